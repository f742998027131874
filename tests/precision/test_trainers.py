"""FP8 through the Trainers that people use: Hugging Face's and Lightning's, each the real library."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.precision.monitor import Bounds
from kernel_pytorch.precision.site import site_of

from .models import Block, batches

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own: deprecations, workers, logging folders

RECIPE = "tensorwise_delayed"


class Learner(nn.Module):
    """A block with a loss, as the Trainer of Hugging Face calls it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.block(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = [(x[0], target[0]) for x, target in batches(24)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": self.rows[i][0], "labels": self.rows[i][1]}


def hugging_face(folder: Path, callback: Any, *, resume: bool = False, steps: int = 6) -> tuple[nn.Module, Any]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, save_steps=3, logging_steps=1, report_to=[], use_cpu=True, seed=0, max_grad_norm=1.0,
        lr_scheduler_type="constant", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    model = Learner()
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[callback] if callback else [])
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_hugging_face(tmp_path) -> None:
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from kernel_pytorch.precision.hf_trainer import STATE_FILE, Float8Callback

    table = tmp_path / "float8.csv"
    callback = Float8Callback(RECIPE, every=2, write_to=table, bounds=None)
    model, trainer = hugging_face(tmp_path / "whole", callback)
    assert len(callback.told.converted) == 6
    assert site_of(model.block.out) is not None
    assert list(model.state_dict()) == list(Learner().state_dict())
    plain, reference = hugging_face(tmp_path / "plain", None)
    assert losses(trainer) != losses(reference)
    assert losses(trainer) == pytest.approx(losses(reference), rel=0.1)
    assert not torch.equal(model.block.out.weight, plain.block.out.weight)
    steps = {line.split(",")[0] for line in table.read_text().splitlines()[1:]}
    assert steps == {"0", "2", "4"}

    # A run that ended after its first checkpoint goes on from it as if it had not.
    hugging_face(tmp_path / "parts", Float8Callback(RECIPE, bounds=None), steps=3)
    assert (tmp_path / "parts" / "checkpoint-3" / STATE_FILE).exists()
    resumed, _ = hugging_face(tmp_path / "parts", Float8Callback(RECIPE, bounds=None), resume=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_hugging_face_tells_of_layers_that_fell_back(tmp_path) -> None:
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from kernel_pytorch.precision.hf_trainer import STATE_FILE, Float8Callback

    callback = Float8Callback(RECIPE, every=1, bounds=Bounds(flushed=0.0, saturated=0.0, patience=1))
    hugging_face(tmp_path, callback, steps=4)
    lost = [layer for layer in callback.told.layers if "fell back" in layer.reason]
    assert lost
    assert torch.load(tmp_path / "checkpoint-4" / STATE_FILE)["fallen"].keys() == {layer.path for layer in lost}
    resumed = Float8Callback(RECIPE, bounds=None)
    hugging_face(tmp_path, resumed, resume=True, steps=5)
    assert [layer.reason for layer in resumed.told.layers if "fell back" in layer.reason] == [la.reason for la in lost]


def test_hugging_face_says_where_scales_start_anew(tmp_path) -> None:
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from kernel_pytorch.precision.hf_trainer import STATE_FILE, Float8Callback

    hugging_face(tmp_path, Float8Callback(RECIPE), steps=3)
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    with pytest.warns(UserWarning, match="start anew in the middle of a run"):
        hugging_face(tmp_path, Float8Callback(RECIPE), resume=True, steps=4)


def test_hugging_face_on_a_cpu_auto_converts_nothing(tmp_path) -> None:
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from kernel_pytorch.precision.hf_trainer import Float8Callback

    callback = Float8Callback()
    model, trainer = hugging_face(tmp_path / "auto", callback)
    _, reference = hugging_face(tmp_path / "plain", None)
    assert callback.told.converted == []
    assert losses(trainer) == losses(reference)
    assert not list((tmp_path / "auto").rglob("float8.pt"))
    assert site_of(model.block.out) is None


def lightning(folder: Path, plugin: Any, *, epochs: int = 2, resume: Path | None = None) -> tuple[nn.Module, Any]:
    pl = pytest.importorskip("pytorch_lightning", reason="pip install lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block = Block()
            self.seen: list[float] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x)

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            loss = nn.functional.mse_loss(self(batch["x"]), batch["labels"])
            self.seen.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Module()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=2, gradient_clip_val=1.0, default_root_dir=folder, num_sanity_val_steps=0,
        enable_checkpointing=False, plugins=[] if plugin is None else [plugin],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=4), ckpt_path=resume, weights_only=False)
    return module, trainer


def plugin_for(**options: Any) -> Any:
    pytest.importorskip("pytorch_lightning", reason="pip install lightning")
    from kernel_pytorch.precision.lightning import Float8Precision

    return Float8Precision(RECIPE, autocast=None, **{"bounds": None, **options})


def test_lightning(tmp_path) -> None:
    table = tmp_path / "float8.csv"
    plugin = plugin_for(every=2, write_to=table)
    whole, trainer = lightning(tmp_path, plugin)
    plain, _ = lightning(tmp_path, None)
    assert len(plugin.told.converted) == 6
    assert list(whole.state_dict()) == list(plain.state_dict())
    assert whole.seen != plain.seen
    assert whole.seen == pytest.approx(plain.seen, rel=0.1)
    assert {line.split(",")[0] for line in table.read_text().splitlines()[1:]} == {"0", "2", "4"}

    first, trainer = lightning(tmp_path, plugin_for(), epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    rest, _ = lightning(tmp_path, plugin_for(), resume=tmp_path / "one.ckpt")
    assert first.seen + rest.seen == whole.seen
    saved = torch.load(tmp_path / "one.ckpt", weights_only=False)
    assert saved["Float8Precision"]["sites"]


def test_lightning_autocasts_what_is_not_in_float8() -> None:
    pytest.importorskip("pytorch_lightning", reason="pip install lightning")
    from kernel_pytorch.precision.lightning import Float8Precision

    plugin = Float8Precision(RECIPE)
    model = plugin.convert_module(Block())
    with plugin.forward_context():
        assert model(torch.randn(4, 32)).dtype is torch.bfloat16
    assert copy.deepcopy(model)(torch.randn(4, 32)).dtype is torch.float32

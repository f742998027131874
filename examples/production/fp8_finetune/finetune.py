"""Fine-tune a causal language model of Hugging Face in FP8, with Trainer and one callback.

    python finetune.py --model ID-OR-FOLDER --steps 200 --output out/finetuned
    python finetune.py --smoke                    # a tiny Llama made here, FP8 emulated on a CPU

The text is the documentation that Python's own standard library carries in its modules. The result is a checkpoint of
the unmodified model: the same class, the same keys; what FP8 carries between steps lies beside it.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from kernel_pytorch.precision.hf_trainer import Float8Callback


def documentation() -> str:
    """Return the docstrings of the standard library's modules, functions and classes."""
    kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
    trees = (ast.parse(path.read_bytes()) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    told = (ast.get_docstring(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(filter(None, told))


class Pieces(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Text as pieces of equal length, each its own label."""

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        self.pieces = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[i], "labels": self.pieces[i]}


def tiny() -> tuple[Any, torch.Tensor]:
    """Return a Llama of two layers over bytes, and the text as bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    text = documentation().encode()
    return LlamaForCausalLM(config), torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an ID of the hub, or a folder")
    parser.add_argument("--output", type=Path, default=Path("out/finetuned"))
    parser.add_argument("--recipe", default="auto", help="`none` trains without FP8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--smoke", action="store_true", help="a tiny model for a few steps")
    chosen = parser.parse_args()
    if chosen.smoke:
        chosen.steps, chosen.length, chosen.accumulate = min(chosen.steps, 10), 64, 2
        chosen.recipe = "tensorwise_delayed" if chosen.recipe == "auto" else chosen.recipe
        model, tokens = tiny()
    elif chosen.model:
        tokenizer = AutoTokenizer.from_pretrained(chosen.model)
        model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.bfloat16)
        tokens = torch.tensor(tokenizer(documentation())["input_ids"])
    else:
        parser.error("--model, or --smoke")
    data = Pieces(tokens, chosen.length)
    example = {key: value.unsqueeze(0) for key, value in data[0].items()}
    callback = Float8Callback(chosen.recipe, example_inputs=example, write_to=chosen.output / "float8.csv")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(chosen.output), max_steps=chosen.steps, per_device_train_batch_size=chosen.batch,
            gradient_accumulation_steps=chosen.accumulate, learning_rate=3e-3 if chosen.smoke else 2e-5,
            lr_scheduler_type="constant", bf16=torch.cuda.is_available(), logging_steps=1, report_to=[], seed=0,
            save_steps=5 if chosen.smoke else 100, disable_tqdm=True, remove_unused_columns=False,
        ),
        train_dataset=data,
        callbacks=[callback] if chosen.recipe != "none" else [],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=chosen.resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {float(losses[0]):.4f} -> {float(losses[-1]):.4f}")
    if callback.told is not None:
        print(callback.told)


if __name__ == "__main__":
    main()

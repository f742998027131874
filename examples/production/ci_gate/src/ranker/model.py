"""The model of this repository: what must not become slower without somebody noticing."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

PADDING = 0


class Ranker(nn.Module):
    """Scores passages for a question by the cosine of their encodings.

    Args:
        vocabulary: Number of words; word 0 pads.
        width: Of the encodings.
    """

    def __init__(self, vocabulary: int = 4096, width: int = 256) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.tower = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return unit vectors of texts: `(..., length)` words to `(..., width)`."""
        known = (tokens != PADDING).unsqueeze(-1)
        pooled = (self.words(tokens) * known).sum(-2) / known.sum(-2).clamp(min=1)
        return functional.normalize(self.tower(pooled), dim=-1)

    def forward(self, question: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
        """Return scores `(batch, passages)` of `(batch, passages, length)` words for `(batch, length)` words."""
        encoded = self.encode(passages)
        return (self.encode(question).unsqueeze(1) * encoded).sum(-1)

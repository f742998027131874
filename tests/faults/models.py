"""Small models of many kinds, each as an inference and as a training workload, with random weights.

Between them: a dictionary-like output, tied weights, BatchNorm, recurrence with a nested tuple, dropout, a dataclass
with an integer output, complex numbers, and a model that draws random numbers in its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.core.types import Mode
from kernel_pytorch.core.workload import Workload

VOCABULARY = 64


class ConvNet(nn.Module):
    """Convolution, BatchNorm, ReLU, a residual sum; returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.stem(images)))
        x = F.relu(x + self.bn2(self.conv(x)))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """Embedding, LSTM, linear head; returns `(logits, (h, c))`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.lstm = nn.LSTM(24, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        hidden, state = self.lstm(self.embed(tokens))
        return self.head(hidden), state


class Mlp(nn.Module):
    """Linear layers with dropout; the last layer is tied to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(24, 48)
        self.middle = nn.Linear(48, 48)
        self.drop = nn.Dropout(0.2)
        self.narrow = nn.Linear(48, 24)
        self.decode = nn.Linear(24, 48)
        self.decode.weight = self.encode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(F.gelu(self.middle(F.gelu(self.encode(x)))))
        return self.decode(self.narrow(hidden))


@dataclass
class Tags:
    """What the tagger returns."""

    logits: torch.Tensor
    tags: torch.Tensor


class Tagger(nn.Module):
    """One attention block over SDPA with LayerNorm; returns a dataclass with logits and their argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.out_proj = nn.Linear(32, 32)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 9)

    def forward(self, tokens: torch.Tensor) -> Tags:
        x = self.embed(tokens)
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out_proj(mixed))
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        logits = self.head(x)
        return Tags(logits, logits.argmax(-1))


class Spectral(nn.Module):
    """A filter with complex weights in the frequency domain; returns `[signal, spectrum]`, the second complex."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(2, 12)
        self.filter = nn.Parameter(torch.randn(12, 12, dtype=torch.complex64) / 4)
        self.lower = nn.Linear(12, 3)

    def forward(self, signal: torch.Tensor) -> list[torch.Tensor]:
        lifted = F.silu(self.lift(signal))
        spectrum = torch.fft.rfft(lifted, dim=1, norm="ortho")
        spectrum = spectrum @ self.filter.to(spectrum.dtype)
        return [self.lower(torch.fft.irfft(spectrum, n=signal.shape[1], dim=1, norm="ortho")), spectrum]


class Sample(NamedTuple):
    """What the variational autoencoder returns."""

    image: torch.Tensor
    mean: torch.Tensor
    log_variance: torch.Tensor


class Variational(nn.Module):
    """Draws from its latent distribution in every forward, in eval mode too; returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(20, 32)
        self.mean, self.spread = nn.Linear(32, 8), nn.Linear(32, 8)
        self.decode = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 20))

    def forward(self, x: torch.Tensor) -> Sample:
        hidden = torch.tanh(self.encode(x))
        mean, log_variance = self.mean(hidden), self.spread(hidden)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return Sample(self.decode(latent), mean, log_variance)


def _bert(mode: Mode) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.15,
    )
    return BertForMaskedLM(config) if mode is Mode.TRAINING else BertModel(config)


def _llama(mode: Mode) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=40,
            tie_word_embeddings=True,
            use_cache=False,
            initializer_range=0.15,
        )
    )


def _plain(cls: type[nn.Module], mode: Mode) -> nn.Module:
    return cls()


def _build(make: Callable[[Mode], nn.Module], mode: Mode) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(mode)
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1:  # fresh biases are 0 and fresh gains 1, which would hide faults from anybody
                nn.init.normal_(tensor, mean=float("bias" not in name), std=0.1)
    return model.train(mode is Mode.TRAINING)


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape)


def _text(length: int, mode: Mode, *, masked: bool) -> dict[str, torch.Tensor]:
    batch = {"input_ids": _tokens(4, length)}
    if masked:
        batch["attention_mask"] = (torch.arange(length) < torch.tensor([[length], [5], [length], [8]])).long()
    if mode is Mode.TRAINING:
        batch["labels"] = _tokens(4, length)
    return batch


def _images(mode: Mode) -> object:
    x = torch.randn(4, 3, 8, 8)
    return {"images": x, "target": torch.randint(0, 10, (4,))} if mode is Mode.TRAINING else x


def _sequence(classes: int, name: str, mode: Mode) -> object:
    x = _tokens(4, 9)
    return {name: x, "target": torch.randint(0, classes, (4, 9))} if mode is Mode.TRAINING else x


def _rows(name: str, shape: tuple[int, ...], wanted: tuple[int, ...], mode: Mode) -> object:
    x = torch.randn(shape)
    return {name: x, "target": torch.randn(wanted)} if mode is Mode.TRAINING else x


def _classify(name: str, pick: Callable[[object], torch.Tensor], model: nn.Module, batch: dict) -> torch.Tensor:
    logits = pick(model(batch[name]))
    return F.cross_entropy(logits.flatten(0, -2), batch["target"].flatten())


def _regress(name: str, pick: Callable[[object], torch.Tensor], model: nn.Module, batch: dict) -> torch.Tensor:
    return F.mse_loss(pick(model(batch[name])), batch["target"])


def _evidence(model: nn.Module, batch: dict) -> torch.Tensor:
    image, mean, log_variance = model(batch["x"])
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return F.mse_loss(image, batch["target"]) + 0.1 * divergence


def _itself(output: torch.Tensor) -> torch.Tensor:
    return output


def _first(output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0]


def _logits(output: Tags) -> torch.Tensor:
    return output.logits


def _sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Inputs:
    """An input factory; the workload has seeded the generator it draws from."""

    draw: Callable[..., object]
    mode: Mode

    def __call__(self, seed: int) -> object:
        return self.draw(mode=self.mode)


@dataclass(frozen=True)
class Family:
    """One kind of model: how to build it, what it is called with, how it is trained.

    Attributes:
        sequence: Whether the second axis of its input is a length that may vary.
    """

    make: Callable[[Mode], nn.Module]
    inputs: Callable[..., object]
    loss: Callable[[nn.Module, dict], torch.Tensor] | None = None
    optimizer: Callable[[object], torch.optim.Optimizer] | None = None
    sequence: bool = False

    def workload(self, mode: Mode, name: str) -> Workload:
        """Return the workload of one mode."""
        training = mode is Mode.TRAINING
        return Workload(
            model=partial(_build, self.make, mode),
            inputs=Inputs(self.inputs, mode),
            loss=self.loss if training else None,
            optimizer=self.optimizer if training else None,
            name=name,
        )


MODELS: dict[str, Family] = {
    "bert": Family(_bert, partial(_text, 12, masked=True), sequence=True),
    "llama": Family(_llama, partial(_text, 10, masked=False), sequence=True),
    "convnet": Family(partial(_plain, ConvNet), _images, partial(_classify, "images", _itself), _sgd),
    "lstm": Family(
        partial(_plain, Recurrent),
        partial(_sequence, VOCABULARY, "tokens"),
        partial(_classify, "tokens", _first),
        sequence=True,
    ),
    "mlp": Family(partial(_plain, Mlp), partial(_rows, "x", (6, 24), (6, 48)), partial(_regress, "x", _itself)),
    "tagger": Family(
        partial(_plain, Tagger),
        partial(_sequence, 9, "tokens"),
        partial(_classify, "tokens", _logits),
        sequence=True,
    ),
    "spectral": Family(
        partial(_plain, Spectral),
        partial(_rows, "signal", (3, 16, 2), (3, 16, 3)),
        partial(_regress, "signal", _first),
        sequence=True,
    ),
    "vae": Family(partial(_plain, Variational), partial(_rows, "x", (5, 20), (5, 20)), _evidence),
}

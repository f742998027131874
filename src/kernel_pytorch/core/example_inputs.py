"""Example inputs for published models, made from what their configuration says they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernel_pytorch.errors import TargetError

if TYPE_CHECKING:
    import torch

__all__ = ["hugging_face_inputs", "image_inputs"]

BATCH = 8
AUDIO_BATCH = 2
LENGTH = 128
SAMPLES = 16_000
"""One second of audio at 16 kHz."""


def image_inputs(batch: int, shape: tuple[int, ...]) -> Callable[[int], torch.Tensor]:
    """Return a factory of random images (or clips) of a shape without the batch."""
    return _Images(batch, shape)


@dataclass(frozen=True, slots=True)
class _Images:
    batch: int
    shape: tuple[int, ...]

    def __call__(self, seed: int) -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.batch, *self.shape, generator=generator)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Keyword arguments drawn anew for each seed: token ids below a limit, noise, ones, or constants."""

    ids: Mapping[str, tuple[tuple[int, ...], int, int]]
    noise: Mapping[str, tuple[int, ...]]
    ones: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, Any]

    def __call__(self, seed: int) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        drawn: dict[str, Any] = {}
        for name, (shape, low, high) in self.ids.items():
            drawn[name] = torch.randint(low, high, shape, generator=generator)
        for name, shape in self.noise.items():
            drawn[name] = torch.randn(shape, generator=generator)
        for name, shape in self.ones.items():
            drawn[name] = torch.ones(shape, dtype=torch.long)
        return {**drawn, **self.constants}


def hugging_face_inputs(kind: Any, config: Any, source: str) -> Callable[[int], Any]:
    """Return an input factory for a Hugging Face class: token ids, pixel values or audio features, by its main input.

    Raises:
        TargetError: The main input is of a kind not known here.
    """
    accepted = set(inspect.signature(kind.forward).parameters)
    main = getattr(kind, "main_input_name", "input_ids")
    noise = _noise(main, accepted, config)
    ids, ones = _tokens(main, accepted, config)
    if main not in {*noise, *ids}:
        raise TargetError(
            f"hf:{source}: {kind.__name__} takes {main!r}, for which no example can be made",
            fix="write a factory: path/file.py:factory",
        )
    constants = {"use_cache": False} if "use_cache" in accepted else {}
    return _Drawn(ids, noise, ones, constants)


def _tokens(
    main: str, accepted: set[str], config: Any
) -> tuple[dict[str, tuple[tuple[int, ...], int, int]], dict[str, tuple[int, ...]]]:
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if not vocabulary:
        return {}, {}
    longest = [
        getattr(text, name)
        for name in ("max_position_embeddings", "n_positions", "max_target_positions")
        if isinstance(getattr(text, name, None), int)
    ]
    length = max(1, min([LENGTH, *(n - 2 for n in longest if n > 2)]))  # RoBERTa counts positions from 2
    low = min(vocabulary - 1, 10)  # below lie padding and other marks
    shape = (AUDIO_BATCH if main in ("input_features", "input_values") else BATCH, length)
    ids: dict[str, tuple[tuple[int, ...], int, int]] = {}
    ones: dict[str, tuple[int, ...]] = {}
    if main == "input_ids" or ("input_ids" in accepted and _is_dual(config)):
        ids["input_ids"] = (shape, low, vocabulary)
        if "attention_mask" in accepted:
            ones["attention_mask"] = shape
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        ids["decoder_input_ids"] = (shape, low, vocabulary)
    return ids, ones


def _is_dual(config: Any) -> bool:
    """Whether it embeds text and images side by side, as CLIP does (and not images into text, as LLaVA)."""
    into_text = any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
    return hasattr(config, "vision_config") and hasattr(config, "text_config") and not into_text


def _noise(main: str, accepted: set[str], config: Any) -> dict[str, tuple[int, ...]]:
    if main == "pixel_values" or ("pixel_values" in accepted and _is_dual(config)):
        vision = getattr(config, "vision_config", config)
        return {"pixel_values": (BATCH, getattr(vision, "num_channels", 3), *_image_size(vision))}
    if main == "input_values":
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):  # a spectrogram, time first
            return {main: (AUDIO_BATCH, config.max_length, config.num_mel_bins)}
        return {main: (AUDIO_BATCH, SAMPLES)}
    if main == "input_features":
        mels: int = getattr(config, "num_mel_bins", 0) or getattr(config, "feature_size", 80)
        if hasattr(config, "max_source_positions"):  # Whisper halves the length by a strided convolution
            return {main: (AUDIO_BATCH, mels, 2 * config.max_source_positions)}
        return {main: (AUDIO_BATCH, LENGTH, mels)}
    return {}


def _image_size(vision: Any) -> tuple[int, int]:
    size = getattr(vision, "image_size", 224)
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[-1])
    return int(size), int(size)

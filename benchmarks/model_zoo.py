"""Models of real sizes, as targets of `kpt optimize`: each as one would write it first, untuned.

    kpt optimize benchmarks/model_zoo.py:bert_large -o out/bert
    kpt optimize benchmarks/model_zoo.py:bert_large_train --mode training -o out/bert_train

Random weights made on the device; fp32, but bf16 for the large language models, as they are used. Optimizers are what
the usual script has: AdamW, fused where that is the default of Hugging Face's Trainer. `JOBS` lists every target with
its mode. `KPT_ZOO_TINY=1` shrinks every size, for a CPU: same code, same structure.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  the name every PyTorch program uses

from kernel_pytorch import Workload

JOBS: dict[str, tuple[str, str]] = {}
"""Factory of this file and mode, by the name of the job."""


def listed(mode: str) -> Callable[[Callable[[], Workload]], Callable[[], Workload]]:
    """Add a factory to `JOBS` under its own name."""

    def add(factory: Callable[[], Workload]) -> Callable[[], Workload]:
        JOBS[factory.__name__] = (factory.__name__, mode)
        return factory

    return add


def _tiny() -> bool:
    return os.environ.get("KPT_ZOO_TINY") == "1"


def _pick(full: Any, tiny: Any) -> Any:
    return tiny if _tiny() else full


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _built(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model whose weights are made on the device in the dtype: 7 GB need no detour through the CPU."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(_device()):
            return make()
    finally:
        torch.set_default_dtype(default)


def _hugging_face(model: str, config: str, dtype: torch.dtype, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return _built(lambda: getattr(transformers, model)(getattr(transformers, config)(**settings)), dtype)

    return make


def _drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ids(vocab: int, batch: int, length: int, seed: int, low: int = 3) -> torch.Tensor:
    return torch.randint(low, vocab, (batch, length), generator=_drawn(seed)).to(_device())


def _labels(classes: int, count: int, seed: int) -> torch.Tensor:
    return torch.randint(classes, (count,), generator=_drawn(seed + 1)).to(_device())


def _normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_drawn(seed)).to(_device())


def _fused_adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=1e-4)


def _logits(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


# --- large language models, bf16 ---------------------------------------------------------------------------------


def _language_model(
    kind: str, name: str, batch: int, length: int, settings: dict[str, Any], *, training: bool = False
) -> Workload:
    settings = {"use_cache": False, **settings}
    vocab = settings["vocab_size"]

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        ids = _ids(vocab, batch, length, seed)
        return {"input_ids": ids, "labels": ids} if training else {"input_ids": ids}

    model = _hugging_face(f"{kind}ForCausalLM", f"{kind}Config", torch.bfloat16, settings)
    return Workload(model, inputs, optimizer=_fused_adamw if training else None, name=name)


def _small_decoder(**settings: Any) -> dict[str, Any]:
    return {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "vocab_size": 128, "max_position_embeddings": 64, **settings,
    }  # fmt: skip


def _llama_settings() -> dict[str, Any]:
    full = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    return _pick(full, _small_decoder())


@listed("inference")
def llama() -> Workload:
    """Return 8 layers of Llama-3-8B over prompts: 4 x 2,048 tokens."""
    return _language_model("Llama", "llama-3-8b-x8", *_pick((4, 2048), (2, 16)), _llama_settings())


@listed("inference")
def llama_decode() -> Workload:
    """Return 8 layers of Llama-3-8B over one token of 8 sequences, without a cache: what reading weights costs."""
    return _language_model("Llama", "llama-3-8b-x8 decode", 8, 1, _llama_settings())


@listed("training")
def llama_train() -> Workload:
    """Return 8 layers of Llama-3-8B in training: 4 x 2,048 tokens."""
    batch, length = _pick((4, 2048), (2, 16))
    return _language_model("Llama", "llama-3-8b-x8", batch, length, _llama_settings(), training=True)


def _qwen_settings() -> dict[str, Any]:
    full = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "num_hidden_layers": 8, "vocab_size": 152064, "max_position_embeddings": 8192, "rope_theta": 1000000.0,
    }  # fmt: skip
    return _pick(full, _small_decoder())


@listed("inference")
def qwen() -> Workload:
    """Return 8 layers of Qwen2.5-7B (biases in QKV, 28 heads over 4): 4 x 2,048 tokens."""
    return _language_model("Qwen2", "qwen2.5-7b-x8", *_pick((4, 2048), (2, 16)), _qwen_settings())


@listed("training")
def qwen_train() -> Workload:
    """Return 8 layers of Qwen2.5-7B in training: 2 x 2,048 tokens."""
    batch, length = _pick((2, 2048), (2, 16))
    return _language_model("Qwen2", "qwen2.5-7b-x8", batch, length, _qwen_settings(), training=True)


def _mixtral_settings() -> dict[str, Any]:
    full = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 4, "vocab_size": 32000, "max_position_embeddings": 8192,
    }  # fmt: skip
    return {**_pick(full, _small_decoder()), "num_local_experts": 4, "num_experts_per_tok": 2}


@listed("inference")
def mixtral() -> Workload:
    """Return 4 layers of Mixtral-8x7B with 4 experts each, 2 a token: 4 x 1,024 tokens."""
    return _language_model("Mixtral", "mixtral-4x7b-x4", *_pick((4, 1024), (2, 16)), _mixtral_settings())


@listed("training")
def mixtral_train() -> Workload:
    """Return 4 layers of Mixtral-8x7B with 4 experts each, in training: 4 x 1,024 tokens."""
    batch, length = _pick((4, 1024), (2, 16))
    return _language_model("Mixtral", "mixtral-4x7b-x4", batch, length, _mixtral_settings(), training=True)


# --- encoders and encoder-decoders, fp32 -------------------------------------------------------------------------


def _bert(*, training: bool) -> Workload:
    full = {
        "vocab_size": 30522, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "max_position_embeddings": 512,
    }  # fmt: skip
    tiny = {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 64,
    }  # fmt: skip
    settings = _pick(full, tiny)
    batch, length = _pick((16, 384), (2, 24))

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        ids = _ids(settings["vocab_size"], batch, length, seed)
        lengths = torch.randint(length // 3, length + 1, (batch, 1), generator=_drawn(seed + 2))
        lengths[0] = length  # the longest sets the length of the batch, as a tokenizer pads it
        mask = (torch.arange(length) < lengths).long().to(_device())
        given = {"input_ids": ids * mask, "attention_mask": mask}
        if training:
            shortest = length // 3
            given["start_positions"] = _labels(shortest, batch, seed)
            given["end_positions"] = _labels(shortest, batch, seed + 1)
        return given

    model = _hugging_face("BertForQuestionAnswering", "BertConfig", torch.float32, settings)
    return Workload(model, inputs, optimizer=_fused_adamw if training else None, name="bert-large")


@listed("inference")
def bert_large() -> Workload:
    """Return BERT-large answering questions: 16 x 384 tokens, padded."""
    return _bert(training=False)


@listed("training")
def bert_large_train() -> Workload:
    """Return BERT-large learning to answer questions: 16 x 384 tokens, padded, dropout as published."""
    return _bert(training=True)


def _t5(*, training: bool) -> Workload:
    full = {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16}
    tiny = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    settings = {**_pick(full, tiny), "use_cache": False, "decoder_start_token_id": 0}
    batch, source, target = _pick((8, 512, 128), (2, 16, 8))

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        ids = _ids(settings["vocab_size"], batch, source, seed)
        said = _ids(settings["vocab_size"], batch, target, seed + 1)
        return {"input_ids": ids, "labels" if training else "decoder_input_ids": said}

    model = _hugging_face("T5ForConditionalGeneration", "T5Config", torch.float32, settings)
    return Workload(model, inputs, optimizer=_fused_adamw if training else None, name="t5-large")


@listed("inference")
def t5_large() -> Workload:
    """Return T5-large: 8 x 512 tokens in, 8 x 128 out."""
    return _t5(training=False)


@listed("training")
def t5_large_train() -> Workload:
    """Return T5-large in training: 8 x 512 tokens in, 8 x 128 out, dropout as published."""
    return _t5(training=True)


def _whisper(*, training: bool) -> Workload:
    full = {
        "d_model": 1024, "encoder_layers": 24, "decoder_layers": 24, "encoder_attention_heads": 16,
        "decoder_attention_heads": 16, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096,
    }  # fmt: skip
    tiny = {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 16,
        "max_source_positions": 32, "max_target_positions": 32, "vocab_size": 128, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "begin_suppress_tokens": None,
    }  # fmt: skip
    settings = {**_pick(full, tiny), "use_cache": False}
    vocab, (batch, mels, frames, length) = _pick(51864, 128), _pick((8, 80, 3000, 128), (2, 16, 64, 8))

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        said = _ids(vocab, batch, length, seed)
        features = _normal(batch, mels, frames, seed=seed)
        return {"input_features": features, "labels" if training else "decoder_input_ids": said}

    model = _hugging_face("WhisperForConditionalGeneration", "WhisperConfig", torch.float32, settings)
    return Workload(model, inputs, optimizer=_fused_adamw if training else None, name="whisper-medium")


@listed("inference")
def whisper_medium() -> Workload:
    """Return Whisper-medium: 8 x 30 s of sound, 8 x 128 tokens."""
    return _whisper(training=False)


@listed("training")
def whisper_medium_train() -> Workload:
    """Return Whisper-medium in training: 8 x 30 s of sound, 8 x 128 tokens."""
    return _whisper(training=True)


# --- images, fp32 ------------------------------------------------------------------------------------------------


def _images(batch: int, size: int, classes: int, *, training: bool) -> Callable[[int], dict[str, torch.Tensor]]:
    def inputs(seed: int) -> dict[str, torch.Tensor]:
        given = {"pixel_values": _normal(batch, 3, size, size, seed=seed)}
        return {**given, "labels": _labels(classes, batch, seed)} if training else given

    return inputs


def _vit(*, training: bool) -> Workload:
    full = {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "image_size": 224, "patch_size": 16,
    }  # fmt: skip
    tiny = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    classes, batch = _pick(1000, 10), _pick(32, 2)
    settings = {**_pick(full, tiny), "num_labels": classes}
    model = _hugging_face("ViTForImageClassification", "ViTConfig", torch.float32, settings)
    inputs = _images(batch, settings["image_size"], classes, training=training)
    return Workload(model, inputs, optimizer=_fused_adamw if training else None, name="vit-l-16")


@listed("inference")
def vit_large() -> Workload:
    """Return ViT-L/16: 32 images of 224 x 224."""
    return _vit(training=False)


@listed("training")
def vit_large_train() -> Workload:
    """Return ViT-L/16 in training: 32 images of 224 x 224."""
    return _vit(training=True)


def _convnext(*, training: bool) -> Workload:
    full = {"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]}
    tiny = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64]}
    classes, batch, size = _pick((1000, 32, 224), (10, 2, 64))
    settings = {**_pick(full, tiny), "num_labels": classes}
    model = _hugging_face("ConvNextForImageClassification", "ConvNextConfig", torch.float32, settings)
    inputs = _images(batch, size, classes, training=training)
    return Workload(model, inputs, optimizer=_fused_adamw if training else None, name="convnext-l")


@listed("inference")
def convnext_large() -> Workload:
    """Return ConvNeXt-L: 32 images of 224 x 224."""
    return _convnext(training=False)


@listed("training")
def convnext_large_train() -> Workload:
    """Return ConvNeXt-L in training: 32 images of 224 x 224."""
    return _convnext(training=True)


def _torchvision_resnet() -> Callable[..., nn.Module] | None:
    try:
        from torchvision.models import resnet50 as make
    except (ImportError, RuntimeError):  # a RuntimeError where it was built for another torch
        return None
    return make


def _resnet_model() -> nn.Module:
    classes = _pick(1000, 10)
    make = _torchvision_resnet()
    if make is not None and not _tiny():
        return _built(lambda: make(num_classes=classes))
    tiny = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]}
    settings = {**_pick({}, tiny), "num_labels": classes}  # its defaults are ResNet-50
    return _hugging_face("ResNetForImageClassification", "ResNetConfig", torch.float32, settings)()


def classify(model: Callable[..., Any], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy of the classes of images."""
    images, labels = batch
    return F.cross_entropy(_logits(model(images)), labels)


def _resnet(*, training: bool) -> Workload:
    classes, batch, size = _pick((1000, 64, 224), (10, 2, 64))

    def inputs(seed: int) -> Any:
        images = _normal(batch, 3, size, size, seed=seed)
        return (images, _labels(classes, batch, seed)) if training else images

    library = "transformers" if _tiny() or _torchvision_resnet() is None else "torchvision"
    name = f"resnet-50 ({library})"
    if not training:
        return Workload(_resnet_model, inputs, name=name)
    return Workload(_resnet_model, inputs, loss=classify, optimizer=_sgd, name=name)


@listed("inference")
def resnet50() -> Workload:
    """Return ResNet-50, torchvision's where it imports, else Hugging Face's: 64 images of 224 x 224."""
    return _resnet(training=False)


@listed("training")
def resnet50_train() -> Workload:
    """Return ResNet-50 in training with SGD: 64 images of 224 x 224."""
    return _resnet(training=True)


def contrast(model: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return CLIP's own contrastive loss."""
    return model(**batch, return_loss=True).loss


def _clip(*, training: bool) -> Workload:
    if _tiny():
        layer = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        text = {
            **layer, "vocab_size": 128, "max_position_embeddings": 16, "bos_token_id": 126, "eos_token_id": 127,
            "pad_token_id": 0,
        }  # fmt: skip
        vision = {**layer, "image_size": 32, "patch_size": 8}
    else:
        text = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
        vision = {
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
            "image_size": 224, "patch_size": 14,
        }  # fmt: skip
    projection = _pick(768, 32)
    settings = {
        "text_config": {**text, "projection_dim": projection},
        "vision_config": {**vision, "projection_dim": projection},
        "projection_dim": projection,
    }
    batch, length, end = _pick((32, 77, 49407), (2, 16, 127))

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        ids = _ids(end - 1, batch, length, seed)
        ids[:, -1] = end
        size = vision["image_size"]
        return {"input_ids": ids, "pixel_values": _normal(batch, 3, size, size, seed=seed)}

    model = _hugging_face("CLIPModel", "CLIPConfig", torch.float32, settings)
    if not training:
        return Workload(model, inputs, name="clip-vit-l-14")
    return Workload(model, inputs, loss=contrast, optimizer=_fused_adamw, name="clip-vit-l-14")


@listed("inference")
def clip_large() -> Workload:
    """Return CLIP ViT-L/14: 32 images of 224 x 224 against 32 texts of 77 tokens."""
    return _clip(training=False)


@listed("training")
def clip_large_train() -> Workload:
    """Return CLIP ViT-L/14 in training: 32 images against 32 texts."""
    return _clip(training=True)


# --- hand-written, fp32: a diffusion U-Net -----------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions under GroupNorm, told the time step."""

    def __init__(self, inner: int, outer: int, told: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.time = nn.Linear(told, outer)
        self.norm2, self.conv2 = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(told))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class Look(nn.Module):
    """Self-attention over the pixels, its scores written out, as the first diffusion code had it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(8, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        scores = (q @ k.transpose(-1, -2)) * (c // self.heads) ** -0.5
        y = scores.softmax(-1) @ v
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


class UNet(nn.Module):
    """A U-Net of latent diffusion: residual blocks and attention, down and up again."""

    def __init__(self, widths: tuple[int, ...], channels: int, heads: int) -> None:
        super().__init__()
        told = 4 * widths[0]
        self.base = widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], told), nn.SiLU(), nn.Linear(told, told))
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        pairs = list(zip((widths[0], *widths[:-1]), widths, strict=True))
        self.down = nn.ModuleList(Residual(a, b, told) for a, b in pairs)
        self.down_look = nn.ModuleList(Look(b, heads) if i else nn.Identity() for i, (_, b) in enumerate(pairs))
        self.shrink = nn.ModuleList(nn.Conv2d(b, b, 3, stride=2, padding=1) for b in widths[:-1])
        self.middle1, self.middle_look = Residual(widths[-1], widths[-1], told), Look(widths[-1], heads)
        self.middle2 = Residual(widths[-1], widths[-1], told)
        self.up = nn.ModuleList(Residual(2 * b, a, told) for a, b in reversed(pairs))
        self.up_look = nn.ModuleList(
            Look(a, heads) if i else nn.Identity() for i, (a, _) in reversed(list(enumerate(pairs)))
        )
        self.leave = nn.Sequential(nn.GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels, 3, padding=1))

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        half = self.base // 2
        rates = torch.exp(torch.arange(half, device=x.device) * (-9.21 / half))
        angle = step[:, None].float() * rates[None]
        told = self.time(torch.cat((angle.cos(), angle.sin()), 1))
        x = self.enter(x)
        kept = []
        for i, (block, look) in enumerate(zip(self.down, self.down_look, strict=True)):
            x = look(block(x, told))
            kept.append(x)
            if i < len(self.shrink):
                x = self.shrink[i](x)
        x = self.middle2(self.middle_look(self.middle1(x, told)), told)
        for block, look in zip(self.up, self.up_look, strict=True):
            other = kept.pop()
            if x.shape[-1] != other.shape[-1]:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = look(block(torch.cat((x, other), 1), told))
        return self.leave(x)


def denoise(model: Callable[..., torch.Tensor], batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the mean squared error of the predicted noise."""
    noisy, step, noise = batch
    return F.mse_loss(model(noisy, step), noise)


def _unet(*, training: bool) -> Workload:
    widths, heads, batch, size = _pick(((320, 640, 1280, 1280), 8, 8, 64), ((16, 32), 2, 2, 16))

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        noisy, step = _normal(batch, 4, size, size, seed=seed), _labels(1000, batch, seed)
        return (noisy, step, _normal(batch, 4, size, size, seed=seed + 1)) if training else (noisy, step)

    def model() -> nn.Module:
        return _built(lambda: UNet(widths, 4, heads))

    if not training:
        return Workload(model, inputs, name="unet")
    return Workload(model, inputs, loss=denoise, optimizer=_adamw, name="unet")


@listed("inference")
def unet() -> Workload:
    """Return a U-Net of Stable Diffusion's widths: 8 latents of 4 x 64 x 64."""
    return _unet(training=False)


@listed("training")
def unet_train() -> Workload:
    """Return a U-Net of Stable Diffusion's widths in training: 8 latents of 4 x 64 x 64."""
    return _unet(training=True)


# --- hand-written, fp32: a graph network -------------------------------------------------------------------------


class Messages(nn.Module):
    """Gated messages along edges, summed at their ends."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.gate_from, self.gate_to = (nn.Linear(width, width) for _ in range(3))
        self.keep, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, end = edges
        gate = torch.sigmoid(self.gate_from(nodes)[source] + self.gate_to(nodes)[end])
        total = torch.zeros_like(nodes).index_add(0, end, gate * self.value(nodes)[source])
        weight = torch.zeros_like(nodes).index_add(0, end, gate)
        return nodes + F.relu(self.norm(self.keep(nodes) + total / (weight + 1e-6)))


class GraphNetwork(nn.Module):
    """Message passing over one graph, a class for each node."""

    def __init__(self, features: int, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(features, width), nn.Linear(width, classes)
        self.layers = nn.ModuleList(Messages(width) for _ in range(layers))

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        x = self.enter(nodes)
        for layer in self.layers:
            x = layer(x, edges)
        return self.leave(x)


def classify_nodes(model: Callable[..., torch.Tensor], batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the mean cross-entropy of the classes of nodes."""
    nodes, edges, labels = batch
    return F.cross_entropy(model(nodes, edges), labels)


def _gnn(*, training: bool) -> Workload:
    nodes, edges, features, width, layers, classes = _pick((169343, 1166243, 128, 128, 4, 40), (60, 200, 16, 16, 2, 4))

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        ends = torch.randint(nodes, (2, edges), generator=_drawn(seed)).to(_device())
        given = (_normal(nodes, features, seed=seed), ends)
        return (*given, _labels(classes, nodes, seed)) if training else given

    def model() -> nn.Module:
        return _built(lambda: GraphNetwork(features, width, layers, classes))

    if not training:
        return Workload(model, inputs, name="gated graph network")
    return Workload(model, inputs, loss=classify_nodes, optimizer=_adamw, name="gated graph network")


@listed("inference")
def gnn() -> Workload:
    """Return a gated graph network on a graph of ogbn-arxiv's size: 169,343 nodes, 1,166,243 edges."""
    return _gnn(training=False)


@listed("training")
def gnn_train() -> Workload:
    """Return a gated graph network in training on the whole graph."""
    return _gnn(training=True)


# --- hand-written, fp32: speech, and a state space ---------------------------------------------------------------


class Speech(nn.Module):
    """Convolutions, bidirectional GRUs, a letter for each frame: after Deep Speech 2 (arXiv:1512.02595)."""

    def __init__(self, mels: int, width: int, layers: int, letters: int) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv1d(mels, width, 11, stride=2, padding=5), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Conv1d(width, width, 11, padding=5), nn.BatchNorm1d(width), nn.ReLU(),
        )  # fmt: skip
        self.gru = nn.GRU(width, width, layers, batch_first=True, bidirectional=True)
        self.out = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, letters))

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        y, _ = self.gru(self.front(sound).transpose(1, 2))
        return self.out(y).log_softmax(-1)


def transcribe(model: Callable[..., torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the CTC loss of texts that are all of one length."""
    sound, letters = batch
    frames = model(sound).transpose(0, 1)
    said = torch.full((letters.shape[0],), frames.shape[0], dtype=torch.long)
    return F.ctc_loss(frames, letters, said, torch.full_like(said, letters.shape[1]))


def _speech(*, training: bool) -> Workload:
    batch, mels, frames, width, layers, letters, text = _pick((16, 80, 1000, 800, 5, 29, 120), (2, 8, 64, 16, 2, 9, 6))

    def inputs(seed: int) -> Any:
        sound = _normal(batch, mels, frames, seed=seed)
        return (sound, _ids(letters, batch, text, seed, low=1)) if training else sound

    def model() -> nn.Module:
        return _built(lambda: Speech(mels, width, layers, letters))

    if not training:
        return Workload(model, inputs, name="gru speech")
    return Workload(model, inputs, loss=transcribe, optimizer=_adamw, name="gru speech")


@listed("inference")
def speech() -> Workload:
    """Return a Deep-Speech-2-like model, 5 bidirectional GRU layers of 800: 16 x 10 s of sound."""
    return _speech(training=False)


@listed("training")
def speech_train() -> Workload:
    """Return a Deep-Speech-2-like model in training with the CTC loss: 16 x 10 s of sound."""
    return _speech(training=True)


class Scan(nn.Module):
    """A diagonal state space as one long convolution by FFT: S4D (arXiv:2206.11893)."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.linspace(-6.9, -2.3, width))
        self.decay = nn.Parameter(torch.full((width, states), -0.693))
        self.turn = nn.Parameter(torch.pi * torch.arange(states, dtype=torch.float32).repeat(width, 1))
        self.read = nn.Parameter(torch.randn(width, states, 2))
        self.direct = nn.Parameter(torch.ones(width))
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        u = self.norm(x).transpose(1, 2)
        rate = torch.complex(-self.decay.exp(), self.turn)
        pace = rate * self.step.exp()[:, None]
        weight = torch.view_as_complex(self.read) * (pace.exp() - 1.0) / rate
        powers = torch.exp(pace[..., None] * torch.arange(length, device=x.device))
        kernel = 2.0 * torch.einsum("hn,hnl->hl", weight, powers).real
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + u * self.direct[:, None]
        return x + F.glu(self.mix(F.gelu(y.transpose(1, 2))), -1)


class StateSpace(nn.Module):
    """A stack of diagonal state spaces over one long signal, a class for each."""

    def __init__(self, features: int, width: int, states: int, layers: int, classes: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(features, width), nn.Linear(width, classes)
        self.layers = nn.Sequential(*(Scan(width, states) for _ in range(layers)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.layers(self.enter(x)).mean(1))


def _state_space(*, training: bool) -> Workload:
    batch, length, width, states, layers, classes = _pick((8, 4096, 512, 32, 6, 35), (2, 32, 16, 4, 2, 5))

    def inputs(seed: int) -> Any:
        signal = _normal(batch, length, 1, seed=seed)
        return (signal, _labels(classes, batch, seed)) if training else signal

    def model() -> nn.Module:
        return _built(lambda: StateSpace(1, width, states, layers, classes))

    if not training:
        return Workload(model, inputs, name="s4d")
    return Workload(model, inputs, loss=classify, optimizer=_adamw, name="s4d")


@listed("inference")
def state_space() -> Workload:
    """Return six S4D layers of 512: 8 signals of 4,096 samples."""
    return _state_space(training=False)


@listed("training")
def state_space_train() -> Workload:
    """Return six S4D layers of 512 in training: 8 signals of 4,096 samples."""
    return _state_space(training=True)

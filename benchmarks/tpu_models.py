"""Plain PyTorch GPTs as training targets for `kpt fit` and the TPU benchmarks; nothing in them knows of a TPU.

`kpt fit benchmarks/tpu_models.py:gpt_111m --mode training --topology v5e:1`. Master weights are fp32 and cast to
bfloat16 inside the step; the output projection is tied to the embedding; the optimizer is torch's own AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from kernel_pytorch import Workload


@dataclass(frozen=True, slots=True)
class Shape:
    vocab: int = 32768
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    length: int = 1024
    batch: int = 8
    fused_attention: bool = False


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.shape.heads
        q, k, v = self.qkv(x).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.shape.fused_attention:
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(width // heads)
            past = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            y = scores.masked_fill(~past, float("-inf")).float().softmax(-1).to(v.dtype) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm2 = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_in_bfloat16(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the next-token loss with weights cast to bfloat16 in the step."""
    ids, targets = batch
    cast = {name: parameter.to(torch.bfloat16) for name, parameter in model.named_parameters()}
    logits = torch.func.functional_call(model, cast, (ids,), tie_weights=True)
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def workload(shape: Shape) -> Workload:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return GPT(shape)

    def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        del seed
        ids = torch.randint(0, shape.vocab, (shape.batch, shape.length + 1))
        return ids[:, :-1], ids[:, 1:]

    optimizer: Callable[..., torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
    return Workload(model=model, inputs=inputs, loss=loss_in_bfloat16, optimizer=optimizer)


GPT_111M = Shape()
GPT_877M = Shape(width=2048, layers=16, heads=16, hidden=8192, length=2048)
GPT_SMALL = Shape(vocab=512, width=64, layers=2, heads=4, hidden=128, length=64, batch=2)


def gpt_small() -> Workload:
    return workload(GPT_SMALL)


def gpt_small_fused() -> Workload:
    return workload(replace(GPT_SMALL, fused_attention=True))


def gpt_111m() -> Workload:
    """The 111M-parameter GPT with attention written out."""
    return workload(GPT_111M)


def gpt_111m_fused() -> Workload:
    """The same with `scaled_dot_product_attention`."""
    return workload(replace(GPT_111M, fused_attention=True))


def gpt_877m() -> Workload:
    return workload(GPT_877M)


def gpt2_of_transformers() -> Workload:
    """GPT-2 small as `transformers` writes it, its own loss, fp32 master weights under autocast."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _of_transformers(lambda: GPT2LMHeadModel(GPT2Config(use_cache=False)), vocab=50257, length=1024)


def llama_of_transformers() -> Workload:
    """A Llama of 0.2e9 parameters as `transformers` writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip
    return _of_transformers(lambda: LlamaForCausalLM(config), vocab=32000, length=2048, batch=4)


def llama_of_8b() -> Workload:
    """The side-by-side job, all in bfloat16: eight layers of Llama-3-8B's shape, 128,256 words, 4 x 4,096 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, use_cache=False,
    )  # fmt: skip

    def model() -> nn.Module:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)

    return _of_transformers(model, vocab=128256, length=4096, batch=4)


def _of_transformers(model: Callable[[], nn.Module], vocab: int, length: int, batch: int = 8) -> Workload:
    def inputs(seed: int) -> dict[str, torch.Tensor]:
        del seed
        ids = torch.randint(0, vocab, (batch, length))
        return {"input_ids": ids, "labels": ids}

    def loss(module: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
        kind = next(module.parameters()).device.type
        with torch.autocast(kind, dtype=torch.bfloat16):
            value: torch.Tensor = module(**given).loss
        return value

    optimizer: Callable[..., torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
    return Workload(model=model, inputs=inputs, loss=loss, optimizer=optimizer)

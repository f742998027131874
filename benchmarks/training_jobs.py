"""Training jobs of real sizes, as targets of `kpt optimize --mode training`.

    kpt optimize benchmarks/training_jobs.py:llama --mode training -o out/llama

Random weights in bf16 on the GPU, random tokens, AdamW as PyTorch's own fused kernel: what a good script has.
`llama` is the job of the side-by-side harness: Llama-3-8B's layer shapes, 8 layers, 128,256 words, 4 x 4,096 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  the name every PyTorch program uses

from kernel_pytorch import Workload

LEARNING_RATE = 1e-5


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _in_bf16(make: Callable[[], nn.Module]) -> nn.Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(_device()):
            return make().train()
    finally:
        torch.set_default_dtype(default)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def _tokens(vocab: int, batch: int, length: int) -> Callable[[int], torch.Tensor]:
    def draw(seed: int) -> torch.Tensor:
        made = torch.Generator().manual_seed(seed)
        return torch.randint(vocab, (batch, length), generator=made).to(_device())

    return draw


def _labelled(vocab: int, batch: int, length: int) -> Callable[[int], dict[str, torch.Tensor]]:
    draw = _tokens(vocab, batch, length)

    def make(seed: int) -> dict[str, torch.Tensor]:
        ids = draw(seed)
        return {"input_ids": ids, "labels": ids}

    return make


def _llama(
    layers: int, vocab: int, batch: int, length: int, hidden: int = 4096, ffn: int = 14336, queries: int = 4
) -> Workload:
    """Return a Llama's job; `queries` is how many heads share a key."""

    def model() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=ffn, num_attention_heads=hidden // 128,
            num_key_value_heads=hidden // 128 // queries, num_hidden_layers=layers, vocab_size=vocab,
            max_position_embeddings=max(8192, length), rope_theta=500000.0, use_cache=False, attn_implementation="sdpa",
        )  # fmt: skip
        return _in_bf16(lambda: LlamaForCausalLM(config))

    return Workload(model, _labelled(vocab, batch, length), optimizer=_adamw, name=f"llama-{layers}x{hidden}")


def llama() -> Workload:
    """Return the harness's job: 8 layers of Llama-3-8B, batch 4, sequence 4,096."""
    return _llama(8, 128256, 4, 4096)


def llama_small() -> Workload:
    """Return a job of the same kind that takes a fraction of the time: 2 layers, batch 2, sequence 1,024."""
    return _llama(2, 32000, 2, 1024)


def llama_tiny() -> Workload:
    """Return a job of the same kind for a CPU."""
    return _llama(2, 512, 2, 64, hidden=512, ffn=256)


def llama_70b_block() -> Workload:
    """Return two layers of Llama-3-70B, 2 x 4,096 tokens; 4,096 words, so that the layers are what takes the time."""
    return _llama(2, 4096, 2, 4096, hidden=8192, ffn=28672, queries=8)


def qwen() -> Workload:
    """Return a Qwen2.5-7B-shaped job: 8 layers, biases in QKV, 28 heads over 4, batch 2, sequence 4,096."""

    def model() -> nn.Module:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
            num_hidden_layers=8, vocab_size=152064, max_position_embeddings=8192, use_cache=False,
            attn_implementation="sdpa",
        )  # fmt: skip
        return _in_bf16(lambda: Qwen2ForCausalLM(config))

    return Workload(model, _labelled(152064, 2, 4096), optimizer=_adamw, name="qwen2.5-7b-x8")


class Block(nn.Module):
    """A pre-norm block whose attention builds its own dense causal mask, as many hand-written GPTs do."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mask", torch.ones(context, context, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:n, :n])
        x = x + self.out(y.transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2-large-like, not from Hugging Face."""

    def __init__(self, vocab: int, width: int, heads: int, layers: int, context: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, context) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token_loss(model: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the next token."""
    return F.cross_entropy(model(ids)[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def gpt() -> Workload:
    """Return GPT-2-large's shapes, 12 layers, batch 8, sequence 2,048."""
    model = lambda: _in_bf16(lambda: GPT(50304, 1280, 20, 12, 2048))  # noqa: E731
    return Workload(model, _tokens(50304, 8, 2048), loss=next_token_loss, optimizer=_adamw, name="gpt2-large-x12")

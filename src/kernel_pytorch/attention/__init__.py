"""Attention that picks the fastest implementation by measuring: FlashAttention-3 and -4, cuDNN, PyTorch's own."""

from kernel_pytorch.attention.activation import activated
from kernel_pytorch.attention.api import attention, attention_varlen, choose, implementations, unsupported
from kernel_pytorch.attention.modules import MultiheadAttention, RotaryAttention
from kernel_pytorch.attention.types import AttentionError, AttentionShape, Choice, Implementation

__all__ = [
    "AttentionError",
    "AttentionShape",
    "Choice",
    "Implementation",
    "MultiheadAttention",
    "RotaryAttention",
    "activated",
    "attention",
    "attention_varlen",
    "choose",
    "implementations",
    "unsupported",
]

"""Cross-entropy of a linear layer without its logits in memory, and of logits without copies."""

from kernel_pytorch.ops.linear_cross_entropy.api import cross_entropy, linear_cross_entropy, unsupported
from kernel_pytorch.ops.linear_cross_entropy.causal_lm import causal_lm_loss

__all__ = ["causal_lm_loss", "cross_entropy", "linear_cross_entropy", "unsupported"]

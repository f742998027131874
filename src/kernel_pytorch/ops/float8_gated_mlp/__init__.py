"""The gated activations of MLPs that write FP8, forwards and backwards, so that nothing is read only to be cast."""

from kernel_pytorch.ops.float8_gated_mlp.op import float8_gated_mlp_backward_op, float8_gated_mlp_op

__all__ = ["float8_gated_mlp_backward_op", "float8_gated_mlp_op"]

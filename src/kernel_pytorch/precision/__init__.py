"""Training in FP8: recipes, linear layers with their scales, and the conversion of models."""

from kernel_pytorch.precision.blocks import BLOCK_RECIPES, BlockRecipe
from kernel_pytorch.precision.convert import convert, report, restore
from kernel_pytorch.precision.fallback import fall_back
from kernel_pytorch.precision.forecast import forecast
from kernel_pytorch.precision.linear import Float8Linear, swap_linears
from kernel_pytorch.precision.monitor import Bounds, Float8FallbackWarning, Monitor
from kernel_pytorch.precision.recipes import RECIPES, Recipe, Scaling
from kernel_pytorch.precision.sharded import follow_weights, shard_weights
from kernel_pytorch.precision.state import hold_weights, load_state, state

__all__ = [
    "BLOCK_RECIPES",
    "RECIPES",
    "BlockRecipe",
    "Bounds",
    "Float8FallbackWarning",
    "Float8Linear",
    "Monitor",
    "Recipe",
    "Scaling",
    "convert",
    "fall_back",
    "follow_weights",
    "forecast",
    "hold_weights",
    "load_state",
    "report",
    "restore",
    "shard_weights",
    "state",
    "swap_linears",
]

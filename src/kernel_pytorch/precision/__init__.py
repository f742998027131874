"""Training in FP8: recipes, linear layers with their scales, and the conversion of models."""

from kernel_pytorch.precision.convert import convert, report, restore
from kernel_pytorch.precision.linear import Float8Linear, swap_linears
from kernel_pytorch.precision.recipes import RECIPES, Recipe, Scaling

__all__ = ["RECIPES", "Float8Linear", "Recipe", "Scaling", "convert", "report", "restore", "swap_linears"]

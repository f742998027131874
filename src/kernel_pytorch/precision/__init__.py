"""Training in FP8: recipes, linear layers with their scales, and the conversion of models."""

from kernel_pytorch.precision.linear import Float8Linear, float8_linear
from kernel_pytorch.precision.recipes import RECIPES, Recipe, Scaling

__all__ = ["RECIPES", "Float8Linear", "Recipe", "Scaling", "float8_linear"]

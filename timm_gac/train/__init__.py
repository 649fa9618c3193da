"""Training on accelerate: recipes, the loop, checkpoints."""

from .recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe"]

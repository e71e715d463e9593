"""Training: recipes, data, the step, the run."""

from dac_fast.training.recipe import RecipeError, load_recipe, recipe_names
from dac_fast.training.split import DataError
from dac_fast.training.state import StateError
from dac_fast.training.trainer import Summary, TrainingError, train

__all__ = [
    "DataError",
    "RecipeError",
    "StateError",
    "Summary",
    "TrainingError",
    "load_recipe",
    "recipe_names",
    "train",
]

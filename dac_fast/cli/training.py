"""Commands about training runs: `train`, `curves`."""

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dac_fast import plots, training
from dac_fast.cli.jobs import Existing, to_write
from dac_fast.cli.options import WhenExisting
from dac_fast.cli.terminal import err, out
from dac_fast.config import Config
from dac_fast.training.recipe import Recipe


class TrainCommand(TyperCommand):
    """The command `train`, whose help goes on with the recipes and the keys."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints it."""
        super().format_help(ctx, formatter)
        out.print(f"Recipes: {', '.join(training.recipe_names())}\n")
        out.print("Keys, each with its default where a recipe says nothing else:")
        recipe = Recipe(Config())
        for part, values in recipe.to_dict().items():
            if isinstance(values, dict):
                out.print(f"\n{part}: {inspect.getdoc(type(getattr(recipe, part)))}\n")
                for key, value in values.items():
                    out.print(f"  {part}.{key}={json.dumps(value, separators=(',', ':'))}")


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as data.train=FOLDER.")
    ] = None,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes", help="Go on with the folder's run by a recipe that trains otherwise."
        ),
    ] = False,
) -> None:
    """Train a codec by a recipe, or go on with the run in its folder.

    Several processes: under torchrun.
    """
    summary = training.train(recipe, overrides or [], err, allow_changes)
    best = "" if summary.best is None else f", best mel distance on validation {summary.best:.4f}"
    out.print(f"{summary.folder}: step {summary.step}{best}")
    if summary.signal is not None:
        raise typer.Exit(128 + summary.signal)


def curves(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture, a PNG.")] = Path(
        "curves.png"
    ),
    existing: WhenExisting = Existing.error,
) -> None:
    """Draw the training and validation curves of runs, to compare them."""
    if to_write(existing, output):
        plots.training_curves(output, runs)
        out.print(f"wrote {output}")

"""The files of a run that let it go on: checkpoints written whole or not at all, the newest found again."""

import os
import re
from pathlib import Path

import torch

from dac_fast.files import atomic_path
from dac_fast.training.recipe import Recipe


class StateError(ValueError):
    """A training checkpoint that cannot be read, or that belongs to another architecture; one line."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the oldest first."""
    found = [
        (int(m[1]), path)
        for path in folder.glob("step_*.pt")
        if (m := re.fullmatch(r"step_(\d+)", path.stem))
    ]
    return [path for _, path in sorted(found)]


def save(
    folder: Path, step: int, recipe: Recipe, state: dict, keep_last: int, keep_steps=()
) -> Path:
    """Writes the checkpoint after `step` steps, then removes those that are too old.

    Raises:
        OSError: it cannot be written; all earlier checkpoints are still there.
    """
    path = folder / f"step_{step:08d}.pt"
    content = {"format": 1, "step": step, "recipe": recipe.to_dict(), **state}
    try:
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    # PyTorch's writer turns a full disk into a RuntimeError.
    except RuntimeError as error:
        raise OSError(f"{path}: cannot write: {str(error).splitlines()[0]}") from error
    kept = {f"step_{s:08d}.pt" for s in keep_steps}
    for old in checkpoints(folder)[:-keep_last]:
        if old.name not in kept:
            old.unlink(missing_ok=True)
    return path


def load_newest(folder: Path, recipe: Recipe) -> tuple[dict, list[str]] | None:
    """The newest checkpoint of a run that can be read, and a line on each newer one that cannot; None: no checkpoint.

    Raises:
        StateError: none of them can be read, or it is of another model or discriminator than the recipe's.
    """
    damaged = []
    for path in reversed(checkpoints(folder)):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        # What torch.load raises on damaged files is of many types.
        except Exception as error:
            damaged.append(
                f"{path}: not a readable checkpoint: {(str(error).splitlines() or [''])[0]}"
            )
            continue
        _require_same_architecture(path, content["recipe"], recipe.to_dict())
        return content, damaged
    if damaged:
        raise StateError(damaged[0])
    return None


def remove_leftovers(folder: Path):
    """Removes what a killed run left half-written."""
    for path in [*folder.glob(".step_*.pt"), *folder.glob(".*.safetensors")]:
        os.unlink(path)


def _require_same_architecture(path: Path, theirs: dict, ours: dict):
    for part in ("model", "discriminator"):
        for key in sorted(theirs[part].keys() | ours[part].keys()):
            old, new = theirs[part].get(key), ours[part].get(key)
            # Dropout changes the training, not the parameters.
            if old != new and key != "quantizer_dropout":
                raise StateError(
                    f"{path} has {part}.{key} {old!r}, the recipe {new!r}; "
                    "accepted: the same, or another trainer.folder"
                )

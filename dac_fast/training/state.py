"""Checkpoints of a run: written whole or not at all, and the newest readable one found again."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dac_fast.files import atomic_path
from dac_fast.training.recipe import Recipe


class StateError(ValueError):
    """A training checkpoint is not readable, or of another architecture; one line."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the oldest first."""
    steps = {path: re.fullmatch(r"step_(\d+)", path.stem) for path in folder.glob("step_*.pt")}
    found = [(int(match[1]), path) for path, match in steps.items() if match]
    return [path for _, path in sorted(found)]


def save(
    folder: Path,
    step: int,
    recipe: Recipe,
    state: dict[str, Any],
    keep_last: int,
    keep_steps: Sequence[int] = (),
) -> None:
    """Writes the checkpoint after `step` steps, then removes old ones.

    Args:
        folder: of the run.
        step: steps done.
        recipe: of the run.
        state: what else the checkpoint holds, beside these.
        keep_last: how many of the newest checkpoints are kept.
        keep_steps: steps whose checkpoints are kept besides.
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


def load_newest(folder: Path, recipe: Recipe) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint of a run that can be read.

    Returns:
        its content (None where the run has no checkpoint), and a line on each newer one that cannot
        be read.
    Raises:
        StateError: there are checkpoints, but none can be read; or the newest that can is of
            another model or discriminator than the recipe's.
    """
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        # On a damaged file torch.load raises exceptions of many types.
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            damaged.append(f"{path}: not a readable checkpoint: {reason}")
            continue
        _require_same_architecture(path, content["recipe"], recipe.to_dict())
        return content, damaged
    if damaged:
        raise StateError(damaged[0])
    return None, []


def _require_same_architecture(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for part in ("model", "discriminator"):
        for key in sorted(theirs[part].keys() | ours[part].keys()):
            old, new = theirs[part].get(key), ours[part].get(key)
            # Dropout changes the training, not the parameters.
            if old != new and key != "quantizer_dropout":
                raise StateError(
                    f"{path} has {part}.{key} {old!r}, the recipe {new!r}; "
                    "accepted: the same, or another trainer.folder"
                )

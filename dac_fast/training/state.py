"""Checkpoints of a run: written whole or not at all, and the newest readable one found again."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dac_fast.files import atomic_path
from dac_fast.training.recipe import Recipe

# Settings that may change within a run: what a step computes does not depend on them.
FREE = {
    "data.workers",
    "trainer.steps",
    "trainer.device",
    "trainer.init_from",
    "trainer.log_every",
    "trainer.validate_every",
    "trainer.sample_every",
    "trainer.save_every",
    "trainer.samples",
    "trainer.keep_last",
    "trainer.keep_steps",
    "trainer.gradient_checkpointing",
    "trainer.cuda_graph",
    "trainer.max_nonfinite",
    "trainer.tensorboard",
}


class StateError(ValueError):
    """A training checkpoint is not readable, or of another recipe; one line."""


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


def load_newest(
    folder: Path, recipe: Recipe, allow_changes: bool = False
) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint of a run that can be read.

    Args:
        folder: of the run.
        recipe: to go on with.
        allow_changes: whether it may train otherwise than the checkpoint's.
    Returns:
        its content (None where the run has no checkpoint), and lines to show: on newer ones that
        cannot be read, and on the settings that change.
    Raises:
        StateError: there are checkpoints, but none can be read; or the newest that can is of
            another model or discriminator than the recipe's, or of other settings.
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
        changed = _changed(content["recipe"], recipe.to_dict())
        if not changed:
            return content, damaged
        shown = "; ".join(f"{key} {old!r}, now {new!r}" for key, (old, new) in changed.items())
        if not allow_changes and changed.keys() - FREE:
            accepted = "the same, another trainer.folder, or --allow-changes"
            raise StateError(f"{path} was trained with {shown}; accepted: {accepted}")
        return content, [*damaged, f"{folder} was trained with {shown}"]
    if damaged:
        raise StateError(damaged[0])
    return None, []


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of two recipes that differ, with both values; of settings that both have."""
    changed = {}
    for part in (name for name, values in now.items() if isinstance(values, dict)):
        for key in now[part].keys() & before[part].keys() - {"folder"}:
            if now[part][key] != before[part][key]:
                changed[f"{part}.{key}"] = before[part][key], now[part][key]
    return dict(sorted(changed.items()))


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

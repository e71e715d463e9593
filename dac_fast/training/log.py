"""The reports of a run: a progress bar or lines, `log.jsonl`, and TensorBoard if installed."""

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dac_fast.files import atomic_path
from dac_fast.spectral import analysis_window, magnitude_spectrogram

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SECONDS_BETWEEN_LINES = 10
# The values of a training step that are shown.
SHOWN = ("steps_per_second", "loss", "mel", "adversarial", "feature", "discriminator")


class Log:
    """The reports of one run.

    A line of `log.jsonl` is an object with "step", "part" ("train" or "validation") and values.

    Args:
        folder: of the run; None: write no files. Lines of steps after `step`, which a killed run
            has left, are removed.
        step: the step that the run goes on from.
        steps: the number of steps in all.
        tensorboard: write TensorBoard logs too, where the package is installed.
        console: to print on.
    """

    def __init__(
        self, folder: Path | None, step: int, steps: int, tensorboard: bool, console: Console
    ) -> None:
        self.console = console
        self._path = folder / "log.jsonl" if folder else None
        if self._path and self._path.exists():
            lines = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_path(self._path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))
        self._writer = _tensorboard_writer(folder, step) if folder and tensorboard else None
        self._printed = 0.0
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=step, values="")
        self._progress.start()

    def note(self, text: str) -> None:
        """Prints a line."""
        self._progress.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step)

    def values(self, step: int, part: str, values: dict[str, float]) -> None:
        """Logs numbers of a part of the run ("train" or "validation")."""
        if self._path:
            # JSON has no infinity.
            finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
            try:
                with open(self._path, "a") as file:
                    file.write(json.dumps({"step": step, "part": part, **finite}) + "\n")
            except OSError as error:
                self.note(f"step {step}: not logged: {error}")
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(f"{part}/{name}", value, step)
        names = SHOWN if part == "train" else values
        text = "  ".join(
            f"{name.replace('_', ' ')} {values[name]:.4g}" for name in names if name in values
        )
        if part == "train" and self.console.is_terminal:
            self._progress.update(self._task, values=text)
        elif part != "train" or time.monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self.note(f"step {step}  {part}: {text}")

    def audio(self, step: int, name: str, audio: Tensor, sample_rate: int) -> None:
        """Puts a signal [T] and its spectrogram, in dB below its peak, into TensorBoard."""
        if self._writer is None:
            return
        audio = audio.detach().float().cpu().clamp(-1, 1)
        self._writer.add_audio(name, audio, step, sample_rate)
        magnitude = magnitude_spectrogram(audio[None, None], analysis_window(1024))[0, 0]
        level = 20 * torch.log10(magnitude / magnitude.max().clamp(min=1e-8) + 1e-5)
        self._writer.add_image(
            f"{name}/spectrogram", (level.flip(0)[None] / 80 + 1).clamp(0, 1), step
        )

    def close(self) -> None:
        """Ends the bar, and closes the files."""
        self._progress.stop()
        if self._writer:
            self._writer.close()


def _tensorboard_writer(folder: Path, step: int) -> "SummaryWriter | None":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _step_of(line: str) -> float:
    """The step of a line of the log; infinite where the line is broken."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf

"""The reports of a run: a progress bar or lines, `log.jsonl`, samples, TensorBoard if installed."""

import errno
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dac_fast import plots
from dac_fast.audio.writing import write
from dac_fast.files import atomic_path, make_folder
from dac_fast.spectral import analysis_window, magnitude_spectrogram

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SECONDS_BETWEEN_LINES = 10
# The values of a training step that are shown.
SHOWN = ("steps_per_second", "loss", "mel", "adversarial", "feature", "discriminator")


class Log:
    """The reports of one run.

    A line of `log.jsonl` is an object with "step", "part" ("train" or "validation") and values. The
    folder `samples` has validation excerpts, and what the codec makes of them, to hear and to see.

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
        self._folder = folder
        self._path = folder / "log.jsonl" if folder else None
        if self._path and self._path.exists():
            lines = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_path(self._path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))
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
        self._writer = self._tensorboard_writer(folder, step) if folder and tensorboard else None

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
                _append(self._path, json.dumps({"step": step, "part": part, **finite}) + "\n")
            except OSError as error:
                self.note(f"step {step}: not logged: {error}")

        def write_values(writer: "SummaryWriter") -> None:
            for name, value in values.items():
                writer.add_scalar(f"{part}/{name}", value, step)

        self._to_tensorboard(write_values)
        names = SHOWN if part == "train" else values
        text = "  ".join(
            f"{name.replace('_', ' ')} {values[name]:.4g}" for name in names if name in values
        )
        if part == "train" and self.console.is_terminal:
            self._progress.update(self._task, values=text)
        elif part != "train" or time.monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self.note(f"step {step}  {part}: {text}")

    def sample(
        self, step: int, number: int, original: Tensor, restored: Tensor, sample_rate: int
    ) -> None:
        """Shows an excerpt [T] and what the codec makes of it, [T], as audio and spectrograms.

        Raises:
            OSError: the folder of samples cannot be written.
        """
        if self._folder is None:
            return
        signals = {
            name: signal.detach().float().cpu().nan_to_num().clamp(-1, 1)
            for name, signal in (("original", original), ("restored", restored))
        }
        make_folder(self._folder / "samples")
        path = self._folder / "samples" / f"{number}_step_{step:08d}.flac"
        write(path, signals["restored"].numpy(), sample_rate)
        write(path.with_name(f"{number}_original.flac"), signals["original"].numpy(), sample_rate)
        pictures = {name: signal.numpy() for name, signal in signals.items()}
        try:
            plots.spectrograms(path.with_suffix(".png"), pictures, sample_rate)
        except plots.PlotError as error:
            self.note(f"step {step}: {path.parent} gets no spectrograms: {error}")

        def write_signals(writer: "SummaryWriter") -> None:
            for name, signal in signals.items():
                writer.add_audio(f"sample_{number}/{name}", signal, step, sample_rate)
                image = _decibels_below_peak(signal)[None] / 80 + 1
                writer.add_image(f"sample_{number}/{name}/spectrogram", image.clamp(0, 1), step)

        self._to_tensorboard(write_signals)

    def close(self) -> None:
        """Ends the bar, and closes the files."""
        self._progress.stop()
        self._to_tensorboard(lambda writer: writer.close())

    def _to_tensorboard(self, write: "Callable[[SummaryWriter], None]") -> None:
        """Calls `write`; where that fails (the disk is full), the run goes on without TensorBoard.

        What fails is reported by a later call, since TensorBoard writes in a thread of its own.
        """
        if self._writer:
            try:
                write(self._writer)
            except OSError as error:
                self._writer = None
                self.note(f"TensorBoard gets no more of this run: {error}")

    def _tensorboard_writer(self, folder: Path, step: int) -> "SummaryWriter | None":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            install = "pip install 'dac-fast[train]'"
            self.note(f"no TensorBoard, which is not installed ({install}): see {self._path}")
            return None
        try:
            return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            self.note(f"no TensorBoard: {error}")
            return None


def _decibels_below_peak(audio: Tensor) -> Tensor:
    """The spectrogram of a signal [T], the highest frequency first."""
    magnitude = magnitude_spectrogram(audio[None, None], analysis_window(1024))[0, 0]
    level = 20 * torch.log10(magnitude / magnitude.max().clamp(min=1e-8) + 1e-5)
    return level.flip(0)


def _append(path: Path, line: str) -> None:
    """Adds a line to a file; where that fails, the file is as it was."""
    data = line.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def _step_of(line: str) -> float:
    """The step of a line of the log; infinite where the line is broken."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf

"""A training run: data, steps, validation, checkpoints; in one process, or several by `torchrun`.

The seed and the number of a step decide everything random in it, so a killed run goes on from its
last checkpoint as if it had never stopped: on the CPU to the last bit. SIGTERM and Ctrl-C end a
run after the step it is in, with a checkpoint.
"""

import functools
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console
from torch import Tensor

from dac_fast.codec import load
from dac_fast.files import atomic_path
from dac_fast.processors import processors
from dac_fast.storage import checkpoint
from dac_fast.training import state, validation
from dac_fast.training.data import Batches, Excerpts, loader, moved
from dac_fast.training.log import Log
from dac_fast.training.processes import Processes, Stop, process_group
from dac_fast.training.recipe import Recipe, RecipeError, load_recipe
from dac_fast.training.split import split_files
from dac_fast.training.step import TrainingStep


class TrainingError(ValueError):
    """A run that cannot go on with these settings; one line."""


@dataclass(frozen=True)
class Summary:
    """The outcome of a run.

    Attributes:
        folder: of the run; codec.safetensors (newest) and best.safetensors (best on validation)
            load as codecs.
        step: steps done in all.
        signal: number of the signal that ended it early, or None.
        best: lowest mel distance on validation, or None.
        skipped: steps that were skipped because gradients were not finite.
        unreadable: files that were skipped, and why.
    """

    folder: Path
    step: int
    signal: int | None
    best: float | None
    skipped: int
    unreadable: dict[str, str]


def train(
    recipe: str,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    allow_changes: bool = False,
) -> Summary:
    """Trains by a recipe, or goes on with the run that is in its folder.

    Args:
        recipe: name or .yaml file, see `load_recipe`.
        overrides: "key=value" each.
        console: to report on; None: the standard error stream.
        allow_changes: go on even where the run was trained with other settings; otherwise that is
            an error, which names them.
    Raises:
        RecipeError, DataError, StateError, CheckpointError, ValueError: something that the user can
            put right, in one line.
        TrainingError: gradients are not finite, step after step.
        OSError: the run's folder cannot be written, or the last checkpoint.
    """
    parsed = load_recipe(recipe, overrides)
    if parsed.data.train is None:
        raise RecipeError(
            "data.train is missing; accepted: data.train=FOLDER, or a .jsonl manifest"
        )
    with process_group(parsed.trainer.device) as processes:
        if parsed.trainer.batch_size % processes.count:
            raise RecipeError(
                f"trainer.batch_size is {parsed.trainer.batch_size}; "
                f"accepted: multiples of the {processes.count} processes"
            )
        console = Console(quiet=True) if processes.rank else console or Console(stderr=True)
        return run_in(processes, parsed, console, allow_changes)


def run_in(processes: Processes, recipe: Recipe, console: Console, allow_changes: bool) -> Summary:
    """Trains in one of the processes; its run is gone when the group of processes ends."""
    run = Run(recipe, processes, console, allow_changes)
    try:
        return run.train()
    finally:
        run.log.close()


class Run:
    """A run in one of its processes; see `train`.

    Attributes:
        done: steps done.
        best: lowest mel distance on validation, or None.
        unreadable: why files were skipped, by their paths.
    """

    def __init__(
        self, recipe: Recipe, processes: Processes, console: Console, allow_changes: bool
    ) -> None:
        self.recipe = recipe
        self.processes = processes
        self.rank = processes.rank
        self.device = processes.device
        trainer = recipe.trainer
        self.folder = Path(trainer.folder or Path("runs") / recipe.name)
        content, notes = state.load_newest(self.folder, recipe, allow_changes)
        held = content.get("held_out", ()) if content else ()
        self.split = split_files(recipe.data, recipe.model.sample_rate, held)
        self.unreadable = self.split.unreadable

        precision = trainer.precision or default_precision(self.device)
        self.step = TrainingStep(recipe, self.device, precision)
        self.done = 0
        self.best: float | None = None
        notes += self.split.notes
        if content is not None:
            self.step.load_state_dict(content)
            self.done = content["step"]
            self.best = content["best"]
            self.unreadable = content["unreadable"] | self.unreadable
            notes.append(f"{self.folder}: goes on from step {self.done}")
        elif trainer.init_from:
            self.initialise(trainer.init_from)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            with atomic_path(self.folder / "recipe.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        folder = None if self.rank else self.folder
        self.log = Log(folder, self.done, trainer.steps, trainer.tensorboard, console)
        parameters = sum(p.numel() for p in self.step.codec.parameters())
        notes.append(
            f"{recipe.name}: {parameters / 1e6:.2f} M parameters "
            f"on {self.device} x {processes.count} in {precision}; "
            f"{len(self.split.training)} training files, "
            f"{len(self.split.validation)} for validation, {len(self.unreadable)} unreadable"
        )
        for note in notes:
            self.log.note(note)

    def initialise(self, name_or_path: str) -> None:
        """Starts the codec, and its average, from the weights of another codec."""
        weights = load(name_or_path).state_dict()
        for codec in filter(None, (self.step.codec, self.step.ema)):
            checkpoint.restore(codec, weights, name_or_path)

    def workers(self) -> int:
        """Processes that read audio for this one."""
        if self.recipe.data.workers is not None:
            return self.recipe.data.workers
        # torchrun says how many processes share this machine.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.processes.count))
        return min(8, processors() // here)

    def train(self) -> Summary:
        """Does all steps that are left."""
        trainer, rate = self.recipe.trainer, self.recipe.model.sample_rate
        excerpts = Excerpts(
            self.split.training,
            self.recipe.data,
            rate,
            trainer.batch_size,
            trainer.seed,
            channels=self.recipe.model.channels,
        )
        batches = Batches(
            range(self.done, trainer.steps), trainer.batch_size, self.rank, self.processes.count
        )
        self.validation_audio, unreadable = validation.read(
            self.recipe, self.split.validation, self.processes, self.workers()
        )
        self.unreadable.update(unreadable)
        clock = Clock()
        stopping = False
        with Stop() as stop:
            if self.done == 0 and trainer.init_from and self.split.validation:
                self.validate()
                self.show_samples()
            pin_memory = self.device.type == "cuda"
            loaded = loader(excerpts, batches, self.workers(), pin_memory)
            for batch in moved(loaded, self.device):
                self.unreadable.update(batch["unreadable"])
                torch.manual_seed(step_seed(trainer.seed, self.done, self.rank))
                losses = self.step(batch["audio"], self.done)
                self.done += 1
                clock.steps += 1
                self.log.advance(self.done)

                last = self.done == trainer.steps
                if self.done % trainer.log_every == 0 or last:
                    self.report(losses, clock.rate())
                    clock = Clock()
                stopping = self.agreed(stop.received)
                if self.split.validation and (self.done % trainer.validate_every == 0 or last):
                    self.validate()
                    clock = Clock()
                if self.done % trainer.sample_every == 0 or last:
                    self.show_samples()
                if self.done % trainer.save_every == 0 or last or stopping:
                    self.save(must=last or stopping)
                if stopping:
                    break
        if self.unreadable and self.rank == 0:
            self.log.note(
                f"{len(self.unreadable)} unreadable files were skipped, "
                f"see {self.folder / 'unreadable.txt'}"
            )
        # Another process may be the one that received the signal.
        received = (stop.received or signal.SIGTERM) if stopping else None
        skipped = int(self.step.skipped["total"])
        return Summary(self.folder, self.done, received, self.best, skipped, self.unreadable)

    def agreed(self, received: int | None) -> bool:
        """Whether to stop now.

        Several processes have to agree, and ask each other at logged steps only.
        """
        if self.processes.count > 1 and self.done % self.recipe.trainer.log_every:
            return False
        flag = torch.tensor(int(received is not None))
        return bool(self.processes.summed(flag))

    def report(self, losses: dict[str, Tensor], steps_per_second: float) -> None:
        """Logs a step.

        Raises:
            TrainingError: too many steps in a row had to be skipped.
        """
        used = validation.codebook_statistics(self.step.code_counts)
        self.step.code_counts.zero_()
        # One copy from the device for all of them.
        numbers = torch.stack([loss.double() for loss in losses.values()]).tolist()
        values = dict(zip(losses, numbers, strict=True)) | used
        values["skipped"] = int(self.step.skipped["total"])
        values["learning_rate"] = float(self.step.optimizers["generator"].param_groups[0]["lr"])
        values["steps_per_second"] = steps_per_second
        if self.rank == 0:
            self.log.values(self.done, "train", values)
        longest = int(self.step.skipped["longest"])
        if longest >= self.recipe.trainer.max_nonfinite:
            raise TrainingError(
                f"step {self.done}: gradients not finite {longest} steps in a row, "
                f"trainer.max_nonfinite is {self.recipe.trainer.max_nonfinite}; "
                "a lower optimizer.learning_rate may help, or trainer.precision=fp32"
            )

    def validate(self) -> None:
        """Logs the metrics over the validation excerpts, and keeps the codec if it is the best."""
        codec = self.step.best_codec().eval()
        values = validation.measured(codec, self.validation_audio, self.processes)
        improved = self.best is None or values["mel_distance"] < self.best
        if improved:
            self.best = values["mel_distance"]
        if self.rank == 0:
            self.log.values(self.done, "validation", values)
            if improved:
                self.try_to_write(lambda: codec.save(self.folder / "best.safetensors"))

    @torch.no_grad()
    def show_samples(self) -> None:
        """Shows the first validation excerpts, original and restored."""
        if self.rank or not self.validation_audio:
            return
        codec = self.step.best_codec().eval()
        for i, audio in enumerate(self.validation_audio[0][: self.recipe.trainer.samples]):
            restored = codec(audio[None].to(self.device))["audio"][0]
            mono = audio.mean(0), restored.mean(0)
            show = functools.partial(self.log.sample, self.done, i, *mono, codec.sample_rate)
            self.try_to_write(show)

    def save(self, must: bool) -> None:
        """Writes a checkpoint and the codec.

        Raises:
            OSError: they cannot be written, and `must` be.
        """
        self.unreadable = self.processes.merged(self.unreadable)
        if self.rank:
            return
        if must:
            self.write()
        else:
            self.try_to_write(self.write)

    def write(self) -> None:
        """Writes a checkpoint, the codec and the list of unreadable files."""
        trainer = self.recipe.trainer
        content = self.step.state_dict() | {"best": self.best, "unreadable": self.unreadable}
        content["held_out"] = sorted({file.package for file in self.split.validation})
        state.save(
            self.folder, self.done, self.recipe, content, trainer.keep_last, trainer.keep_steps
        )
        self.step.best_codec().save(self.folder / "codec.safetensors")
        if self.unreadable:
            lines = [f"{path}\t{reason}\n" for path, reason in sorted(self.unreadable.items())]
            with atomic_path(self.folder / "unreadable.txt") as temporary:
                temporary.write_text("".join(lines))

    def try_to_write(self, write: Callable[[], None]) -> None:
        """Calls `write`, and goes on where it fails: the disk may have space at the next time."""
        try:
            write()
        except OSError as error:
            self.log.note(f"step {self.done}: not saved: {error}")


def default_precision(device: torch.device) -> str:
    """The precision of a recipe that names none, see `TrainerConfig`."""
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


class Clock:
    """Steps per second since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.steps = 0

    def rate(self) -> float:
        """Steps per second so far."""
        return self.steps / (time.monotonic() - self.start)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of what a process draws in a step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])

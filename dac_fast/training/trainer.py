"""A training run: data, steps, validation, checkpoints; in one process, or in several under `torchrun`.

Everything random in step s follows from the seed and s, so a run that was killed goes on from its last checkpoint as
if it had not been: on the CPU in float32 to the last bit. SIGTERM and Ctrl-C end a run after the step it is in, with a
checkpoint.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from torch import Tensor

from dac_fast import load
from dac_fast.files import atomic_path
from dac_fast.metrics import codebook_counts, codebook_entropy, mel_distance, si_sdr, stft_distance
from dac_fast.ops.device import checked_device
from dac_fast.storage import checkpoint
from dac_fast.training import state
from dac_fast.training.data import Batches, Excerpts, loader, moved
from dac_fast.training.log import Log
from dac_fast.training.recipe import Recipe, RecipeError, load_recipe
from dac_fast.training.split import DataError, find_files, hold_out
from dac_fast.training.step import TrainingStep

VALIDATION_BATCH = 8


class TrainingError(ValueError):
    """A run that cannot go on with these settings; one line."""


@dataclass(frozen=True)
class Summary:
    """What became of a run.

    Attributes:
        folder: of the run; codec.safetensors (newest) and best.safetensors (best on validation) load as codecs.
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


def train(recipe: str, overrides: Sequence[str] = (), console: Console | None = None) -> Summary:
    """Trains by a recipe, or goes on with the run that is in its folder.

    Args:
        recipe: name or .yaml file, see `load_recipe`.
        overrides: "key=value" each.
        console: to report on; None: the standard error stream.
    Raises:
        RecipeError, DataError, StateError, CheckpointError, ValueError: something the user can put right, in one line.
        TrainingError: gradients are not finite, step after step.
        OSError: the run's folder cannot be written, or the last checkpoint.
    """
    parsed = load_recipe(recipe, overrides)
    if parsed.data.train is None:
        raise RecipeError(
            "data.train is missing; accepted: data.train=FOLDER, or a .jsonl manifest"
        )
    with process_group(parsed.trainer.device) as (rank, processes, device):
        if parsed.trainer.batch_size % processes:
            raise RecipeError(
                f"trainer.batch_size is {parsed.trainer.batch_size}; accepted: multiples of the {processes} processes"
            )
        console = console or Console(stderr=True)
        run = Run(parsed, rank, processes, device, console if rank == 0 else Console(quiet=True))
        try:
            return run.train()
        finally:
            run.log.close()


@contextlib.contextmanager
def process_group(name: str | None):
    """Yields (rank, processes, device), as `torchrun` has set them; alone: (0, 1, device)."""
    name = name or "auto"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = checked_device(name, "trainer.device")
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Shapes are the same in every step: the search for the quickest convolutions pays.
        torch.backends.cudnn.benchmark = True
    if processes == 1:
        yield 0, 1, device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), processes, device
    finally:
        dist.destroy_process_group()


class Run:
    """A run in one of its processes; see `train`."""

    def __init__(
        self, recipe: Recipe, rank: int, processes: int, device: torch.device, console: Console
    ):
        self.recipe, self.rank, self.processes, self.device = recipe, rank, processes, device
        trainer = recipe.trainer
        self.folder = Path(trainer.folder or Path("runs") / recipe.name)
        workers = recipe.data.workers
        # torchrun says how many processes share this machine.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        self.workers = min(8, (os.cpu_count() or 1) // here) if workers is None else workers
        self.training, self.validation, self.unreadable = self.find_data()

        precision = trainer.precision or ("bf16" if device.type == "cuda" else "fp32")
        self.step = TrainingStep(recipe, device, precision)
        self.done, self.best = 0, None
        found = state.load_newest(self.folder, recipe)
        notes = [] if found is None else found[1]
        if found is not None:
            content = found[0]
            self.step.load_state_dict(content)
            self.done, self.best = content["step"], content["best"]
            self.unreadable = {**content["unreadable"], **self.unreadable}
            notes.append(f"{self.folder}: goes on from step {self.done}")
        elif trainer.init_from:
            self.initialise(trainer.init_from)
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            state.remove_leftovers(self.folder)
            with atomic_path(self.folder / "recipe.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        self.log = Log(
            self.folder if rank == 0 else None,
            self.done,
            trainer.steps,
            trainer.tensorboard and rank == 0,
            console,
        )
        parameters = sum(p.numel() for p in self.step.codec.parameters())
        notes.append(
            f"{recipe.name}: {parameters / 1e6:.2f} M parameters on {device} x {processes} in {precision}; "
            f"{len(self.training)} training files, {len(self.validation)} for validation, "
            f"{len(self.unreadable)} unreadable"
        )
        for note in notes:
            self.log.note(note)

    def find_data(self):
        """Training files, validation files, and those that cannot be read."""
        data, rate = self.recipe.data, self.recipe.model.sample_rate
        files, unreadable = find_files(data.train, rate, data.full_band)
        if data.validation is None:
            return files, [], unreadable
        if isinstance(data.validation, float | int):
            if not 0 <= data.validation < 1:
                raise RecipeError(
                    f"data.validation is {data.validation}; accepted: 0 up to, not including, 1"
                )
            return *hold_out(files, data.validation), unreadable
        held, more = find_files(data.validation, rate, data.full_band, "data.validation")
        paths = {os.path.realpath(file.path) for file in held}
        files = [file for file in files if os.path.realpath(file.path) not in paths]
        if not files:
            raise DataError("data.train: all of its files are those of data.validation")
        return files, held, {**unreadable, **more}

    def initialise(self, name_or_path: str):
        """Starts the codec, and its average, from the weights of another one."""
        weights = load(name_or_path).state_dict()
        for codec in filter(None, (self.step.codec, self.step.ema)):
            checkpoint.restore(codec, weights, name_or_path)

    def train(self) -> Summary:
        """All steps that are left."""
        trainer, data = self.recipe.trainer, self.recipe.data
        excerpts = Excerpts(
            self.training, data, self.recipe.model.sample_rate, trainer.batch_size, trainer.seed
        )
        batches = Batches(
            range(self.done, trainer.steps), trainer.batch_size, self.rank, self.processes
        )
        self.validation_audio = self.read_validation()
        since, timed, stopping = time.monotonic(), 0, False
        with Stop() as stop:
            loaded = loader(excerpts, batches, self.workers, pin_memory=self.device.type == "cuda")
            for batch in moved(loaded, self.device):
                self.unreadable.update(batch["unreadable"])
                torch.manual_seed(step_seed(trainer.seed, self.done, self.rank))
                losses = self.step(batch["audio"], self.done)
                self.done, timed = self.done + 1, timed + 1
                self.log.advance(self.done)

                last = self.done == trainer.steps
                if self.done % trainer.log_every == 0 or last:
                    self.report(losses, timed / (time.monotonic() - since))
                    since, timed = time.monotonic(), 0
                stopping = self.agreed(stop.received)
                if self.validation and (self.done % trainer.validate_every == 0 or last):
                    self.validate()
                    since, timed = time.monotonic(), 0
                if self.done % trainer.sample_every == 0 or last:
                    self.show_samples()
                if self.done % trainer.save_every == 0 or last or stopping:
                    self.save(must=last or stopping)
                if stopping:
                    break
        if self.unreadable and self.rank == 0:
            self.log.note(
                f"{len(self.unreadable)} unreadable files were skipped, see {self.folder / 'unreadable.txt'}"
            )
        # Another process may be the one that received it.
        received = (stop.received or signal.SIGTERM) if stopping else None
        skipped = int(self.step.skipped["total"])
        return Summary(self.folder, self.done, received, self.best, skipped, self.unreadable)

    def agreed(self, received: int | None) -> bool:
        """Whether to stop now. Several processes have to agree on it, so these ask each other at logged steps only."""
        if self.processes == 1:
            return received is not None
        if self.done % self.recipe.trainer.log_every:
            return False
        flag = torch.tensor(float(received is not None), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def report(self, losses: dict[str, Tensor], steps_per_second: float):
        """Logs a step; raises TrainingError where too many in a row had to be skipped."""
        used = codebook_statistics(self.step.code_counts)
        self.step.code_counts.zero_()
        names = list(losses)
        values = dict(
            zip(names, torch.stack([losses[name].double() for name in names]).tolist(), strict=True)
        )
        values |= used | {
            "skipped": int(self.step.skipped["total"]),
            "learning_rate": float(self.step.optimizers["generator"].param_groups[0]["lr"]),
            "steps_per_second": steps_per_second,
        }
        if self.rank == 0:
            self.log.values(self.done, "train", values)
        longest, most = int(self.step.skipped["longest"]), self.recipe.trainer.max_nonfinite
        if longest >= most:
            raise TrainingError(
                f"step {self.done}: gradients not finite {longest} steps in a row, trainer.max_nonfinite is {most};"
                " a lower optimizer.learning_rate may help, or trainer.precision=fp32"
            )

    def read_validation(self) -> list[Tensor]:
        """This process's part of the validation excerpts, in batches [B, 1, T]."""
        data = self.recipe.data
        if not self.validation:
            return []
        excerpts = Excerpts(
            self.validation,
            data,
            self.recipe.model.sample_rate,
            batch_size=data.validation_items,
            seed=0,
            seconds=data.validation_seconds,
            phase_shift=False,
        )
        items = list(range(self.rank, data.validation_items, self.processes))
        batches = [items[i : i + VALIDATION_BATCH] for i in range(0, len(items), VALIDATION_BATCH)]
        audio = []
        for batch in loader(excerpts, batches, self.workers):
            self.unreadable.update(batch["unreadable"])
            audio.append(batch["audio"])
        return audio

    @torch.no_grad()
    def validate(self):
        """Logs the metrics over the validation excerpts, and keeps the codec if it is the best so far."""
        codec, model = self.step.best_codec().eval(), self.recipe.model
        sums = torch.zeros(4, dtype=torch.float64)
        counts = torch.zeros(model.n_codebooks, model.codebook_size, dtype=torch.int64)
        for audio in self.validation_audio:
            out = codec(audio.to(self.device))
            restored = out["audio"].float().cpu()
            measured = (
                mel_distance(restored, audio, model.sample_rate),
                stft_distance(restored, audio),
            )
            # Silence has no ratio.
            ratio = si_sdr(audio, restored).nan_to_num()
            sums += torch.stack([*measured, ratio, torch.ones(())]).double() * len(audio)
            counts += codebook_counts(out["codes"].cpu(), model.codebook_size)
        if self.processes > 1:
            for total in (sums, counts):
                moved = total.to(self.device)
                dist.all_reduce(moved)
                total.copy_(moved)
        mel, stft, ratio = (sums[:3] / sums[3]).tolist()
        values = {
            "mel_distance": mel,
            "stft_distance": stft,
            "si_sdr": ratio,
            **codebook_statistics(counts),
        }
        improved = self.best is None or mel < self.best
        self.best = mel if improved else self.best
        if self.rank == 0:
            self.log.values(self.done, "validation", values)
            if improved:
                self.keep_going_without_disk(lambda: codec.save(self.folder / "best.safetensors"))

    @torch.no_grad()
    def show_samples(self):
        """Puts the first validation excerpts, original and restored, into TensorBoard."""
        if self.rank or not self.validation_audio:
            return
        codec = self.step.best_codec().eval()
        for i, audio in enumerate(self.validation_audio[0][: self.recipe.trainer.samples]):
            restored = codec(audio[None].to(self.device))["audio"][0, 0]
            self.log.audio(self.done, f"sample_{i}/original", audio[0], codec.sample_rate)
            self.log.audio(self.done, f"sample_{i}/restored", restored, codec.sample_rate)

    def save(self, must: bool):
        """Writes a checkpoint and the codec; without disk space, a run only stops at its end."""
        if self.rank:
            return
        trainer = self.recipe.trainer
        content = {**self.step.state_dict(), "best": self.best, "unreadable": self.unreadable}

        def write():
            state.save(
                self.folder, self.done, self.recipe, content, trainer.keep_last, trainer.keep_steps
            )
            self.step.best_codec().save(self.folder / "codec.safetensors")
            if self.unreadable:
                with atomic_path(self.folder / "unreadable.txt") as temporary:
                    lines = [
                        f"{path}\t{reason}\n" for path, reason in sorted(self.unreadable.items())
                    ]
                    temporary.write_text("".join(lines))

        if must:
            write()
        else:
            self.keep_going_without_disk(write)

    def keep_going_without_disk(self, write):
        """Calls `write`; a disk that is full now may not be at the next checkpoint, so that is a line, not the end."""
        try:
            write()
        except OSError as error:
            self.log.note(f"step {self.done}: not saved: {error}")


class Stop:
    """While active, the first SIGTERM or SIGINT is only remembered, in `received`; another SIGINT interrupts."""

    def __init__(self):
        self.received = None

    def __enter__(self) -> "Stop":
        # Signals can be handled in the main thread only; elsewhere somebody else is in charge of them.
        main = threading.current_thread() is threading.main_thread()
        self._before = {
            s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT) if main
        }
        return self

    def _remember(self, number, _):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what a process draws in a step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def codebook_statistics(counts: Tensor) -> dict[str, float]:
    """Bitrate efficiency, and the share of all entries that were used, from counts [N, K]."""
    if not counts.any():
        return {}
    size = counts.shape[1]
    efficiency = codebook_entropy(counts.cpu()).mean() / np.log2(size)
    return {
        "bitrate_efficiency": float(efficiency),
        "codebook_usage": float((counts > 0).double().mean()),
    }

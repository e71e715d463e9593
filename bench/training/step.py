"""`python -m bench train`: the training step, published composition against ours, as a whole and part by part.

Every implementation starts from the same weights and gets the same batch, made up; batches of real audio are timed by
`--data`. The result file is one JSON document: `environment` and `limits` as in run.py, and

    rows    one per batch size, precision and implementation: step_ms, steps_s, `parts` (ms of each part of the step),
            `discriminators` (ms of an update's passes through each of them, alone), `work` (per part: its flops and
            bytes, and the floor they set), peak_bytes of GPU memory, and saved_peak_bytes that autograd kept
    data    excerpts per second and worker, where a folder was given
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import timing
from bench.document import SCHEMA, environment, write
from bench.peers.published_step import PublishedStep
from bench.training.saved import SavedBytes
from dac_fast.discriminators import MRD
from dac_fast.training.recipe import Recipe, load_recipe
from dac_fast.training.step import TrainingStep

IMPLEMENTATIONS = ("published", "published, compiled", "ours", "ours, CUDA graph")
# What both targets compare, should time not suffice for more.
FIRST = (("published", "fp32"), ("ours", "bf16"))
# A codec and discriminators that run in a moment, for the bench's own test.
QUICK = (
    "model.encoder_dim=4", "model.encoder_rates=[2,4]", "model.decoder_dim=16", "model.decoder_rates=[4,2]",
    "model.n_codebooks=2", "model.codebook_size=16", "discriminator.periods=[]", "discriminator.fft_sizes=[128]",
    "data.seconds=0.1",
)  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """What to time.

    Attributes:
        device: "cpu" or "cuda".
        recipe: whose model, discriminators and losses.
        overrides: of it.
        batches: items per step. precisions: "fp32", "bf16".
        implementations: of `IMPLEMENTATIONS`.
        seconds: of timing per row, about.
        count_only: count what a step computes and keeps, and time nothing.
        data: folder of audio, whose reading is timed too; None: it is not.
        quick: measure the device's limits in a moment, too, for the bench's own test.
    """

    device: str
    recipe: str
    overrides: Sequence[str]
    batches: Sequence[int]
    precisions: Sequence[str]
    implementations: Sequence[str]
    seconds: float = 5.0
    count_only: bool = False
    data: Path | None = None
    quick: bool = False


def run_train(
    settings: TrainSettings, path: Path, budget: float | None = None, commit: str | None = None
):
    """Time everything and write the document to `path`, again after every row.

    Args:
        budget: seconds; a row is not started after that many.
        commit: see `environment`.
    """
    start = time.monotonic()
    if settings.device == "cuda":
        # As both trainers do.
        torch.backends.cudnn.benchmark = True
    recipe = load_recipe(settings.recipe, settings.overrides)
    document = {
        "schema": SCHEMA,
        "environment": environment(settings.device, commit),
        "limits": timing.limits(settings.device, settings.quick),
        "recipe": recipe.to_dict(),
        "rows": [],
        "not_run": [],
    }
    if settings.data:
        document["data"] = time_data(recipe, settings.data, settings.seconds)
    for batch, group in product(settings.batches, groups(settings)):
        rows = [
            {"batch": batch, "precision": precision, "implementation": name}
            for name, precision in group
        ]
        if budget is not None and time.monotonic() - start > budget:
            document["not_run"] += rows
            continue
        measure_rows(rows, recipe, settings, document["limits"])
        document["rows"] += rows
        write(document, path)
        for row in rows:
            result = (
                f"{row['step_ms']:.1f} ms" if "step_ms" in row else row.get("reason", row["status"])
            )
            print(
                f"batch {batch}, {row['precision']}, {row['implementation']}: {result}", flush=True
            )
        if any(row["implementation"] == "published, compiled" for row in rows):
            torch._dynamo.reset()
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    write(document, path)


def groups(settings: TrainSettings) -> list[list[tuple[str, str]]]:
    """Implementations and their precisions, in the order of interest; those of a group take turns.

    On the CPU all of a precision do, so that a machine that slows down slows all; on a GPU each has it for itself.
    """
    if settings.device == "cpu":
        return [
            [(name, precision) for name in settings.implementations]
            for precision in settings.precisions
        ]
    pairs = product(settings.implementations, settings.precisions)
    # Compiling takes minutes.
    return [
        [pair]
        for pair in sorted(
            pairs, key=lambda pair: (pair not in FIRST, pair[0] == "published, compiled")
        )
    ]


def made_up_audio(recipe: Recipe, items: int, seed: int = 0) -> Tensor:
    """A batch [B, 1, T] of decaying harmonic tones over noise."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(items, 1, 1, generator=random)

    samples, rate = int(recipe.data.seconds * recipe.model.sample_rate), recipe.model.sample_rate
    t = torch.arange(samples) / rate
    phase = 2 * torch.pi * uniform(80, 800) * t * torch.arange(1, 9)[:, None] + uniform(0, 6)
    # No partial beyond half the sample rate: the eighth of 800 Hz lies at 6.4 kHz.
    tones = (torch.sin(phase) / torch.arange(1, 9)[:, None]).sum(1, keepdim=True) * torch.exp(
        -uniform(0, 10) * t
    )
    noise = torch.randn(items, 1, samples, generator=random)
    return 0.2 * tones + uniform(0.001, 0.05) * noise


def make_step(name: str, recipe: Recipe, device: torch.device, precision: str):
    """A step by its name, all with the weights that the recipe's seed draws."""
    if name == "ours, CUDA graph":
        recipe = replace(recipe, trainer=replace(recipe.trainer, cuda_graph=True))
    ours = TrainingStep(recipe, device, precision)
    if not name.startswith("published"):
        return ours
    theirs = PublishedStep(recipe, device, precision)
    for key, network in theirs.networks.items():
        network.load_state_dict(ours.state_dict()["networks"][key])
    if name == "published, compiled":
        theirs.compile()
    return theirs


def measure_rows(rows: list[dict], recipe: Recipe, settings: TrainSettings, limits: dict):
    """Completes rows of one batch size and precision; what fails is reported in its row, and the others go on."""
    device, batch, precision = torch.device(settings.device), rows[0]["batch"], rows[0]["precision"]
    audio = made_up_audio(recipe, batch).to(device)
    steps = {}

    def attempt(row: dict, measure: Callable[[str], dict]):
        try:
            row |= measure(row["implementation"])
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {reason}"}
            steps.pop(row["implementation"], None)

    def start(name) -> dict:
        steps[name] = make_step(name, recipe, device, precision)
        if settings.count_only:
            return {"status": "counted"} | count_work(steps[name], audio, limits, precision)
        for number in range(5 if audio.is_cuda else 2):
            steps[name](audio, number)
        return {"status": "timed"}

    def take_apart(name) -> dict:
        discriminators = time_discriminators(steps[name], audio)
        return {"parts": parts[name], "discriminators": discriminators} | count_work(
            steps[name], audio, limits, precision
        )

    for row in rows:
        attempt(row, start)
    if settings.count_only:
        return
    if audio.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = take_turns(steps, audio, settings.seconds)
    # A graph is one part, and what torch.compile made of a step does not show its tensors.
    parts = time_parts(
        {name: steps[name] for name in ("published", "ours") if name in steps}, audio
    )
    for row in rows:
        name = row["implementation"]
        if name not in steps:
            continue
        row |= timing.summary(times[name])
        row |= {"step_ms": row["p50_ms"], "steps_s": 1e3 / row["p50_ms"]}
        if audio.is_cuda:
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        if name in parts:
            attempt(row, take_apart)


def take_turns(steps: dict, audio: Tensor, seconds: float) -> dict[str, list[list[float]]]:
    """Per step and round, milliseconds by the wall clock; on a GPU means of five steps that nothing waits between."""
    times, count = {name: [] for name in steps}, 5 if audio.is_cuda else 1
    end = time.monotonic() + seconds * len(steps)
    rounds = 0
    while steps and (time.monotonic() < end or rounds < 3):
        for name, step in steps.items():
            if audio.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                step(audio, 10)
            if audio.is_cuda:
                torch.cuda.synchronize()
            times[name].append([(time.perf_counter() - start) * 1e3 / count])
        rounds += 1
    return times


def time_data(recipe: Recipe, folder: Path, seconds: float) -> dict:
    """How many excerpts of a folder's audio one process reads and augments per second."""
    from dac_fast.training.data import Excerpts
    from dac_fast.training.split import find_files

    rate = recipe.model.sample_rate
    files, unreadable = find_files(str(folder), rate, recipe.data.full_band)
    excerpts = Excerpts(files, recipe.data, rate, recipe.trainer.batch_size, recipe.trainer.seed)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        excerpts[count]
        count += 1
    per_second = count / (time.perf_counter() - start)
    return {"files": len(files), "unreadable": len(unreadable), "excerpts_s_per_worker": per_second}


class Clock:
    """Milliseconds between the marks of a step: on a GPU its own, between events."""

    def __init__(self, on_gpu: bool):
        self.on_gpu, self.marks = on_gpu, []

    def mark(self, part: str):
        """The next part begins."""
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((part, now))

    def parts(self) -> dict[str, float]:
        """Per part, the sum of its times, the last one up to now."""
        self.mark("")
        if self.on_gpu:
            torch.cuda.synchronize()
        sums = defaultdict(float)
        for (part, begin), (_, end) in pairwise(self.marks):
            sums[part] += begin.elapsed_time(end) if self.on_gpu else (end - begin) * 1e3
        return sums


def time_parts(steps: dict, audio: Tensor, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Per step and part, the median of its milliseconds over rounds in which the steps take turns."""
    runs = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            clock = Clock(audio.is_cuda)
            step.mark = clock.mark
            step(audio, 10)
            runs[name].append(clock.parts())
            step.mark = lambda part: None
    return {
        name: {part: float(np.median([run[part] for run in of_step])) for part in of_step[0]}
        for name, of_step in runs.items()
    }


def time_discriminators(step, audio: Tensor) -> dict[str, float]:
    """Milliseconds of what an update of the discriminator takes in each of them: forward and backward, two signals."""
    discriminators = step.discriminator.discriminators
    if isinstance(step, PublishedStep):
        signals = [step.discriminator.inputs(audio) for _ in range(2)]
        passes = [[signal[i] for signal in signals] for i in range(len(discriminators))]
    else:
        with step.autocast():
            spectra = step.discriminator.spectra(torch.cat([audio, audio]))
        bands = iter(spectra.bands)
        passes = [[next(bands) if isinstance(d, MRD) else spectra.audio] for d in discriminators]
    times = {}
    for d, inputs in zip(discriminators, passes, strict=True):

        def run(d=d, inputs=inputs):
            with step.autocast():
                maps = [m for x in inputs for m in d(x)]
            # Scores and maps both get gradients in a step.
            torch.autograd.backward([m.float().mean() for m in maps])

        sample = timing.sampler(run, audio.device.type)
        sample(2)
        times[_name(d)] = float(np.median(sample(5 if audio.is_cuda else 3)))
        step.discriminator.zero_grad()
    return times


def _name(d: torch.nn.Module) -> str:
    if hasattr(d, "period"):
        return f"period {d.period}"
    return f"window {d.window_length if isinstance(d, MRD) else d.window}"


def count_work(step, audio: Tensor, limits: dict, precision: str) -> dict:
    """`work`: per part of a step, its floor, and what sets it; saved_peak_bytes: the most that autograd kept at once.

    flops: of matrix products and convolutions. bytes: forward, tensors kept for the backward pass, written once;
    backward, the same, read once; optimizers: parameters, gradients and moments. floor_ms: the larger of what both
    take at the measured limits.
    """
    saved, totals, counter = SavedBytes(), [], FlopCounterMode(display=False)

    def mark(part):
        totals.append((part, counter.get_total_flops(), saved.moved))

    step.mark = mark
    with counter, saved:
        step(audio, 10)
        mark("")
    step.mark = lambda part: None
    flops, moved = defaultdict(int), defaultdict(int)
    for (part, f, m), (_, next_f, next_m) in pairwise(totals):
        flops[part] += next_f - f
        moved[part] += next_m - m
    parameters = sum(
        p.numel() for network in (step.codec, step.discriminator) for p in network.parameters()
    )
    # Read and written: the parameters and two moments; read: the gradients.
    moved["optimizers"] = 7 * 4 * parameters
    rate = limits["matmul_tflop_s"][
        "bfloat16" if precision == "bf16" and audio.is_cuda else "float32"
    ]
    work = {}
    for part in flops:
        floor = max(flops[part] / rate / 1e9, moved[part] / limits["copy_gb_s"] / 1e6)
        work[part] = {"flops": flops[part], "bytes": moved[part], "floor_ms": floor}
    return {"work": work, "saved_peak_bytes": saved.peak}

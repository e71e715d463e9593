"""`python -m bench train`: the training step, the published one and ours, whole and in parts.

All peers start from the same weights and get the same batch, which is made up; reading real audio
is timed by `--data`. The result file is one JSON document: `environment` and `limits` as in run.py,
`recipe`, and

    rows    one per batch size, precision and peer: step_ms, steps_s, `parts` (ms of each part of
            the step), `discriminators` (ms of each of them in its update, alone), `work` (per part
            its flops and bytes, and the floor that they set), peak_bytes of GPU memory, and
            saved_peak_bytes that autograd kept
    data    excerpts per second and worker, where a folder was given
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from bench import timing
from bench.document import SCHEMA, Json, environment, one_line, write
from bench.peers.published_step import PublishedStep
from bench.training.parts import AnyStep, count_work, time_discriminators, time_parts
from bench.training.report import label
from dac_fast.training.data import Excerpts
from dac_fast.training.recipe import Recipe
from dac_fast.training.split import find_files
from dac_fast.training.step import TrainingStep

COMPILED = "published, compiled"
GRAPHED = "ours, CUDA graph"
# Off CUDA there are no graphs.
PEERS = {
    "cpu": ("published", COMPILED, "ours"),
    "cuda": ("published", COMPILED, "ours", GRAPHED),
}
# A graph is one part, and compiled code does not show what it keeps: only these are taken apart.
TAKEN_APART = ("published", "ours")
# The pairs that matter most, should time not suffice for more.
FIRST = (("published", "fp32"), ("ours", "bf16"))
# Overrides that make any recipe run in a moment, for the test of the benchmark itself.
QUICK = (
    "model.encoder_dim=4",
    "model.encoder_rates=[2,4]",
    "model.decoder_dim=16",
    "model.decoder_rates=[4,2]",
    "model.n_codebooks=2",
    "model.codebook_size=16",
    "discriminator.periods=[]",
    "discriminator.fft_sizes=[128]",
    "data.seconds=0.1",
)


@dataclass(frozen=True)
class TrainSettings:
    """What to time.

    Attributes:
        device: "cpu" or "cuda".
        recipe: whose model, discriminators and losses.
        batches: items per step.
        precisions: "fp32", "bf16".
        peers: of `PEERS`.
        seconds: of timing per row, about.
        count_only: whether only flops and memory are counted, and nothing is timed.
        data: folder of audio, whose reading is timed too; None: it is not.
        quick: whether the device's limits, too, are measured in a moment.
    """

    device: str
    recipe: Recipe
    batches: Sequence[int]
    precisions: Sequence[str]
    peers: Sequence[str]
    seconds: float = 5.0
    count_only: bool = False
    data: Path | None = None
    quick: bool = False


def run_train(
    settings: TrainSettings, path: Path, budget: float | None = None, commit: str | None = None
) -> None:
    """Times everything and writes the document, again after every group of rows.

    Args:
        settings: what to time.
        path: of the document.
        budget: seconds after which no group is started.
        commit: see `environment`.
    """
    start = time.monotonic()
    if settings.device == "cuda":
        # Both trainers do so.
        torch.backends.cudnn.benchmark = True
    document: Json = {
        "schema": SCHEMA,
        "environment": environment(settings.device, commit, settings.quick),
        "limits": timing.limits(settings.device, settings.quick),
        "recipe": settings.recipe.to_dict(),
        "rows": [],
        "not_run": [],
    }
    if settings.data:
        document["data"] = time_data(settings.recipe, settings.data, settings.seconds)
    for batch, group in product(settings.batches, groups(settings)):
        rows = [
            {"batch": batch, "precision": precision, "implementation": name}
            for name, precision in group
        ]
        if budget is not None and time.monotonic() - start > budget:
            document["not_run"] += rows
            continue
        measure_rows(rows, settings, document["limits"])
        document["rows"] += rows
        write(document, path)
        print_rows(rows)
        if any(name == COMPILED for name, _ in group):
            torch._dynamo.reset()
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    write(document, path)


def groups(settings: TrainSettings) -> list[list[tuple[str, str]]]:
    """Peers and their precisions, in the order of interest; those of a group take turns.

    On the CPU all of a precision do, so that a machine that slows down slows all; on a GPU each
    peer has the memory for itself.
    """
    if settings.device == "cpu":
        return [[(name, precision) for name in settings.peers] for precision in settings.precisions]
    # Compiling takes minutes, so it comes last.
    pairs = sorted(
        product(settings.peers, settings.precisions),
        key=lambda pair: (pair not in FIRST, pair[0] == COMPILED),
    )
    return [[pair] for pair in pairs]


def measure_rows(rows: list[Json], settings: TrainSettings, limits: Json) -> None:
    """Completes rows of one batch size and precision.

    A peer that fails is reported in its row, and the others go on.
    """
    batch, precision = rows[0]["batch"], rows[0]["precision"]
    device = torch.device(settings.device)
    audio = made_up_audio(settings.recipe, batch).to(device)
    steps: dict[str, AnyStep] = {}

    def attempt(row: Json, measure: Callable[[str], Json]) -> None:
        try:
            row |= measure(row["implementation"])
        except Exception as error:
            row |= {"status": "failed", "reason": one_line(error)}
            steps.pop(row["implementation"], None)

    def start(name: str) -> Json:
        steps[name] = make_step(name, settings.recipe, device, precision)
        if settings.count_only:
            return {"status": "counted"} | count_work(steps[name], audio, limits, precision)
        for number in range(5 if audio.is_cuda else 2):
            steps[name](audio, number)
        return {"status": "timed"}

    def take_apart(name: str) -> Json:
        discriminators = time_discriminators(steps[name], audio)
        work = count_work(steps[name], audio, limits, precision)
        return {"parts": parts[name], "discriminators": discriminators} | work

    for row in rows:
        attempt(row, start)
    if settings.count_only:
        return
    if audio.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = take_turns(steps, audio, settings.seconds)
    parts = time_parts({name: steps[name] for name in TAKEN_APART if name in steps}, audio)
    for row in rows:
        name = row["implementation"]
        if name not in steps:
            continue
        row |= timing.summary(times[name])
        row |= {"step_ms": row["p50_ms"], "steps_s": 1e3 / row["p50_ms"]}
        if audio.is_cuda:
            torch.cuda.empty_cache()
            # What a graph works in is held by it, and counts as reserved alone.
            peak = torch.cuda.max_memory_allocated()
            row["peak_bytes"] = max(peak, torch.cuda.memory_reserved())
        if name in parts:
            attempt(row, take_apart)


def make_step(name: str, recipe: Recipe, device: torch.device, precision: str) -> AnyStep:
    """The step of a peer; all start from the weights that the recipe's seed draws."""
    if name == GRAPHED:
        recipe = replace(recipe, trainer=replace(recipe.trainer, cuda_graph=True))
    ours = TrainingStep(recipe, device, precision)
    if not name.startswith("published"):
        return ours
    theirs = PublishedStep(recipe, device, precision)
    for key, network in theirs.networks.items():
        network.load_state_dict(ours.state_dict()["networks"][key])
    if name == COMPILED:
        theirs.compile()
    return theirs


def made_up_audio(recipe: Recipe, items: int, seed: int = 0) -> Tensor:
    """A batch [B, 1, T] of decaying harmonic tones over noise."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(items, 1, 1, generator=generator)

    rate = recipe.model.sample_rate
    samples = int(recipe.data.seconds * rate)
    t = torch.arange(samples) / rate
    # The highest partial, the eighth of 800 Hz, stays below half of any preset's sample rate.
    partials = torch.arange(1, 9)[:, None]
    phase = 2 * torch.pi * uniform(80, 800) * t * partials + uniform(0, 6)
    tones = (torch.sin(phase) / partials).sum(1, keepdim=True) * torch.exp(-uniform(0, 10) * t)
    noise = torch.randn(items, 1, samples, generator=generator)
    return 0.2 * tones + uniform(0.001, 0.05) * noise


def take_turns(
    steps: Mapping[str, AnyStep], audio: Tensor, seconds: float
) -> dict[str, list[list[float]]]:
    """Milliseconds per step and round, by the wall clock.

    On a GPU they are means of five steps, between which nothing waits for the device.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in steps}
    count = 5 if audio.is_cuda else 1
    end = time.monotonic() + seconds * len(steps)
    rounds = 0
    while steps and (time.monotonic() < end or rounds < 3):
        for name, step in steps.items():
            timing.synchronize(audio.device.type)
            start = time.perf_counter()
            for _ in range(count):
                step(audio, 10)
            timing.synchronize(audio.device.type)
            times[name].append([(time.perf_counter() - start) * 1e3 / count])
        rounds += 1
    return times


def time_data(recipe: Recipe, folder: Path, seconds: float) -> Json:
    """How many excerpts of a folder's audio one process reads and augments per second."""
    rate = recipe.model.sample_rate
    files, unreadable = find_files(str(folder), rate, recipe.data.full_band)
    excerpts = Excerpts(files, recipe.data, rate, recipe.trainer.batch_size, recipe.trainer.seed)
    count = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        excerpts[count]
        count += 1
    per_second = count / (time.perf_counter() - start)
    return {"files": len(files), "unreadable": len(unreadable), "excerpts_s_per_worker": per_second}


def print_rows(rows: Sequence[Json]) -> None:
    """Prints a line per row."""
    for row in rows:
        timed = "step_ms" in row
        result = f"{row['step_ms']:.1f} ms" if timed else row.get("reason", row["status"])
        print(f"{label(row)}: {result}", flush=True)

"""The parts of a training step: how long each takes, what it computes and keeps, and its floor."""

import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import timing
from bench.document import Json
from bench.peers.published_step import PublishedStep
from bench.training.saved import SavedBytes
from dac_fast.discriminators import MRD
from dac_fast.training.step import TrainingStep

AnyStep = PublishedStep | TrainingStep


class Clock:
    """The time between the marks of a step: on a GPU its own, between events."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        # A part, and the event or the second at which it began.
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Begins the next part."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def parts(self) -> dict[str, float]:
        """Milliseconds per part, the last one up to now; a part that comes twice has their sum."""
        self.mark("")
        if self.on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = defaultdict(float)
        for (part, begin), (_, end) in pairwise(self.marks):
            sums[part] += begin.elapsed_time(end) if self.on_gpu else (end - begin) * 1e3
        return sums


def time_parts(
    steps: Mapping[str, AnyStep], audio: Tensor, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """Milliseconds per step and part: medians over rounds in which the steps take turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
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


def time_discriminators(step: AnyStep, audio: Tensor) -> dict[str, float]:
    """Milliseconds of each discriminator in its update: forward and backward, of two signals."""
    discriminators = step.discriminator.discriminators
    if isinstance(step, PublishedStep):
        signals = [step.discriminator.inputs(audio) for _ in range(2)]
        passes = [[signal[i] for signal in signals] for i in range(len(discriminators))]
    else:
        with step.autocast():
            spectra = step.discriminator.spectra(torch.cat([audio, audio]))
        bands = iter(spectra.bands)
        passes = [
            [next(bands) if isinstance(each, MRD) else spectra.audio] for each in discriminators
        ]
    times = {}
    for discriminator, inputs in zip(discriminators, passes, strict=True):

        def run(discriminator: nn.Module = discriminator, inputs: list[Tensor] = inputs) -> None:
            with step.autocast():
                maps = [feature for x in inputs for feature in discriminator(x)]
            # Scores and maps both get gradients in a step.
            torch.autograd.backward([feature.float().mean() for feature in maps])

        sample = timing.sampler(run, audio.device.type)
        sample(2)
        times[_name(discriminator)] = float(np.median(sample(5 if audio.is_cuda else 3)))
        step.discriminator.zero_grad()
    return times


def _name(discriminator: nn.Module) -> str:
    if hasattr(discriminator, "period"):
        return f"period {discriminator.period}"
    ours = isinstance(discriminator, MRD)
    return f"window {discriminator.window_length if ours else discriminator.window}"


def count_work(step: AnyStep, audio: Tensor, limits: Json, precision: str) -> Json:
    """What a step computes and keeps.

    Returns:
        work: per part `flops`, of matrix products and convolutions; `bytes`; and `floor_ms`, the
            larger of what both take at the measured limits. The bytes of a forward pass are the
            tensors kept for the backward pass, written once; of a backward pass the same, read
            once; of the optimizers parameters, gradients and moments.
        saved_peak_bytes: the most that autograd kept at once.
    """
    saved = SavedBytes()
    counter = FlopCounterMode(display=False)
    totals: list[tuple[str, int, int]] = []

    def mark(part: str) -> None:
        totals.append((part, counter.get_total_flops(), saved.moved))

    step.mark = mark
    with counter, saved:
        step(audio, 10)
        mark("")
    step.mark = lambda part: None
    flops: dict[str, int] = defaultdict(int)
    moved: dict[str, int] = defaultdict(int)
    for (part, flops_before, moved_before), (_, flops_after, moved_after) in pairwise(totals):
        flops[part] += flops_after - flops_before
        moved[part] += moved_after - moved_before
    networks = (step.codec, step.discriminator)
    parameters = sum(p.numel() for network in networks for p in network.parameters())
    # Parameters and two moments are read and written, gradients read.
    moved["optimizers"] = 7 * 4 * parameters
    products = "float32"
    if audio.is_cuda and precision == "bf16":
        products = "bfloat16"
    elif audio.is_cuda and torch.backends.cudnn.allow_tf32:
        # PyTorch's default for convolutions, and nearly all of a step's products are theirs.
        products = "tf32"
    rate = limits["matmul_tflop_s"][products]
    work = {}
    for part in flops:
        floor = max(flops[part] / rate / 1e9, moved[part] / limits["copy_gb_s"] / 1e6)
        work[part] = {"flops": flops[part], "bytes": moved[part], "floor_ms": floor}
    return {"work": work, "saved_peak_bytes": saved.peak}

"""Timing of one iteration, in milliseconds, and of what the device can do at best.

All providers of a case are timed in interleaved rounds of one run, so that the ratio of two of them is taken between
neighbours in time: a machine that slows down slows both.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from dac_fast.ops.precision import float32_products

# Larger than any GPU's L2 cache (60 MB on an H200): writing it evicts the inputs that the last iteration left there.
FLUSH_BYTES = 256 * 2**20


def sampler(run: Callable, device: str) -> Callable[[int], list[float]]:
    """A function of n that runs `run` n times and returns each one's milliseconds.

    CUDA: events around each call, the L2 cache flushed before it; the flush also keeps the GPU busy while the CPU
    launches, so the time is the GPU's. CPU: wall clock, nothing flushed.
    """
    if device == "cpu":
        return lambda n: [_wall_clock(run) for _ in range(n)]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def sample(n):
        events = []
        for _ in range(n):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    return sample


def request_sampler(run: Callable, device: str) -> Callable[[int], list[float]]:
    """As `sampler`, but each one's milliseconds are those that a caller waits for its result, wall clock."""
    return lambda n: [_wall_clock(run, device) for _ in range(n)]


def _wall_clock(run: Callable, device: str = "cpu") -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def synchronize(device: str):
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


class Start:
    """Measures, as a context manager, a provider's start and first call.

    Attributes:
        facts: `start_s`, seconds; on CUDA also `peak_bytes`, beyond what was held before: the most that tensors held,
            or what is held at the end, the memory of CUDA graphs included, where that is more.
    """

    def __init__(self, device: str):
        self._device, self.facts = device, {}

    def __enter__(self):
        synchronize(self._device)
        if self._device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        synchronize(self._device)
        self.facts["start_s"] = time.perf_counter() - self._start
        if self._device != "cpu":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
            allocated, reserved = self._before
            self.facts["peak_bytes"] = max(
                peak - allocated, torch.cuda.memory_reserved() - reserved
            )


def measure(
    samplers: dict[str, Callable], seconds: float, rounds: int
) -> dict[str, list[list[float]]]:
    """Milliseconds of every iteration, per provider and round.

    Args:
        samplers: per provider, what `sampler` returns; already warm.
        seconds: to spend on each provider, about; at least one iteration a round is made.
        rounds: how often the providers take turns.
    """
    counts = {}
    for name, sample in samplers.items():
        # Two at least: what compiles on the first calls (TorchScript: the second) is slow on those only.
        once = min(sample(2))
        if once < 100:
            once = min(sample(5))
        counts[name] = int(min(max(seconds * 1e3 / rounds / max(once, 1e-6), 1), 200))
    samples = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            samples[name].append(sample(counts[name]))
    return samples


def summary(rounds: list[list[float]]) -> dict:
    """Percentiles over all iterations (20, 50, 80, 99), and the median of each round, in milliseconds."""
    p20, p50, p80, p99 = np.percentile(np.concatenate(rounds), (20, 50, 80, 99))
    return {
        "p20_ms": float(p20),
        "p50_ms": float(p50),
        "p80_ms": float(p80),
        "p99_ms": float(p99),
        "iterations": sum(map(len, rounds)),
        "round_ms": [float(np.median(r)) for r in rounds],
    }


def limits(device: str, quick: bool = False) -> dict:
    """What the device does at best here and now: a large copy, and a large matrix product per dtype.

    Returns:
        copy_gb_s: bytes read plus bytes written, per second. matmul_tflop_s: per dtype, and on CUDA of "tf32".
    """
    on_gpu = device != "cpu"
    copied = 2**22 if quick else 2**30 if on_gpu else 2**28
    n = 256 if quick else 8192 if on_gpu else 2048
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if on_gpu else (torch.float32,)
    with float32_products(tf32=False):
        products = {
            str(dtype).removeprefix("torch."): _matmul(n, dtype, device) for dtype in dtypes
        }
    if on_gpu:
        with float32_products(tf32=True):
            products["tf32"] = _matmul(n, torch.float32, device)
    return {"copy_gb_s": _copy(copied, device), "matmul_tflop_s": products}


def _copy(size: int, device: str) -> float:
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device) / 1e6


def _matmul(n: int, dtype: torch.dtype, device: str) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: a @ b, device) / 1e9


def _best(run: Callable, device: str) -> float:
    sample = sampler(run, device)
    sample(2)
    return float(np.median(sample(10)))

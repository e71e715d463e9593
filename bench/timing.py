"""The time of one call, in milliseconds, and what the device can do at best.

All peers of a case are timed in interleaved rounds of one run, so that the ratio of two of them is
taken between neighbours in time: a machine that slows down slows both.
"""

import time
from collections.abc import Callable
from types import TracebackType

import numpy as np
import torch

from bench.document import Json
from dac_fast.ops.precision import float32_products

# Times that many calls and returns the milliseconds of each.
Sampler = Callable[[int], list[float]]

# More than any GPU's L2 cache holds (60 MB on an H200): writing them evicts the last call's inputs.
FLUSH_BYTES = 256 * 2**20


def sampler(run: Callable[[], object], device: str) -> Sampler:
    """Times calls of `run` by the device's clock.

    CUDA: events around each call. The L2 cache is flushed before it, which also keeps the GPU busy
    while the CPU launches, so that launches do not count. CPU: wall clock, nothing is flushed.
    """
    if device == "cpu":
        return lambda n: [_wall_clock(run) for _ in range(n)]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def sample(n: int) -> list[float]:
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


def request_sampler(run: Callable[[], object], device: str) -> Sampler:
    """Times calls of `run` as a caller waits for each result, by the wall clock."""
    return lambda n: [_wall_clock(run, device) for _ in range(n)]


def _wall_clock(run: Callable[[], object], device: str = "cpu") -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def synchronize(device: str) -> None:
    """Waits until the device has done its work."""
    if device != "cpu":
        torch.cuda.synchronize()


class Start:
    """Measures a peer's start and first call, as a context manager.

    Attributes:
        facts: `start_s`, seconds. On CUDA also `peak_bytes`, beyond what was held before: the most
            that tensors held, or the memory held at the end, CUDA graphs included, if that is more.
    """

    def __init__(self, device: str):
        self.facts: Json = {}
        self._device = device

    def __enter__(self) -> "Start":
        synchronize(self._device)
        if self._device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        synchronize(self._device)
        self.facts["start_s"] = time.perf_counter() - self._start
        if self._device != "cpu":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
            allocated, reserved = self._before
            held = torch.cuda.memory_reserved() - reserved
            self.facts["peak_bytes"] = max(peak - allocated, held)


def measure(
    samplers: dict[str, Sampler], seconds: float, rounds: int
) -> dict[str, list[list[float]]]:
    """Milliseconds of every call, per peer and round.

    Args:
        samplers: per peer; the peers are warm already.
        seconds: to spend on each peer, about; every round has at least one call.
        rounds: in which the peers take turns.
    """
    counts = {}
    for name, sample in samplers.items():
        # A peer that compiles in its second call, as TorchScript does, is slow in two calls only.
        once = min(sample(2))
        if once < 100:
            once = min(sample(5))
        counts[name] = int(min(max(seconds * 1e3 / rounds / max(once, 1e-6), 1), 200))
    samples: dict[str, list[list[float]]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            samples[name].append(sample(counts[name]))
    return samples


def summary(rounds: list[list[float]]) -> Json:
    """Percentiles over all calls, and the median of each round, in milliseconds."""
    p20, p50, p80, p99 = np.percentile(np.concatenate(rounds), (20, 50, 80, 99))
    return {
        "p20_ms": float(p20),
        "p50_ms": float(p50),
        "p80_ms": float(p80),
        "p99_ms": float(p99),
        "iterations": sum(map(len, rounds)),
        "round_ms": [float(np.median(r)) for r in rounds],
    }


def limits(device: str, quick: bool = False) -> Json:
    """What the device does at best here and now: a large copy, and large products per dtype.

    On a CPU the products are matrix products (MKL's, which is slow on processors that are not
    Intel's) and a convolution with channels innermost (oneDNN's); the faster one counts.

    Returns:
        copy_gb_s: bytes read plus bytes written, per second.
        matmul_tflop_s: per dtype that the device multiplies, on CUDA with "tf32" as one of them.
    """
    on_gpu = device != "cpu"
    copied = 2**22 if quick else 2**30 if on_gpu else 2**28
    size = 256 if quick else 8192 if on_gpu else 2048
    # A CPU that does not multiply bfloat16 natively takes minutes for these products.
    cpu_halves = (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    halves = (torch.float16, torch.bfloat16) if on_gpu else cpu_halves
    products = {}
    with float32_products(tf32=False):
        for dtype in (torch.float32, *halves):
            rate = _matmul(size, dtype, device)
            if not on_gpu:
                rate = max(rate, _convolution(size, dtype))
            products[str(dtype).removeprefix("torch.")] = rate
    if on_gpu:
        with float32_products(tf32=True):
            products["tf32"] = _matmul(size, torch.float32, device)
    return {"copy_gb_s": _copy(copied, device), "matmul_tflop_s": products}


def _copy(size: int, device: str) -> float:
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device) / 1e6


def _matmul(size: int, dtype: torch.dtype, device: str) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device) / 1e9


def _convolution(size: int, dtype: torch.dtype) -> float:
    """oneDNN's convolution of 7 and 384 channels, a shape of the 44.1 kHz decoder.

    0 where there is no oneDNN, or none in bfloat16 on this processor.

    The weight is packed beforehand, by functions that torch has for its own compiler.
    """
    if not torch.backends.mkldnn.is_available():
        return 0.0
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0.0
    channels, taps, positions = 384, 7, 2 * size
    around = ([0, taps // 2], [1, 1], [1, 1], 1)
    x = torch.randn(1, channels, 1, positions).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 1, taps).to(dtype).to_mkldnn()
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *around, x.shape)
    convolve = torch.ops.mkldnn._convolution_pointwise
    milliseconds = _best(lambda: convolve(x, packed, None, *around, "none", [], ""), "cpu")
    return 2 * channels**2 * taps * positions / milliseconds / 1e9


def _best(run: Callable[[], object], device: str) -> float:
    sample = sampler(run, device)
    sample(2)
    return float(np.median(sample(10)))

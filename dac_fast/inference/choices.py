"""Which way a layer runs at which shape.

Which is fastest depends on the shape: inside `choosing`, each new shape of each layer is timed in
every way. An input takes the way that was fastest for the timed shape of the nearest size.
"""

import contextlib
import functools
import math
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from dac_kernels import native
from dac_kernels.launch import milliseconds
from torch import Tensor

from dac_fast import ops

# A layer's result y, and Snake of y; None where the next layer does not read it.
Result = tuple[Tensor | None, Tensor | None]
Way = Callable[[], Result]

# The ways that are no kernel of ours: by matrix products where a layer is one or two, by a
# convolution in two dimensions where it is, and by cuDNN with what follows fused.
LIBRARY, CONV2D, CUDNN = "library", "conv2d", "cudnn-fused"


@dataclass
class Choices:
    """The choices of one plan.

    Attributes:
        invariant: whether every layer runs by fused kernels, the same ones at every shape: their
            sums have one order, while the library's depends on the shape.
        timing: whether shapes that were not seen before are timed; never where invariant.
        times: layer name -> shape [B, C, T] of the input -> way -> milliseconds.
    """

    invariant: bool = False
    timing: bool = False
    times: dict[str, dict[tuple[int, ...], dict[str, float]]] = field(default_factory=dict)

    def ways(
        self, op: str, arguments: list[Any], options: dict[str, Any], others: dict[str, Way]
    ) -> dict[str, Way]:
        """The fused kernels that the backend in force has for an op, and other ways.

        Untimed, the first way runs: a kernel whose backend was named, or of the CPU, since that has
        no tiles to choose; else another way.

        Raises:
            BackendError: every layer has to be fused, and no kernel computes this one.
        """
        found = ops.implementations(op, *arguments, **options)
        fused: dict[str, Way] = {
            name: functools.partial(function, *arguments, **options)
            for name, function in found.items()
            if callable(function)
        }
        if self.invariant:
            ours = {name: way for name, way in others.items() if name not in (LIBRARY, CONV2D)}
            ways = fused | ours
            if not ways:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in found.items())
                raise ops.BackendError(f"no kernel runs {op} whatever the batch: {reasons}")
            return ways
        first = ops.backend() == "triton" or "native" in fused
        return fused | others if first else others | fused

    def run(self, layer: str, x: Tensor, ways: dict[str, Way]) -> Result:
        """Run the fastest of the layer's ways; without any times, the first one."""
        first = next(iter(ways.values()))
        if len(ways) == 1 or self.invariant:
            return first()
        shape, times = tuple(x.shape), self.times.setdefault(layer, {})
        if self.timing and shape not in times:
            with torch.cuda.device_of(x):
                times[shape] = _milliseconds(ways, x.is_cuda)
        if not times:
            return first()

        def distance(known: tuple[int, ...]) -> tuple[float, bool]:
            # Of the shapes of one size, the input's own comes first.
            return abs(math.log(math.prod(known) / max(x.numel(), 1))), known != shape

        nearest = times[min(times, key=distance)]
        return ways[min(ways, key=lambda name: nearest.get(name, math.inf))]()

    def table(self, precision: str) -> list[str]:
        """A line per layer and shape: every way's milliseconds, the fastest first."""
        rows = []
        for layer, shapes in self.times.items():
            for shape, times in shapes.items():
                fastest_first = sorted(times.items(), key=lambda item: item[1])
                ways = ", ".join(f"{name} {time:.4f} ms" for name, time in fastest_first)
                rows.append(f"{layer:28} {precision}  {' × '.join(map(str, shape)):18} {ways}")
        return rows


@contextlib.contextmanager
def choosing(choices: Choices | None) -> Iterator[None]:
    """Inside, what is fastest is found by timing: cuDNN's algorithms, and the ways of layers."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    if choices:
        choices.timing = not choices.invariant
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
        if choices:
            choices.timing = False


def _milliseconds(ways: dict[str, Way], on_cuda: bool) -> dict[str, float]:
    """How long each way takes, with warm caches; on CUDA in a graph, as the engine replays it."""
    if on_cuda:
        return {name: milliseconds(way) for name, way in ways.items()}
    memory = native.Memory()

    def on_the_cpu(way: Way) -> float:
        with memory.in_force():
            return 1e3 * timeit.timeit(way, number=1)

    return {name: min([on_the_cpu(way) for _ in range(4)][1:]) for name, way in ways.items()}

"""CUDA graphs of whole requests, captured ahead of time for listed sizes.

A bucket is one captured size, (batch, frames), of one direction ("encode" or "decode"). It serves
requests of its size and smaller ones: a request is copied to the beginning of the bucket's inputs,
and the lengths of the items declare the rest to be padding. So a bucket serves ragged batches, too.
A request that fits into no bucket, or leaves too much of every bucket to padding, is run without a
graph: nothing is ever captured for a request.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from dac_fast.ops import cuda_graph

# A request must fill at least 1/MOST_PADDING of its bucket.
MOST_PADDING = 2

# Of a batch and the lengths of its items to the outputs.
Request = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Bucket:
    """A captured size.

    Attributes:
        batch, frames: what the bucket holds.
        run: the function that was captured.
        graph: its capture.
        turn: to be entered for a request, from its inputs to the copy of its outputs.
    """

    batch: int
    frames: int
    run: Request
    graph: cuda_graph.Captured[tuple[Tensor, ...]]
    turn: Callable[[], AbstractContextManager[None]]

    @property
    def positions(self) -> int:
        """Frames of the whole batch."""
        return self.batch * self.frames


class Graphs:
    """The buckets of one device.

    Args:
        device: where the graphs run.
        memory: bytes that the graphs may hold, all together.

    Attributes:
        buckets: by direction, the smallest first.
        left_eager: (direction, batch, frames, bytes) of what was not captured for lack of memory.
    """

    def __init__(self, device: torch.device, memory: int):
        self.memory = memory
        self.buckets: dict[str, list[Bucket]] = {}
        self.left_eager: list[tuple[str, int, int, int]] = []
        self._device = device
        self._capturer: cuda_graph.Capturer | None = None
        # Bytes of the inputs and outputs of all buckets, which stay apart from each other.
        self._apart = 0

    @property
    def used(self) -> int:
        """Bytes that the graphs hold."""
        return self._capturer.held if self._capturer else 0

    def add(
        self, direction: str, batch: int, frames: int, run: Request, inputs: tuple[Tensor, Tensor]
    ) -> None:
        """Capture `run(*inputs)` as a bucket of that direction, if the memory suffices.

        All buckets share their memory, but for inputs and outputs: add the largest first. What
        `run` compiles, tunes or caches must have happened before.
        """
        self._capturer = self._capturer or cuda_graph.Capturer(self._device)
        needed = self._capturer.peak(run, *inputs)
        if max(self.used, self._apart + needed) > self.memory:
            self.left_eager.append((direction, batch, frames, needed))
            return
        graph = self._capturer.capture(run, *inputs)
        self._apart += sum(t.numel() * t.element_size() for t in (*inputs, *graph.outputs))
        buckets = self.buckets.setdefault(direction, [])
        buckets.append(Bucket(batch, frames, run, graph, self._capturer.turn))
        buckets.sort(key=lambda bucket: bucket.positions)

    def find(self, direction: str, batch: int, frames: int) -> Bucket | None:
        """The bucket that serves such a request, or None."""
        for bucket in self.buckets.get(direction, ()):
            fits = batch <= bucket.batch and frames <= bucket.frames
            if fits and bucket.positions <= MOST_PADDING * batch * frames:
                return bucket
        return None

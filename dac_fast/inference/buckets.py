"""CUDA graphs of whole stages, captured ahead of time for listed sizes, for requests of those sizes and below.

A bucket is one captured size, (batch, frames). A request is served by the smallest bucket that holds it: it is copied
to the beginning of the bucket's inputs, the rest of which the lengths of the items declare to be padding. So a graph
serves ragged batches, too. A request that would leave more than half of every bucket to padding is run eagerly, as is
one that fits into none: nothing is ever captured for a request.
"""

import contextlib
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A bucket serves requests down to one in so many of its positions.
MOST_PADDING = 2


@dataclass
class Bucket:
    """A captured size.

    Attributes:
        batch, frames: what it holds.
        inputs, outputs: tensors that every replay reads and writes.
        run: what was captured; replay: runs it.
    """

    batch: int
    frames: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    run: Callable[..., tuple[Tensor, ...]]
    replay: Callable[[], None]

    @property
    def positions(self) -> int:
        """Frames of the whole batch."""
        return self.batch * self.frames


class Graphs:
    """The buckets of one device.

    Args:
        device: where they run.
        memory: bytes that the graphs may hold, all together.

    Attributes:
        used: bytes that they hold.
        left_eager: (stage, batch, frames, bytes) of what was not captured for lack of memory.
    """

    def __init__(self, device: torch.device, memory: int):
        self.device, self.memory = device, memory
        self.used = 0
        self.left_eager: list[tuple[str, int, int, int]] = []
        self.buckets: dict[str, list[Bucket]] = {}
        self._outputs = 0
        self._stream = self._pool = self._last = None
        self._lock = threading.Lock()

    def add(self, stage: str, batch: int, frames: int, run: Callable, inputs: tuple[Tensor, ...]):
        """Capture `run(*inputs)`, a tuple of tensors, as a bucket of that stage, if the memory suffices.

        All buckets share their memory, but for the outputs: add the largest first. What `run` compiles, tunes or
        caches must have happened before.
        """
        needed = self._needed(run, inputs)
        if max(self.used, self._outputs + needed) > self.memory:
            self.left_eager.append((stage, batch, frames, needed))
            return
        replay, outputs = self._capture(run, inputs)
        self._outputs += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        buckets = self.buckets.setdefault(stage, [])
        buckets.append(Bucket(batch, frames, inputs, outputs, run, replay))
        buckets.sort(key=lambda bucket: bucket.positions)

    def find(self, stage: str, batch: int, frames: int) -> Bucket | None:
        """The bucket that serves such a request, or None."""
        for bucket in self.buckets.get(stage, ()):
            fits = batch <= bucket.batch and frames <= bucket.frames
            if fits and bucket.positions <= MOST_PADDING * batch * frames:
                return bucket
        return None

    @contextlib.contextmanager
    def turn(self):
        """For the whole of a request, from its inputs to the copy of its outputs: the buckets share their memory.

        One thread at a time, and on the device after the request before, on whatever stream that was.
        """
        with self._lock:
            if self._last is not None:
                torch.cuda.current_stream(self.device).wait_event(self._last)
            yield
            self._last = self._event()

    def _needed(self, run: Callable, inputs: tuple[Tensor, ...]) -> int:
        """Bytes that `run(*inputs)` holds at its peak."""
        # the capture's stream too: libraries then have their workspaces for it
        self._stream = self._stream or torch.cuda.Stream(self.device)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with torch.cuda.stream(self._stream):
            run(*inputs)
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _capture(
        self, run: Callable, inputs: tuple[Tensor, ...]
    ) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # what is held for nobody would hide how much the pool grows
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        # of this thread's work only: others may go on allocating
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            outputs = run(*inputs)
        self.used += max(torch.cuda.memory_reserved(self.device) - before, 0)
        return graph.replay, outputs

    def _event(self):
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

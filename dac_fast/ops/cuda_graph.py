"""CUDA graphs: what a function launches on a device, captured once and replayed as one launch."""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Captured(Generic[T]):
    """A function of tensors as a CUDA graph.

    Attributes:
        inputs: the tensors that every replay reads.
        outputs: what the function returned; every replay writes new values to the same tensors.
        replay: launches the graph.
    """

    inputs: tuple[Tensor, ...]
    outputs: T
    replay: Callable[[], None]

    def __call__(self, *inputs: Tensor) -> T:
        """The outputs for these inputs, of the captured shapes, on any device."""
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.replay()
        return self.outputs


class Capturer:
    """Captures functions on one CUDA device; all its graphs share one stream and one memory pool.

    Attributes:
        held: bytes by which captures have enlarged the memory that PyTorch reserves.
    Raises:
        ValueError: the device is none of CUDA's.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(
                f"the codec is on {device}; accepted: a CUDA device, "
                "since CUDA graphs are captured there"
            )
        self.device = device
        self.held = 0
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._lock = threading.Lock()
        self._last: torch.cuda.Event | None = None

    def run(self, function: Callable[..., T], *inputs: Tensor) -> T:
        """`function(*inputs)` without a graph, on the stream of the captures.

        A function must run there before it is captured: kernels are compiled and convolutions
        chosen in a first call, and libraries keep a workspace for each stream.
        """
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = function(*inputs)
        current.wait_stream(self._stream)
        return outputs

    def peak(self, function: Callable[..., object], *inputs: Tensor) -> int:
        """Bytes that `function(*inputs)` allocates at its peak; runs it, and waits for it."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.run(function, *inputs)
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def capture(self, function: Callable[..., T], *inputs: Tensor) -> Captured[T]:
        """Capture `function(*inputs)`, which computes on these very tensors and never waits."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            # Memory that is held for nobody would hide how much the pool grows.
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self.device)
            # Other threads go on allocating and pinning memory: the capture forbids that to this
            # thread only.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                outputs = function(*inputs)
            self.held += max(torch.cuda.memory_reserved(self.device) - before, 0)
        return Captured(inputs, outputs, graph.replay)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """For one use of a graph, from its inputs to the copy of its outputs: graphs share memory.

        One thread at a time; on the device, after the turn before, whatever stream that was on.
        """
        with self._lock:
            current = torch.cuda.current_stream(self.device)
            if self._last is not None:
                current.wait_event(self._last)
            yield
            self._last = current.record_event()


# Eager steps before the capture. They compile kernels and allocate the optimizers' states.
WARMUP = 3


class GraphedStep:
    """A training step, captured in its fourth call and replayed from then on.

    Nothing in the step may depend on the host: what changes from call to call lies in tensors that
    stay where they are. Random numbers follow `torch.manual_seed` in replays too.

    Args:
        function: of audio on the GPU, always of one shape; returns a dictionary of tensors.
    """

    def __init__(self, function: Callable[[Tensor], dict[str, Tensor]]):
        self._function, self._calls = function, 0
        self._capturer: Capturer | None = None
        self._graph: Captured[dict[str, Tensor]] | None = None

    def __call__(self, audio: Tensor) -> dict[str, Tensor]:
        """The function's result; from the fourth call on always the same tensors."""
        if self._capturer is None:
            self._capturer = Capturer(audio.device)
        if self._calls < WARMUP:
            self._calls += 1
            # A capture must not meet anything that autograd tied to the default stream.
            return self._capturer.run(self._function, audio)
        if self._graph is None:
            self._graph = self._capturer.capture(self._function, audio.clone())
        return self._graph(audio)

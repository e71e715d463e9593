"""A stream's step, recorded once as a CUDA graph: one launch in place of some hundred."""

from collections.abc import Callable

import torch
from torch import Tensor


def record(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What `step` launches on a device, as a CUDA graph; returns its replay, which gives the same tensor every time.

    `step` is called three times. It must compute on tensors that stay where they are, and not wait for the device.

    Raises:
        ValueError: the device is none of CUDA's.
    """
    if device.type != "cuda":
        raise ValueError(
            f"the codec is on {device}; accepted: a CUDA device, since CUDA graphs are captured there"
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # what compiles or is chosen at a first call cannot be recorded
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        # other threads may go on using the device
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = step()

    def replay():
        graph.replay()
        return output

    return replay


class RecordedStep:
    """A function of a block and of which streams are active, recorded for blocks of one shape.

    Args:
        compute: block [B, ...] and active [B] to a new tensor; it may change tensors that stay where they are.
        block: of the shape; on the device.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor], block: Tensor):
        self._block = block.clone()
        self._flags = [True] * block.shape[0]
        self._active = torch.ones(block.shape[0], dtype=torch.bool, device=block.device)
        self._replay = record(lambda: compute(self._block, self._active), block.device)

    def __call__(self, block: Tensor, flags: list[bool]) -> Tensor:
        """The function's result, for a block on any device and the streams whose flag is True."""
        self._block.copy_(block)
        if flags != self._flags:
            self._active.copy_(torch.tensor(flags))
            self._flags = flags
        # the next replay writes to the same memory
        return self._replay().clone()


# Eager steps before the capture: kernels are compiled in them, convolutions chosen, optimizer states allocated.
WARMUP = 3


class GraphedStep:
    """A function of a batch, captured in its fourth call and replayed from then on.

    Nothing in it may depend on the host: what changes from step to step lies in tensors that stay where they are.
    Random numbers follow `torch.manual_seed` in replays too.

    Args:
        function: of audio on the GPU, always of the same shape; returns a dictionary of tensors.
    """

    def __init__(self, function: Callable[[Tensor], dict[str, Tensor]]):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, audio: Tensor) -> dict[str, Tensor]:
        """What the function returns; from the fourth call on always the same tensors, with new values."""
        if self.calls < WARMUP:
            self.calls += 1
            return self._on_another_stream(audio)
        if self.graph is None:
            self._capture(audio)
        self.audio.copy_(audio)
        self.graph.replay()
        return self.values

    def _on_another_stream(self, audio: Tensor) -> dict[str, Tensor]:
        # A capture must not meet anything that autograd tied to the default stream.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            values = self.function(audio)
        torch.cuda.current_stream().wait_stream(stream)
        return values

    def _capture(self, audio: Tensor):
        self.audio, self.graph = audio.clone(), torch.cuda.CUDAGraph()
        # Another thread goes on pinning memory for the next batches, which a capture may forbid to this one only.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.values = self.function(self.audio)

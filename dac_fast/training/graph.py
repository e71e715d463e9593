"""A training step as one CUDA graph: thousands of kernels in one launch, so that the GPU never waits for Python."""

from collections.abc import Callable

import torch
from torch import Tensor

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

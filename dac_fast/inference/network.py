"""Any module of convolutions and Snakes, run as `Plan` runs the codec's encoder and decoder."""

from collections import Counter

import torch
from dac_kernels import native
from torch import Tensor

from dac_fast.inference.choices import Choices, choosing
from dac_fast.inference.fusion import fused
from dac_fast.inference.plan import Scratch
from dac_fast.inference.recorded import Recording, Signal
from dac_fast.ops.precision import float32_products


class Network:
    """A recorded module for inference: its results have no gradients. Threads may share it.

    Args:
        recording: of the module; its weights as they are now are used.
        dtype: of weights and signals.
        products: of float32, see `ops.conv1d`.
    Attributes:
        nodes: what runs, in order.
        choices: which way each layer runs, see `Plan`.
    """

    def __init__(self, recording: Recording, dtype: torch.dtype, products: str = "ieee"):
        self.dtype, self.products = dtype, products
        self.choices = Choices()
        self._input, self._output = recording.input, recording.output
        self._scratch = Scratch()
        with torch.no_grad():
            self.nodes = fused(recording, dtype, products, self.choices)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copy of the module runs by itself.
        return type(None), ()

    def __str__(self) -> str:
        """How many of what runs fused, and what runs by PyTorch."""
        kinds = Counter(node.kind for node in self.nodes)
        return "\n".join(f"{count} × {kind}" for kind, count in sorted(kinds.items()))

    def time(self, example: Tensor) -> None:
        """Find the fastest way of each layer at the example's size."""
        with choosing(self.choices):
            self(example)

    @native.torch_on_one_thread()
    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The module's output for x [B, C, T]; of x's dtype."""
        # Channels innermost, as in all that follows.
        first = x.to(self.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        values = {self._input: first}
        with float32_products(tf32=self.products == "tf32"), self._scratch.lent() as memory:
            for node in self.nodes:
                made = node.run(*(values[signal] for signal in node.inputs))
                for signal, tensor in zip(node.outputs, made, strict=True):
                    if signal is not None and tensor is not None:
                        values[signal] = tensor
                for signal in node.last:
                    _give_back(memory, values.pop(signal), values)
            # On a CPU the next call writes where the values lie.
            last = values[self._output]
            return last.to(x.dtype, copy=True, memory_format=torch.contiguous_format)


def _give_back(memory: native.Memory, tensor: Tensor, values: dict[Signal, Tensor]) -> None:
    """Nobody reads a tensor any more; but another value may be a view of it."""
    place = tensor.untyped_storage().data_ptr()
    if all(value.untyped_storage().data_ptr() != place for value in values.values()):
        memory.give_back(tensor)

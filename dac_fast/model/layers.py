"""The codec's building blocks: weight-normed convolutions, the activation, the residual unit.

Parameters carry the published names, so published checkpoints load as they are. A `Layer` knows how
many positions come out of it, and its forward takes two optional arguments beside x [B, C, T]:

    lengths: int64 [B], the valid positions of each item. A layer zeroes its output past them, since
        its bias would otherwise fill the padding, and leak into the item through the next layer.
    padded: False runs convolutions without padding, as the published package's chunk mode does.
"""

import contextlib
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dac_fast import ops
from dac_fast.model import channels_last, folded
from dac_fast.model.activated import Activated, activated_convolutions
from dac_fast.ops.reference import valid_mask

# A number of positions, or int64 [B] of them.
Length = TypeVar("Length", int, Tensor)


class Layer(nn.Module, ABC):
    """A module on [B, C, T] that knows how many positions come out of it."""

    # `nn.Module` promises nothing about the result of a call.
    __call__: Callable[..., Tensor]

    @abstractmethod
    def output_length(self, length: Length, padded: bool = True) -> Length:
        """Positions that come out of `length` positions."""

    @abstractmethod
    def forward(self, x: Tensor, lengths: Tensor | None = None, padded: bool = True) -> Tensor:
        """x [B, C, T] to [B, C', T']; see this file's head for `lengths` and `padded`."""


class WeightNorm(nn.Module):
    """A weight, as direction `weight_v` and magnitude `weight_g` (arXiv 1602.07868), or folded.

    There is one magnitude per index of the weight's first axis. Folded, the weight is the one
    tensor `weight`. Subclasses convolve with `normed_weight()`.

    Attributes:
        channels_last: whether outputs have channels innermost in memory, see `set_channels_last`.
        gradients: the dtype in which a layer in float32 with channels innermost computes its
            gradients, see `dac_fast.model.cpu_gradients`; None: as PyTorch does.
        plain: whether a folded weight is convolved with by PyTorch's own function, which other
            runtimes know, and not as `dac_fast.model.folded` does.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.channels_last = False
        self.gradients: torch.dtype | None = None
        self.plain = False
        # Within `weights_kept` a list, which holds the weight once it has been computed.
        self._kept: list[Tensor] | None = None
        rows = weight.flatten(1)
        # Nothing is computed on the meta device, whose functions take a second to import.
        magnitude = rows[:, 0] if weight.is_meta else rows.norm(dim=1)
        self.weight_g = nn.Parameter(magnitude.view(-1, *[1] * (weight.dim() - 1)))
        self.weight_v = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    @property
    def folded(self) -> bool:
        """Whether the weight is stored as one tensor."""
        return "weight" in self._parameters

    def library(
        self, usual: Callable[..., Tensor], innermost: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        """PyTorch's function, or that of `dac_fast.model.channels_last`, as the attributes say."""
        if not self.channels_last:
            return usual
        return functools.partial(innermost, gradients=self.gradients)

    def normed_weight(self) -> Tensor:
        """The weight to convolve with."""
        # Looked at once: another thread may fold the weight meanwhile.
        direction, magnitude = map(self._parameters.get, ("weight_v", "weight_g"))
        if direction is None or magnitude is None:
            return self.weight
        if self._kept:
            return self._kept[0]
        weight = torch._weight_norm(direction, magnitude, 0)
        if self._kept is not None:
            self._kept.append(weight)
        return weight

    @torch.no_grad()
    def fold(self) -> None:
        """Stores the weight as one tensor, on the device it is on: faster, but no longer trainable.

        The weight's second axis becomes innermost in memory, for `dac_fast.model.folded`.
        """
        if not self.folded:
            self.hold(self.normed_weight())

    def hold(self, weight: Tensor) -> None:
        """Stores another weight, as one tensor, in place of direction and magnitude."""
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        self.weight = nn.Parameter(weight, requires_grad=False)
        del self.weight_g, self.weight_v


@contextlib.contextmanager
def weights_kept(network: nn.Module) -> Iterator[None]:
    """Inside, each weight of the network is normed once: for several passes between two updates."""
    layers = [module for module in network.modules() if isinstance(module, WeightNorm)]
    for layer in layers:
        layer._kept = []
    try:
        yield
    finally:
        for layer in layers:
            layer._kept = None


def set_gradients(network: nn.Module, dtype: torch.dtype) -> None:
    """Have all layers of the network that keep channels innermost compute gradients in `dtype`.

    For training on a CPU. Under autocast they would convolve in float32 still.
    """
    for module in network.modules():
        if isinstance(module, WeightNorm):
            module.gradients = dtype


def default_init(weight: Tensor, fan_in: int) -> Tensor:
    """PyTorch's own initialisation of convolutions: uniform with bound 1 / sqrt(fan_in).

    The published package draws a truncated normal, but into the tensor that weight norm overwrites
    at the first call, so its training starts from this one.
    """
    return nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


class Conv1d(WeightNorm, Layer):
    """Weight-normed `torch.nn.Conv1d`, bias included."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
    ) -> None:
        weight = torch.empty(out_channels, in_channels, kernel_size)
        bias = torch.zeros(out_channels)
        super().__init__(default_init(weight, in_channels * kernel_size), bias)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation

    def output_length(self, length: Length, padded: bool = True) -> Length:  # noqa: D102
        change = 2 * self.padding * padded - self.dilation * (self.kernel_size - 1)
        if self.stride > 1:
            return (length + change - 1) // self.stride + 1
        # The very tensor where the number stays the same.
        return length + change if change else length

    def sizes(self) -> tuple[Any, ...]:
        """What `torch.convolution` takes beside the tensors, for images of height 1."""
        # One tap is the same with any dilation, with which PyTorch leaves its slow loop for oneDNN.
        dilation = self.dilation if self.kernel_size > 1 else 2
        return (1, self.stride), (0, self.padding), (1, dilation), False, (0, 0), 1

    def forward(  # noqa: D102
        self, x: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor:
        padding = self.padding if padded else 0
        if self.folded and not self.plain:
            y = folded.conv1d(x, self.weight, self.bias, self.stride, padding, self.dilation)
        else:
            convolve = self.library(F.conv1d, channels_last.conv1d)
            y = convolve(x, self.normed_weight(), self.bias, self.stride, padding, self.dilation)
        return y if lengths is None else zero_past(y, self.output_length(lengths))


class ConvTranspose1d(WeightNorm, Layer):
    """Weight-normed `torch.nn.ConvTranspose1d` with a kernel of two strides, bias included."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, padding: int = 0) -> None:
        kernel_size = 2 * stride
        fan_in = out_channels * kernel_size
        weight = torch.empty(in_channels, out_channels, kernel_size)
        bias = torch.empty(out_channels)
        super().__init__(default_init(weight, fan_in), default_init(bias, fan_in))
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding

    def output_length(self, length: Length, padded: bool = True) -> Length:  # noqa: D102
        return (length - 1) * self.stride - 2 * self.padding * padded + self.kernel_size

    def sizes(self) -> tuple[Any, ...]:
        """As of `Conv1d`."""
        return (1, self.stride), (0, self.padding), (1, 1), True, (0, 0), 1

    def forward(  # noqa: D102
        self, x: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor:
        padding = self.padding if padded else 0
        if self.folded and not self.plain:
            y = folded.conv_transpose1d(x, self.weight, self.bias, self.stride, padding)
        else:
            convolve = self.library(F.conv_transpose1d, channels_last.conv_transpose1d)
            y = convolve(x, self.normed_weight(), self.bias, self.stride, padding)
        return y if lengths is None else zero_past(y, self.output_length(lengths))


class Snake(nn.Module):
    """Snake activation with one learned frequency per channel, see `dac_fast.ops.snake`."""

    __call__: Callable[..., Tensor]

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return ops.snake(x, self.alpha)


def activation(name: str, channels: int) -> nn.Module:
    """The activation of that name, see `Config.activation`.

    All of them map zero to zero, so none needs `lengths`.
    """
    return Snake(channels) if name == "snake" else nn.LeakyReLU(0.1)


def zero_past(x: Tensor, lengths: Tensor) -> Tensor:
    """x [B, C, T] with zeros at each item's positions from its length on."""
    return torch.where(valid_mask(lengths, x.shape[-1]), x, 0)


def fused_pairs(
    layers: Sequence[nn.Module], x: Tensor, lengths: Tensor | None, padded: bool
) -> list[Activated]:
    """The first layers, as far as they are to train as `activated_convolutions`."""
    pairs: list[Activated] = []
    if lengths is not None or not padded:
        return pairs
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return pairs
    for snake, layer in zip(layers[::2], layers[1::2], strict=False):
        if not (isinstance(snake, Snake) and isinstance(layer, Conv1d | ConvTranspose1d)):
            break
        # What is in bfloat16 already has its gradients in it too.
        dtypes = {torch.float32: layer.gradients, torch.bfloat16: torch.bfloat16}
        dtype = dtypes.get(x.dtype)
        if layer.folded or not layer.channels_last or not dtype:
            break
        if pairs and pairs[0].dtype != dtype:
            break
        if ops.choose("snake", x, snake.alpha)[0] != "native":
            break
        weight = layer.normed_weight()
        pairs.append(Activated(snake.alpha, weight, layer.bias, layer.sizes(), dtype))
    return pairs


class Chain(nn.Sequential):
    """`nn.Sequential` that also hands `lengths` and `padded` to its modules of type `Layer`."""

    __call__: Callable[..., Tensor]

    def output_length(self, length: Length, padded: bool = True) -> Length:
        """Positions that come out of `length` positions."""
        for layer in self:
            if isinstance(layer, Layer):
                length = layer.output_length(length, padded)
        return length

    def forward(self, x: Tensor, lengths: Tensor | None = None, padded: bool = True) -> Tensor:
        """x [B, C, T] through all modules."""
        layers = list(self)
        while layers:
            if pairs := fused_pairs(layers, x, lengths, padded):
                x = activated_convolutions(x, pairs)
                del layers[: 2 * len(pairs)]
                continue
            layer = layers.pop(0)
            if not isinstance(layer, Layer):
                x = layer(x)
                continue
            x = layer(x, lengths, padded)
            if lengths is not None:
                lengths = layer.output_length(lengths, padded)
        return x


class Block(Layer):
    """One chain of modules, under the published name `block`.

    Attributes:
        checkpointed: keep only the input for the backward pass, which computes the rest again: less
            memory, more time.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = Chain(*layers)
        self.checkpointed = False

    def output_length(self, length: Length, padded: bool = True) -> Length:  # noqa: D102
        return self.block.output_length(length, padded)

    def forward(  # noqa: D102
        self, x: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor:
        if not (self.checkpointed and torch.is_grad_enabled()):
            return self.block(x, lengths, padded)
        backend = ops.backend()

        def run(x: Tensor, lengths: Tensor | None, padded: bool) -> Tensor:
            # Autograd computes the block again in its own thread, where no backend is set.
            with ops.use_backend(backend):
                return self.block(x, lengths, padded)

        # Nothing in a block is random, and saving the generator's state would wait for the GPU.
        y: Tensor = checkpoint(
            run, x, lengths, padded, use_reentrant=False, preserve_rng_state=False
        )
        return y


class ResidualUnit(Block):
    """Activation, dilated convolution of 7, activation, convolution of 1, plus the input.

    Source: paper, appendix A.
    """

    def __init__(self, channels: int, dilation: int, act: str) -> None:
        super().__init__(
            activation(act, channels),
            Conv1d(channels, channels, kernel_size=7, dilation=dilation, padding=3 * dilation),
            activation(act, channels),
            Conv1d(channels, channels, kernel_size=1),
        )

    def forward(  # noqa: D102
        self, x: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor:
        if pairs := fused_pairs(list(self.block), x, lengths, padded):
            return activated_convolutions(x, pairs, residual=True)
        y = self.block(x, lengths, padded)
        crop = (x.shape[-1] - y.shape[-1]) // 2
        x = x[..., crop : x.shape[-1] - crop]
        # Channels last, y is a view, through whose change in place gradients would go by copies.
        if torch.is_grad_enabled() and y._is_view():
            return y + x
        # In place: nothing else needs y, and a large tensor's first touch costs more than the sum.
        return y.add_(x)


def residual_units(channels: int, act: str) -> list[ResidualUnit]:
    """The three residual units of every encoder and decoder block."""
    return [ResidualUnit(channels, dilation, act) for dilation in (1, 3, 9)]

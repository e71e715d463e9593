"""The codec's building blocks: weight-normed convolutions, the activation, the residual unit.

Parameters carry the published names, so published checkpoints load as they are. Every convolution knows its output
length, and every forward takes two optional things beside x [B, C, T]:

    lengths: int64 [B], the valid positions of each item. A layer zeroes what lies past them in its output, since its
        bias would otherwise refill the padding and leak into the item through the next layer.
    padded: False runs the convolution without its padding, as the published package's chunk mode does.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dac_fast import ops
from dac_fast.model import channels_last, folded
from dac_fast.ops.reference import valid_mask


class WeightNorm(nn.Module):
    """Holds a weight as direction `weight_v` and magnitude `weight_g` (arXiv 1602.07868), or folded, as `weight`.

    The magnitude is per index of the first axis. Subclasses use `self.normed_weight()`.

    Attributes:
        channels_last: whether outputs are to have channels innermost in memory, see `set_channels_last`.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.channels_last = False
        # Within `weights_kept`: a list, of the weight once it is computed.
        self._kept: list[Tensor] | None = None
        self.weight_g = nn.Parameter(
            weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
        )
        self.weight_v = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    @property
    def folded(self) -> bool:
        """Whether the weight is stored as one tensor."""
        return "weight" in self._parameters

    def normed_weight(self) -> Tensor:
        """The weight that is convolved with."""
        if self.folded:
            return self.weight
        if self._kept:
            return self._kept[0]
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        if self._kept is not None:
            self._kept.append(weight)
        return weight

    @torch.no_grad()
    def fold(self):
        """Store the weight as one tensor, on the device it is on: quicker, and no longer meant for training.

        Its second axis lies innermost in memory, for `dac_fast.model.folded`.
        """
        if not self.folded:
            weight = self.normed_weight().transpose(1, 2).contiguous().transpose(1, 2)
            self.weight = nn.Parameter(weight, requires_grad=False)
            del self.weight_g, self.weight_v


@contextlib.contextmanager
def weights_kept(network: nn.Module) -> Iterator[None]:
    """Inside, every weight of the network is normed in the first pass only: for several passes between two updates."""
    layers = [module for module in network.modules() if isinstance(module, WeightNorm)]
    for layer in layers:
        layer._kept = []
    try:
        yield
    finally:
        for layer in layers:
            layer._kept = None


def default_init(weight: Tensor, fan_in: int) -> Tensor:
    """PyTorch's own initialisation of convolutions: uniform with bound 1 / sqrt(fan_in).

    The published package draws a truncated normal, but into the tensor that weight norm overwrites at the first
    call: this is what its training starts from.
    """
    return nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


class Conv1d(WeightNorm):
    """Weight-normed `torch.nn.Conv1d`, bias included."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1):
        weight = default_init(
            torch.empty(out_channels, in_channels, kernel_size), in_channels * kernel_size
        )
        super().__init__(weight, torch.zeros(out_channels))
        self.kernel_size, self.stride, self.padding, self.dilation = (
            kernel_size,
            stride,
            padding,
            dilation,
        )

    def output_length(self, length, padded=True):
        """Positions that come out of `length` (an int or an int tensor)."""
        span = self.dilation * (self.kernel_size - 1) + 1
        return (length + 2 * self.padding * padded - span) // self.stride + 1

    def forward(self, x, lengths=None, padded=True):  # noqa: D102
        padding = self.padding if padded else 0
        if self.folded:
            y = folded.conv1d(x, self.weight, self.bias, self.stride, padding, self.dilation)
        else:
            convolve = channels_last.conv1d if self.channels_last else F.conv1d
            y = convolve(x, self.normed_weight(), self.bias, self.stride, padding, self.dilation)
        return y if lengths is None else zero_past(y, self.output_length(lengths))


class ConvTranspose1d(WeightNorm):
    """Weight-normed `torch.nn.ConvTranspose1d` with a kernel of two strides, bias included."""

    def __init__(self, in_channels, out_channels, stride, padding=0):
        kernel_size = 2 * stride
        fan_in = out_channels * kernel_size
        bias = torch.empty(out_channels)
        super().__init__(
            default_init(torch.empty(in_channels, out_channels, kernel_size), fan_in),
            default_init(bias, fan_in),
        )
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def output_length(self, length, padded=True):
        """Positions that come out of `length` (an int or an int tensor)."""
        return (length - 1) * self.stride - 2 * self.padding * padded + self.kernel_size

    def forward(self, x, lengths=None, padded=True):  # noqa: D102
        padding = self.padding if padded else 0
        if self.folded:
            y = folded.conv_transpose1d(x, self.weight, self.bias, self.stride, padding)
        else:
            convolve = channels_last.conv_transpose1d if self.channels_last else F.conv_transpose1d
            y = convolve(x, self.normed_weight(), self.bias, self.stride, padding)
        return y if lengths is None else zero_past(y, self.output_length(lengths))


class Snake(nn.Module):
    """Snake activation with one learned frequency per channel, see `dac_fast.ops.snake`."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x):  # noqa: D102
        return ops.snake(x, self.alpha)


def activation(name: str, channels: int) -> nn.Module:
    """The activation of that name (see `Config.activation`). Both map zero to zero, so they need no `lengths`."""
    return Snake(channels) if name == "snake" else nn.LeakyReLU(0.1)


def zero_past(x: Tensor, lengths: Tensor) -> Tensor:
    """x [B, C, T] with zeros at each item's positions from its length on."""
    return torch.where(valid_mask(lengths, x.shape[-1]), x, 0)


class Chain(nn.Sequential):
    """`nn.Sequential` whose layers also get `lengths` and `padded`, where they take them."""

    def output_length(self, length, padded=True):
        """Positions that come out of `length` (an int or an int tensor)."""
        for layer in self:
            if hasattr(layer, "output_length"):
                length = layer.output_length(length, padded)
        return length

    def forward(self, x, lengths=None, padded=True):  # noqa: D102
        for layer in self:
            if not hasattr(layer, "output_length"):
                x = layer(x)
                continue
            x = layer(x, lengths, padded)
            if lengths is not None:
                lengths = layer.output_length(lengths, padded)
        return x


class Block(nn.Module):
    """A module that is one chain of layers, kept under the published name `block`.

    Attributes:
        checkpointed: keep only the input for the backward pass, which computes the rest again: less memory, more time.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.block = Chain(*layers)
        self.checkpointed = False

    def output_length(self, length, padded=True):
        """Positions that come out of `length` (an int or an int tensor)."""
        return self.block.output_length(length, padded)

    def forward(self, x, lengths=None, padded=True):  # noqa: D102
        if not (self.checkpointed and torch.is_grad_enabled()):
            return self.block(x, lengths, padded)
        backend = ops.backend()

        def run(*args):
            # Computed again by a thread of autograd's, for which the caller has set no backend.
            with ops.use_backend(backend):
                return self.block(*args)

        # Nothing in a block is random, and saving the generator's state would wait for the GPU.
        return checkpoint(run, x, lengths, padded, use_reentrant=False, preserve_rng_state=False)


class ResidualUnit(Block):
    """Activation, dilated convolution of 7, activation, convolution of 1, plus the input (paper, appendix A)."""

    def __init__(self, channels: int, dilation: int, act: str):
        super().__init__(
            activation(act, channels),
            Conv1d(channels, channels, kernel_size=7, dilation=dilation, padding=3 * dilation),
            activation(act, channels),
            Conv1d(channels, channels, kernel_size=1),
        )

    def forward(self, x, lengths=None, padded=True):  # noqa: D102
        y = self.block(x, lengths, padded)
        crop = (x.shape[-1] - y.shape[-1]) // 2
        # in place: nothing else needs y, and a large tensor's first touch costs more than the addition
        return y.add_(x[..., crop : x.shape[-1] - crop])


def residual_units(channels: int, act: str) -> list[ResidualUnit]:
    """The three residual units of every encoder and decoder block."""
    return [ResidualUnit(channels, dilation, act) for dilation in (1, 3, 9)]

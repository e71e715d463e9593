"""Convolutions along time that keep channels innermost in memory: x [B, C, T] lies as [B, T, C].

GPUs multiply matrices of half precision in this layout; in the other one, cuDNN copies every input
and output. These functions are differentiable, so training uses them too; with `half_gradients`
their gradients are computed in bfloat16, see the module of that name.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast.model import half_gradients as with_half_gradients


@runtime_checkable
class CanBeChannelsLast(Protocol):
    """A module whose outputs can have channels innermost in memory."""

    channels_last: bool


def set_channels_last(network: nn.Module) -> None:
    """Have all modules of the network that can do so put channels innermost in their outputs."""
    for module in network.modules():
        if isinstance(module, CanBeChannelsLast):
            module.channels_last = True


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int = 1,
    half_gradients: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv1d` with channels innermost, from arguments of any layout."""
    # PyTorch knows this layout for images only: a signal is an image of height 1.
    x, weight = innermost(x.unsqueeze(2)), innermost(weight.unsqueeze(2))
    convolve = with_half_gradients.conv2d if half_gradients else F.conv2d
    y = convolve(x, weight, bias, (1, stride), (0, padding), (1, dilation), groups)
    return innermost(y).squeeze(2)


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    output_padding: int = 0,
    groups: int = 1,
    dilation: int = 1,
    half_gradients: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d` with channels innermost, as for `conv1d`."""
    x, weight = innermost(x.unsqueeze(2)), innermost(weight.unsqueeze(2))
    sizes = ((1, stride), (0, padding), (0, output_padding), groups, (1, dilation))
    convolve = with_half_gradients.conv_transpose2d if half_gradients else F.conv_transpose2d
    return innermost(convolve(x, weight, bias, *sizes)).squeeze(2)


def pad(
    x: Tensor, ends: tuple[int, int], mode: str = "constant", value: float | None = None
) -> Tensor:
    """`torch.nn.functional.pad` with channels innermost, as for `conv1d`."""
    return F.pad(innermost(x.unsqueeze(2)), (*ends, 0, 0), mode, value).squeeze(2)


def innermost(x: Tensor) -> Tensor:
    """x [B, C, H, W] with channels innermost in memory; x itself where they already are."""
    if x.shape[1] == 1:
        # Of one channel only the strides tell the layouts apart, which the result's layout follows.
        return x.contiguous()[:, 0].unsqueeze(3).movedim(3, 1)
    return x.contiguous(memory_format=torch.channels_last)

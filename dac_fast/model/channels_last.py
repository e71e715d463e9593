"""Convolutions along time that keep channels innermost in memory: x [B, C, T] lies as [B, T, C].

GPUs multiply matrices of half precision in this layout; in the other one, cuDNN copies every input
and output. These functions are differentiable, so training uses them too; with `gradients`, what is
in float32 has its gradients in that dtype, on a CPU, see `dac_fast.model.cpu_gradients`.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast.model import cpu_gradients


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
    gradients: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.conv1d` with channels innermost, from arguments of any layout."""
    # PyTorch knows this layout for images only: a signal is an image of height 1.
    x, weight = innermost(x.unsqueeze(2)), innermost(weight.unsqueeze(2))
    sizes = (1, stride), (0, padding), (1, dilation)
    if gradients and x.dtype == torch.float32:
        y = cpu_gradients.convolution(x, weight, bias, gradients, *sizes, False, (0, 0), groups)
    else:
        y = F.conv2d(x, weight, bias, *sizes, groups)
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
    gradients: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d` with channels innermost, as for `conv1d`."""
    x, weight = innermost(x.unsqueeze(2)), innermost(weight.unsqueeze(2))
    sizes = (1, stride), (0, padding)
    extra, spread = (0, output_padding), (1, dilation)
    if gradients and x.dtype == torch.float32:
        transposed = (spread, True, extra, groups)
        y = cpu_gradients.convolution(x, weight, bias, gradients, *sizes, *transposed)
    else:
        y = F.conv_transpose2d(x, weight, bias, *sizes, extra, groups, spread)
    return innermost(y).squeeze(2)


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

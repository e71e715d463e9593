"""The gradient of a convolution for its weight, on the CPU: csrc/weight_gradient.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from dac_kernels.native.compiled import call, channel_rows, differs, extension, require, unsupported
from dac_kernels.tiles import channels_innermost, output_length

DTYPES = {"cpu": (torch.float32,)}


def conv1d_weight_gradient(
    grad: Tensor, x: Tensor, kernel: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """The gradient of `torch.nn.functional.conv1d`, without groups, for its weight.

    Of `conv_transpose1d` it is the same with x and grad in each other's place. Channels should lie
    innermost in memory; what lies otherwise is copied. The bits do not depend on the number of
    threads.

    Args:
        grad: of the result, [B, C', T'], float32.
        x: [B, C, T], float32.
        kernel: taps of the weight.
        stride, padding, dilation: of the convolution.
    Returns:
        [C', C, kernel].
    Raises:
        RuntimeError: see `conv1d_weight_gradient_unsupported`.
    """
    reason = conv1d_weight_gradient_unsupported(grad, x, kernel, stride, padding, dilation)
    require("conv1d_weight_gradient", reason)
    batch, channels, length = grad.shape
    positions, inputs = x.shape[2], x.shape[1]
    sizes = (batch, positions, inputs, length, channels, kernel, stride, dilation, padding)
    shape = extension.ConvShape(*sizes, channels, 0)
    # Named, since the extension reads their memory.
    operands = channels_innermost(grad), channels_innermost(x)
    weight = grad.new_empty(channels, inputs, kernel)
    places = map(channel_rows, operands)
    call("conv1d_weight_gradient", x, [x.dtype], shape, *places, weight.data_ptr())
    return weight


def conv1d_weight_gradient_unsupported(
    grad: Tensor, x: Tensor, kernel: int, stride: int, padding: int, dilation: int
) -> str | None:
    """Why `conv1d_weight_gradient` cannot run on these arguments, or None."""
    if reason := unsupported(x, DTYPES):
        return reason
    if x.ndim != 3 or grad.ndim != 3:
        return f"x and grad have shapes {list(x.shape)} and {list(grad.shape)}, not [B, C, T]"
    length = output_length(x.shape[2], kernel, stride, padding, dilation, False)
    return differs("grad", grad, (len(x), grad.shape[1], length), x)

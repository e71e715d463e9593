"""Convolutions of seven taps for training on the CPU, by minimal filtering: csrc/winograd.cpp.

They take 10 products where the sum over taps has 28, and round more: errors are some millionths of
the largest result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dac_kernels.native.compiled import call, channel_rows, differs, extension, require, unsupported
from dac_kernels.residual_unit import KERNEL
from dac_kernels.tiles import channels_innermost, dense, output_length

DTYPES = {"cpu": (torch.float32,)}
LEAST_CHANNELS = 8


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dilation: int) -> Tensor:
    """As `torch.nn.functional.conv1d` with stride 1, for seven taps, without gradients.

    Channels should lie innermost in memory; what lies otherwise is copied. The bits do not depend
    on the number of threads.

    Args:
        x: [B, C, T], float32, of 8 channels or more.
        weight: [C', C, 7]; C' is 8 or more.
        bias: [C'], or None.
        padding, dilation: of the convolution.
    Returns:
        [B, C', T'], with channels innermost.
    Raises:
        RuntimeError: see `winograd_unsupported`; or the bias has another shape, dtype or device.
    """
    reason = winograd_unsupported(x, weight, padding, dilation)
    if not reason and bias is not None:
        reason = differs("bias", bias, weight.shape[:1], x)
    require("winograd", reason)
    return _convolve(x, weight.permute(2, 1, 0), bias, padding, dilation)


def winograd_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int, dilation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `winograd` for x, weight and bias.

    Args:
        grad: of the result, [B, C', T'].
        x, weight, padding, dilation: what `winograd` took.
    Returns:
        As x, with channels innermost; as the weight, in any layout; [C'].
    Raises:
        RuntimeError: see `winograd_unsupported`; or grad has another shape, dtype or device.
    """
    reason = winograd_unsupported(x, weight, padding, dilation)
    if not reason:
        length = output_length(x.shape[2], KERNEL, 1, padding, dilation, False)
        reason = differs("grad", grad, (len(x), len(weight), length), x)
    require("winograd_gradients", reason)
    grad, x = channels_innermost(grad), channels_innermost(x)
    # From the last tap to the first, and from the result's channels to those of x.
    taps = weight.flip(2).permute(2, 0, 1)
    of_x = _convolve(grad, taps, None, (KERNEL - 1) * dilation - padding, dilation)
    of_weight, of_bias = x.new_empty(taps.shape), x.new_empty(len(weight))
    shape = _shape(x, grad, padding, dilation)
    addresses = of_weight.data_ptr(), of_bias.data_ptr()
    call(
        "winograd_weight_gradient",
        x,
        [x.dtype],
        shape,
        channel_rows(grad),
        channel_rows(x),
        *addresses,
    )
    return of_x, of_weight.permute(1, 2, 0), of_bias


def winograd_unsupported(x: Tensor, weight: Tensor, padding: int, dilation: int) -> str | None:
    """Why `winograd` cannot run on these arguments, or None."""
    if reason := unsupported(x, DTYPES):
        return reason
    if weight.ndim != 3:
        return f"the weight has shape {list(weight.shape)}, not [C', C, {KERNEL}]"
    columns, inputs, taps = weight.shape
    if x.ndim != 3 or x.shape[1] != inputs:
        return f"x has shape {list(x.shape)}, not [B, {inputs}, T]"
    if taps != KERNEL or min(columns, inputs) < LEAST_CHANNELS:
        accepted = f"{KERNEL} taps and at least {LEAST_CHANNELS} channels"
        return f"the weight has shape {list(weight.shape)}, not {accepted}"
    if padding < 0 or dilation < 1:
        return f"padding is {padding} and dilation {dilation}, not at least 0 and 1"
    if output_length(x.shape[2], KERNEL, 1, padding, dilation, False) < 1:
        return f"nothing comes out of {x.shape[2]} positions"
    return differs("weight", weight, weight.shape, x)


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None, padding: int, dilation: int) -> Tensor:
    """taps: [7, C, C']."""
    # Named, since the extension reads their memory.
    x, taps = channels_innermost(x), taps.contiguous()
    bias = dense(bias)
    length = output_length(x.shape[2], KERNEL, 1, padding, dilation, False)
    y = x.new_empty(len(x), length, taps.shape[2]).transpose(1, 2)
    addresses = taps.data_ptr(), 0 if bias is None else bias.data_ptr()
    shape = _shape(x, y, padding, dilation)
    call("winograd", x, [x.dtype], shape, channel_rows(x), *addresses, channel_rows(y))
    return y


def _shape(x: Tensor, y: Tensor, padding: int, dilation: int) -> Any:
    columns = y.shape[1]
    sizes = len(x), x.shape[2], x.shape[1], y.shape[2], columns
    return extension.ConvShape(*sizes, KERNEL, 1, dilation, padding, columns, 0)

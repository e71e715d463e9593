"""Convolutions over images, in the dtype of x, whose gradients are computed in bfloat16.

A processor that multiplies bfloat16 natively does so at twice the rate of float32 or more, and two
thirds of a training step's products are in its backward pass. Rounding there is noise of 0.2 % of a
gradient, far less than one batch's gradient differs from the next one's. In the forward pass it
would be noise in the audio, which training fights in place of what is quiet: see docs/training.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# For both axes of an image, or for each.
Size = int | Sequence[int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`; see this file's head."""
    sizes = (*map(pair, (stride, padding, dilation)), False, [0, 0], groups)
    return _convolution(x, weight, bias, sizes)


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d`; see this file's head."""
    sizes = (*map(pair, (stride, padding, dilation)), True, pair(output_padding), groups)
    return _convolution(x, weight, bias, sizes)


def pair(size: Size) -> list[int]:
    """The size along each axis."""
    return [size, size] if isinstance(size, int) else list(size)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Any) -> Tensor:
    y: Tensor = _Convolution.apply(x, weight, bias, sizes)  # type: ignore[no-untyped-call]
    return y


class _Convolution(torch.autograd.Function):
    """`torch.convolution`, whose last six arguments are `sizes`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Any) -> Tensor:
        ctx.save_for_backward(x.bfloat16(), weight.bfloat16())
        ctx.dtype, ctx.sizes = x.dtype, sizes
        ctx.biases = None if bias is None else list(bias.shape)
        return torch.convolution(x, weight, bias, *sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads = torch.ops.aten.convolution_backward(
            grad.bfloat16(), x, weight, ctx.biases, *ctx.sizes, ctx.needs_input_grad[:3]
        )
        return *(each if each is None else each.to(ctx.dtype) for each in grads), None

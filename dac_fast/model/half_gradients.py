"""Convolutions over images, in the dtype of x, whose gradients are computed in bfloat16.

Processors that multiply bfloat16 natively do so at twice the rate of float32 or more, and two
thirds of a training step's products are in its backward pass. Rounding there is noise in a
gradient, far less than what one batch's differs from the next one's. In the forward pass it would
be noise in the audio, which training fights in place of what is quiet: see docs/training.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Along each axis.
Size = tuple[int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    dilation: Size,
    groups: int,
) -> Tensor:
    """`torch.nn.functional.conv2d`; see this file's head."""
    return convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d`; see this file's head."""
    return convolution(x, weight, bias, stride, padding, dilation, True, output_padding, groups)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> Tensor:
    """`torch.convolution`; see this file's head."""
    y: Tensor = _Convolution.apply(x, weight, bias, sizes)  # type: ignore[no-untyped-call]
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Any) -> Tensor:
        ctx.save_for_backward(x.bfloat16(), weight.bfloat16())
        ctx.dtype, ctx.sizes = x.dtype, sizes
        return torch.convolution(x, weight, bias, *sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads = gradients(grad.bfloat16(), x, weight, ctx.sizes, ctx.needs_input_grad[:3])
        return *(each if each is None else each.to(ctx.dtype) for each in grads), None


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, sizes: Any, needed: Sequence[bool]
) -> list[Any]:
    """The gradients of a convolution for input, weight and bias, in bfloat16 as the arguments.

    Args:
        grad: of its result.
        x, weight: what it convolved.
        sizes: what `torch.convolution` takes beside the tensors.
        needed: for each of the three; None in the place of the others.
    """
    *others, bias = needed
    # Of transposed convolutions, oneDNN sums the bias's as slowly as it computes the other two.
    grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, [*others, False])
    return [*grads[:2], grad.sum((0, 2, 3)) if bias else None]

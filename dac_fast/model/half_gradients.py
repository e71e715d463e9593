"""Convolutions over images, in the dtype of x, whose gradients are computed in bfloat16.

Processors that multiply bfloat16 natively do so at twice the rate of float32 or more, and two
thirds of a training step's products are in its backward pass. Rounding there is noise in a
gradient, far less than what one batch's differs from the next one's. In the forward pass it would
be noise in the audio, which training fights in place of what is quiet: see docs/training.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from dac_kernels import native
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
        ctx.dtype, ctx.sizes, ctx.biased = x.dtype, sizes, bias is not None
        return torch.convolution(x, weight, bias, *sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = [*ctx.needs_input_grad[:2], ctx.biased and ctx.needs_input_grad[2]]
        grads = _gradients(grad.bfloat16(), x, weight, ctx.sizes, needed)
        return *(each if each is None else each.to(ctx.dtype) for each in grads), None


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, sizes: Any, needed: Sequence[bool]
) -> list[Any]:
    """The gradients of a convolution for input, weight and bias; None where not needed."""
    *others, bias = needed
    # Of transposed convolutions, oneDNN sums the bias's as slowly as it computes the other two.
    grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, [*others, False])
    return [*grads[:2], grad.sum((0, 2, 3)) if bias else None]


class Activated(NamedTuple):
    """Snake, and the convolution behind it.

    Attributes:
        alpha: [1, C, 1].
        weight: [C', C, K], or transposed [C, C', K].
        bias: [C'].
        sizes: what `torch.convolution` takes beside them, for images of height 1.
    """

    alpha: Tensor
    weight: Tensor
    bias: Tensor
    sizes: Any


def activated_convolutions(
    x: Tensor, layers: Sequence[Activated], residual: bool = False
) -> Tensor:
    """x through the layers, plus x itself if `residual`, as one step of autograd on a CPU.

    So no value is rounded, or brought back, in a pass over memory of its own, which would take as
    long as Snake.

    Args:
        x: [B, C, T] with channels innermost, float32 or bfloat16: what the layers compute in.
    Returns:
        [B, C', T'], alike.
    """
    tensors = [tensor for layer in layers for tensor in layer[:3]]
    sizes = [layer.sizes for layer in layers]
    y: Tensor = _Activated.apply(x, sizes, residual, *tensors)  # type: ignore[no-untyped-call]
    return y


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Any, residual: bool, *tensors: Tensor) -> Tensor:
        y, kept = x, []
        for i, size in enumerate(sizes):
            alpha, weight, bias = tensors[3 * i : 3 * i + 3]
            active, half = native.snake_rounded(y, alpha)
            image = weight.unsqueeze(2).to(x.dtype, memory_format=torch.channels_last)
            kept += [y, alpha, half, image.bfloat16()]
            y = torch.convolution(active.unsqueeze(2), image, bias.to(x.dtype), *size).squeeze(2)
            del active  # The next result takes its memory, which is in the cache.
        ctx.save_for_backward(*kept)
        ctx.sizes, ctx.residual = sizes, residual
        return y.add_(x) if residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        upstream = grad
        grads: list[Tensor | None] = []
        for i, sizes in reversed(list(enumerate(ctx.sizes))):
            x, alpha, half, weight = ctx.saved_tensors[4 * i : 4 * i + 4]
            image = grad.bfloat16().unsqueeze(2).contiguous(memory_format=torch.channels_last)
            grad, of_weight, of_bias = _gradients(
                image, half.unsqueeze(2), weight, sizes, (True, True, True)
            )
            # Only what leaves is in x's dtype.
            grad, of_alpha = native.snake_gradients(
                grad.squeeze(2), x, alpha, torch.bfloat16 if i else x.dtype
            )
            of_weight = of_weight.squeeze(2).to(alpha.dtype, memory_format=torch.contiguous_format)
            grads = [of_alpha, of_weight, of_bias, *grads]
        return grad.add_(upstream) if ctx.residual else grad, None, None, *grads

"""Snake and the convolutions behind it in training on a CPU, as one step of autograd.

The gradients are those of `dac_fast.model.cpu_gradients`. Layer by layer, what they need in
bfloat16 would be rounded, and brought back, in passes over memory of their own, each as long as
Snake; and the sums of residual units would be copies.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from dac_kernels import native
from torch import Tensor
from torch.autograd.function import once_differentiable

from dac_fast.model import cpu_gradients


class Activated(NamedTuple):
    """Snake, and the convolution behind it.

    Attributes:
        alpha: [1, C, 1].
        weight: [C', C, K], or transposed [C, C', K].
        bias: [C'].
        sizes: what `torch.convolution` takes beside them, for images of height 1.
        dtype: of the gradients, bfloat16 or float32; the same in all layers of one step.
    """

    alpha: Tensor
    weight: Tensor
    bias: Tensor
    sizes: Any
    dtype: torch.dtype


def activated_convolutions(
    x: Tensor, layers: Sequence[Activated], residual: bool = False
) -> Tensor:
    """x through the layers, plus x itself if `residual`.

    Args:
        x: [B, C, T] with channels innermost, float32 or bfloat16: what the layers compute in.
    Returns:
        [B, C', T'], alike.
    """
    tensors = [tensor for layer in layers for tensor in layer[:3]]
    sizes = [layer.sizes for layer in layers]
    y: Tensor = _Activated.apply(  # type: ignore[no-untyped-call]
        x, sizes, layers[0].dtype, residual, *tensors
    )
    return y


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: Any, dtype: torch.dtype, residual: bool, *tensors: Tensor
    ) -> Tensor:
        y, kept = x, []
        for i, size in enumerate(sizes):
            alpha, weight, bias = tensors[3 * i : 3 * i + 3]
            previous = y
            active, rounded = native.snake_rounded(previous, alpha, dtype)
            image = weight.unsqueeze(2)
            if cpu_gradients.by_winograd(active.unsqueeze(2), image, size):
                y = native.winograd(active, weight, bias, padding=size[1][1], dilation=size[2][1])
            else:
                image = image.to(x.dtype, memory_format=torch.channels_last)
                y = torch.convolution(active.unsqueeze(2), image, bias.to(x.dtype), *size)
                y = y.squeeze(2)
            kept += [previous, alpha, rounded, image.to(dtype)]
            del active  # The next result takes its memory, which is in the cache.
        ctx.save_for_backward(*kept)
        ctx.sizes, ctx.dtype, ctx.residual = sizes, dtype, residual
        return y.add_(x) if residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        upstream = grad
        grads: list[Tensor | None] = []
        for i, sizes in reversed(list(enumerate(ctx.sizes))):
            x, alpha, rounded, weight = ctx.saved_tensors[4 * i : 4 * i + 4]
            image = grad.to(ctx.dtype).unsqueeze(2).contiguous(memory_format=torch.channels_last)
            grad, of_weight, of_bias = cpu_gradients.gradients(
                image, rounded.unsqueeze(2), weight, sizes, (True, True, True)
            )
            # Only what leaves is in x's dtype.
            grad, of_alpha = native.snake_gradients(
                grad.squeeze(2), x, alpha, ctx.dtype if i else x.dtype
            )
            of_weight = of_weight.squeeze(2).to(alpha.dtype, memory_format=torch.contiguous_format)
            grads = [of_alpha, of_weight, of_bias, *grads]
        return grad.add_(upstream) if ctx.residual else grad, None, None, None, *grads

"""Snake and the convolutions behind it in training on a CPU, as one step of autograd.

The gradients are computed in bfloat16, see `dac_fast.model.half_gradients`. Layer by layer, values
would be rounded, and brought back, in passes over memory of their own, each as long as Snake.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from dac_kernels import native
from torch import Tensor
from torch.autograd.function import once_differentiable

from dac_fast.model import half_gradients


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
    """x through the layers, plus x itself if `residual`.

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
            grad, of_weight, of_bias = half_gradients.gradients(
                image, half.unsqueeze(2), weight, sizes, (True, True, True)
            )
            # Only what leaves is in x's dtype.
            grad, of_alpha = native.snake_gradients(
                grad.squeeze(2), x, alpha, torch.bfloat16 if i else x.dtype
            )
            of_weight = of_weight.squeeze(2).to(alpha.dtype, memory_format=torch.contiguous_format)
            grads = [of_alpha, of_weight, of_bias, *grads]
        return grad.add_(upstream) if ctx.residual else grad, None, None, *grads

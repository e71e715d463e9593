"""Convolutions along time for training on a CPU: with channels innermost, and their own gradients.

Arguments are images of height 1 (x [B, C, 1, T]), the only ones for which PyTorch has this layout.
The gradients are computed in a dtype of their own:

bfloat16: processors that multiply it natively do so at twice the rate of float32 or more, and two
    thirds of a training step's products are in its backward pass. Rounding there is noise in a
    gradient, far less than what one batch's differs from the next one's. In the forward pass it
    would be noise in the audio, which training fights in place of what is quiet: see
    docs/training.md.
float32: as the rest. Those of seven taps are dac_kernels' own, by minimal filtering; of other
    convolutions the weight's is, since oneDNN, which computes the rest fastest in this layout,
    takes three times as long for it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from dac_kernels import native
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of what is filtered: its sums take ten times the weight's memory, in up to eight parts.
MOST_CHANNELS = 256


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *sizes: Any
) -> Tensor:
    """`torch.convolution`, in the dtype of x; `dtype`: of the products that make its gradients."""
    y: Tensor = _Convolution.apply(x, weight, bias, dtype, sizes)  # type: ignore[no-untyped-call]
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, sizes: Any
    ) -> Tensor:
        ctx.save_for_backward(x.to(dtype), weight.to(dtype))
        ctx.dtype, ctx.sizes = x.dtype, sizes
        return torch.convolution(x, weight, bias, *sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype, memory_format=torch.channels_last)
        grads = gradients(grad, x, weight, ctx.sizes, ctx.needs_input_grad[:3])
        return *(each if each is None else each.to(ctx.dtype) for each in grads), None, None


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, sizes: Any, needed: Sequence[bool]
) -> list[Any]:
    """The gradients of a convolution for input, weight and bias, in the dtype of the arguments.

    Args:
        grad: of its result.
        x, weight: what it convolved.
        sizes: what `torch.convolution` takes beside the tensors.
        needed: for each of the three; None in the place of the others.
    """
    of_x, of_weight, of_bias = needed
    native_weight = of_weight and grad.dtype == torch.float32 and sizes[-1] == 1  # No groups.
    if native_weight and of_x and by_winograd(x, weight, sizes):
        given = grad.squeeze(2), x.squeeze(2), weight.squeeze(2)
        grads = native.winograd_gradients(*given, padding=sizes[1][1], dilation=sizes[2][1])
        return [grads[0].unsqueeze(2), grads[1].unsqueeze(2), grads[2] if of_bias else None]
    # Of transposed convolutions, oneDNN sums the bias's as slowly as it computes the other two.
    parts = [of_x, of_weight and not native_weight, False]
    weight = weight.contiguous(memory_format=torch.channels_last)
    grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *sizes, parts)
    return [
        grads[0],
        _weight_gradient(grad, x, weight, sizes) if native_weight else grads[1],
        grad.sum((0, 2, 3)) if of_bias else None,
    ]


def by_winograd(x: Tensor, weight: Tensor, sizes: Any) -> bool:
    """Whether `native.winograd` does the same convolution as these sizes ask for."""
    (_, stride), (_, padding), (_, dilation), transposed, *_ = sizes
    if stride > 1 or transposed or max(weight.shape[:2]) > MOST_CHANNELS:
        return False
    given = x.squeeze(2), weight.squeeze(2), padding, dilation
    return native.winograd_unsupported(*given) is None


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, sizes: Any) -> Tensor:
    (_, stride), (_, padding), (_, dilation), transposed, _, _ = sizes
    first, second = (x, grad) if transposed else (grad, x)
    size = (weight.shape[3], stride, padding, dilation)
    return native.conv1d_weight_gradient(first.squeeze(2), second.squeeze(2), *size).unsqueeze(2)

"""Mean removal and peak normalisation of signals: csrc/disc_preprocess.cpp and .cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dac_kernels.native.compiled import (
    call,
    contiguous_rows,
    differs,
    extension,
    require,
    unsupported,
)

DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)}


def disc_preprocess(x: Tensor) -> Tensor:
    """Each signal without its mean, its peak at 0.8: `0.8 (x - mean) / (max |x - mean| + 1e-9)`.

    Sums are in float64.

    Args:
        x: [..., T], float32, or on the CPU float64; each leading index is a signal of its own.
    Raises:
        RuntimeError: see `disc_preprocess_unsupported`.
    """
    y: Tensor = _disc_preprocess(x)[0]
    return y


def disc_preprocess_unsupported(x: Tensor) -> str | None:
    """Why `disc_preprocess` cannot run on this tensor, or None."""
    if reason := unsupported(x, DTYPES):
        return reason
    if x.ndim == 0 or x.shape[-1] == 0:
        return f"the shape is {list(x.shape)}: no samples"
    return None if x.numel() < 2**31 else f"there are {x.numel()} samples, more than 2^31 - 1"


def _signals(x: Tensor) -> tuple[Tensor, extension.Signals, Tensor]:
    """x as rows [signals, T], their description, and room for each chunk's partial results."""
    rows = contiguous_rows(x.reshape(-1, x.shape[-1]))
    count, samples = rows.shape
    chunk = 4096 if x.is_cuda else 65536
    # At most 32 bytes each.
    partial = rows.new_empty(count * -(-samples // chunk), 4, dtype=torch.float64)
    return rows, extension.Signals(count, samples, rows.stride(0), chunk), partial


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what `_disc_preprocess` returns, once its argument is checked."""
    require("disc_preprocess", disc_preprocess_unsupported(x))
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 2)


@torch.library.custom_op("dac_native::disc_preprocess", mutates_args=())
def _disc_preprocess(x: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and for the backward pass each signal's mean and peak, [..., 2]."""
    y, levels = _outputs(x)
    rows, signals, partial = _signals(x)
    tensors = [tensor.data_ptr() for tensor in (rows, y, levels, partial)]
    call("disc_preprocess_forward", x, [x.dtype], signals, *tensors)
    return y, levels


_disc_preprocess.register_fake(_outputs)


def _gradient(grad: Tensor, x: Tensor, levels: Tensor) -> Tensor:
    """Room for what `_disc_preprocess_backward` returns, once its arguments are checked."""
    reason = (
        disc_preprocess_unsupported(x)
        or differs("the gradient", grad, x.shape, x)
        or differs("levels", levels, (*x.shape[:-1], 2), x)
    )
    require("disc_preprocess_backward", reason)
    return x.new_empty(x.shape)


@torch.library.custom_op("dac_native::disc_preprocess_backward", mutates_args=())
def _disc_preprocess_backward(grad: Tensor, x: Tensor, levels: Tensor) -> Tensor:
    grad_x = _gradient(grad, x, levels)
    grad, levels = grad.contiguous(), levels.contiguous()
    rows, signals, partial = _signals(x)
    tensors = [tensor.data_ptr() for tensor in (grad, rows, levels, grad_x, partial)]
    call("disc_preprocess_backward", x, [x.dtype], signals, *tensors)
    return grad_x


_disc_preprocess_backward.register_fake(_gradient)


def _save(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> Tensor:
    grad_x: Tensor = _disc_preprocess_backward(grad, *ctx.saved_tensors)
    return grad_x


_disc_preprocess.register_autograd(_backward, setup_context=_save)

"""Snake on the CPU: csrc/snake.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dac_kernels.native.compiled import call, differs, extension, require, unsupported

DTYPES = {"cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
# Those are computed in float32, and alpha may be in float32 already.
HALVES = (torch.bfloat16, torch.float16)


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """Snake activation `x + sin(alpha x)^2 / (alpha + 1e-9)` (arXiv 2006.08195), on the CPU.

    Runs without a copy where time or the channels are contiguous; any other layout is copied once.
    The backward pass keeps x and alpha only, and its results do not depend on the number of
    threads.

    Args:
        x: [B, C, T], float32, float64, bfloat16 or float16.
        alpha: [1, C, 1], of x's dtype, or float32 where x has 16 bits.
    Raises:
        RuntimeError: see `snake_unsupported`.
    """
    y: Tensor = _snake(x, alpha)
    return y


def snake_rounded(x: Tensor, alpha: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`snake`, and the same in `dtype`. Autograd does not see it: see `snake_gradients`.

    Args:
        x: [B, C, T], float32 or bfloat16.
        alpha: as for `snake`.
        dtype: x's or bfloat16.
    Raises:
        RuntimeError: they are something else.
    """
    require("snake_rounded", _not_rounded(x, dtype))
    if dtype == x.dtype:
        y = _forward(x, alpha, alpha)
        return y, y
    rounded = _empty_like(x, dtype)
    return _forward(x, alpha, alpha, rounded), rounded


def snake_gradients(
    grad: Tensor, x: Tensor, alpha: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of `snake` for x and, in float32, for alpha.

    Args:
        grad: of its result, [B, C, T], of x's dtype or bfloat16.
        x, alpha: as for `snake_rounded`.
        dtype: of the first result, x's or grad's.
    Raises:
        RuntimeError: they are something else.
    """
    reason = _not_rounded(x, x.dtype) or snake_unsupported(x, alpha)
    dtypes = (x.dtype, torch.bfloat16)
    if (grad.shape, grad.device) != (x.shape, x.device) or grad.dtype not in dtypes:
        found = f"{grad.dtype} {list(grad.shape)} on {grad.device}"
        wanted = f"{x.dtype} or torch.bfloat16 {list(x.shape)} on {x.device}"
        reason = reason or f"the gradient is {found}, not {wanted}"
    if dtype not in (x.dtype, grad.dtype):
        reason = reason or f"gradients are to be {dtype}, not {x.dtype} or {grad.dtype}"
    require("snake_gradients", reason)
    grad_x = _empty_like(x, dtype)
    return grad_x, _backward_into(grad_x, grad, x, alpha)


def _not_rounded(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why values of x are not rounded to `dtype`, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"the dtype is {x.dtype}, not torch.float32 or torch.bfloat16"
    if dtype not in (x.dtype, torch.bfloat16):
        return f"{x.dtype} is not rounded to {dtype}, but to itself or torch.bfloat16"
    return None


def snake_unsupported(x: Tensor, alpha: Tensor) -> str | None:
    """Why `snake` cannot run on these tensors, or None."""
    if reason := unsupported(x, DTYPES):
        return reason
    if x.ndim != 3 or alpha.shape != (1, x.shape[1], 1):
        return (
            f"x and alpha have shapes {list(x.shape)} and {list(alpha.shape)}, "
            "not [B, C, T] and [1, C, 1]"
        )
    if x.dtype in HALVES and (alpha.dtype, alpha.device) == (torch.float32, x.device):
        return None
    return differs("alpha", alpha, alpha.shape, x)


def snake_beta(x: Tensor, alpha: Tensor, beta: Tensor, log_scale: bool = False) -> Tensor:
    """`x + sin(alpha x)^2 / (beta + 1e-9)`, BigVGAN's variant, on the CPU, for inference.

    Args:
        x: as for `snake`.
        alpha, beta: as its alpha.
        log_scale: alpha and beta hold logarithms.
    Raises:
        RuntimeError: see `snake_beta_unsupported`.
    """
    require("snake_beta", snake_beta_unsupported(x, alpha, beta))
    if log_scale:
        alpha, beta = alpha.exp(), beta.exp()
    y: Tensor = _snake_beta(x, alpha, beta)
    return y


def snake_beta_unsupported(
    x: Tensor, alpha: Tensor, beta: Tensor, log_scale: bool = False
) -> str | None:
    """Why `snake_beta` cannot run on these tensors, or None."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, alpha, beta)):
        return "it computes no gradients"
    reason = snake_unsupported(x, beta)
    return snake_unsupported(x, alpha) or (reason and reason.replace("alpha", "beta"))


def _channels_last(x: Tensor) -> bool:
    """Whether the channels of x [B, C, T], and not time, lie next to each other."""
    return x.stride(1) == 1 and (x.stride(2) != 1 or x.shape[2] == 1)


def _empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if not _channels_last(x):
        return x.new_empty(x.shape, dtype=dtype)
    batch, channels, time = x.shape
    return x.new_empty(batch, time, channels, dtype=dtype).transpose(1, 2)


def _with_runs(x: Tensor, channels_last: bool) -> Tensor:
    """x [B, C, T] with contiguous channels or contiguous time: a copy only where they are not."""
    if channels_last:
        return x if x.stride(1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if x.stride(2) == 1 else x.contiguous()


def _wide(alpha: Tensor) -> Tensor:
    """alpha [1, C, 1] without gaps, in the dtype that the extension computes in."""
    return (alpha.float() if alpha.dtype in HALVES else alpha).contiguous()


def _rows(x: Tensor, channels_last: bool, absent: bool = False) -> extension.Rows:
    address = 0 if absent else x.data_ptr()
    return extension.Rows(address, x.stride(0), x.stride(2 if channels_last else 1))


def _snake_shape(x: Tensor, channels_last: bool) -> extension.SnakeShape:
    batch, channels, time = x.shape
    rows, size = (time, channels) if channels_last else (channels, time)
    return extension.SnakeShape(batch, rows, size, channels_last)


def _output(x: Tensor, *per_channel: Tensor) -> Tensor:
    """Room for what `_snake` and `_snake_beta` return, once their arguments are checked."""
    for values in per_channel:
        require("snake", snake_unsupported(x, values))
    return _empty_like(x)


def _forward(x: Tensor, alpha: Tensor, beta: Tensor, rounded: Tensor | None = None) -> Tensor:
    """y, and `rounded`, of its layout, filled with y in bfloat16."""
    y, last = _output(x, alpha, beta), _channels_last(x)
    x = _with_runs(x, last)
    alpha, beta = _wide(alpha), _wide(beta)
    inputs = _rows(x, last), alpha.data_ptr(), beta.data_ptr()
    outputs = _rows(y, last), _rows(y if rounded is None else rounded, last, rounded is None)
    call("snake_forward", x, [x.dtype], _snake_shape(x, last), *inputs, *outputs)
    return y


@torch.library.custom_op("dac_native::snake", mutates_args=())
def _snake(x: Tensor, alpha: Tensor) -> Tensor:
    return _forward(x, alpha, alpha)


@torch.library.custom_op("dac_native::snake_beta", mutates_args=())
def _snake_beta(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _forward(x, alpha, beta)


_snake.register_fake(_output)
_snake_beta.register_fake(_output)


def _gradients(grad: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what `_snake_backward` returns, once its arguments are checked."""
    reason = snake_unsupported(x, alpha) or differs("the gradient", grad, x.shape, x)
    require("snake_backward", reason)
    return _empty_like(x), alpha.new_empty(alpha.shape)


@torch.library.custom_op("dac_native::snake_backward", mutates_args=())
def _snake_backward(grad: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_alpha = _gradients(grad, x, alpha)
    return grad_x, _backward_into(grad_x, grad, x, alpha).to(grad_alpha.dtype)


_snake_backward.register_fake(_gradients)


def _backward_into(grad_x: Tensor, grad: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """Fills grad_x, of x's layout; returns the gradient of alpha, in what it is computed in."""
    last = _channels_last(x)
    dtypes = grad.dtype, x.dtype, grad_x.dtype
    grad, x = _with_runs(grad, last), _with_runs(x, last)
    alpha = _wide(alpha)
    grad_alpha = torch.empty_like(alpha)
    inputs = _rows(grad, last), _rows(x, last), alpha.data_ptr()
    outputs = _rows(grad_x, last), grad_alpha.data_ptr()
    call("snake_backward", x, dtypes, _snake_shape(x, last), *inputs, *outputs)
    return grad_alpha


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = _snake_backward(grad, *ctx.saved_tensors)
    return gradients


_snake.register_autograd(_backward, setup_context=_save)

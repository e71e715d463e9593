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


def _empty_like(x: Tensor) -> Tensor:
    if not _channels_last(x):
        return x.new_empty(x.shape)
    batch, channels, time = x.shape
    return x.new_empty(batch, time, channels).transpose(1, 2)


def _with_runs(x: Tensor, channels_last: bool) -> Tensor:
    """x [B, C, T] with contiguous channels or contiguous time: a copy only where they are not."""
    if channels_last:
        return x if x.stride(1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if x.stride(2) == 1 else x.contiguous()


def _wide(alpha: Tensor) -> Tensor:
    """alpha [1, C, 1] without gaps, in the dtype that the extension computes in."""
    return (alpha.float() if alpha.dtype in HALVES else alpha).contiguous()


def _rows(x: Tensor, channels_last: bool) -> extension.Rows:
    return extension.Rows(x.data_ptr(), x.stride(0), x.stride(2 if channels_last else 1))


def _snake_shape(x: Tensor, channels_last: bool) -> extension.SnakeShape:
    batch, channels, time = x.shape
    rows, size = (time, channels) if channels_last else (channels, time)
    return extension.SnakeShape(batch, rows, size, channels_last)


def _output(x: Tensor, *per_channel: Tensor) -> Tensor:
    """Room for what `_snake` and `_snake_beta` return, once their arguments are checked."""
    for values in per_channel:
        require("snake", snake_unsupported(x, values))
    return _empty_like(x)


def _forward(function: str, x: Tensor, *per_channel: Tensor) -> Tensor:
    y, last = _output(x, *per_channel), _channels_last(x)
    x, wide = _with_runs(x, last), [_wide(values) for values in per_channel]
    addresses = (values.data_ptr() for values in wide)
    call(function, x, [x.dtype], _snake_shape(x, last), _rows(x, last), *addresses, _rows(y, last))
    return y


@torch.library.custom_op("dac_native::snake", mutates_args=())
def _snake(x: Tensor, alpha: Tensor) -> Tensor:
    return _forward("snake_forward", x, alpha)


@torch.library.custom_op("dac_native::snake_beta", mutates_args=())
def _snake_beta(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _forward("snake_beta_forward", x, alpha, beta)


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
    last = _channels_last(x)
    grad = _with_runs(grad, last)
    x = _with_runs(x, last)
    wide, wide_grad = _wide(alpha), _wide(grad_alpha)
    inputs = _rows(grad, last), _rows(x, last), wide.data_ptr()
    outputs = _rows(grad_x, last), wide_grad.data_ptr()
    call("snake_backward", x, [x.dtype], _snake_shape(x, last), *inputs, *outputs)
    return grad_x, wide_grad.to(alpha.dtype)


_snake_backward.register_fake(_gradients)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = _snake_backward(grad, *ctx.saved_tensors)
    return gradients


_snake.register_autograd(_backward, setup_context=_save)

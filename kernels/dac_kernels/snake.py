# ruff: noqa: N803 (sizes of a kernel are named as in its formulas)
"""Snake activations in Triton: one pass over the tensor forward, one backward.

    snake       y = x + sin(alpha x)^2 / (alpha + 1e-9)     arXiv 2006.08195; Descript Audio Codec
    snake_beta  y = x + sin(alpha x)^2 / (beta + 1e-9)      BigVGAN, arXiv 2206.04658

The backward pass keeps only x: with s = sin(alpha x) and c = cos(alpha x),

    dx     = g (1 + 2 s c alpha / (beta + 1e-9))
    dalpha = sum of g 2 s c x / (beta + 1e-9)
    dbeta  = sum of -g s^2 / (beta + 1e-9)^2

and for `snake`, where alpha is beta too, the last two are added. Each program writes its own fp32
partial sums, and a second reduction adds them in a fixed order: no atomics, the same bits on every
run. `sine.py` has the sine, and how exact y is.
"""

# Strings as annotations: without Triton, `tl.constexpr` must not be looked up.
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor

from dac_kernels.launch import DTYPES, Config, device_unsupported, jit, launch, tl, tuned
from dac_kernels.sine import sine_and_cosine, squared_sine

# Elements of a tile and the warps that share it.
CONFIGS: tuple[Config, ...] = tuple(
    {"elements": elements, "num_warps": warps}
    for elements, warps in ((2048, 4), (4096, 8), (4096, 4))
)
# The backward pass has one only, because its partial sums, hence its bits, depend on it.
BACKWARD: Config = {"elements": 4096, "num_warps": 4}


@jit
@no_type_check
def activated(x, alpha, gain, SINGLE: tl.constexpr):
    """x + gain sin(alpha x)^2 in float32; less exactly for results of 16 bits, not SINGLE."""
    return tl.fma(squared_sine(x, alpha, SINGLE), gain, x)


@jit
@no_type_check
def _tile(
    C, T, ALIGN: tl.constexpr, C_FAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr
):
    # This program's item, first channel and first time, in int64; its row of partial sums; which of
    # its channels and elements exist. Neighbouring programs are neighbours in memory. Divisions are
    # in int32 where T is (one in int64 costs as much as several elements), and so are the mask's
    # comparisons, of which there is one per element.
    c_blocks = tl.cdiv(C, BLOCK_C)
    t_blocks = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    if C_FAST:
        c_block = pid % c_blocks
        row = pid // c_blocks
    else:
        c_block = pid // t_blocks % c_blocks
        row = pid // (t_blocks * c_blocks) * t_blocks + pid % t_blocks
    c_start = c_block.to(tl.int64) * BLOCK_C
    t_start = (row % t_blocks).to(tl.int64) * BLOCK_T
    c_left = tl.minimum(C - c_start, BLOCK_C).to(tl.int32)
    t_left = tl.minimum(T - t_start, BLOCK_T).to(tl.int32)
    if C_FAST:
        c_left = tl.multiple_of(c_left, ALIGN)
    else:
        t_left = tl.multiple_of(t_left, ALIGN)
    c_inside = tl.arange(0, BLOCK_C)[:, None] < c_left
    inside = c_inside & (tl.arange(0, BLOCK_T)[None, :] < t_left)
    return (row // t_blocks).to(tl.int64), c_start, t_start, row.to(tl.int64), c_inside, inside


@jit
@no_type_check
def _pointers(
    x, item, c_start, t_start, stride_batch, stride_channel, stride_time,
    ALIGN: tl.constexpr, C_FAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # To the tile [BLOCK_C, BLOCK_T] of x. ALIGN divides the distances between runs of consecutive
    # elements, so that these are loaded in vectors. Of an argument Triton itself notices only that
    # 16 divides it, and takes no `tl.multiple_of`.
    stride_batch = stride_batch // ALIGN * ALIGN
    if C_FAST:
        stride_time = stride_time // ALIGN * ALIGN
    else:
        stride_channel = stride_channel // ALIGN * ALIGN
    first = x + item * stride_batch + c_start * stride_channel + t_start * stride_time
    c = tl.arange(0, BLOCK_C)[:, None].to(tl.int64)
    t = tl.arange(0, BLOCK_T)[None, :].to(tl.int64)
    return first + c * stride_channel + t * stride_time


@jit
@no_type_check
def _forward_kernel(
    x, alpha, beta, y, C, T,
    stride_x_batch, stride_x_channel, stride_x_time,
    stride_y_batch, stride_y_channel, stride_y_time,
    ALIGN: tl.constexpr, C_FAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    item, c_start, t_start, _, c_inside, inside = _tile(C, T, ALIGN, C_FAST, BLOCK_C, BLOCK_T)
    x_at = _pointers(
        x, item, c_start, t_start, stride_x_batch, stride_x_channel, stride_x_time,
        ALIGN, C_FAST, BLOCK_C, BLOCK_T,
    )  # fmt: skip
    y_at = _pointers(
        y, item, c_start, t_start, stride_y_batch, stride_y_channel, stride_y_time,
        ALIGN, C_FAST, BLOCK_C, BLOCK_T,
    )  # fmt: skip
    c = c_start + tl.arange(0, BLOCK_C)[:, None]
    frequency = tl.load(alpha + c, mask=c_inside, other=1.0).to(tl.float32)
    gain = 1.0 / (tl.load(beta + c, mask=c_inside, other=1.0).to(tl.float32) + 1e-9)
    value = tl.load(x_at, mask=inside).to(tl.float32)
    y_value = activated(value, frequency, gain, y.dtype.element_ty == tl.float32)
    tl.store(y_at, y_value.to(y.dtype.element_ty), mask=inside)


@jit
@no_type_check
def _backward_kernel(
    x, alpha, beta, g, dx, partials, C, T,
    stride_x_batch, stride_x_channel, stride_x_time,
    stride_g_batch, stride_g_channel, stride_g_time,
    stride_dx_batch, stride_dx_channel, stride_dx_time,
    ALIGN: tl.constexpr, C_FAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    # SHARED: alpha is beta too, so there is one sum for both.
    item, c_start, t_start, row, c_inside, inside = _tile(C, T, ALIGN, C_FAST, BLOCK_C, BLOCK_T)
    x_at = _pointers(
        x, item, c_start, t_start, stride_x_batch, stride_x_channel, stride_x_time,
        ALIGN, C_FAST, BLOCK_C, BLOCK_T,
    )  # fmt: skip
    g_at = _pointers(
        g, item, c_start, t_start, stride_g_batch, stride_g_channel, stride_g_time,
        ALIGN, C_FAST, BLOCK_C, BLOCK_T,
    )  # fmt: skip
    dx_at = _pointers(
        dx, item, c_start, t_start, stride_dx_batch, stride_dx_channel, stride_dx_time,
        ALIGN, C_FAST, BLOCK_C, BLOCK_T,
    )  # fmt: skip
    c = c_start + tl.arange(0, BLOCK_C)[:, None]
    frequency = tl.load(alpha + c, mask=c_inside, other=1.0).to(tl.float32)
    gain = 1.0 / (tl.load(beta + c, mask=c_inside, other=1.0).to(tl.float32) + 1e-9)

    value = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
    sine, cosine = sine_and_cosine(value, frequency, dx.dtype.element_ty == tl.float32)
    double = 2.0 * sine * cosine
    d_x = grad * tl.fma(double, frequency * gain, 1.0)
    tl.store(dx_at, d_x.to(dx.dtype.element_ty), mask=inside)

    d_alpha = double * value
    d_beta = sine * sine * -gain
    sums = partials + row * C + c
    if SHARED:
        d_both = gain * tl.sum(grad * (d_alpha + d_beta), axis=1, keep_dims=True)
        tl.store(sums, d_both, mask=c_inside)
    else:
        rows = tl.num_programs(0).to(tl.int64) // tl.cdiv(C, BLOCK_C)
        d_alpha = gain * tl.sum(grad * d_alpha, axis=1, keep_dims=True)
        d_beta = gain * tl.sum(grad * d_beta, axis=1, keep_dims=True)
        tl.store(sums, d_alpha, mask=c_inside)
        tl.store(sums + rows * C, d_beta, mask=c_inside)


def _geometry(elements: int, *tensors: Tensor) -> tuple[int, int, dict[str, int]]:
    """Programs, rows of partial sums, and constants of a launch over tensors [B, C, T].

    The first tensor decides along which axis the tiles are long.
    """
    b, c, t = tensors[0].shape
    c_fast = tensors[0].stride(1) == 1 and (t == 1 or tensors[0].stride(2) != 1)
    fast, slow = (c, t) if c_fast else (t, c)
    # The largest extent along the fast axis that wastes little more of the tile than the best one.
    extents = [32 << i for i in range(6)]
    padded = {extent: -(-fast // extent) * extent for extent in extents}
    fast_block = max(e for e in extents if padded[e] <= 1.125 * min(padded.values()))
    slow_block = min(elements // fast_block, 1 << (slow - 1).bit_length())
    block_c, block_t = (fast_block, slow_block) if c_fast else (slow_block, fast_block)
    # What is known to divide every row's start: the width of the vector loads.
    slow_axis = 2 if c_fast else 1
    strides = [tensor.stride(axis) for tensor in tensors for axis in (0, slow_axis)]
    align = math.gcd(16, fast, *strides)
    rows = b * -(-t // block_t)
    constants = {"ALIGN": align, "C_FAST": c_fast, "BLOCK_C": block_c, "BLOCK_T": block_t}
    return rows * -(-c // block_c), rows, constants


@torch.library.custom_op("dac_kernels::snake", mutates_args=())
def _snake(x: Tensor, alpha: Tensor, beta: Tensor | None) -> Tensor:
    """beta: None where it is alpha."""
    y = torch.empty_like(x)
    _, channels, time = x.shape
    tensors = (x, alpha, alpha if beta is None else beta, y)
    integers = (channels, time, *x.stride(), *y.stride())

    def run(config: Config) -> None:
        programs, _, constants = _geometry(config["elements"], x, y)
        warps = config["num_warps"]
        launch(_forward_kernel, programs, *tensors, *integers, **constants, num_warps=warps)

    if x.numel():
        _, _, constants = _geometry(1024, x, y)
        shape = constants["ALIGN"], constants["C_FAST"], channels, time.bit_length()
        run(tuned("snake", x, shape, CONFIGS, run))
    return y


@_snake.register_fake
def _(x: Tensor, alpha: Tensor, beta: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dac_kernels::snake_backward", mutates_args=())
def _snake_backward(
    g: Tensor, x: Tensor, alpha: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx, and fp32 sums [1, C] (dalpha where alpha is beta too) or [2, C] (dalpha, dbeta)."""
    dx = torch.empty_like(x)
    _, channels, time = x.shape
    sums = 1 if beta is None else 2
    if not x.numel():
        return dx, x.new_zeros(sums, channels, dtype=torch.float32)
    programs, rows, constants = _geometry(BACKWARD["elements"], x, g, dx)
    partials = x.new_empty(sums, rows, channels, dtype=torch.float32)
    tensors = (x, alpha, alpha if beta is None else beta, g, dx, partials)
    integers = (channels, time, *x.stride(), *g.stride(), *dx.stride())
    options = constants | {"SHARED": beta is None, "num_warps": BACKWARD["num_warps"]}
    launch(_backward_kernel, programs, *tensors, *integers, **options)
    return dx, partials.sum(1)


@_snake_backward.register_fake
def _(g: Tensor, x: Tensor, alpha: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    sums = 1 if beta is None else 2
    return torch.empty_like(x), x.new_empty(sums, x.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x, alpha, beta = ctx.saved_tensors
    dx, sums = _snake_backward(g, x, alpha, beta)
    d_alpha = sums[0].view(alpha.shape).to(alpha.dtype)
    return dx, d_alpha, None if beta is None else sums[1].view(beta.shape).to(beta.dtype)


_snake.register_autograd(_gradients, setup_context=_save)


def snake_unsupported(x: Tensor, alpha: Tensor) -> str | None:
    """Why `snake` cannot run on these arguments, or None."""
    if reason := device_unsupported(x):
        return reason
    if x.dim() != 3:
        return f"x has shape {tuple(x.shape)}; accepted: [B, C, T]"
    if alpha.shape != (1, x.shape[1], 1):
        return f"alpha has shape {tuple(alpha.shape)}; accepted: (1, {x.shape[1]}, 1)"
    for name, tensor in (("x", x), ("alpha", alpha)):
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; accepted: float32, float16, bfloat16"
    if alpha.device != x.device:
        return f"alpha is on {alpha.device} and x on {x.device}"
    return None


def snake_beta_unsupported(
    x: Tensor, alpha: Tensor, beta: Tensor, log_scale: bool = False
) -> str | None:
    """Why `snake_beta` cannot run on these arguments, or None."""
    reason = snake_unsupported(x, beta)
    return snake_unsupported(x, alpha) or (reason and reason.replace("alpha", "beta"))


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """`x + sin(alpha x)^2 / (alpha + 1e-9)`, one frequency per channel; differentiable once.

    Args:
        x: [B, C, T], float32, float16 or bfloat16; any strides without a copy, but contiguous and
            channels-last tensors are fast.
        alpha: [1, C, 1], one of those dtypes (float32 with a half-precision x is fine).
    Returns:
        of x's shape and dtype, and its strides where x is dense (otherwise contiguous). Computed in
        float32 from the exact product: alpha = 0 gives x in every dtype, and a finite x whose
        alpha x overflows gives x, not NaN.
    Raises:
        ValueError: `snake_unsupported` has a reason.
    """
    if reason := snake_unsupported(x, alpha):
        raise ValueError(reason)
    y: Tensor = _snake(x, alpha.contiguous(), None)
    return y


def snake_beta(x: Tensor, alpha: Tensor, beta: Tensor, log_scale: bool = False) -> Tensor:
    """`x + sin(alpha x)^2 / (beta + 1e-9)`, BigVGAN's variant; differentiable once.

    Args:
        x: as for `snake`.
        alpha, beta: [1, C, 1].
        log_scale: alpha and beta hold logarithms.
    Raises:
        ValueError: `snake_beta_unsupported` has a reason.
    """
    if reason := snake_beta_unsupported(x, alpha, beta):
        raise ValueError(reason)
    if log_scale:
        alpha, beta = alpha.float().exp(), beta.float().exp()
    y: Tensor = _snake(x, alpha.contiguous(), beta.contiguous())
    return y


def warmup(
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cuda",
    channels_last: bool = False,
    backward: bool = False,
) -> None:
    """Compile and tune `snake` for tensors [B, C, T] of these shapes, before a graph's capture."""
    for b, c, t in shapes:
        x = torch.zeros((b, t, c), dtype=dtype, device=device).transpose(1, 2)
        x = (x if channels_last else x.contiguous()).requires_grad_(backward)
        y = snake(x, torch.ones(1, c, 1, dtype=dtype, device=device))
        if backward:
            torch.autograd.backward(y, torch.zeros_like(y))

# ruff: noqa: N803 (sizes and strides of a kernel are named as in its formulas)
"""What the fused convolution kernels share: rows of a tile, loads of windows, the epilogue, the choice of tiles."""

# Strings as annotations: without Triton, `tl.constexpr` must not be looked up.
from __future__ import annotations

import math

import torch
from torch import Tensor

from dac_kernels.launch import DTYPES, INTERPRETED, device_unsupported, jit, tl
from dac_kernels.snake import _reduced, _sine

# Blocks of rows that take turns on the same columns, so that weights are read from L2 rather than from memory.
GROUP = 8


@jit
def tile_of(m_blocks, n_blocks, GROUP: tl.constexpr):
    """This program's block of rows and of columns: GROUP blocks of rows by all columns, then the next GROUP."""
    pid = tl.program_id(0)
    first = pid // (GROUP * n_blocks) * GROUP
    size = tl.minimum(m_blocks - first, GROUP)
    inside = pid % (GROUP * n_blocks)
    return first + inside % size, inside // size


@jit
def windows(x, item, m, known, size, x_b, step, first, ALIGN: tl.constexpr):
    """Pointers [M, 1] to where each row's runs start, and the offsets from there between which the item lies."""
    start = (m.to(tl.int64) * step - first)[:, None]
    # Offsets are small, so what is far away may as well be 2^30 away.
    low = tl.maximum(-start, 0).to(tl.int32)
    high = tl.where(known[:, None], tl.minimum(size - start, 1 << 30), 0).to(tl.int32)
    at = x + item.to(tl.int64)[:, None] * x_b + start
    return at, tl.multiple_of(low, (ALIGN, ALIGN)), tl.multiple_of(high, (ALIGN, ALIGN))


@jit
def any_valid(lengths, item, known, position):
    """1 if any of these positions lies before its item's length, else 0: nothing needs to be summed."""
    length = tl.load(lengths + item, mask=known, other=0)
    return tl.max((position < length).to(tl.int32), axis=0)


@jit
def snake_of(c, alpha, channel, known):
    """Snake of c [M, N] with the frequencies of channels [N]."""
    frequency = tl.load(alpha + channel, mask=known, other=1.0).to(tl.float32)[None, :]
    sine = _sine(_reduced(c, frequency))
    square = tl.minimum(sine * sine, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.fma(square, 1.0 / (frequency + 1e-9), c)


@jit
def finish(
    c, bias, alpha, residual, lengths, y, snaked, item, known, position, channel, channel_known, at, inside, y_b, r_b,
    TANH: tl.constexpr,
):  # fmt: skip
    """The epilogue on sums c [M, N]: `at` are their offsets in the item, which exist where `inside`."""
    c += tl.load(bias + channel, mask=channel_known, other=0.0).to(tl.float32)[None, :]
    if TANH:
        c = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * c))
    item = item.to(tl.int64)[:, None]
    if lengths is not None:
        length = tl.load(lengths + item, mask=known[:, None], other=0)
        c = tl.where(position < length, c, 0.0)
    if residual is not None:
        c += tl.load(residual + item * r_b + at, mask=inside, other=0.0).to(tl.float32)
    at += item * y_b
    if y is not None:
        tl.store(y + at, c.to(y.dtype.element_ty), mask=inside)
    if alpha is not None:
        tl.store(
            snaked + at,
            snake_of(c, alpha, channel, channel_known).to(snaked.dtype.element_ty),
            mask=inside,
        )


def channels_innermost(x: Tensor) -> Tensor:
    """x [B, C, T] with each item's elements in a flat [T, C]: a copy only where they are not."""
    _, channels, time = x.shape
    if (channels == 1 or x.stride(1) == 1) and (time == 1 or x.stride(2) == channels):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def dense(vector: Tensor | None) -> Tensor | None:
    """A vector, or None, with its elements next to each other."""
    return None if vector is None else vector.contiguous()


def factors(*tensors: Tensor) -> list[Tensor]:
    """The tensors as the kernel multiplies them. Triton's interpreter would take bfloat16's bits for integers."""
    return [t.float() if INTERPRETED and t.dtype == torch.bfloat16 else t for t in tensors]


def outputs(
    x: Tensor, dtype: torch.dtype, channels: int, time: int, keep: bool, snaked: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for c and snake(c), with channels innermost, where they are wanted."""
    shape = (x.shape[0], time, channels)
    return tuple(
        x.new_empty(shape, dtype=dtype).transpose(1, 2) if wanted else None
        for wanted in (keep, snaked)
    )


def precision_of(x: Tensor, tf32: bool) -> str:
    """`input_precision` of products; half precision has only one."""
    return "tf32" if tf32 or x.dtype != torch.float32 else "ieee"


def alignment(channels: int, x: Tensor, *weights: Tensor) -> tuple[int, bool]:
    """What is known to divide every offset in x, 16 or 1, and whether x and the weights are loaded in vectors."""
    align = 16 if channels % 16 == 0 else 1
    strides = [
        x.stride(0),
        *(stride for weight in weights for stride in weight.stride() if stride != 1),
    ]
    innermost = all(1 in weight.stride()[:2] for weight in weights)
    return align, align == 16 and innermost and math.gcd(16, *strides) == 16


def tiles(
    kinds: dict[str, tuple], x: Tensor, precision: str, aligned: bool, columns: int, run: int
) -> list[dict]:
    """The tiles for such tensors, no wider than the product needs."""
    kind = "unaligned" if not aligned else precision if x.dtype == torch.float32 else "half"

    def needed(block, extent):
        return min(block, max(16, 1 << (extent - 1).bit_length()))

    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    fitting = dict.fromkeys(
        (m, needed(n, columns), needed(k, run), *rest) for m, n, k, *rest in kinds[kind]
    )
    return [dict(zip(names, tile, strict=True)) for tile in fitting]


def output_length(
    size: int, kernel: int, stride: int, padding: int, dilation: int, transposed: bool
) -> int:
    """Positions that come out of `size`."""
    if transposed:
        return (size + 1) * stride - 2 * padding
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def tensors_unsupported(
    x: Tensor, shapes: dict[str, tuple[Tensor | None, tuple]], single: tuple = ()
) -> str | None:
    """Why no kernel can run on x and the named tensors, of these shapes; those of `single` may be float32 too."""
    if reason := device_unsupported(x):
        return reason
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; accepted: float32, float16, bfloat16"
    for name, (tensor, shape) in {"x": (x, x.shape), **shapes}.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            return f"{name} has shape {tuple(tensor.shape)}; accepted: {shape}"
        accepted = (
            {torch.int64}
            if name == "lengths"
            else {x.dtype, torch.float32}
            if name in single
            else {x.dtype}
        )
        if tensor.dtype not in accepted:
            return f"{name} is {tensor.dtype}; accepted: {' or '.join(sorted(map(str, accepted)))}"
        if tensor.device != x.device:
            return f"{name} is on {tensor.device} and x on {x.device}"
        if tensor.requires_grad and torch.is_grad_enabled():
            return f"{name} needs a gradient, and this op is for inference"
    return None


def pair(made: list[Tensor], keep: bool) -> tuple[Tensor | None, Tensor | None]:
    """The list that an op returns as (c, snake(c))."""
    made = made if keep else [None, *made]
    return made[0], made[1] if len(made) > 1 else None

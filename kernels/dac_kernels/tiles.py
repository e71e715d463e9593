# ruff: noqa: N803 (sizes of a kernel are named as in its formulas)
"""What `conv1d` and `residual_unit` share: parts of their kernels, then parts of their launchers.

In the kernels c [M, N] are the sums of a tile: M rows, which are positions of the output across all
items, by N columns, which are channels. All tensors have their channels innermost in memory.
"""

# Strings as annotations: without Triton, `tl.constexpr` must not be looked up.
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import no_type_check

import torch
from torch import Tensor

from dac_kernels.launch import DTYPES, INTERPRETED, Config, jit, tl
from dac_kernels.snake import activated

# Blocks of rows that take turns on the same columns: weights are then read from L2, not from
# memory.
GROUP = 8

# How products of float32 are computed; see `conv1d`.
PRODUCTS = ("ieee", "tf32", "tf32x3")

# BLOCK_M, BLOCK_N, BLOCK_K (elements of the sum at a time), num_warps, num_stages.
Tile = tuple[int, int, int, int, int]


@jit
@no_type_check
def tile_of(m_blocks, n_blocks, GROUP: tl.constexpr):
    """This program's block of rows and of columns: GROUP blocks of rows by all columns in turn."""
    pid = tl.program_id(0)
    first = pid // (GROUP * n_blocks) * GROUP
    size = tl.minimum(m_blocks - first, GROUP)
    inside = pid % (GROUP * n_blocks)
    return first + inside % size, inside // size


@jit
@no_type_check
def windows(x, item, m, known, size, stride_batch, step, first, ALIGN: tl.constexpr):
    """Pointers [M, 1] to where each row's inputs start, and between which offsets its item lies.

    Row m of an item of `size` elements starts at its element m step - first.
    """
    start = (m.to(tl.int64) * step - first)[:, None]
    # Offsets are small, so what is far away may as well be 2^30 away.
    low = tl.maximum(-start, 0).to(tl.int32)
    high = tl.where(known[:, None], tl.minimum(size - start, 1 << 30), 0).to(tl.int32)
    at = x + item.to(tl.int64)[:, None] * stride_batch + start
    return at, tl.multiple_of(low, (ALIGN, ALIGN)), tl.multiple_of(high, (ALIGN, ALIGN))


@jit
@no_type_check
def any_valid(lengths, item, known, position):
    """1 if any of these positions lies before its item's length; 0 if nothing must be summed."""
    length = tl.load(lengths + item, mask=known, other=0)
    return tl.max((position < length).to(tl.int32), axis=0)


@jit
@no_type_check
def snake_of(c, alpha, channel, known, SINGLE: tl.constexpr):
    """Snake of c [M, N] with the frequencies of channels [N]; see `activated`."""
    frequency = tl.load(alpha + channel, mask=known, other=1.0).to(tl.float32)[None, :]
    return activated(c, frequency, 1.0 / (frequency + 1e-9), SINGLE)


@jit
@no_type_check
def finish(
    c, bias, alpha, residual, lengths, y, snaked, item, known, position, channel, channel_known,
    row_at, column, inside, stride_y_batch, stride_residual_batch, TANH: tl.constexpr,
):  # fmt: skip
    """The epilogue on sums c [M, N], which lie at row_at [M, 1] + column [1, N] of their item.

    They exist where `inside`.
    """
    c += tl.load(bias + channel, mask=channel_known, other=0.0).to(tl.float32)[None, :]
    if TANH:
        c = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * c))
    item = item.to(tl.int64)[:, None]
    if lengths is not None:
        length = tl.load(lengths + item, mask=known[:, None], other=0)
        c = tl.where(position < length, c, 0.0)
    if residual is not None:
        residual_at = residual + (item * stride_residual_batch + row_at) + column
        c += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
    row_at += item * stride_y_batch
    if y is not None:
        tl.store(y + row_at + column, c.to(y.dtype.element_ty), mask=inside)
    if alpha is not None:
        c = snake_of(c, alpha, channel, channel_known, snaked.dtype.element_ty == tl.float32)
        tl.store(snaked + row_at + column, c.to(snaked.dtype.element_ty), mask=inside)


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
    """The tensors as kernels multiply them: the interpreter would take bfloat16 for integers."""
    return [t.float() if INTERPRETED and t.dtype == torch.bfloat16 else t for t in tensors]


def outputs(
    x: Tensor, dtype: torch.dtype, channels: int, time: int, keep: bool, snaked: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for c and for snake(c), where they are wanted, with channels innermost."""

    def made(wanted: bool) -> Tensor | None:
        shape = (x.shape[0], time, channels)
        return x.new_empty(shape, dtype=dtype).transpose(1, 2) if wanted else None

    return made(keep), made(snaked)


def existing(*tensors: Tensor | None) -> list[Tensor]:
    """The tensors that are not None: an op returns c and snake(c) as such a list."""
    return [tensor for tensor in tensors if tensor is not None]


def pair(made: Sequence[Tensor], keep: bool) -> tuple[Tensor | None, Tensor | None]:
    """c and snake(c), or None, from the list that an op returns."""
    c, *rest = made if keep else [None, *made]
    return c, rest[0] if rest else None


def precision_of(x: Tensor, products: str) -> str:
    """`input_precision` of products; half precision has only one.

    Raises:
        ValueError: products is none of `PRODUCTS`.
    """
    if products not in PRODUCTS:
        raise ValueError(f"products is {products!r}; accepted: {', '.join(PRODUCTS)}")
    return products if x.dtype == torch.float32 else "tf32"


def alignment(channels: int, x: Tensor, *weights: Tensor) -> tuple[int, bool]:
    """What divides every offset in x, 16 or 1, and whether x and weights are loaded in vectors."""
    align = 16 if channels % 16 == 0 else 1
    strides = [stride for weight in weights for stride in weight.stride() if stride != 1]
    innermost = all(1 in weight.stride()[:2] for weight in weights)
    return align, align == 16 and innermost and math.gcd(16, x.stride(0), *strides) == 16


def tiles(
    kinds: dict[str, tuple[Tile, ...]],
    x: Tensor,
    precision: str,
    aligned: bool,
    columns: int,
    run: int,
) -> list[Config]:
    """The configurations for such tensors, with tiles no wider than the product needs.

    Args:
        kinds: the tiles of "half" precision, of each of `PRODUCTS`, and of "unaligned" tensors.
        columns: the product's N.
        run: elements of its sum that lie next to each other.
    """
    kind = "unaligned" if not aligned else precision if x.dtype == torch.float32 else "half"

    def needed(block: int, extent: int) -> int:
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
    x: Tensor,
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]],
    single: Sequence[str] = (),
) -> str | None:
    """Why no kernel runs on tensors of such shapes and dtypes, or None.

    Args:
        shapes: by name, each other tensor and the shape that it must have.
        single: names of those that may be float32 whatever x is.
    """
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; accepted: float32, float16, bfloat16"
    for name, (tensor, shape) in {"x": (x, tuple(x.shape)), **shapes}.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            return f"{name} has shape {tuple(tensor.shape)}; accepted: {shape}"
        accepted = {torch.float32, x.dtype} if name in single else {x.dtype}
        if name == "lengths":
            accepted = {torch.int64}
        if tensor.dtype not in accepted:
            return f"{name} is {tensor.dtype}; accepted: {' or '.join(sorted(map(str, accepted)))}"
        if tensor.device != x.device:
            return f"{name} is on {tensor.device} and x on {x.device}"
        if tensor.requires_grad and torch.is_grad_enabled():
            return f"{name} needs a gradient, and this op is for inference"
    return None

# ruff: noqa: N803 (sizes of a kernel are named as in its formulas)
"""Convolutions with channels innermost in memory, in Triton: one kernel for every kind of them.

In this layout an item x [C, T] is a flat array, time by time, and the inputs of one output position
are runs of consecutive elements: without dilation one run of K C elements that starts at
(t stride - padding) C, else K runs of C elements, `dilation C` apart. Outside the item x reads as
zero. So a convolution is one matrix product

    c[t, n] = sum over runs r and elements k of
              x[(t stride - padding) C + r dilation C + k]  weight[n, r, k]

A transposed convolution whose kernel is two strides is one as well: input t reaches the `stride`
outputs of block t by the first half of the taps, and those of block t + 1 by the second half. That
is a convolution with runs (t - 1, t), padding 1 and stride * out columns, n = (tap, channel). Its
row t is flat too: it begins `padding` positions before position t stride of the output.

The epilogue works in float32 on the accumulators: c + bias, tanh, zero past the item's length,
+ residual. It stores c, or snake(c) for the layer that follows, or both, so that Snake is neither
computed once per tap nor costs a pass. Rows of all items are tiled together: short items
(streaming) share tiles.
"""

# Strings as annotations: without Triton, `tl.constexpr` must not be looked up.
from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from dac_kernels.launch import Config, device_unsupported, jit, launch, tl, tuned
from dac_kernels.tiles import (
    GROUP,
    Tile,
    alignment,
    any_valid,
    channels_innermost,
    dense,
    existing,
    factors,
    finish,
    output_length,
    outputs,
    pair,
    precision_of,
    tensors_unsupported,
    tile_of,
    tiles,
    windows,
)

# All tiles of a kind sum in the same order, for which those of tf32x3 need one length: it begins
# every block at zero, and adds the blocks. On sm_90 none spills (tests/test_aot.py). The first of
# each kind fits in 99 KiB of shared memory, which GPUs from sm_80 on have; one that a GPU has no
# room for is passed over.
TILES: dict[str, tuple[Tile, ...]] = {
    "half": (
        (128, 64, 64, 4, 4),
        (128, 128, 64, 8, 3),
        (64, 64, 64, 4, 4),
        (128, 32, 64, 4, 4),
        (64, 32, 64, 4, 4),
        # Reads a quarter less from L2, which limits wide layers: 144 KiB. On sm_80 to 89
        # its loop spills registers, on sm_100 16 warps get no tcgen05; there timing passes it over.
        (256, 128, 64, 16, 3),
    ),
    "tf32": ((128, 64, 32, 4, 4), (128, 128, 32, 8, 3), (64, 64, 32, 4, 4), (128, 32, 32, 4, 4)),
    "tf32x3": (
        (128, 64, 32, 8, 3),
        # On sm_80 to 89 its loop spills.
        (128, 128, 32, 8, 3),
        (64, 64, 32, 4, 4),
        (128, 32, 32, 4, 4),
        (64, 32, 32, 4, 3),
    ),
    "ieee": ((64, 64, 16, 4, 3), (64, 32, 16, 4, 3), (32, 64, 32, 4, 3)),
    # Each thread holds an address per element.
    "unaligned": ((64, 64, 16, 4, 2),),
}

# Up to so many rows, nearly all that is read are weights, once: narrow tiles, that more SMs read,
# and long ones, that have more under way. The last of half and of TF32 needs 160 KiB.
FEW_ROWS = 64
FEW: dict[str, tuple[Tile, ...]] = {
    "half": ((64, 32, 64, 4, 4), (64, 16, 128, 4, 4), (64, 16, 256, 4, 4)),
    "tf32": ((64, 32, 32, 4, 4), (64, 16, 128, 4, 4)),
    "tf32x3": ((64, 32, 32, 4, 3), (64, 16, 32, 4, 4)),
    "ieee": ((32, 64, 32, 4, 3), (32, 32, 64, 4, 4), (16, 16, 128, 4, 4)),
}


# The sizes named here differ from call to call.
@jit(any_value=("rows", "M", "T"))
@no_type_check
def _conv1d_kernel(
    x, weight, bias, alpha, residual, lengths, y, snaked, rows, M, size, stride_x_batch,
    step, first, run_step,
    stride_weight_run, stride_weight_in, stride_weight_tap, stride_weight_out,
    N, CHANNELS, T, skip, stride_y_batch, stride_residual_batch,
    RUNS: tl.constexpr, RUN: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr,
    TANH: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Items of `size` elements give M rows each, `rows` together. A row's first run of RUN elements
    # starts at row * step - first, the next ones `run_step` apart. RUN is known to the compiler:
    # the loop's divisions become shifts, and masks that always hold are left out.
    m_block, n_block = tile_of(tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    known = row < rows
    item = row // M
    m = row % M
    x_at, low, high = windows(x, item, m, known, size, stride_x_batch, step, first, ALIGN)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_known = n < N
    inside = known[:, None] & n_known[None, :]
    if TRANSPOSED:
        tap, channel = n // CHANNELS, n % CHANNELS
        position = (m * (N // CHANNELS))[:, None] + (tap - skip)[None, :]
        inside = inside & (position >= 0) & (position < T)
        column = tap.to(tl.int64) * stride_weight_tap + channel.to(tl.int64) * stride_weight_out
    else:
        channel, position = n, m[:, None]
        column = n.to(tl.int64) * stride_weight_out
    weight_at = weight + column[None, :]

    run_blocks: tl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K
    blocks = RUNS * run_blocks
    if lengths is not None:
        blocks *= any_valid(lengths, item, known, m * (N // CHANNELS) - skip)
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(blocks):
        r = block // run_blocks
        k = block % run_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        at = (r * run_step + k)[None, :]
        a = tl.load(x_at + at, mask=(at >= low) & (at < high) & (k < RUN)[None, :], other=0.0)
        offset = (tl.cast(r, tl.int64) * stride_weight_run + k.to(tl.int64) * stride_weight_in)[
            :, None
        ]
        w = tl.load(weight_at + offset, mask=n_known[None, :] & (k < RUN)[:, None], other=0.0)
        c = tl.dot(a, w, c, input_precision=PRECISION)
    row_at = (m.to(tl.int64) * N - skip * CHANNELS)[:, None]
    finish(
        c, bias, alpha, residual, lengths, y, snaked, item, known, position, channel, n_known,
        row_at, n[None, :], inside, stride_y_batch, stride_residual_batch, TANH,
    )  # fmt: skip


def _product(
    x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, transposed: bool
) -> dict[str, int]:
    """The convolution as a matrix product: the integers of `_conv1d_kernel` that describe it."""
    _, channels, size = x.shape
    kernel = weight.shape[2]
    time = output_length(size, kernel, stride, padding, dilation, transposed)
    if transposed:
        stride_in, stride_out, stride_tap = weight.stride()
        out = weight.shape[1]
        return {
            "M": size + 1, "N": stride * out, "CHANNELS": out, "T": time, "skip": padding,
            "step": channels, "first": channels, "RUNS": 2, "RUN": channels, "run_step": channels,
            "stride_weight_run": -stride * stride_tap, "stride_weight_in": stride_in,
            "stride_weight_tap": stride_tap, "stride_weight_out": stride_out,
        }  # fmt: skip
    stride_out, stride_in, stride_tap = weight.stride()
    out = weight.shape[0]
    # Runs are one where they follow each other in x and in the weight.
    one_run = dilation == 1 and (channels == 1 or kernel == 1 or stride_tap == channels * stride_in)
    return {
        "M": time, "N": out, "CHANNELS": out, "T": time, "skip": 0,
        "step": stride * channels, "first": padding * channels,
        "RUNS": 1 if one_run else kernel, "RUN": kernel * channels if one_run else channels,
        "run_step": dilation * channels,
        # Unless 16 divides it weights are not loaded in vectors, and a kernel of 1 may have any
        # `stride_tap`.
        "stride_weight_run": 0 if one_run else stride_tap,
        "stride_weight_in": stride_tap if channels == 1 else stride_in,
        "stride_weight_tap": 0, "stride_weight_out": stride_out,
    }  # fmt: skip


def _result_dtype(x: Tensor, tanh: bool) -> torch.dtype:
    """What tanh makes is audio, in which half precision would drown quiet bands in rounding."""
    return torch.float32 if tanh else x.dtype


@torch.library.custom_op("dac_kernels::conv1d", mutates_args=())
def _conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    transposed: bool,
    tanh: bool,
    keep: bool,
    products: str,
) -> list[Tensor]:
    """c, if wanted, and snake(c), if there is an alpha."""
    dtype = _result_dtype(x, tanh)
    x, weight = factors(channels_innermost(x), weight)
    product = _product(x, weight, stride, padding, dilation, transposed)
    y, snaked = outputs(x, dtype, product["CHANNELS"], product["T"], keep, alpha is not None)
    items, channels, size = x.shape
    rows = items * product["M"]
    residual = None if residual is None else channels_innermost(residual)
    weight = weight[..., stride:] if transposed else weight
    tensors = (x, weight, dense(bias), dense(alpha), residual, dense(lengths), y, snaked)
    integers = product | {
        "rows": rows,
        "size": size * channels,
        "stride_x_batch": x.stride(0),
        "stride_y_batch": product["T"] * product["CHANNELS"],
        "stride_residual_batch": 0 if residual is None else residual.stride(0),
    }
    align, aligned = alignment(channels, x, weight)
    precision = precision_of(x, products)
    constants = {
        "TRANSPOSED": transposed,
        "ALIGN": align,
        "TANH": tanh,
        "PRECISION": precision,
        "GROUP": GROUP,
    }

    def run(config: Config) -> None:
        programs = -(-rows // config["BLOCK_M"]) * -(-product["N"] // config["BLOCK_N"])
        launch(_conv1d_kernel, programs, *tensors, **integers, **constants, **config)

    parts = [tensor is not None for tensor in tensors]
    # FEW_ROWS and fewer share no choice with more.
    size_class = (rows - 1).bit_length()
    shape = (channels, product["N"], product["RUNS"], product["RUN"], stride, size_class)
    kind = precision, align, aligned, weight.stride(), *parts, *shape
    kinds = TILES | FEW if rows <= FEW_ROWS else TILES
    configs = tiles(kinds, x, precision, aligned, product["N"], product["RUN"])
    if lengths is not None or residual is not None or (keep and alpha is not None):
        # Beside these in the epilogue the tallest tile's sums do not fit in registers.
        configs = [config for config in configs if config["BLOCK_M"] <= 128]
    run(tuned("conv1d", x, kind, configs, run))
    return existing(y, snaked)


@_conv1d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    transposed: bool,
    tanh: bool,
    keep: bool,
    products: str,
) -> list[Tensor]:
    product = _product(x, weight, stride, padding, dilation, transposed)
    dtype = _result_dtype(x, tanh)
    return existing(*outputs(x, dtype, product["CHANNELS"], product["T"], keep, alpha is not None))


def arguments_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    alpha: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
    transposed: bool,
) -> str | None:
    """Why no convolution on any device runs with such arguments, or None; see `conv1d`."""
    if x.dim() != 3 or weight.dim() != 3:
        return (
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "accepted: [B, C, T] and three axes"
        )
    kernel = weight.shape[2]
    if min(stride, dilation, kernel) < 1 or padding < 0:
        return (
            f"stride {stride}, padding {padding}, dilation {dilation}, kernel {kernel}; "
            "accepted: 1, 0, 1, 1 or more"
        )
    if transposed and kernel != 2 * stride:
        return f"a kernel of {kernel} at stride {stride}; accepted: {2 * stride}"
    if alpha is None and not keep:
        return "neither keep nor alpha, so there would be no output"
    items, channels, size = x.shape
    time = output_length(size, kernel, stride, padding, dilation, transposed)
    if time < 1 or items * (time + 1) >= 1 << 30:
        return (
            f"there would be {items} x {time} output positions; "
            "accepted: at least 1 and fewer than 2^30"
        )
    out = weight.shape[1 if transposed else 0]
    shapes = {
        "weight": (weight, (channels, out, kernel) if transposed else (out, channels, kernel)),
        "bias": (bias, (out,)),
        "alpha": (alpha, (1, out, 1)),
        "residual": (residual, (items, out, time)),
        "lengths": (lengths, (items,)),
    }
    return tensors_unsupported(x, shapes, single=("bias", "alpha"))


def conv1d_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    *,
    alpha: Tensor | None = None,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    tanh: bool = False,
    keep: bool = True,
    products: str = "ieee",
) -> str | None:
    """Why `conv1d` cannot run on these arguments, or None."""
    return device_unsupported(x) or arguments_unsupported(
        x, weight, bias, stride, padding, dilation, alpha, residual, lengths, keep, False
    )


def conv_transpose1d_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int = 0,
    *,
    alpha: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: bool = True,
    products: str = "ieee",
) -> str | None:
    """Why `conv_transpose1d` cannot run on these arguments, or None."""
    return device_unsupported(x) or arguments_unsupported(
        x, weight, bias, stride, padding, 1, alpha, None, lengths, keep, True
    )


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    *,
    alpha: Tensor | None = None,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    tanh: bool = False,
    keep: bool = True,
    products: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """c = conv(x) + bias, its tanh where asked, zero past lengths, + residual; and snake(c).

    For inference: gradients are refused.

    Args:
        x: [B, in, T], float32, float16 or bfloat16; copied unless its channels lie innermost in
            memory, densely.
        weight: [out, in, K], of x's dtype, any strides; fast with memory [out, K, in], and 16
            dividing `in` and `out`.
        bias: [out], of x's dtype or float32.
        alpha: [1, out, 1], of x's dtype or float32: of the Snake that follows.
        residual: [B, out, T'], of x's dtype: added at the end. Copied as x is.
        lengths: int64 [B], valid positions of each item in the output.
        keep: whether c itself is wanted.
        products: of float32: "ieee"; "tf32", of factors rounded to 11 bits; or "tf32x3", the sum of
            three of those, of the rounded factors and of what rounding took off them.
    Returns:
        c [B, out, T'], or None without `keep`; snake(c) of the unrounded c, or None without
        `alpha`. Both of x's dtype, or with `tanh` in float32, with channels innermost in memory.
        Sums and epilogue are float32.
    Raises:
        ValueError: `conv1d_unsupported` has a reason.
    """
    if reason := device_unsupported(x) or arguments_unsupported(
        x, weight, bias, stride, padding, dilation, alpha, residual, lengths, keep, False
    ):
        raise ValueError(reason)
    made = _conv1d(
        x, weight, bias, alpha, residual, lengths, stride, padding, dilation, False, tanh, keep,
        products,
    )  # fmt: skip
    return pair(made, keep)


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int = 0,
    *,
    alpha: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: bool = True,
    products: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """c = conv_transpose(x) + bias, kernel of two strides, zero past lengths; and snake(c).

    For inference: gradients are refused.

    Args:
        weight: [in, out, 2 stride], of x's dtype, any strides; fast with `in` or `out` innermost in
            memory.
        x, bias, alpha, lengths, keep, products: as for `conv1d`.
    Returns:
        c and snake(c), as for `conv1d`; T' = (T + 1) stride - 2 padding.
    Raises:
        ValueError: `conv_transpose1d_unsupported` has a reason.
    """
    if reason := device_unsupported(x) or arguments_unsupported(
        x, weight, bias, stride, padding, 1, alpha, None, lengths, keep, True
    ):
        raise ValueError(reason)
    made = _conv1d(
        x, weight, bias, alpha, None, lengths, stride, padding, 1, True, False, keep, products
    )
    return pair(made, keep)

# ruff: noqa: N803 (sizes of a kernel are named as in its formulas)
"""The codec's residual unit in one Triton kernel (arXiv 2306.06546, appendix A).

    c = conv1(snake(conv7(snake(x)))) + x

with a dilated convolution of 7 and one of 1. Whoever made x also applied the first Snake (the
epilogues here and in `conv1d.py` do), so the unit begins with seven matrix products on shifted
rows. A program holds its rows of all C channels: the hidden activation stays in its registers,
where the second convolution multiplies it, and the residual is added at the end. Beside the
weights, memory sees snaked, x and the outputs once each.

C = 96 and 192 are not powers of two, which a tile's sides must be. So C is cut in parts of equal
width that is one (3 of 32, 3 of 64), each with an accumulator of its own, and no product is wasted
on padding.
"""

# Strings as annotations: without Triton, `tl.constexpr` must not be looked up.
from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor

from dac_kernels.launch import Config, device_unsupported, jit, launch, tl, tuned
from dac_kernels.tiles import (
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
    snake_of,
    tensors_unsupported,
    tiles,
    windows,
)

KERNEL = 7

# Beyond, the sums of a useful number of rows do not fit in an SM's registers.
MAX_CHANNELS = 192

# As in `conv1d.py`; the columns are those of a part. The tiles of TF32 need 180 KiB of shared
# memory, the others 99 KiB.
SHARED_TF32 = 180 << 10
TILES: dict[str, tuple[Tile, ...]] = {
    "half": ((128, 64, 32, 8, 3), (128, 32, 32, 8, 3), (64, 64, 32, 8, 3), (64, 32, 32, 4, 3)),
    "tf32": ((64, 64, 32, 8, 2), (64, 32, 32, 8, 2)),
    "ieee": ((64, 32, 16, 8, 2), (32, 32, 16, 4, 3)),
    "unaligned": ((32, 32, 16, 4, 2),),
}


# The sizes named here differ from call to call.
@jit(any_value=("rows", "M"))
@no_type_check
def _residual_unit_kernel(
    x, snaked, weight1, bias1, alpha1, weight2, bias2, alpha, lengths, y, y_snaked, rows, M, size,
    stride_snaked_batch, first, run_step,
    stride_weight1_run, stride_weight1_in, stride_weight1_out, stride_weight2_in,
    stride_weight2_out, stride_y_batch, stride_x_batch,
    C: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, TAPS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Items of `size` elements give M rows each, `rows` together. C is known to the compiler: the
    # loop's divisions become shifts, and masks that always hold are left out.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = row < rows
    item = row // M
    m = row % M
    snaked_at, low, high = windows(
        snaked, item, m, known, size, stride_snaked_batch, C, first, ALIGN
    )

    sums = ()
    for _ in tl.static_range(PARTS):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)  # noqa: RUF005
    run_blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    blocks = TAPS * run_blocks
    if lengths is not None:
        blocks *= any_valid(lengths, item, known, m)
    for block in range(blocks):
        tap = block // run_blocks
        k = block % run_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        at = (tap * run_step + k)[None, :]
        a = tl.load(snaked_at + at, mask=(at >= low) & (at < high) & (k < C)[None, :], other=0.0)
        w_row = tl.cast(tap, tl.int64) * stride_weight1_run + k.to(tl.int64) * stride_weight1_in
        added = ()
        for part in tl.static_range(PARTS):
            n = part * BLOCK_N + tl.arange(0, BLOCK_N)
            w_at = weight1 + w_row[:, None] + n.to(tl.int64)[None, :] * stride_weight1_out
            w = tl.load(w_at, mask=(n < C)[None, :] & (k < C)[:, None], other=0.0)
            added = added + (tl.dot(a, w, sums[part], input_precision=PRECISION),)  # noqa: RUF005
        sums = added

    hidden = ()
    for part in tl.static_range(PARTS):
        n = part * BLOCK_N + tl.arange(0, BLOCK_N)
        h = sums[part] + tl.load(bias1 + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
        h = snake_of(h, alpha1, n, n < C, snaked.dtype.element_ty == tl.float32)
        hidden = hidden + (h.to(snaked.dtype.element_ty),)  # noqa: RUF005

    # In the three stages of the loop above Triton 3.6 runs out of registers.
    for column in tl.range(0, PARTS, num_stages=2):
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for part in tl.static_range(PARTS):
            k = part * BLOCK_N + tl.arange(0, BLOCK_N)
            w_row = k.to(tl.int64) * stride_weight2_in
            w_at = weight2 + w_row[:, None] + n.to(tl.int64)[None, :] * stride_weight2_out
            w = tl.load(w_at, mask=(n < C)[None, :] & (k < C)[:, None], other=0.0)
            c = tl.dot(hidden[part], w, c, input_precision=PRECISION)
        row_at = (m.to(tl.int64) * C)[:, None]
        inside = known[:, None] & (n < C)[None, :]
        finish(
            c, bias2, alpha, x, lengths, y, y_snaked, item, known, m[:, None], n, n < C,
            row_at, n[None, :], inside, stride_y_batch, stride_x_batch, False,
        )  # fmt: skip


@torch.library.custom_op("dac_kernels::residual_unit", mutates_args=())
def _residual_unit(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    dilation: int,
    padding: int,
    keep: bool,
    products: str,
) -> list[Tensor]:
    """c, if wanted, and snake(c), if there is an alpha."""
    items, channels, size = x.shape
    time = output_length(size, KERNEL, 1, padding, dilation, False)
    y, y_snaked = outputs(x, x.dtype, channels, time, keep, alpha is not None)
    crop = (size - time) // 2
    x, snaked = channels_innermost(x)[..., crop : crop + time], channels_innermost(snaked)
    snaked, weight1, weight2 = factors(snaked, weight1, weight2)
    tensors = (
        x, snaked, weight1, dense(bias1), dense(alpha1), weight2, dense(bias2), dense(alpha),
        dense(lengths), y, y_snaked,
    )  # fmt: skip
    integers = {
        "rows": items * time,
        "M": time,
        "size": size * channels,
        "first": padding * channels,
        "C": channels,
        "run_step": dilation * channels,
        "stride_snaked_batch": snaked.stride(0),
        "stride_weight1_run": weight1.stride(2),
        "stride_weight1_in": weight1.stride(1),
        "stride_weight1_out": weight1.stride(0),
        "stride_weight2_in": weight2.stride(1),
        "stride_weight2_out": weight2.stride(0),
        "stride_y_batch": time * channels,
        "stride_x_batch": x.stride(0),
    }
    align, aligned = alignment(channels, snaked, weight1, weight2)
    precision = precision_of(x, products)

    def run(config: Config) -> None:
        constants = {
            "ALIGN": align,
            "PRECISION": precision,
            "TAPS": KERNEL,
            "PARTS": -(-channels // config["BLOCK_N"]),
        }
        programs = -(-items * time // config["BLOCK_M"])
        launch(_residual_unit_kernel, programs, *tensors, **integers, **constants, **config)

    parts = keep, alpha is None, lengths is None
    shape = (channels, dilation, (items * time).bit_length())
    strides = weight1.stride(), weight2.stride()
    kind = precision, aligned, *strides, *parts, *shape
    configs = tiles(TILES, x, precision, aligned, channels, channels)
    run(tuned("residual_unit", x, kind, configs, run))
    return existing(y, y_snaked)


@_residual_unit.register_fake
def _(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    dilation: int,
    padding: int,
    keep: bool,
    products: str,
) -> list[Tensor]:
    time = output_length(x.shape[2], KERNEL, 1, padding, dilation, False)
    return existing(*outputs(x, x.dtype, x.shape[1], time, keep, alpha is not None))


def residual_unit_unsupported(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    dilation: int,
    padding: int,
    *,
    alpha: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: bool = True,
    products: str = "ieee",
) -> str | None:
    """Why `residual_unit` cannot run on these arguments, or None."""
    tensors = (x, snaked, weight1, bias1, alpha1, weight2, bias2)
    if x.dim() == 3 and x.shape[1] > MAX_CHANNELS:
        return f"x has {x.shape[1]} channels; accepted: up to {MAX_CHANNELS}"
    if reason := device_unsupported(x) or unit_arguments_unsupported(
        *tensors, dilation, padding, alpha, lengths, keep
    ):
        return reason
    if products == "tf32x3" and x.dtype == torch.float32:
        # Each warp would split the same weights into the parts that the three products are of.
        return f"products is {products!r}; accepted: ieee, tf32"
    if products == "tf32" and x.is_cuda and x.dtype == torch.float32:
        properties: Any = torch.cuda.get_device_properties(x.device)
        available = properties.shared_memory_per_block_optin
        if available < SHARED_TF32:
            return (
                f"the device has {available >> 10} KiB of shared memory; "
                f"accepted for TF32: {SHARED_TF32 >> 10} KiB"
            )
    return None


def unit_arguments_unsupported(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    dilation: int,
    padding: int,
    alpha: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> str | None:
    """Why no residual unit on any device runs with such arguments, or None."""
    if x.dim() != 3:
        return f"x has shape {tuple(x.shape)}; accepted: [B, C, T]"
    items, channels, size = x.shape
    if dilation < 1 or padding not in (0, 3 * dilation):
        return f"dilation {dilation}, padding {padding}; accepted: padding of 3 dilation, or of 0"
    if alpha is None and not keep:
        return "neither keep nor alpha, so there would be no output"
    time = output_length(size, KERNEL, 1, padding, dilation, False)
    if time < 1 or items * time >= 1 << 30:
        return (
            f"there would be {items} x {time} output positions; "
            "accepted: at least 1 and fewer than 2^30"
        )
    shapes = {
        "snaked": (snaked, tuple(x.shape)),
        "weight1": (weight1, (channels, channels, KERNEL)),
        "bias1": (bias1, (channels,)),
        "alpha1": (alpha1, (1, channels, 1)),
        "weight2": (weight2, (channels, channels, 1)),
        "bias2": (bias2, (channels,)),
        "alpha": (alpha, (1, channels, 1)),
        "lengths": (lengths, (items,)),
    }
    return tensors_unsupported(x, shapes, single=("bias1", "alpha1", "bias2", "alpha"))


def residual_unit(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    dilation: int,
    padding: int,
    *,
    alpha: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: bool = True,
    products: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """c = conv1(snake(conv7(snaked))) + x, zero past lengths before x is added; and snake(c).

    For inference: gradients are refused.

    Args:
        x: [B, C, T], C up to 192; float32, float16 or bfloat16; copied unless its channels lie
            innermost in memory, densely.
        snaked: [B, C, T], Snake of x by the unit's first alpha.
        weight1, bias1, alpha1: [C, C, 7], [C] and [1, C, 1]; the weight in any strides, fast as for
            `conv1d`.
        weight2, bias2: [C, C, 1] and [C].
        padding: 3 dilation, or 0: then the result is shorter than x, which is cropped alike on both
            sides.
        alpha: [1, C, 1], of the Snake that follows.
        lengths, keep, products, dtypes: as for `conv1d`, but not "tf32x3". The Snake in the middle
            is rounded to x's dtype.
    Returns:
        c and snake(c), as for `conv1d`.
    Raises:
        ValueError: `residual_unit_unsupported` has a reason.
    """
    tensors = (x, snaked, weight1, bias1, alpha1, weight2, bias2)
    if reason := residual_unit_unsupported(
        *tensors, dilation, padding, alpha=alpha, lengths=lengths, keep=keep, products=products
    ):
        raise ValueError(reason)
    return pair(_residual_unit(*tensors, alpha, lengths, dilation, padding, keep, products), keep)

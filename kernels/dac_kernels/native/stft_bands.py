"""Spectrograms of several windows, cut into frequency bands: csrc/stft_bands.cpp and .cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)}
MEMORY_FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
WINDOWS = tuple(2**i for i in range(5, 13))


def stft_bands(
    x: Tensor,
    windows: Sequence[int],
    bands: Sequence[tuple[float, float]] = BANDS,
    layout: str = "channels_first",
    dtype: torch.dtype | None = None,
) -> list[list[Tensor]]:
    """Complex spectrogram of each window, cut into frequency bands: a discriminator's input.

    Hann windows, hop of a quarter window. Frame t starts at sample `t hop - 3 hop / 2`; there are
    ceil(T / hop) frames; everything outside the signal is its reflection. One kernel launch for all
    windows. On CUDA, call it once before capturing it in a CUDA graph.

    Args:
        x: [B, T] audio, float32, or on the CPU float64; T up to 2^30. No items give empty bands.
        windows: window lengths in samples, powers of two from 32 to 4096, at most 8.
        bands: (low, high) fractions of the spectrum, from low to high without overlap, at most 8.
        layout: "channels_first" (contiguous) or "channels_last" (strides of torch.channels_last).
        dtype: of the outputs: that of x (also where None), or torch.bfloat16 of float32.
    Returns:
        per window, per band: [B, 2, frames, bins], real part then imaginary part.
    Raises:
        ValueError: the signal is too short for a window's reflection, the layout is unknown, or a
            band is not two numbers.
        RuntimeError: see `stft_bands_unsupported`.
    """
    if layout not in MEMORY_FORMATS:
        raise ValueError(f"layout is {layout!r}; accepted: {', '.join(MEMORY_FORMATS)}")
    edges = _edges(windows, bands)
    flat = _stft_bands(x, list(windows), edges, layout == "channels_last", dtype or x.dtype)
    return [flat[i * len(bands) : (i + 1) * len(bands)] for i in range(len(windows))]


def stft_bands_unsupported(
    x: Tensor,
    windows: Sequence[int],
    bands: Sequence[tuple[float, float]] = BANDS,
    layout: str = "channels_first",
    dtype: torch.dtype | None = None,
) -> str | None:
    """Why `stft_bands` cannot run on these arguments, or None."""
    return _bands_unsupported(x, windows, _edges(windows, bands), dtype or x.dtype)


def _edges(windows: Sequence[int], bands: Sequence[tuple[float, float]]) -> list[int]:
    """Per window, per band: first and one-past-last FFT bin."""
    for band in bands:
        try:
            low, high = band
            numbers = math.isfinite(low) and math.isfinite(high)
        except (TypeError, ValueError):
            numbers = False
        if not numbers:
            raise ValueError(f"a band is {band!r}; accepted: two fractions of the spectrum")
    return [
        int(fraction * (window // 2 + 1))
        for window in windows
        for band in bands
        for fraction in band
    ]


def _bands_unsupported(
    x: Tensor, windows: Sequence[int], edges: Sequence[int], dtype: torch.dtype
) -> str | None:
    """Why `stft_bands` cannot run with these edges (see `_edges`), or None."""
    if reason := unsupported(x, DTYPES):
        return reason
    if x.ndim != 2:
        return f"the shape is {list(x.shape)}, not [B, T]"
    if x.numel() >= 2**31 or x.shape[1] > extension.max_samples:
        return (
            f"there are {x.shape[0]} x {x.shape[1]} samples; "
            f"accepted: up to {extension.max_samples} each, 2^31 - 1 together"
        )
    if not 1 <= len(windows) <= extension.max_windows or not set(windows).issubset(WINDOWS):
        return (
            f"the windows are {list(windows)}, "
            f"not 1 to {extension.max_windows} powers of two from 32 to 4096"
        )
    bands = len(edges) // 2 // len(windows)
    if len(edges) != 2 * bands * len(windows) or not 1 <= bands <= extension.max_bands:
        return f"there are {bands} bands, not 1 to {extension.max_bands}"
    for i, window in enumerate(windows):
        bins = [0, *edges[2 * bands * i : 2 * bands * (i + 1)], window // 2 + 1]
        if bins != sorted(bins):
            return "the bands overlap, or leave the spectrum, or are out of order"
    if dtype != x.dtype and (x.dtype, dtype) != (torch.float32, torch.bfloat16):
        return f"outputs of {dtype} from {x.dtype}"
    return None


def _require_bands(
    op: str, x: Tensor, windows: Sequence[int], edges: Sequence[int], dtype: torch.dtype
) -> None:
    require(op, _bands_unsupported(x, windows, edges, dtype))
    for window in windows:
        hop, samples = window // 4, x.shape[1]
        shortest = 3 * hop // 2 + -samples % hop + 1
        if samples < shortest:
            raise ValueError(
                f"{samples} samples are too few for a window of {window}: at least {shortest}"
            )


def _band_shapes(
    x: Tensor, windows: Sequence[int], edges: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """Per window, per band: the shape of its spectrogram."""
    bands = len(edges) // 2 // len(windows)
    frames = [-(-x.shape[1] // (window // 4)) for window in windows]
    return [
        (x.shape[0], 2, frames[i // bands], edges[2 * i + 1] - edges[2 * i])
        for i in range(len(edges) // 2)
    ]


def _memory_format(channels_last: bool) -> torch.memory_format:
    return MEMORY_FORMATS["channels_last" if channels_last else "channels_first"]


def _plan(
    bands: Sequence[Tensor],
    x: Tensor,
    windows: Sequence[int],
    edges: Sequence[int],
    channels_last: bool,
) -> extension.Plan:
    batch, samples = x.shape
    addresses = [band.data_ptr() for band in bands]
    return extension.Plan(batch, samples, channels_last, list(windows), list(edges), addresses)


def _outputs(
    x: Tensor, windows: Sequence[int], edges: Sequence[int], channels_last: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Room for what `_stft_bands` returns, once its arguments are checked."""
    _require_bands("stft_bands", x, windows, edges, dtype)
    memory_format = _memory_format(channels_last)
    return [
        torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)
        for shape in _band_shapes(x, windows, edges)
    ]


@torch.library.custom_op("dac_native::stft_bands", mutates_args=())
def _stft_bands(
    x: Tensor, windows: Sequence[int], edges: Sequence[int], channels_last: bool, dtype: torch.dtype
) -> list[Tensor]:
    bands, x = _outputs(x, windows, edges, channels_last, dtype), contiguous_rows(x)
    plan = _plan(bands, x, windows, edges, channels_last)
    call("stft_bands_forward", x, [x.dtype, dtype], plan, x.data_ptr(), x.stride(0))
    return bands


_stft_bands.register_fake(_outputs)


def _gradient(
    grads: Sequence[Tensor],
    samples: int,
    windows: Sequence[int],
    edges: Sequence[int],
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Room for what `_stft_bands_backward` returns, once its arguments are checked."""
    op = "stft_bands_backward"
    if not grads or grads[0].ndim != 4:
        require(op, f"gradients are {[list(g.shape) for g in grads]}, not [B, 2, frames, bins]")
    # Of x's shape, and without its memory.
    x = grads[0].new_empty(1, dtype=dtype).expand(grads[0].shape[0], samples)
    _require_bands(op, x, windows, edges, grads[0].dtype)
    shapes = _band_shapes(x, windows, edges)
    if len(grads) != len(shapes):
        require(op, f"there are {len(grads)} gradients for {len(shapes)} bands")
    for grad, shape in zip(grads, shapes, strict=True):
        require(op, differs("a gradient", grad, shape, like=grads[0]))
    return x.new_empty(x.shape)


def _aligned(grad: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The gradient in that layout, each pair of elements at a multiple of a pair's size.

    A part of a longer tensor may begin between two.
    """
    grad = grad.contiguous(memory_format=memory_format)
    begins_a_pair = grad.data_ptr() % (2 * grad.element_size()) == 0
    return grad if begins_a_pair else grad.clone(memory_format=memory_format)


@torch.library.custom_op("dac_native::stft_bands_backward", mutates_args=())
def _stft_bands_backward(
    grads: Sequence[Tensor],
    samples: int,
    windows: Sequence[int],
    edges: Sequence[int],
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    grad_x = _gradient(grads, samples, windows, edges, channels_last, dtype)
    grads = [_aligned(grad, _memory_format(channels_last)) for grad in grads]
    plan = _plan(grads, grad_x, windows, edges, channels_last)
    partial = [grad_x.new_empty(extension.stft_bands_partial(plan))] if grad_x.is_cuda else []
    addresses = [tensor.data_ptr() for tensor in (*partial, grad_x)]
    call("stft_bands_backward", grad_x, [dtype, grads[0].dtype], plan, *addresses)
    return grad_x


_stft_bands_backward.register_fake(_gradient)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, *ctx.arguments, _ = inputs
    ctx.samples, ctx.dtype = x.shape[1], x.dtype


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    grad_x: Tensor = _stft_bands_backward(grads, ctx.samples, *ctx.arguments, ctx.dtype)
    return grad_x, None, None, None, None


_stft_bands.register_autograd(_backward, setup_context=_save)

"""The ops compiled from csrc: Snake on the CPU; the discriminators' preprocessing and spectrograms on CPU and CUDA.

The compiled module, dac_kernels._C, knows addresses and strides only. Here arguments are checked, tensors allocated,
and the ops registered with PyTorch, so that autograd, torch.compile and torch.export see through them. Gradients of
gradients are not available.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from dac_kernels import _C
except ImportError as error:
    _C, _MISSING = None, str(error)

BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
MEMORY_FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
WINDOWS = tuple(2**i for i in range(5, 13))


def status() -> str:
    """One line on what was built and what of it can run here."""
    if _C is None:
        return f"absent ({_MISSING}): install again with a C++ compiler on PATH and DAC_KERNELS_BUILD not 'none'"
    if not _C.cuda_architectures:
        return "CPU ops; no CUDA ops: install again with nvcc on PATH"
    architectures = ", ".join(f"sm_{name}" for name in _C.cuda_architectures.split(";"))
    try:
        devices = _C.cuda_devices()
    except RuntimeError as error:
        return f"CPU ops; CUDA ops for {architectures}, which cannot run here ({error})"
    return f"CPU ops; CUDA ops for {architectures}; {devices} CUDA device{'s' * (devices != 1)}"


def _unsupported(x: Tensor, dtypes: dict[str, tuple[torch.dtype, ...]]) -> str | None:
    """Why no op can run on this tensor. dtypes: the accepted ones, per type of device."""
    if _C is None:
        return f"the compiled module is absent ({_MISSING})"
    if x.device.type not in dtypes:
        return f"the tensor is on {x.device.type}, not {' or '.join(dtypes)}"
    if x.dtype not in dtypes[x.device.type]:
        return f"the dtype is {x.dtype}, not {' or '.join(map(str, dtypes[x.device.type]))} ({x.device.type})"
    if x.is_cuda and not _C.cuda_architectures:
        return "the compiled module was built without nvcc"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < _oldest_capability():
        return f"the GPU is older than what the compiled module was built for ({_C.cuda_architectures})"
    return None


def _oldest_capability() -> tuple[int, int]:
    return min(divmod(int(name.rstrip("af")), 10) for name in _C.cuda_architectures.split(";"))


def _call(op: str, tensor: Tensor, types: Sequence[torch.dtype], *args) -> None:
    """Call the compiled function of that op for the tensor's device and those dtypes."""
    suffix = "_".join(str(dtype).removeprefix("torch.") for dtype in types)
    if tensor.is_cuda:
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        getattr(_C, f"{op}_cuda_{suffix}")(*args, tensor.get_device(), stream)
    else:
        getattr(_C, f"{op}_{suffix}")(*args, torch.get_num_threads())


# ------------------------------------------------------------------------------------------------------------ snake


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """Snake activation `x + sin(alpha x)^2 / (alpha + 1e-9)` (arXiv 2006.08195), on the CPU.

    Runs without a copy where time or the channels are contiguous; any other layout is copied once. The backward pass
    keeps x and alpha only, and its results do not depend on the number of threads.

    Args:
        x: [B, C, T], float32 or float64.
        alpha: [1, C, 1], same dtype.
    Raises:
        RuntimeError: see `snake_unsupported`.
    """
    _require("snake", snake_unsupported(x, alpha))
    return _snake(x, alpha)


def snake_unsupported(x: Tensor, alpha: Tensor) -> str | None:
    """Why `snake` cannot run on these tensors, or None."""
    if reason := _unsupported(x, {"cpu": (torch.float32, torch.float64)}):
        return reason
    if x.ndim != 3 or alpha.shape != (1, x.shape[1], 1):
        return f"x and alpha have shapes {list(x.shape)} and {list(alpha.shape)}, not [B, C, T] and [1, C, 1]"
    if alpha.dtype != x.dtype or alpha.device != x.device:
        return f"alpha is {alpha.dtype} on {alpha.device}, x is {x.dtype} on {x.device}"
    return None


def _require(op: str, reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f"native {op} cannot run: {reason}")


def _channels_last(x: Tensor) -> bool:
    """Whether the channels of x [B, C, T], and not time, lie next to each other."""
    return x.stride(1) == 1 and (x.stride(2) != 1 or x.shape[2] == 1)


def _empty_like(x: Tensor) -> Tensor:
    batch, channels, time = x.shape
    return (
        x.new_empty(batch, time, channels).transpose(1, 2)
        if _channels_last(x)
        else x.new_empty(x.shape)
    )


def _with_runs(x: Tensor, channels_last: bool) -> Tensor:
    """Make x [B, C, T] contiguous along the channels or along time; itself where it is."""
    if channels_last:
        return x if x.stride(1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if x.stride(2) == 1 else x.contiguous()


def _rows(x: Tensor, channels_last: bool):
    return _C.Rows(x.data_ptr(), x.stride(0), x.stride(2 if channels_last else 1))


def _snake_shape(x: Tensor, channels_last: bool):
    batch, channels, time = x.shape
    return _C.SnakeShape(
        batch, *((time, channels) if channels_last else (channels, time)), channels_last
    )


@torch.library.custom_op("dac_native::snake", mutates_args=(), device_types="cpu")
def _snake(x: Tensor, alpha: Tensor) -> Tensor:
    last, y = _channels_last(x), _empty_like(x)
    x, alpha = _with_runs(x, last), alpha.contiguous()
    _call(
        "snake_forward",
        x,
        [x.dtype],
        _snake_shape(x, last),
        _rows(x, last),
        alpha.data_ptr(),
        _rows(y, last),
    )
    return y


@_snake.register_fake
def _(x, alpha):
    return _empty_like(x)


@torch.library.custom_op("dac_native::snake_backward", mutates_args=(), device_types="cpu")
def _snake_backward(grad: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    last, grad_x, grad_alpha = (
        _channels_last(x),
        _empty_like(x),
        torch.empty_like(alpha).contiguous(),
    )
    grad, x, alpha = _with_runs(grad, last), _with_runs(x, last), alpha.contiguous()
    tensors = (
        _rows(grad, last),
        _rows(x, last),
        alpha.data_ptr(),
        _rows(grad_x, last),
        grad_alpha.data_ptr(),
    )
    _call("snake_backward", x, [x.dtype], _snake_shape(x, last), *tensors)
    return grad_x, grad_alpha


@_snake_backward.register_fake
def _(grad, x, alpha):
    return _empty_like(x), torch.empty_like(alpha).contiguous()


_snake.register_autograd(
    lambda ctx, grad: _snake_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# -------------------------------------------------------------------------------------------------- disc_preprocess


def disc_preprocess(x: Tensor) -> Tensor:
    """Remove the mean of each signal, then scale its peak to 0.8: `0.8 (x - mean) / (max |x - mean| + 1e-9)`.

    Sums are in float64.

    Args:
        x: [..., T], float32, or on the CPU float64; each leading index is a signal of its own.
    Raises:
        RuntimeError: see `disc_preprocess_unsupported`.
    """
    _require("disc_preprocess", disc_preprocess_unsupported(x))
    return _disc_preprocess(x.reshape(-1, x.shape[-1]))[0].reshape(x.shape)


def disc_preprocess_unsupported(x: Tensor) -> str | None:
    """Why `disc_preprocess` cannot run on this tensor, or None."""
    if reason := _unsupported(x, {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)}):
        return reason
    if x.ndim == 0 or x.shape[-1] == 0:
        return f"the shape is {list(x.shape)}: no samples"
    return None if x.numel() < 2**31 else f"there are {x.numel()} samples, more than 2^31 - 1"


def _signals(x: Tensor):
    """Description of x [signals, T], and room for the partial results (at most 32 bytes each)."""
    chunk = 4096 if x.is_cuda else 65536
    chunks = -(-x.shape[1] // chunk)
    partial = torch.empty(x.shape[0] * chunks, 4, dtype=torch.float64, device=x.device)
    return _C.Signals(x.shape[0], x.shape[1], x.stride(0), chunk), partial


@torch.library.custom_op(
    "dac_native::disc_preprocess", mutates_args=(), device_types=("cpu", "cuda")
)
def _disc_preprocess(x: Tensor) -> tuple[Tensor, Tensor]:
    # Beside the result: each signal's mean and peak, for the backward pass.
    y, levels = x.new_empty(x.shape), x.new_empty(x.shape[0], 2)
    x = _contiguous_rows(x)
    signals, partial = _signals(x)
    tensors = x.data_ptr(), y.data_ptr(), levels.data_ptr(), partial.data_ptr()
    _call("disc_preprocess_forward", x, [x.dtype], signals, *tensors)
    return y, levels


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@_disc_preprocess.register_fake
def _(x):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 2)


@torch.library.custom_op(
    "dac_native::disc_preprocess_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _disc_preprocess_backward(grad: Tensor, x: Tensor, levels: Tensor) -> Tensor:
    grad_x, grad, x = x.new_empty(x.shape), grad.contiguous(), _contiguous_rows(x)
    signals, partial = _signals(x)
    tensors = (
        grad.data_ptr(),
        x.data_ptr(),
        levels.data_ptr(),
        grad_x.data_ptr(),
        partial.data_ptr(),
    )
    _call("disc_preprocess_backward", x, [x.dtype], signals, *tensors)
    return grad_x


@_disc_preprocess_backward.register_fake
def _(grad, x, levels):
    return x.new_empty(x.shape)


def _save_levels(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


_disc_preprocess.register_autograd(
    lambda ctx, grad, _: _disc_preprocess_backward(grad, *ctx.saved_tensors),
    setup_context=_save_levels,
)


# ------------------------------------------------------------------------------------------------------- stft_bands


def stft_bands(
    x: Tensor,
    windows: Sequence[int],
    bands: Sequence[tuple[float, float]] = BANDS,
    layout: str = "channels_first",
    dtype: torch.dtype | None = None,
) -> list[list[Tensor]]:
    """Complex spectrogram of each window, cut into frequency bands: a multi-resolution discriminator's input.

    Hann windows, hop of a quarter window. Frame t starts at sample `t hop - 3 hop / 2`; there are ceil(T / hop)
    frames; everything outside the signal is its reflection. One kernel launch for all windows. On CUDA, call it once
    before capturing it in a CUDA graph.

    Args:
        x: [B, T] audio, float32, or on the CPU float64.
        windows: window lengths in samples, powers of two from 32 to 4096, at most 8.
        bands: (low, high) fractions of the spectrum, from low to high without overlap, at most 8.
        layout: "channels_first" (contiguous) or "channels_last" (strides of torch.channels_last).
        dtype: of the outputs: that of x (also where None), or torch.bfloat16 of float32.
    Returns:
        per window, per band: [B, 2, frames, bins], real part then imaginary part.
    Raises:
        ValueError: the signal is too short for a window's reflection, or the layout is unknown.
        RuntimeError: see `stft_bands_unsupported`.
    """
    if layout not in MEMORY_FORMATS:
        raise ValueError(f"layout is {layout!r}; accepted: {', '.join(MEMORY_FORMATS)}")
    _require("stft_bands", stft_bands_unsupported(x, windows, bands, layout, dtype))
    for window in windows:
        hop, samples = window // 4, x.shape[1]
        shortest = 3 * hop // 2 + -samples % hop + 1
        if samples < shortest:
            raise ValueError(
                f"{samples} samples are too few for a window of {window}: at least {shortest}"
            )
    flat = _stft_bands(
        x, list(windows), _edges(windows, bands), layout == "channels_last", dtype or x.dtype
    )
    return [flat[i * len(bands) : (i + 1) * len(bands)] for i in range(len(windows))]


def stft_bands_unsupported(
    x: Tensor,
    windows: Sequence[int],
    bands: Sequence[tuple[float, float]] = BANDS,
    layout: str = "channels_first",
    dtype: torch.dtype | None = None,
) -> str | None:
    """Why `stft_bands` cannot run on these arguments, or None."""
    if reason := _unsupported(x, {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)}):
        return reason
    if x.ndim != 2:
        return f"the shape is {list(x.shape)}, not [B, T]"
    if x.numel() >= 2**31:
        return f"there are {x.numel()} samples, more than 2^31 - 1"
    if not 1 <= len(windows) <= _C.max_windows or any(window not in WINDOWS for window in windows):
        return f"the windows are {list(windows)}, not 1 to {_C.max_windows} powers of two from 32 to 4096"
    if not 1 <= len(bands) <= _C.max_bands:
        return f"there are {len(bands)} bands, not 1 to {_C.max_bands}"
    fractions = [0.0, *(fraction for band in bands for fraction in band), 1.0]
    if fractions != sorted(fractions):
        return "the bands overlap, or leave the spectrum, or are out of order"
    if dtype not in (None, x.dtype) and (x.dtype, dtype) != (torch.float32, torch.bfloat16):
        return f"outputs of {dtype} from {x.dtype}"
    return None


def _edges(windows: Sequence[int], bands: Sequence[tuple[float, float]]) -> list[int]:
    """Per window, per band: first and one-past-last FFT bin."""
    return [
        int(fraction * (window // 2 + 1))
        for window in windows
        for band in bands
        for fraction in band
    ]


def _empty_bands(
    x: Tensor, windows: Sequence[int], edges: Sequence[int], channels_last: bool, dtype: torch.dtype
) -> list[Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    bands = len(edges) // len(windows) // 2
    return [
        torch.empty(
            (
                x.shape[0],
                2,
                -(-x.shape[1] // (windows[i // bands] // 4)),
                edges[2 * i + 1] - edges[2 * i],
            ),
            dtype=dtype,
            device=x.device,
            memory_format=memory_format,
        )
        for i in range(len(windows) * bands)
    ]


def _plan(tensors: Sequence[Tensor], batch: int, samples: int, windows, edges, channels_last: bool):
    return _C.Plan(
        batch, samples, channels_last, windows, edges, [tensor.data_ptr() for tensor in tensors]
    )


@torch.library.custom_op("dac_native::stft_bands", mutates_args=(), device_types=("cpu", "cuda"))
def _stft_bands(
    x: Tensor, windows: Sequence[int], edges: Sequence[int], channels_last: bool, dtype: torch.dtype
) -> list[Tensor]:
    outputs = _empty_bands(x, windows, edges, channels_last, dtype)
    x = _contiguous_rows(x)
    plan = _plan(outputs, *x.shape, windows, edges, channels_last)
    _call("stft_bands_forward", x, [x.dtype, dtype], plan, x.data_ptr(), x.stride(0))
    return outputs


@_stft_bands.register_fake
def _(x, windows, edges, channels_last, dtype):
    return _empty_bands(x, windows, edges, channels_last, dtype)


@torch.library.custom_op(
    "dac_native::stft_bands_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _stft_bands_backward(
    grads: Sequence[Tensor],
    samples: int,
    windows: Sequence[int],
    edges: Sequence[int],
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grads = [grad.contiguous(memory_format=memory_format) for grad in grads]
    grad_x = torch.empty(grads[0].shape[0], samples, dtype=dtype, device=grads[0].device)
    plan = _plan(grads, *grad_x.shape, windows, edges, channels_last)
    _call("stft_bands_backward", grad_x, [dtype, grads[0].dtype], plan, grad_x.data_ptr())
    return grad_x


@_stft_bands_backward.register_fake
def _(grads, samples, windows, edges, channels_last, dtype):
    return torch.empty(grads[0].shape[0], samples, dtype=dtype, device=grads[0].device)


def _save_arguments(ctx, inputs, output):
    x, *ctx.arguments, _ = inputs
    ctx.samples, ctx.dtype = x.shape[1], x.dtype


_stft_bands.register_autograd(
    lambda ctx, grads: (
        _stft_bands_backward(grads, ctx.samples, *ctx.arguments, ctx.dtype),
        None,
        None,
        None,
        None,
    ),
    setup_context=_save_arguments,
)

"""Spectrograms and mel filterbanks for losses and metrics, in PyTorch.

B items, C channels, T samples. Computed in float32, or in float64 where the audio is float64.
Spectrograms have first derivatives, not second ones.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

WINDOWS = ("hann", "sqrt_hann", "hamming", "blackman", "average")


def full_precision(x: Tensor) -> Tensor:
    """x in float32, unless it is float64: FFTs know neither float16 nor bfloat16."""
    return x if x.dtype == torch.float64 else x.float()


def analysis_window(length: int, window_type: str = "hann") -> Tensor:
    """A periodic window, float32 [length].

    Raises:
        ValueError: the length is not a positive multiple of 4, or the type is not one of `WINDOWS`.
    """
    if length < 4 or length % 4:
        raise ValueError(
            f"window length is {length}; accepted: positive multiples of 4 samples "
            "(the hop is a quarter)"
        )
    if window_type not in WINDOWS:
        raise ValueError(f"window_type is {window_type!r}; accepted: {', '.join(WINDOWS)}")
    if window_type == "average":
        window = torch.full((length,), 1 / length, dtype=torch.float64)
    elif window_type == "sqrt_hann":
        window = torch.hann_window(length, dtype=torch.float64).sqrt()
    else:
        window = getattr(torch, f"{window_type}_window")(length, dtype=torch.float64)
    return window.float()


def magnitude_spectrogram(x: Tensor, window: Tensor, match_stride: bool = False) -> Tensor:
    """Magnitude of the short-time Fourier transform, its hop a quarter window, its edges reflected.

    Args:
        x: [..., T] audio.
        window: [W], as of `analysis_window`.
        match_stride: align frames as the outputs of a convolution with that stride: there are
            ceil(T / hop), and frame t starts at sample `t hop - 3 hop / 2`. Otherwise there are
            floor(T / hop) + 1, and frame t is centred on sample `t hop`.
    Returns:
        [..., W / 2 + 1, frames].
    Raises:
        ValueError: the signal is too short to be reflected.
    """
    x = full_precision(x)
    samples, length = x.shape[-1], window.shape[0]
    hop = length // 4
    left = right = length // 2
    if match_stride:
        left = (length - hop) // 2
        right = left + -samples % hop
    if samples <= right:
        raise ValueError(
            f"{samples} samples are too few for a window of {length}: at least {right + 1}"
        )
    padded = F.pad(x.reshape(-1, 1, samples), (left, right), mode="reflect")[:, 0]
    magnitude: Tensor = _Magnitude.apply(padded, window.to(x))  # type: ignore[no-untyped-call]
    return magnitude.transpose(1, 2).view(*x.shape[:-1], length // 2 + 1, -1)


class _Magnitude(torch.autograd.Function):
    """Magnitudes [N, frames, bins] of rows [N, T], a whole number of hops long after a window.

    PyTorch's own gradients of these steps take twice the time: a complex transform of each frame,
    and a sum by index.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Tensor) -> Tensor:
        length = window.shape[0]
        frames = x.unfold(1, length, length // 4)
        spectrum = torch.fft.rfft(frames * window)
        magnitude = torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag).sqrt_()
        ctx.save_for_backward(window, spectrum, magnitude)
        ctx.samples = x.shape[1]
        return magnitude

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        window, spectrum, magnitude = ctx.saved_tensors
        length = window.shape[0]
        # No gradient where the magnitude is 0, and none too large where its square underflows.
        scale = grad / magnitude.clamp(min=1e-18)
        # The inverse counts every bin twice, but for the first and the last.
        scale[..., 1:-1] /= 2
        frames = torch.fft.irfft(spectrum * scale, length, norm="forward") * window
        # Hop by hop, each frame's quarters are added to four neighbours.
        quarters = frames.unflatten(2, (4, -1))
        hops = grad.new_zeros(grad.shape[0], grad.shape[1] + 3, length // 4)
        for i in range(4):
            hops[:, i : i + grad.shape[1]] += quarters[:, :, i]
        rest = ctx.samples - hops[0].numel()
        return F.pad(hops.flatten(1), (0, rest)), None


class Spectrograms:
    """A signal's magnitude spectrograms, each of which is computed once.

    Args:
        x: [..., T] audio.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._known: dict[tuple[int, str, bool], Tensor] = {}

    def magnitude(self, window: Tensor, window_type: str, match_stride: bool) -> Tensor:
        """`magnitude_spectrogram` of it; the window is that of this type."""
        key = window.shape[0], window_type, match_stride
        if key not in self._known:
            self._known[key] = magnitude_spectrogram(self.x, window, match_stride)
        return self._known[key]


def hz_to_mel(hz: Tensor) -> Tensor:
    """Slaney's mel scale: linear up to 1 kHz with 3 mels per 200 Hz, logarithmic above.

    Source: Auditory Toolbox, 1998.
    """
    above = 15 + 27 * torch.log(hz.clamp(min=1000) / 1000) / math.log(6.4)
    return torch.where(hz < 1000, 3 * hz / 200, above)


def mel_to_hz(mel: Tensor) -> Tensor:
    """Inverse of `hz_to_mel`."""
    above = 1000 * torch.exp((mel - 15) * math.log(6.4) / 27)
    return torch.where(mel < 15, 200 * mel / 3, above)


def mel_filters(
    sample_rate: int, n_fft: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None
) -> Tensor:
    """Triangular filters, equally spaced on Slaney's mel scale, each of unit area over frequency.

    Args:
        sample_rate: in Hz.
        n_fft: FFT length in samples.
        n_mels: number of filters.
        fmin, fmax: edges of the lowest and highest filter in Hz; fmax None: half the sample rate.
    Returns:
        float32 [n_mels, n_fft // 2 + 1].
    Raises:
        ValueError: fmin and fmax are not in order.
    """
    fmax = sample_rate / 2 if fmax is None else fmax
    if not 0 <= fmin < fmax:
        raise ValueError(
            f"mel_fmin is {fmin} Hz and mel_fmax {fmax} Hz; accepted: 0 <= mel_fmin < mel_fmax"
        )
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    low, high = hz_to_mel(torch.tensor([fmin, fmax], dtype=torch.float64)).tolist()
    edges = mel_to_hz(torch.linspace(low, high, n_mels + 2, dtype=torch.float64))[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (edges[2:] - edges[:-2])).float()

"""Discriminators of the codec's training (paper, section 3.4): on waveforms, on periods, on complex spectrograms.

Audio is [B, 1, T]. A discriminator returns its feature maps, the score map last; module names and state-dict keys
are the published ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast import ops
from dac_fast.audio.resample import filter_bank
from dac_fast.model.channels_last import innermost
from dac_fast.model.layers import WeightNorm, default_init
from dac_fast.ops.reference import band_edges
from dac_fast.spectral import full_precision

BANDS = ops.BANDS


class Conv(WeightNorm):
    """Weight-normed convolution over as many axes as `kernel_size` names, initialised as PyTorch does."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, groups=1):
        fan_in = in_channels // groups * math.prod(kernel_size)
        weight = default_init(
            torch.empty(out_channels, in_channels // groups, *kernel_size), fan_in
        )
        super().__init__(weight, default_init(torch.empty(out_channels), fan_in))
        self.convolve = F.conv1d if len(kernel_size) == 1 else F.conv2d
        self.stride, self.padding, self.groups = stride, padding, groups

    def forward(self, x):  # noqa: D102
        weight = self.normed_weight()
        if not self.channels_last or self.convolve is F.conv1d:
            return self.convolve(
                x, weight, self.bias, self.stride, self.padding, groups=self.groups
            )
        return innermost(
            F.conv2d(innermost(x), innermost(weight), self.bias, self.stride, self.padding)
        )


def activated(*args, **kwargs) -> nn.Sequential:
    """`Conv` and its leaky ReLU."""
    # In place: neither gradient needs the convolution's own output, and these maps are most of a step's memory.
    return nn.Sequential(Conv(*args, **kwargs), nn.LeakyReLU(0.1, inplace=True))


def apply_stack(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """The output of every layer, each applied to the one before."""
    maps = []
    for layer in layers:
        x = layer(x)
        maps.append(x)
    return maps


def check_audio(x: Tensor):
    """Raises ValueError unless x is audio [B, 1, T]."""
    if x.dim() != 3 or x.shape[1] != 1:
        raise ValueError(f"audio has shape {list(x.shape)}; accepted: [B, 1, T]")


class MPD(nn.Module):
    """Multi-period discriminator (arXiv 2010.05646): sees the waveform folded into rows of `period` samples.

    Args:
        period: in samples.
    """

    def __init__(self, period: int):
        super().__init__()
        self.period = period
        channels = (1, 32, 128, 512, 1024, 1024)
        strides = (3, 3, 3, 3, 1)
        self.convs = nn.ModuleList(
            activated(channels[i], channels[i + 1], (5, 1), (stride, 1), (2, 0))
            for i, stride in enumerate(strides)
        )
        self.conv_post = Conv(1024, 1, (3, 1), 1, (1, 0))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, channels, rows, period] of x [B, 1, T].

        Raises:
            ValueError: x is not [B, 1, T], or T is not larger than the period.
        """
        check_audio(x)
        samples = x.shape[-1]
        if samples <= self.period:
            raise ValueError(
                f"{samples} samples are too few for a period of {self.period}: at least {self.period + 1}"
            )
        # A whole number of periods already gets one more, as published.
        x = F.pad(x, (0, self.period - samples % self.period), mode="reflect")
        maps = apply_stack(self.convs, x.unflatten(2, (-1, self.period)))
        return [*maps, self.conv_post(maps[-1])]


class SincResample(nn.Module):
    """Differentiable resampling with the filters of `dac_fast.resample`; rates in Hz."""

    def __init__(self, old_rate: int, new_rate: int):
        super().__init__()
        divisor = math.gcd(old_rate, new_rate)
        self.old, self.new = old_rate // divisor, new_rate // divisor
        if self.old == self.new:
            return
        filters = torch.from_numpy(filter_bank(self.old, self.new))
        taps = filters.shape[1]
        self.before = taps // 2 - 1
        # One output channel per phase: its filter, at the place of its first sample within a stride of `old`.
        kernel = torch.zeros(self.new, 1, taps + self.old - 1)
        for phase in range(self.new):
            start = phase * self.old // self.new
            kernel[phase, 0, start : start + taps] = filters[phase]
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, T] to [B, 1, floor(T new_rate / old_rate)]."""
        if self.old == self.new:
            return x
        padded = F.pad(x, (self.before, self.kernel.shape[2] - self.before - 1), mode="replicate")
        phases = F.conv1d(padded, self.kernel.to(x), stride=self.old)
        return phases.transpose(1, 2).flatten(1)[:, None, : x.shape[-1] * self.new // self.old]


class MSD(nn.Module):
    """Multi-scale discriminator (arXiv 1910.06711): sees the waveform at a fraction of its sample rate.

    Args:
        rate: factor by which the sample rate is divided.
        sample_rate: of the audio, in Hz.
    """

    def __init__(self, rate: int = 1, sample_rate: int = 44100):
        super().__init__()
        self.rate, self.sample_rate = rate, sample_rate
        self.resample = SincResample(sample_rate, sample_rate // rate)
        self.convs = nn.ModuleList(
            [
                activated(1, 16, (15,), 1, 7),
                activated(16, 64, (41,), 4, 20, groups=4),
                activated(64, 256, (41,), 4, 20, groups=16),
                activated(256, 1024, (41,), 4, 20, groups=64),
                activated(1024, 1024, (41,), 4, 20, groups=256),
                activated(1024, 1024, (5,), 1, 2),
            ]
        )
        self.conv_post = Conv(1024, 1, (3,), 1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, channels, time] of x [B, 1, T].

        Raises:
            ValueError: x is not [B, 1, T].
        """
        check_audio(x)
        maps = apply_stack(self.convs, self.resample(x))
        return [*maps, self.conv_post(maps[-1])]


class MRD(nn.Module):
    """Complex multi-band discriminator of one STFT resolution (paper, section 3.4).

    A stack of convolutions for each frequency band, and a score over all of them.

    Args:
        window_length: of the STFT, in samples.
        hop_factor: hop as a part of the window; a quarter is the one whose frames match strided convolutions.
        sample_rate: of the audio, in Hz; kept for information.
        bands: (low, high) fractions of the spectrum.
    Raises:
        ValueError: another hop factor, a window that is not a multiple of 4, or a band without a single bin.
    """

    def __init__(
        self,
        window_length: int,
        hop_factor: float = 0.25,
        sample_rate: int = 44100,
        bands: Sequence[tuple[float, float]] = BANDS,
    ):
        super().__init__()
        if hop_factor != 0.25:
            raise ValueError(f"hop_factor is {hop_factor}; accepted: 0.25")
        if window_length % 4:
            raise ValueError(f"window_length is {window_length}; accepted: multiples of 4 samples")
        for band, (low, high) in zip(bands, band_edges(window_length, bands), strict=True):
            if low >= high:
                raise ValueError(
                    f"band {tuple(band)} holds no bin of a window of {window_length} samples"
                )
        self.window_length, self.sample_rate = window_length, sample_rate
        self.bands = [tuple(band) for band in bands]
        self.band_convs = nn.ModuleList(
            nn.ModuleList(
                [
                    activated(2, 32, (3, 9), 1, (1, 4)),
                    *(activated(32, 32, (3, 9), (1, 2), (1, 4)) for _ in range(3)),
                    activated(32, 32, (3, 3), 1, 1),
                ]
            )
            for _ in self.bands
        )
        self.conv_post = Conv(32, 1, (3, 3), 1, 1)

    def spectrogram(self, x: Tensor) -> list[Tensor]:
        """Per band, the complex spectrogram [B, 2, frames, bins] of x [B, 1, T], see `ops.stft_bands`."""
        check_audio(x)
        return band_spectrograms(x, [self.window_length], self.bands)[0]

    def forward(self, x: Tensor | list[Tensor]) -> list[Tensor]:
        """Feature maps [B, channels, frames, width], band after band, of x [B, 1, T] or its `spectrogram`."""
        spectrogram = x if isinstance(x, list) else self.spectrogram(x)
        maps = [
            apply_stack(stack, band)
            for stack, band in zip(self.band_convs, spectrogram, strict=True)
        ]
        score = self.conv_post(torch.cat([band[-1] for band in maps], dim=-1))
        return [m for band in maps for m in band] + [score]


def band_spectrograms(
    x: Tensor, windows: list[int], bands: list[tuple[float, float]], channels_last: bool = False
) -> list[list[Tensor]]:
    """`ops.stft_bands` of x [B, 1, T] in float32, stored in the type that autocast would have convolutions read."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    layout = "channels_last" if channels_last else "channels_first"
    return ops.stft_bands(full_precision(x)[:, 0], windows, bands, layout, dtype)


@dataclass(frozen=True)
class DiscriminatorInput:
    """A signal as the sub-discriminators see it.

    `audio` [B, 1, T] has no mean and a peak of 0.8; `bands` are its spectrograms, per MRD and band, each
    [B, 2, frames, bins].
    """

    audio: Tensor
    bands: list[list[Tensor]]

    def detach(self) -> "DiscriminatorInput":
        """The same values without their history."""
        return DiscriminatorInput(
            self.audio.detach(), [[band.detach() for band in w] for w in self.bands]
        )

    def joined(self, other: "DiscriminatorInput") -> "DiscriminatorInput":
        """One batch of these items and then the other's."""
        windows = zip(self.bands, other.bands, strict=True)
        bands = [[torch.cat(pair) for pair in zip(*window, strict=True)] for window in windows]
        return DiscriminatorInput(torch.cat([self.audio, other.audio]), bands)


class Discriminator(nn.Module):
    """All of them: an MPD per period, an MSD per rate, an MRD per FFT size, in this order.

    Args:
        rates: factors by which the MSDs divide the sample rate; empty: no MSD.
        periods: of the MPDs, in samples; empty: no MPD.
        fft_sizes: windows of the MRDs, in samples; empty: no MRD.
        sample_rate: of the audio, in Hz.
        bands: of every MRD, as (low, high) fractions of the spectrum; `((0.0, 1.0),)` is a single band.

    Attributes:
        channels_last: whether spectrograms are to have their channels innermost in memory, see `set_channels_last`.
    """

    def __init__(
        self,
        rates: Sequence[int] = (),
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        fft_sizes: Sequence[int] = (2048, 1024, 512),
        sample_rate: int = 44100,
        bands: Sequence[tuple[float, float]] = BANDS,
    ):
        super().__init__()
        self.channels_last = False
        self.fft_sizes = list(fft_sizes)
        self.bands = [tuple(band) for band in bands]
        self.discriminators = nn.ModuleList(
            [
                *(MPD(period) for period in periods),
                *(MSD(rate, sample_rate) for rate in rates),
                *(MRD(size, sample_rate=sample_rate, bands=bands) for size in fft_sizes),
            ]
        )

    def spectra(self, x: Tensor) -> DiscriminatorInput:
        """Preprocess x [B, 1, T] and compute every MRD's spectrogram in one go. Accepted in place of x by `forward`.

        Raises:
            ValueError: x is not [B, 1, T], or too short for a window.
        """
        check_audio(x)
        audio = ops.disc_preprocess(full_precision(x))
        bands = (
            band_spectrograms(audio, self.fft_sizes, self.bands, self.channels_last)
            if self.fft_sizes
            else []
        )
        return DiscriminatorInput(audio, bands)

    def forward(self, x: Tensor | DiscriminatorInput) -> list[list[Tensor]]:
        """Feature maps of every sub-discriminator for x [B, 1, T] or its `spectra`."""
        x = x if isinstance(x, DiscriminatorInput) else self.spectra(x)
        spectrograms = iter(x.bands)
        return [
            d(next(spectrograms) if isinstance(d, MRD) else x.audio) for d in self.discriminators
        ]

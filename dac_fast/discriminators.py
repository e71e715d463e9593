"""Discriminators of the codec's training, on waveforms, periods and complex spectrograms.

Audio is [B, 1, T]. A discriminator returns its feature maps, the score map last. Module names and
state-dict keys are the published ones. Source: paper, section 3.4.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

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
# Shares of the published numbers of channels. Those of the MSD's groups stay whole numbers.
WIDTHS = (1.0, 0.5, 0.25, 0.125)

# A number of samples or bins, for each axis or for all.
Size: TypeAlias = int | tuple[int, ...]
# (low, high) fractions of the spectrum.
Bands: TypeAlias = Sequence[tuple[float, float]]


class Conv(WeightNorm):
    """Weight-normed convolution over one or two axes, initialised as PyTorch does.

    Args:
        in_channels, out_channels, stride, padding, groups: as of `torch.nn.Conv1d` and `Conv2d`.
        kernel_size: along each axis.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: Size,
        padding: Size,
        groups: int = 1,
    ) -> None:
        fan_in = in_channels // groups * math.prod(kernel_size)
        weight = torch.empty(out_channels, in_channels // groups, *kernel_size)
        bias = torch.empty(out_channels)
        super().__init__(default_init(weight, fan_in), default_init(bias, fan_in))
        self.axes = len(kernel_size)
        self.stride = stride
        self.padding = padding
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        weight = self.normed_weight()
        convolve = F.conv1d if self.axes == 1 else F.conv2d
        channels_last = self.channels_last and self.axes == 2
        if channels_last:
            x, weight = innermost(x), innermost(weight)
        y = convolve(x, weight, self.bias, self.stride, self.padding, groups=self.groups)
        return innermost(y) if channels_last else y


def activated(conv: Conv) -> nn.Sequential:
    """A convolution and its leaky ReLU."""
    # In place: no gradient needs the convolution's own output, and such maps are most of a step's
    # memory.
    return nn.Sequential(conv, nn.LeakyReLU(0.1, inplace=True))


def checked_width(width: float) -> float:
    """The width, if it is one of `WIDTHS`.

    Raises:
        ValueError: it is none.
    """
    if width not in WIDTHS:
        accepted = ", ".join(f"{accepted:g}" for accepted in WIDTHS)
        raise ValueError(f"width is {width}; accepted: {accepted}")
    return width


def narrowed(channels: int, width: float) -> int:
    """That share of so many channels, or groups of channels, at least one."""
    return max(1, int(channels * checked_width(width)))


def apply_stack(layers: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """The output of every layer, each applied to the one before."""
    maps = []
    for layer in layers:
        x = layer(x)
        maps.append(x)
    return maps


def check_audio(x: Tensor) -> None:
    """Raises ValueError unless x is audio [B, 1, T]."""
    if x.dim() != 3 or x.shape[1] != 1:
        raise ValueError(f"audio has shape {list(x.shape)}; accepted: [B, 1, T]")


class MPD(nn.Module):
    """Multi-period discriminator (arXiv 2010.05646), on the waveform in rows of `period` samples.

    Args:
        period: in samples.
        width: see `Discriminator`.
    """

    __call__: Callable[..., list[Tensor]]

    def __init__(self, period: int, width: float = 1.0) -> None:
        super().__init__()
        self.period = period
        channels = [1, *(narrowed(c, width) for c in (32, 128, 512, 1024, 1024))]
        strides = (3, 3, 3, 3, 1)
        self.convs = nn.ModuleList(
            activated(Conv(inputs, outputs, (5, 1), (stride, 1), (2, 0)))
            for (inputs, outputs), stride in zip(pairwise(channels), strides, strict=True)
        )
        self.conv_post = Conv(channels[-1], 1, (3, 1), 1, (1, 0))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, channels, rows, period] of x [B, 1, T].

        Raises:
            ValueError: x is not [B, 1, T], or T is not larger than the period.
        """
        check_audio(x)
        samples = x.shape[-1]
        if samples <= self.period:
            raise ValueError(
                f"{samples} samples are too few for a period of {self.period}: "
                f"at least {self.period + 1}"
            )
        # As published, a whole number of periods gets another one.
        x = F.pad(x, (0, self.period - samples % self.period), mode="reflect")
        maps = apply_stack(self.convs, x.unflatten(2, (-1, self.period)))
        return [*maps, self.conv_post(maps[-1])]


class SincResample(nn.Module):
    """Differentiable resampling with the filters of `dac_fast.audio.resample`; rates in Hz."""

    __call__: Callable[..., Tensor]
    kernel: Tensor

    def __init__(self, old_rate: int, new_rate: int) -> None:
        super().__init__()
        divisor = math.gcd(old_rate, new_rate)
        self.old = old_rate // divisor
        self.new = new_rate // divisor
        if self.old == self.new:
            return
        filters = torch.from_numpy(filter_bank(self.old, self.new))
        taps = filters.shape[1]
        self.before = taps // 2 - 1
        # One output channel per phase: its filter, at its first sample within a stride of `old`.
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
    """Multi-scale discriminator (arXiv 1910.06711), on the waveform at a lower sample rate.

    Args:
        rate: factor by which the sample rate is divided.
        sample_rate: of the audio, in Hz.
        width: see `Discriminator`.
    """

    __call__: Callable[..., list[Tensor]]

    def __init__(self, rate: int = 1, sample_rate: int = 44100, width: float = 1.0) -> None:
        super().__init__()
        self.rate = rate
        self.sample_rate = sample_rate
        self.resample = SincResample(sample_rate, sample_rate // rate)
        channels = [narrowed(c, width) for c in (16, 64, 256, 1024, 1024)]
        groups = [narrowed(g, width) for g in (4, 16, 64, 256)]
        self.convs = nn.ModuleList(
            [
                activated(Conv(1, channels[0], (15,), 1, 7)),
                *(
                    activated(Conv(inputs, outputs, (41,), 4, 20, groups=count))
                    for (inputs, outputs), count in zip(pairwise(channels), groups, strict=True)
                ),
                activated(Conv(channels[-1], channels[-1], (5,), 1, 2)),
            ]
        )
        self.conv_post = Conv(channels[-1], 1, (3,), 1, 1)

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

    Each frequency band has a stack of convolutions; one score is over all bands.

    Args:
        window_length: of the STFT, in samples.
        hop_factor: hop as a share of the window. Frames match strided convolutions at 0.25 only.
        sample_rate: of the audio, in Hz; kept for information.
        bands: (low, high) fractions of the spectrum.
        width: see `Discriminator`.
    Raises:
        ValueError: the hop factor is not 0.25, the window no multiple of 4, or a band has no bin.
    """

    __call__: Callable[..., list[Tensor]]

    def __init__(
        self,
        window_length: int,
        hop_factor: float = 0.25,
        sample_rate: int = 44100,
        bands: Bands = BANDS,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if hop_factor != 0.25:
            raise ValueError(f"hop_factor is {hop_factor}; accepted: 0.25")
        if window_length % 4:
            raise ValueError(f"window_length is {window_length}; accepted: multiples of 4 samples")
        self.window_length = window_length
        self.sample_rate = sample_rate
        self.bands = [(low, high) for low, high in bands]
        for band, (first, end) in zip(self.bands, band_edges(window_length, bands), strict=True):
            if first >= end:
                raise ValueError(f"band {band} holds no bin of a window of {window_length} samples")
        channels = narrowed(32, width)
        self.band_convs = nn.ModuleList(
            nn.ModuleList(
                [
                    activated(Conv(2, channels, (3, 9), 1, (1, 4))),
                    *(
                        activated(Conv(channels, channels, (3, 9), (1, 2), (1, 4)))
                        for _ in range(3)
                    ),
                    activated(Conv(channels, channels, (3, 3), 1, 1)),
                ]
            )
            for _ in self.bands
        )
        self.conv_post = Conv(channels, 1, (3, 3), 1, 1)

    def spectrogram(self, x: Tensor) -> list[Tensor]:
        """Per band, the complex spectrogram [B, 2, frames, bins] of x [B, 1, T].

        See `ops.stft_bands`.
        """
        check_audio(x)
        return band_spectrograms(x, [self.window_length], self.bands)[0]

    def forward(self, x: Tensor | list[Tensor]) -> list[Tensor]:
        """Feature maps [B, channels, frames, width], band after band.

        x: [B, 1, T], or its `spectrogram`.
        """
        spectrogram = x if isinstance(x, list) else self.spectrogram(x)
        stacks = [layers for layers in self.band_convs if isinstance(layers, nn.ModuleList)]
        maps = [apply_stack(*pair) for pair in zip(stacks, spectrogram, strict=True)]
        score = self.conv_post(torch.cat([band[-1] for band in maps], dim=-1))
        return [m for band in maps for m in band] + [score]


def band_spectrograms(
    x: Tensor, windows: list[int], bands: Bands, channels_last: bool = False
) -> list[list[Tensor]]:
    """`ops.stft_bands` of x [B, 1, T], computed in float32.

    Under autocast the result is in the half precision that convolutions will read.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    layout = "channels_last" if channels_last else "channels_first"
    return ops.stft_bands(full_precision(x)[:, 0], windows, bands, layout, dtype)


@dataclass(frozen=True)
class DiscriminatorInput:
    """A signal as the sub-discriminators see it.

    Attributes:
        audio: [B, 1, T], without mean, of peak 0.8.
        bands: its spectrograms [B, 2, frames, bins], per MRD and band.
    """

    audio: Tensor
    bands: list[list[Tensor]]

    def detach(self) -> "DiscriminatorInput":
        """The same values without their history."""
        bands = [[band.detach() for band in window] for window in self.bands]
        return DiscriminatorInput(self.audio.detach(), bands)

    def joined(self, other: "DiscriminatorInput") -> "DiscriminatorInput":
        """One batch of these items and then the other's."""
        windows = zip(self.bands, other.bands, strict=True)
        bands = [[torch.cat(pair) for pair in zip(*window, strict=True)] for window in windows]
        return DiscriminatorInput(torch.cat([self.audio, other.audio]), bands)


class Discriminator(nn.Module):
    """All discriminators: an MPD per period, an MSD per rate, an MRD per FFT size, in this order.

    Args:
        rates: factors by which the MSDs divide the sample rate; empty: no MSD.
        periods: of the MPDs, in samples; empty: no MPD.
        fft_sizes: windows of the MRDs, in samples; empty: no MRD.
        sample_rate: of the audio, in Hz.
        bands: of every MRD, as (low, high) fractions of the spectrum.
        width: share of the published numbers of channels, one of `WIDTHS`; 1 is published.

    Attributes:
        channels_last: whether spectrograms have channels innermost in memory, see
            `set_channels_last`.
    """

    __call__: Callable[..., list[list[Tensor]]]

    def __init__(
        self,
        rates: Sequence[int] = (),
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        fft_sizes: Sequence[int] = (2048, 1024, 512),
        sample_rate: int = 44100,
        bands: Bands = BANDS,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        self.channels_last = False
        self.fft_sizes = list(fft_sizes)
        self.bands = [(low, high) for low, high in bands]
        self.discriminators = nn.ModuleList(
            [
                *(MPD(period, width) for period in periods),
                *(MSD(rate, sample_rate, width) for rate in rates),
                *(
                    MRD(size, sample_rate=sample_rate, bands=bands, width=width)
                    for size in fft_sizes
                ),
            ]
        )

    def spectra(self, x: Tensor) -> DiscriminatorInput:
        """The input of every sub-discriminator, for x [B, 1, T]; `forward` accepts it.

        All spectrograms are computed in one go.

        Raises:
            ValueError: x is not [B, 1, T], or too short for a window.
        """
        check_audio(x)
        audio = ops.disc_preprocess(full_precision(x))
        if not self.fft_sizes:
            return DiscriminatorInput(audio, [])
        bands = band_spectrograms(audio, self.fft_sizes, self.bands, self.channels_last)
        return DiscriminatorInput(audio, bands)

    def forward(self, x: Tensor | DiscriminatorInput) -> list[list[Tensor]]:
        """Feature maps of every sub-discriminator for x [B, 1, T] or its `spectra`."""
        x = x if isinstance(x, DiscriminatorInput) else self.spectra(x)
        spectrograms = iter(x.bands)
        return [
            d(next(spectrograms) if isinstance(d, MRD) else x.audio) for d in self.discriminators
        ]

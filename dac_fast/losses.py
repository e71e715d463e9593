"""Training losses (paper, section 3.5): of audio [B, 1, T], and of a discriminator's feature maps.

The losses of audio are modules, multiplied by their `weight`, 1 unless given. Adversarial losses
are functions of feature maps; `GANLoss` calls them with those of a discriminator. Where several
losses compare the same signals, spectral losses accept `Spectrograms(signal)` in place of a signal,
and `GANLoss` the discriminator's `spectra(signal)`, so that these are computed only once.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast.spectral import Spectrograms, analysis_window, full_precision, mel_filters

# Per sub-discriminator its feature maps, of which the last is the score.
FeatureMaps: TypeAlias = list[list[Tensor]]
# What a spectral loss compares: audio [B, C, T], or its spectrograms.
Signal: TypeAlias = Tensor | Spectrograms
# What a discriminator sees.
AnySignal = TypeVar("AnySignal", Tensor, "Spectra")


class L1Loss(nn.L1Loss):
    """Mean absolute difference of two waveforms of one shape.

    Args:
        weight: factor of the loss.
        reduction: "mean", "sum" or "none".
    """

    __call__: Callable[..., Tensor]

    def __init__(self, weight: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.weight = weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return self.weight * super().forward(x, y)


class SISDRLoss(nn.Module):
    """Negative scale-invariant signal-to-distortion ratio, in dB (arXiv 1811.02508).

    Args:
        scaling: scale the reference to fit the estimate; False: the plain signal-to-noise ratio.
        reduction: "mean", "sum" or "none" over the batch.
        zero_mean: remove the mean of both signals first.
        clip_min: lowest value of an item's loss, so that good items stop counting; None: none.
        weight: factor of the loss.
    Raises:
        ValueError: there is no such reduction.
    """

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        scaling: bool = True,
        reduction: str = "mean",
        zero_mean: bool = True,
        clip_min: float | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {reduction!r}; accepted: mean, sum, none")
        self.scaling = scaling
        self.reduction = reduction
        self.zero_mean = zero_mean
        self.clip_min = clip_min
        self.weight = weight

    def forward(self, references: Tensor, estimates: Tensor) -> Tensor:
        """The loss of estimates [B, ...] against references of the same shape; "none" gives [B]."""
        epsilon = 1e-8
        references, estimates = references.flatten(1), estimates.flatten(1)
        if self.zero_mean:
            references = references - references.mean(1, keepdim=True)
            estimates = estimates - estimates.mean(1, keepdim=True)
        target = references
        if self.scaling:
            projection = (estimates * references).sum(1, keepdim=True) + epsilon
            target = references * projection / (references.square().sum(1, keepdim=True) + epsilon)
        ratio = target.square().sum(1) / (estimates - target).square().sum(1)
        loss = -10 * torch.log10(ratio + epsilon)
        if self.clip_min is not None:
            loss = loss.clamp(min=self.clip_min)
        if self.reduction == "none":
            return self.weight * loss
        return self.weight * (loss.mean() if self.reduction == "mean" else loss.sum())


class MultiScaleSTFTLoss(nn.Module):
    """Distance of magnitude spectrograms and of their logarithms, summed over scales.

    Per scale: `log_weight loss_fn(log10 X^pow, log10 Y^pow) + mag_weight loss_fn(X, Y)`, with
    magnitudes clamped to `clamp_eps` before the logarithm. Source: DDSP, arXiv 2001.04643.

    Args:
        window_lengths: of each scale, in samples; the hop is a quarter of it.
        loss_fn: compares two spectrograms; None: the mean absolute difference.
        clamp_eps, mag_weight, log_weight, pow: as in the formula.
        weight: factor of the whole loss.
        match_stride: align frames as a strided convolution does, see `magnitude_spectrogram`.
        window_type: one of `dac_fast.spectral.WINDOWS`; None: hann.
    """

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        window_lengths: Sequence[int] = (2048, 512),
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        clamp_eps: float = 1e-5,
        mag_weight: float = 1.0,
        log_weight: float = 1.0,
        pow: float = 2.0,
        weight: float = 1.0,
        match_stride: bool = False,
        window_type: str | None = None,
    ) -> None:
        super().__init__()
        self.window_lengths = list(window_lengths)
        self.loss_fn: Callable[[Tensor, Tensor], Tensor] = loss_fn or F.l1_loss
        self.clamp_eps = clamp_eps
        self.mag_weight = mag_weight
        self.log_weight = log_weight
        self.pow = pow
        self.weight = weight
        self.match_stride = match_stride
        self.window_type = window_type or "hann"
        for scale, length in enumerate(self.window_lengths):
            window = analysis_window(length, self.window_type)
            self.register_buffer(f"window_{scale}", window, persistent=False)

    def _compared(self, x: Spectrograms) -> Iterator[Tensor]:
        """Per scale, what is compared: the spectrogram [B, C, bins, frames]."""
        for scale in range(len(self.window_lengths)):
            window = self.get_buffer(f"window_{scale}")
            yield x.magnitude(window, self.window_type, self.match_stride)

    def forward(self, x: Signal, y: Signal) -> Tensor:
        """The loss between x and y, each audio [B, C, T] or its `Spectrograms`."""
        of_x, of_y = (s if isinstance(s, Spectrograms) else Spectrograms(s) for s in (x, y))
        losses = []
        for a, b in zip(self._compared(of_x), self._compared(of_y), strict=True):
            if self.log_weight:
                losses.append(self.log_weight * self.loss_fn(self._log(a), self._log(b)))
            if self.mag_weight:
                losses.append(self.mag_weight * self.loss_fn(a, b))
        return self.weight * total(losses)

    def _log(self, spectrogram: Tensor) -> Tensor:
        # log10(m^pow) as pow log10(m), which cannot underflow.
        return self.pow * spectrogram.clamp(self.clamp_eps).log10()


class MelSpectrogramLoss(MultiScaleSTFTLoss):
    """`MultiScaleSTFTLoss` of mel spectrograms; training uses seven scales (paper, section 3.5).

    Args:
        n_mels: mel filters of each scale.
        mel_fmin, mel_fmax: per scale, edges of the filterbank in Hz; None: 0 and half the sample
            rate throughout.
        sample_rate: of the audio, in Hz.
        window_lengths, loss_fn, clamp_eps, mag_weight: see `MultiScaleSTFTLoss`.
        log_weight, pow, weight, match_stride, window_type: see there, too.
    Raises:
        ValueError: the lists have different lengths.
    """

    def __init__(
        self,
        n_mels: Sequence[int] = (150, 80),
        window_lengths: Sequence[int] = (2048, 512),
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        clamp_eps: float = 1e-5,
        mag_weight: float = 1.0,
        log_weight: float = 1.0,
        pow: float = 2.0,
        weight: float = 1.0,
        match_stride: bool = False,
        mel_fmin: Sequence[float] | None = None,
        mel_fmax: Sequence[float | None] | None = None,
        window_type: str | None = None,
        *,
        sample_rate: int = 44100,
    ) -> None:
        super().__init__(
            window_lengths,
            loss_fn,
            clamp_eps,
            mag_weight,
            log_weight,
            pow,
            weight,
            match_stride,
            window_type,
        )
        scales = len(self.window_lengths)
        fmins = [0.0] * scales if mel_fmin is None else mel_fmin
        fmaxs = [None] * scales if mel_fmax is None else mel_fmax
        for name, values in {"n_mels": n_mels, "mel_fmin": fmins, "mel_fmax": fmaxs}.items():
            if len(values) != scales:
                raise ValueError(
                    f"{name} has {len(values)} values; accepted: one per window length, "
                    f"that is {scales}"
                )
        for i, length in enumerate(self.window_lengths):
            filters = mel_filters(sample_rate, length, n_mels[i], fmins[i], fmaxs[i])
            self.register_buffer(f"filters_{i}", filters, persistent=False)

    def _compared(self, x: Spectrograms) -> Iterator[Tensor]:
        """Per scale, the mel spectrogram [B, C, mels, frames]."""
        for scale, spectrogram in enumerate(super()._compared(x)):
            filters = self.get_buffer(f"filters_{scale}").to(spectrogram)
            # Half precision, which autocast would choose, is too coarse for the logarithm near
            # silence.
            with torch.autocast(filters.device.type, enabled=False):
                mels = F.linear(spectrogram.mT, filters)
            yield mels.mT


def total(losses: Iterable[Tensor]) -> Tensor:
    """The sum of one or more losses, in their order."""
    return reduce(operator.add, losses)


def halves(maps: FeatureMaps) -> tuple[FeatureMaps, FeatureMaps]:
    """The feature maps of the two halves of a batch."""
    chunks = [[m.chunk(2) for m in of_one] for of_one in maps]
    first, second = ([[pair[i] for pair in of_one] for of_one in chunks] for i in (0, 1))
    return first, second


def discriminator_loss(fake: FeatureMaps, real: FeatureMaps) -> Tensor:
    """The discriminator's least-squares loss: pushes scores of `fake` to 0 and of `real` to 1.

    Source: LSGAN, arXiv 1611.04076.
    """
    pairs = zip(_scores(fake), _scores(real), strict=True)
    return total(f.square().mean() + (1 - r).square().mean() for f, r in pairs)


def generator_loss(fake: FeatureMaps) -> Tensor:
    """The generator's least-squares loss: pushes scores of `fake` to 1."""
    return total((1 - score).square().mean() for score in _scores(fake))


def feature_matching(fake: FeatureMaps, real: FeatureMaps) -> Tensor:
    """Mean absolute difference of feature maps, summed over all maps but the scores.

    Source: MelGAN, arXiv 1910.06711.
    """
    return total(
        mean_absolute_difference(f, r)
        for fake_maps, real_maps in zip(fake, real, strict=True)
        for f, r in zip(fake_maps[:-1], real_maps[:-1], strict=True)
    )


def _scores(maps: FeatureMaps) -> list[Tensor]:
    """The scores in float32 at least: their squares are summed to a loss."""
    return [full_precision(of_one[-1]) for of_one in maps]


def mean_absolute_difference(x: Tensor, y: Tensor) -> Tensor:
    """`F.l1_loss`, summed in float32 at least.

    Only the difference, in its own dtype, is kept for the backward pass.
    """
    # Rounding a difference keeps its sign, and the gradient depends on nothing else.
    difference = x - y
    dtype = torch.promote_types(difference.dtype, torch.float32)
    distance: Tensor = torch.linalg.vector_norm(difference, 1, dtype=dtype)
    return distance / difference.numel()


@runtime_checkable
class Spectra(Protocol):
    """The spectra of a signal, which a discriminator accepts in its place."""

    def detach(self) -> Any:
        """The same values without their history."""

    def joined(self, other: Any) -> Any:
        """One batch of these items and then the other's."""


class GANLoss(nn.Module):
    """The adversarial losses of audio, by a discriminator.

    Args:
        discriminator: maps audio to `FeatureMaps`, as `dac_fast.discriminators.Discriminator` does.
            Losses then take its `spectra` in place of audio, too; `fake` and `real` of one shape.
    """

    def __init__(self, discriminator: Callable[..., FeatureMaps]) -> None:
        super().__init__()
        self.discriminator = discriminator

    def discriminator_loss(self, fake: AnySignal, real: AnySignal) -> Tensor:
        """See the function of this name; no gradient reaches `fake`."""
        fake = fake.detach()
        both = fake.joined(real) if isinstance(fake, Spectra) else torch.cat([fake, real])
        return discriminator_loss(*halves(self.discriminator(both)))

    def generator_loss(self, fake: AnySignal, real: AnySignal) -> tuple[Tensor, Tensor]:
        """See `generator_loss` and `feature_matching`; no gradient passes through `real`."""
        fakes = self.discriminator(fake)
        with torch.no_grad():
            reals = self.discriminator(real)
        return generator_loss(fakes), feature_matching(fakes, reals)

"""Training losses (paper, section 3.5): audio as tensors [B, 1, T] in, scalars out.

Every loss is multiplied by its `weight`, 1 unless given. The spectral losses and `GANLoss` accept, in place of a
signal, what `spectra(signal)` returned for it, so that a training step analyses the real signal only once.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast.spectral import analysis_window, magnitude_spectrogram, mel_filters


class L1Loss(nn.L1Loss):
    """Mean absolute difference of two waveforms of one shape.

    Args:
        weight: factor of the loss.
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, weight: float = 1.0, reduction: str = "mean"):
        super().__init__(reduction=reduction)
        self.weight = weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return self.weight * super().forward(x, y)


class SISDRLoss(nn.Module):
    """Negative scale-invariant signal-to-distortion ratio, in dB (arXiv 1811.02508).

    Args:
        scaling: scale the reference to fit the estimate; False gives the plain signal-to-noise ratio.
        reduction: "mean", "sum" or "none" over the batch.
        zero_mean: remove the mean of both signals first.
        clip_min: lowest value of an item's loss, so that good items stop counting; None: none.
        weight: factor of the loss.
    """

    def __init__(
        self,
        scaling: bool = True,
        reduction: str = "mean",
        zero_mean: bool = True,
        clip_min: float | None = None,
        weight: float = 1.0,
    ):
        super().__init__()
        reductions = {"mean": torch.mean, "sum": torch.sum, "none": lambda loss: loss}
        if reduction not in reductions:
            raise ValueError(f"reduction is {reduction!r}; accepted: {', '.join(reductions)}")
        self.scaling, self.zero_mean, self.clip_min, self.weight = (
            scaling,
            zero_mean,
            clip_min,
            weight,
        )
        self.reduce = reductions[reduction]

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
        return self.weight * self.reduce(loss)


class MultiScaleSTFTLoss(nn.Module):
    """Distance of magnitude spectrograms and of their logarithms, summed over scales (DDSP, arXiv 2001.04643).

    Per scale: `log_weight loss_fn(log10 X^pow, log10 Y^pow) + mag_weight loss_fn(X, Y)`, magnitudes clamped to
    `clamp_eps` before the logarithm.

    Args:
        window_lengths: of each scale, in samples; the hop is a quarter of it.
        loss_fn: compares two spectrograms; None: the mean absolute difference.
        clamp_eps, mag_weight, log_weight, pow: as in the formula.
        weight: factor of the whole loss.
        match_stride: align frames as a strided convolution does, see `magnitude_spectrogram`.
        window_type: one of `dac_fast.spectral.WINDOWS`; None: hann.
    """

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
    ):
        super().__init__()
        self.window_lengths, self.loss_fn = list(window_lengths), loss_fn or F.l1_loss
        self.clamp_eps, self.mag_weight, self.log_weight, self.pow = (
            clamp_eps,
            mag_weight,
            log_weight,
            pow,
        )
        self.weight, self.match_stride = weight, match_stride
        for scale, length in enumerate(self.window_lengths):
            window = analysis_window(length, window_type or "hann")
            self.register_buffer(f"window_{scale}", window, persistent=False)

    def spectra(self, x: Tensor) -> list[Tensor]:
        """Per scale, the spectrogram [B, C, bins, frames] of x [B, C, T]. Accepted in place of x by `forward`."""
        windows = [self.get_buffer(f"window_{scale}") for scale in range(len(self.window_lengths))]
        return [magnitude_spectrogram(x, window, self.match_stride) for window in windows]

    def forward(self, x: Tensor | list[Tensor], y: Tensor | list[Tensor]) -> Tensor:
        """The loss between x and y, each [B, C, T] audio or its `spectra`."""
        pairs = [signal if isinstance(signal, list) else self.spectra(signal) for signal in (x, y)]
        total = 0.0
        for a, b in zip(*pairs, strict=True):
            if self.log_weight:
                total = total + self.log_weight * self.loss_fn(self._log(a), self._log(b))
            if self.mag_weight:
                total = total + self.mag_weight * self.loss_fn(a, b)
        return self.weight * total

    def _log(self, spectrogram: Tensor) -> Tensor:
        # log10(m^pow) = pow log10(m), which cannot underflow.
        return self.pow * spectrogram.clamp(self.clamp_eps).log10()


class MelSpectrogramLoss(MultiScaleSTFTLoss):
    """`MultiScaleSTFTLoss` of mel spectrograms; the codec's training uses seven scales (paper, section 3.5).

    Args:
        n_mels: mel filters of each scale.
        mel_fmin, mel_fmax: per scale, edges of the filterbank in Hz; None: 0 and half the sample rate throughout.
        sample_rate: of the audio, in Hz.
        window_lengths, loss_fn, clamp_eps, mag_weight, log_weight, pow, weight, match_stride, window_type: as of
            `MultiScaleSTFTLoss`.
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
    ):
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
        mel_fmin = [0.0] * scales if mel_fmin is None else mel_fmin
        mel_fmax = [None] * scales if mel_fmax is None else mel_fmax
        for name, values in {"n_mels": n_mels, "mel_fmin": mel_fmin, "mel_fmax": mel_fmax}.items():
            if len(values) != scales:
                raise ValueError(
                    f"{name} has {len(values)} values; accepted: one per window length, that is {scales}"
                )
        for scale, length in enumerate(self.window_lengths):
            filters = mel_filters(
                sample_rate, length, n_mels[scale], mel_fmin[scale], mel_fmax[scale]
            )
            self.register_buffer(f"filters_{scale}", filters, persistent=False)

    def spectra(self, x: Tensor) -> list[Tensor]:
        """Per scale, the mel spectrogram [B, C, mels, frames] of x [B, C, T]. Accepted in place of x by `forward`."""
        # Autocast would turn the product into half precision, whose logarithm is too coarse near silence.
        with torch.autocast(x.device.type, enabled=False):
            spectrograms = super().spectra(x)
            return [
                self.get_buffer(f"filters_{scale}").to(s) @ s
                for scale, s in enumerate(spectrograms)
            ]


class GANLoss(nn.Module):
    """Least-squares adversarial loss and feature matching (arXiv 1611.04076, 1910.06711; paper, section 3.5).

    Args:
        discriminator: maps audio to a list, one per sub-discriminator, of lists of feature maps whose last is its
            score, as `dac_fast.discriminators.Discriminator` does. What that one's `spectra` returns is accepted
            as `fake` and `real` too; both of one shape.
    """

    def __init__(self, discriminator: Callable):
        super().__init__()
        self.discriminator = discriminator

    def discriminator_loss(self, fake, real) -> Tensor:
        """Pushes scores of `fake` to 0 and of `real` to 1, both seen in one pass. No gradient reaches `fake`."""
        fake = fake.detach()
        both = torch.cat([fake, real]) if isinstance(fake, Tensor) else fake.joined(real)
        scores = [maps[-1].chunk(2) for maps in self.discriminator(both)]
        return sum(f.square().mean() + (1 - r).square().mean() for f, r in scores)

    def generator_loss(self, fake, real) -> tuple[Tensor, Tensor]:
        """Adversarial loss, which pushes scores of `fake` to 1, and feature loss. No gradient passes through `real`.

        The feature loss is the sum over all maps but the scores of their mean absolute difference.
        """
        fakes = self.discriminator(fake)
        with torch.no_grad():
            reals = self.discriminator(real)
        adversarial = sum((1 - maps[-1]).square().mean() for maps in fakes)
        feature = sum(
            mean_absolute_difference(f, r)
            for fake_maps, real_maps in zip(fakes, reals, strict=True)
            for f, r in zip(fake_maps[:-1], real_maps[:-1], strict=True)
        )
        return adversarial, feature


def mean_absolute_difference(x: Tensor, y: Tensor) -> Tensor:
    """`F.l1_loss` in float32 at least, which keeps only the difference for the backward pass, in the inputs' dtype."""
    # Rounding a difference keeps its sign, which is all that the gradient depends on.
    difference = x - y
    dtype = torch.promote_types(difference.dtype, torch.float32)
    return torch.linalg.vector_norm(difference, 1, dtype=dtype) / difference.numel()

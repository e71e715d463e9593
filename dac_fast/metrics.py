"""Signal metrics and codebook statistics. Audio is [B, C, T]; means are over the batch.

ViSQOL is not here: it needs a package of its own, which `dac-fast evaluate` calls.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dac_fast.losses import MelSpectrogramLoss, MultiScaleSTFTLoss, SISDRLoss
from dac_fast.storage.dac2 import DACFile

# Fewer samples have no mel distance.
SHORTEST = 1025


@lru_cache(maxsize=8)
def _mel_loss(sample_rate: int) -> MelSpectrogramLoss:
    return MelSpectrogramLoss(sample_rate=sample_rate)


def mel_distance(x: Tensor, y: Tensor, sample_rate: int = 44100) -> Tensor:
    """Distance of mel spectrograms, as the paper evaluates it; no unit, lower is better.

    Args:
        x, y: [B, C, T], more than 1024 samples.
        sample_rate: in Hz.
    """
    return _mel_loss(sample_rate)(x, y)


def stft_distance(x: Tensor, y: Tensor) -> Tensor:
    """Distance of spectrograms with windows of 2048 and 512 samples; no unit, lower is better.

    Args:
        x, y: [B, C, T], more than 1024 samples.
    """
    return MultiScaleSTFTLoss()(x, y)


def si_sdr(reference: Tensor, estimate: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, higher is better.

    An item of which either signal is silent (the same value throughout) has no ratio, and does not
    count; NaN if that is so for all.

    Args:
        reference, estimate: [B, C, T].
    """
    ratios = -SISDRLoss(reduction="none")(reference, estimate)
    for signal in (reference, estimate):
        lowest, highest = signal.flatten(1).aminmax(dim=1)
        ratios = ratios.masked_fill(lowest == highest, math.nan)
    return ratios.nanmean()


@dataclass(frozen=True)
class Quality:
    """What codes cost, and how near the original they come; None stands for what is not defined.

    Attributes:
        kbps: bitrate of all channels together, kbit/s.
        ratio: to PCM of 16 bit at the recording's own rate.
        si_sdr: in dB.
        mel_distance: as `mel_distance`, of at least 1025 samples.
    """

    kbps: float | None
    ratio: float | None
    si_sdr: float | None
    mel_distance: float | None


def quality(file: DACFile, original: NDArray[np.float32], restored: NDArray[np.float32]) -> Quality:
    """What the codes in a file cost, and how near the original they come.

    Args:
        file: the codes.
        original, restored: audio [C, T] at the file's sample rate.
    """
    rate = file.sample_rate
    x, y = torch.from_numpy(original)[None], torch.from_numpy(restored)[None]
    ratio = 16 * rate * file.channels / file.bitrate if file.bitrate else None
    distortion = si_sdr(x, y).item()
    return Quality(
        kbps=file.bitrate / 1000 if file.bitrate else None,
        ratio=ratio,
        si_sdr=distortion if math.isfinite(distortion) else None,
        mel_distance=mel_distance(x, y, rate).item() if x.shape[-1] >= SHORTEST else None,
    )


def codebook_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each codebook used each of its entries: int64 [N, codebook_size].

    The counts of several batches may be added up.

    Args:
        codes: integers [B, N, F].
        codebook_size: entries of every codebook.
    Raises:
        ValueError: a code lies outside the codebook.
    """
    codes = codes.transpose(0, 1).flatten(1).long()
    low, high = codes.aminmax()
    if low < 0 or high >= codebook_size:
        raise ValueError(f"codes run from {low} to {high}; accepted: 0 to {codebook_size - 1}")
    return codes.new_zeros(codes.shape[0], codebook_size).scatter_add_(
        1, codes, torch.ones_like(codes)
    )


def codebook_entropy(counts: Tensor) -> Tensor:
    """Entropy of each codebook's use in bits, float64 [N].

    Args:
        counts: [N, codebook_size], as of `codebook_counts`.
    """
    share = counts.double() / counts.sum(1, keepdim=True)
    nats: Tensor = -torch.special.xlogy(share, share).sum(1)
    return nats / math.log(2)


def efficiency(counts: Tensor) -> float:
    """Sum of the codebooks' entropies over the bits spent on them (paper, section 4.3).

    1 if every entry is used alike; 0 for codebooks of one entry, which carry nothing.

    Args:
        counts: [N, codebook_size], as of `codebook_counts`.
    """
    bits = math.log2(counts.shape[1])
    return codebook_entropy(counts).mean().item() / bits if bits else 0.0


def bitrate_efficiency(codes: Tensor, codebook_size: int) -> float:
    """The `efficiency` of codes.

    Args:
        codes: integers [B, N, F].
        codebook_size: entries of every codebook.
    """
    return efficiency(codebook_counts(codes, codebook_size))

"""Signal metrics and codebook statistics. Audio is [B, C, T]; distances are averaged over the batch.

ViSQOL, which needs a package of its own, is called by `dac-fast evaluate`.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from dac_fast.losses import MelSpectrogramLoss, MultiScaleSTFTLoss, SISDRLoss


@lru_cache(maxsize=8)
def _mel_loss(sample_rate: int) -> MelSpectrogramLoss:
    return MelSpectrogramLoss(sample_rate=sample_rate)


def mel_distance(x: Tensor, y: Tensor, sample_rate: int = 44100) -> Tensor:
    """Distance of mel spectrograms, without unit, lower is better: `MelSpectrogramLoss` as the paper evaluates.

    Args:
        x, y: [B, C, T], more than 1024 samples.
        sample_rate: in Hz.
    """
    return _mel_loss(sample_rate)(x, y)


def stft_distance(x: Tensor, y: Tensor) -> Tensor:
    """Distance of spectrograms with windows of 2048 and 512 samples, without unit, lower is better.

    Args:
        x, y: [B, C, T], more than 1024 samples.
    """
    return MultiScaleSTFTLoss()(x, y)


def si_sdr(reference: Tensor, estimate: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, higher is better; not a number where both are silent.

    Args:
        reference, estimate: [B, C, T].
    """
    return -SISDRLoss()(reference, estimate)


def codebook_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each codebook used each of its entries: int64 [N, codebook_size]. Counts of batches add up.

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
    return -torch.special.xlogy(share, share).sum(1) / math.log(2)


def bitrate_efficiency(codes: Tensor, codebook_size: int) -> float:
    """Sum of the codebooks' entropies over the bits spent on them: 1 if every entry is used alike (paper, section 4.3).

    Args:
        codes: integers [B, N, F].
        codebook_size: entries of every codebook.
    """
    entropy = codebook_entropy(codebook_counts(codes, codebook_size))
    return (entropy.mean() / math.log2(codebook_size)).item()

"""Spectrograms of the multi-resolution discriminator: 72 real and 72 generated signals of 0.38 s.

Bytes: the forward pass reads the audio and writes every band of every window; the backward pass
reads their gradients and writes the audio's.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.case import Case, Prepared, Settings
from bench.checks import ops as checks
from bench.peers import ops as peers
from dac_fast.ops import reference

WINDOWS = (2048, 1024, 512)


def cases(device: str, quick: bool) -> list[Case]:
    """Forward and backward; on the CPU a twelfth of the batch."""
    signals = 2 if quick else 144 if device == "cuda" else 12
    samples = 2000 if quick else round(0.38 * 44100)
    found = []
    for direction in ("forward", "backward"):
        run = partial(prepare, signals, samples, direction)
        shape = f"{signals}x{samples}"
        found.append(Case("stft_bands", direction, device, "float32", shape, run, priority=0))
    return found


def prepare(signals: int, samples: int, direction: str, settings: Settings) -> Prepared:
    """Inputs, peers and check for a number of signals of a number of samples."""
    torch.manual_seed(0)
    x = 0.3 * torch.randn(signals, samples, device=settings.device)
    functions = peers.functions("stft_bands", x, WINDOWS)
    bins = sum(math.ceil(samples / (window // 4)) * (window // 2 + 1) for window in WINDOWS)
    size = 4 * signals * (samples + 2 * bins)

    def bands(x: Tensor) -> list[Tensor]:
        return tree_leaves(reference.stft_bands(x, WINDOWS))

    if direction == "forward":
        check = checks.as_good_as(bands(x), bands(x.double()))
        return Prepared(peers.forward(functions, x, WINDOWS), check, size)

    gradients = [torch.randn_like(band) for band in bands(x)]

    def gradient(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaf = x.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad(bands(leaf), [leaf], [g.to(dtype) for g in gradients])

    check = checks.as_good_as(gradient(x.dtype), gradient(torch.float64))
    x.requires_grad_()
    return Prepared(peers.backward(functions, (x, WINDOWS), [x], gradients), check, size)

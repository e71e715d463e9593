"""Streamed resampling by windowed sinc, with the filter of the published package.

The filter (of the library `julius`) is a low-pass at 0.945 of the lower Nyquist frequency with 24
zero crossings to either side, under a squared-cosine window. Each phase is normalised to pass a
constant, and the signal's first and last samples are held beyond its ends. It is written by hand
because codes are to be those of the published package, and no resampling library has this filter.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

# Audio, [channels, samples], with full scale at 1.
Samples: TypeAlias = NDArray[np.float32]

ZERO_CROSSINGS = 24
ROLLOFF = 0.945
# Rates of recordings lie nearer to each other than this (100 Hz to 44.1 kHz: 441), and their ratio
# in lowest terms has smaller numbers (44.1 kHz to 48.001 kHz: 48001). Others would take memory and
# time for filters that have nothing to do with how much audio there is.
MOST_APART = 512
LARGEST_TERM = 1 << 16
# Outputs that are made at once, of all channels, and inputs that are gathered for one of them.
MOST_OUTPUTS = 1 << 20
MOST_GATHERED = 1 << 22


def filter_bank(old: int, new: int) -> Samples:
    """Filters of every output phase, float32 [new, taps], for rates without a common factor.

    Output n is the filter of phase `n % new`, applied from input `n * old // new - (taps // 2 - 1)`
    on.
    """
    cutoff = min(old, new) * ROLLOFF / old
    width = math.ceil(ZERO_CROSSINGS / cutoff)
    phase = (np.arange(new) * old % new / new)[:, None]
    t = np.clip((np.arange(-width, width + 2) - phase) * cutoff, -ZERO_CROSSINGS, ZERO_CROSSINGS)
    filters = np.sinc(t) * np.cos(np.pi / 2 * t / ZERO_CROSSINGS) ** 2
    return np.asarray(filters / filters.sum(axis=1, keepdims=True), np.float32)


def resampled(blocks: Iterable[Samples], old_rate: int, new_rate: int) -> Iterator[Samples]:
    """A signal at another rate, in constant memory.

    T samples become `T * new_rate // old_rate`, at least one.

    Args:
        blocks: the signal, piece by piece, each [C, n] for any n.
        old_rate, new_rate: in Hz.
    Yields:
        the result, piece by piece, [C, m].
    Raises:
        ValueError: the rates are too far apart, or hardly have a common factor.
    """
    if old_rate == new_rate:
        yield from blocks
        return
    divisor = math.gcd(old_rate, new_rate)
    old, new = old_rate // divisor, new_rate // divisor
    if max(old, new) > min(MOST_APART * min(old, new), LARGEST_TERM):
        raise ValueError(
            f"resampling from {old_rate} Hz to {new_rate} Hz, as {old} to {new}; accepted: up to "
            f"{MOST_APART} times apart, and terms up to {LARGEST_TERM}"
        )
    bank = filter_bank(old, new)
    taps = bank.shape[1]
    width = taps // 2 - 1
    # The inputs held, the index of the first of them, and the inputs and outputs so far.
    held: Samples | None = None
    first = -width
    total = 0
    done = 0
    for block in chain(blocks, [None]):
        if block is not None:
            total += block.shape[1]
            if held is None:
                held = np.pad(block, ((0, 0), (width, 0)), "edge")
            else:
                held = np.concatenate([held, block], axis=1)
            # The outputs whose last tap is here.
            until = max(-(-(total - width - 1) * new // old), 0)
        elif held is not None:
            held = np.pad(held, ((0, 0), (0, width + 1)), "edge")
            until = max(total * new // old, 1)
        else:
            return
        size = max(min(MOST_OUTPUTS // len(held), MOST_GATHERED // taps), 1)
        for begin in range(done, until, size):
            outputs = np.arange(begin, min(begin + size, until))
            starts = outputs * old // new - width - first
            filters = bank[outputs % new]
            yield np.stack([_filtered(channel, starts, filters) for channel in held])
        done = max(done, until)
        keep = done * old // new - width
        held, first = held[:, keep - first :], keep


def _filtered(signal: Samples, starts: NDArray[np.int64], filters: Samples) -> Samples:
    """Every filter [n, taps] applied to a signal [T] at its start: [n]."""
    windows = np.lib.stride_tricks.sliding_window_view(signal, filters.shape[1])
    return np.asarray(np.einsum("nk,nk->n", windows[starts], filters), np.float32)

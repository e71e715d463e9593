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
    """
    if old_rate == new_rate:
        yield from blocks
        return
    divisor = math.gcd(old_rate, new_rate)
    old, new = old_rate // divisor, new_rate // divisor
    filters = filter_bank(old, new)
    width = filters.shape[1] // 2 - 1
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
        outputs = np.arange(done, until)
        if not len(outputs):
            continue
        windows = np.lib.stride_tricks.sliding_window_view(held, filters.shape[1], axis=1)
        starts = outputs * old // new - width - first
        yield np.einsum("cnk,nk->cn", windows[:, starts], filters[outputs % new])
        done = until
        keep = done * old // new - width
        held, first = held[:, keep - first :], keep

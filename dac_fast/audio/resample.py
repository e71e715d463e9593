"""Streamed resampling by windowed sinc, with the published package's filter, so that codes are those it would give.

The filter (of the library `julius`): a low-pass at 0.945 of the lower Nyquist frequency, 24 zero crossings to either
side, under a squared-cosine window; each phase normalised to pass a constant; the signal's ends held.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

ZERO_CROSSINGS = 24
ROLLOFF = 0.945


def filter_bank(old: int, new: int) -> np.ndarray:
    """Filters of every output phase, float32 [new, taps], for rates without a common factor.

    Output n is the filter of phase `n % new` applied from input `n * old // new - (taps // 2 - 1)` on.
    """
    cutoff = min(old, new) * ROLLOFF / old
    width = math.ceil(ZERO_CROSSINGS / cutoff)
    phase = (np.arange(new) * old % new / new)[:, None]
    t = np.clip((np.arange(-width, width + 2) - phase) * cutoff, -ZERO_CROSSINGS, ZERO_CROSSINGS)
    filters = np.sinc(t) * np.cos(np.pi / 2 * t / ZERO_CROSSINGS) ** 2
    return (filters / filters.sum(axis=1, keepdims=True)).astype(np.float32)


def resampled(blocks: Iterable[np.ndarray], old_rate: int, new_rate: int) -> Iterator[np.ndarray]:
    """A signal at another rate, in constant memory: T samples become `T * new_rate // old_rate`, at least one.

    Args:
        blocks: the signal, piece by piece, each float32 [C, n] for any n.
        old_rate, new_rate: in Hz.
    Yields:
        float32 [C, m].
    """
    if old_rate == new_rate:
        yield from blocks
        return
    divisor = math.gcd(old_rate, new_rate)
    old, new = old_rate // divisor, new_rate // divisor
    filters = filter_bank(old, new)
    width = filters.shape[1] // 2 - 1
    held, first, done, total = (
        None,
        -width,
        0,
        0,
    )  # input held, index of its first sample, outputs so far, inputs
    for block in chain(blocks, [None]):
        if block is not None:
            total += block.shape[1]
            held = (
                np.pad(block, ((0, 0), (width, 0)), "edge")
                if held is None
                else np.concatenate([held, block], 1)
            )
            # the outputs whose last tap is here
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

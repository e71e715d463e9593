"""Streams of work: made ahead of time by threads, computed in batches, handed on in order.

A stream holds windows (see `chunks`), and anything else besides, which passes through in its place.
"""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from dac_fast.recordings.windows import Window

# Things that a thread of `read_ahead` may have ready.
_READY = 4


def in_batches(
    stream: Iterable[tuple[int, object]],
    run: Callable[[list[Window]], Callable[[], list[Tensor]]],
    seconds: float,
) -> Iterator[tuple[int, object]]:
    """A stream with a result in place of each window.

    A batch is begun before the results of the one before are handed on, so that a GPU has something to do meanwhile.
    Where a batch raises ValueError, that is the result of its windows.

    Args:
        stream: pairs of a source's number and a window or another thing of that source.
        run: begins to compute a batch, and returns what waits for the result of each window.
        seconds: audio of a batch, padding included; a window of more is a batch by itself.
    """
    things, windows, begun = [], [], iter(())
    for source, thing in stream:
        if isinstance(thing, Window):
            if windows and not _fits(windows, thing, seconds):
                begun, before = _results(things, _begin(run, windows)), begun
                yield from before
                things, windows = [], []
            windows.append(thing)
        things.append((source, thing))
    last = _results(things, _begin(run, windows))
    yield from begun
    yield from last


def _begin(run: Callable, windows: list[Window]) -> Callable[[], list]:
    if not windows:
        return list
    try:
        return run(windows)
    except ValueError as error:
        results = [error] * len(windows)
        return lambda: results


def _results(
    things: list[tuple[int, object]], wait: Callable[[], list[Tensor]]
) -> Iterator[tuple[int, object]]:
    """The things of a batch, with results in place of the windows."""
    results = iter(wait())
    for source, thing in things:
        yield source, next(results) if isinstance(thing, Window) else thing


def _fits(windows: list[Window], window: Window, seconds: float) -> bool:
    """Whether a window can join a batch of at most so many seconds."""
    first = windows[0]
    if window.codec is not first.codec or window.padded != first.padded:
        return False
    # codes of another number of codebooks; without padding, another length
    end = -1 if window.padded else None
    if window.signal.shape[1:end] != first.signal.shape[1:end]:
        return False
    together = [*windows, window]
    return sum(len(w.signal) for w in together) * max(w.seconds for w in together) <= seconds


def read_ahead(
    sources: Sequence[Callable[[], Iterator]], threads: int
) -> Iterator[tuple[int, object]]:
    """Everything that the sources give, source by source, as (its number, thing), made ahead of time by threads.

    Where a source raises ValueError or OSError, the exception is the last thing of it. Each thread has a few things
    ready at most. No threads: things are made when they are asked for.
    """
    if not threads:
        for number, source in enumerate(sources):
            yield from ((number, thing) for thing in _until_error(source))
        return
    # thread k makes the things of sources k, k + threads, …
    queues = [queue.Queue(_READY) for _ in range(threads)]
    end, stopped = object(), threading.Event()

    def give(ready: queue.Queue, thing):
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(thing, timeout=0.1)

    def work(sources, ready: queue.Queue):
        try:
            for source in sources:
                for thing in itertools.chain(_until_error(source), [end]):
                    give(ready, thing)
                    if stopped.is_set():
                        return
        # a bug: to be raised where it is seen
        except Exception as error:
            give(ready, _Failed(error))

    for k, ready in enumerate(queues):
        threading.Thread(target=work, args=(sources[k::threads], ready), daemon=True).start()
    try:
        for number in range(len(sources)):
            while (thing := queues[number % threads].get()) is not end:
                if isinstance(thing, _Failed):
                    raise thing.error
                yield number, thing
    finally:
        stopped.set()


class _Failed(NamedTuple):
    """A thread ended with this."""

    error: Exception


def _until_error(source: Callable[[], Iterator]) -> Iterator:
    """What the source gives, then the exception that it ended with, if it did."""
    try:
        yield from source()
    except (ValueError, OSError) as error:
        yield error

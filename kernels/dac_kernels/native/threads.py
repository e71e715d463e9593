"""How many threads the compiled ops use, and how torch's own keep out of their way.

After each of its parallel regions torch's OpenMP threads spin for milliseconds, on the processors
that the compiled ops' threads need: a stream's step took twice as long. Inside
`torch_on_one_thread` there are no such regions.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch


class _Here(threading.local):
    # Threads for the compiled ops, inside `torch_on_one_thread`; else 0.
    count = 0
    # Whether this thread has been inside before.
    known = False


_here = _Here()
# As many as the last thread had that came in.
_usual = 1


def count() -> int:
    """The number of threads that a compiled op uses: torch's, of this thread."""
    return _here.count or torch.get_num_threads()


@contextlib.contextmanager
def torch_on_one_thread(count: int | None = None) -> Iterator[None]:
    """Inside, in this thread, torch computes on one thread; the compiled ops keep theirs.

    Args:
        count: threads for the compiled ops; None: as many as torch has.
    """
    global _usual
    if _here.count:
        yield
        return
    threads = torch.get_num_threads()
    # A thread that was born while another one was inside has inherited its 1.
    if not _here.known:
        threads = max(threads, _usual)
    _here.known, _usual = True, threads
    _here.count = count or threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _here.count = 0


@contextlib.contextmanager
def torch_on_all_threads() -> Iterator[None]:
    """Inside, torch computes on as many threads as the compiled ops."""
    threads = _here.count
    if not threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)

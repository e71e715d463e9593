"""Many recordings through the codec: read ahead, computed in common batches, handed on in order.

Each recording is a `Job`. Threads take its windows (`read_ahead`), windows of several jobs are
computed together (`in_batches`), and the job makes its result of what comes out (`results`).
"""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from torch import Tensor

from dac_fast.recordings.windows import Window

# Windows that each thread of `read_ahead` may have ready.
READY = 8
# What the content or the place of one recording can cause. Anything else is a bug.
FAULTS = (ValueError, OSError)

ResultOut = TypeVar("ResultOut", covariant=True)


class Job(Protocol[ResultOut]):
    """One recording on its way through the codec."""

    def windows(self) -> Iterator[Window]:
        """Opens the recording and yields its windows, at least one. Called once, by any thread."""

    def result(self, outputs: Iterator[Tensor]) -> ResultOut:
        """What becomes of the recording. Called once, unless its first window already failed.

        Args:
            outputs: of its windows, in order. They raise what went wrong with the recording.
        """


Result = TypeVar("Result")
# A window of a job, or what its reading ended with; and likewise what came of it.
Read: TypeAlias = tuple[Job[Result], Window | Exception]
Computed: TypeAlias = tuple[Job[Result], Tensor | Exception]
# Begins to compute a batch, and returns what waits for the output of each of its windows.
Run: TypeAlias = Callable[[list[Window]], Callable[[], list[Tensor]]]


def results(
    jobs: Sequence[Job[Result]], run: Run, batch_seconds: float, threads: int
) -> Iterator[Result | Exception]:
    """The result of every job, in order, or the ValueError or OSError that the job caused.

    Args:
        jobs: work goes fastest where neighbours are about as long as each other.
        run, batch_seconds: as for `in_batches`.
        threads: as for `read_ahead`.
    """
    return assembled(in_batches(read_ahead(jobs, threads), run, batch_seconds))


def assembled(computed: Iterable[Computed[Result]]) -> Iterator[Result | Exception]:
    """The result of every job, made of the outputs of its windows, as `results` says."""
    for job, group in itertools.groupby(computed, key=lambda pair: pair[0]):
        outcome: Result | Exception
        try:
            outputs = _raising(content for _, content in group)
            outcome = job.result(itertools.chain([next(outputs)], outputs))
        except FAULTS as error:
            outcome = error
        yield outcome


def _raising(outputs: Iterable[Tensor | Exception]) -> Iterator[Tensor]:
    for output in outputs:
        if isinstance(output, Exception):
            raise output
        yield output


def in_batches(
    windows: Iterable[Read[Result]], run: Run, batch_seconds: float
) -> Iterator[Computed[Result]]:
    """The output of each window, in order; exceptions among the windows pass through.

    A batch is begun before the outputs of the one before are handed on, so that a GPU has something
    to do meanwhile. Where beginning raises ValueError, that is the output of the batch's windows.

    Args:
        windows: of any jobs.
        run: begins to compute a batch.
        batch_seconds: audio of a batch, padding included; a longer window is a batch by itself.
    """
    before: Iterator[Computed[Result]] = iter(())
    for batch in _batches(windows, batch_seconds):
        begun = _begin(batch, run)
        yield from before
        before = begun
    yield from before


def _batches(windows: Iterable[Read[Result]], seconds: float) -> Iterator[list[Read[Result]]]:
    """The stream in pieces, whose windows can be computed at once."""
    batch: list[Read[Result]] = []
    inside: list[Window] = []
    for job, content in windows:
        if isinstance(content, Window):
            if inside and not _fits(inside, content, seconds):
                yield batch
                batch, inside = [], []
            inside.append(content)
        batch.append((job, content))
    if batch:
        yield batch


def _fits(inside: list[Window], window: Window, seconds: float) -> bool:
    """Whether a window can join a batch of at most so many seconds."""
    first = inside[0]
    if window.codec is not first.codec or window.padded != first.padded:
        return False
    # The number of codebooks has to be the same and, without padding, the length.
    end = -1 if window.padded else None
    if window.signal.shape[1:end] != first.signal.shape[1:end]:
        return False
    together = [*inside, window]
    return len(together) * max(w.seconds for w in together) <= seconds


def _begin(batch: list[Read[Result]], run: Run) -> Iterator[Computed[Result]]:
    """Begins to compute a batch at once; its outputs are waited for when they are taken."""
    windows = [content for _, content in batch if isinstance(content, Window)]
    if not windows:
        return _finished(batch, list)
    try:
        return _finished(batch, run(windows))
    except ValueError as error:
        failed = [error] * len(windows)
        return _finished(batch, lambda: failed)


def _finished(
    batch: list[Read[Result]], wait: Callable[[], Sequence[Tensor | Exception]]
) -> Iterator[Computed[Result]]:
    outputs = iter(wait())
    for job, content in batch:
        yield job, next(outputs) if isinstance(content, Window) else content


def read_ahead(jobs: Sequence[Job[Result]], threads: int) -> Iterator[Read[Result]]:
    """The windows of all jobs, job by job, made ahead of time by threads.

    Where a job raises ValueError or OSError, the exception comes after its last window. Each thread
    has `READY` windows ready at most.

    Args:
        jobs: thread k takes jobs k, k + threads, ….
        threads: 0: windows are made when they are asked for.
    """
    if not threads:
        for job in jobs:
            for content in _until_fault(job):
                yield job, content
        return
    stopped = threading.Event()
    lanes = [_Lane(jobs[first::threads], stopped) for first in range(threads)]
    # Not daemons: to be killed within PyTorch at the end of the process would abort it.
    for lane in lanes:
        threading.Thread(target=lane.work).start()
    try:
        for number, job in enumerate(jobs):
            for content in lanes[number % threads].next_job():
                yield job, content
    finally:
        stopped.set()


def _until_fault(job: Job[Result]) -> Iterator[Window | Exception]:
    """The windows of a job, then the exception that they ended with, if they did."""
    try:
        yield from job.windows()
    except FAULTS as error:
        yield error


@dataclass(frozen=True)
class _Bug:
    """What a thread ended with that is no fault of a recording."""

    error: Exception


class _Lane:
    """Jobs whose windows one thread makes, for another to take.

    Args:
        jobs: in the order in which they are taken.
        stopped: set when nothing more is going to be taken.
    """

    def __init__(self, jobs: Sequence[Job[Result]], stopped: threading.Event):
        self.jobs, self.stopped = jobs, stopped
        # None: the job's end.
        self.ready: queue.Queue[Window | Exception | _Bug | None] = queue.Queue(READY)

    def work(self) -> None:
        """Makes the windows of all jobs; the thread's whole work."""
        try:
            for job in self.jobs:
                for content in itertools.chain(_until_fault(job), [None]):
                    if not self._give(content):
                        return
        # A bug is raised where the windows are taken, and seen there.
        except Exception as error:
            self._give(_Bug(error))

    def _give(self, content: Window | Exception | _Bug | None) -> bool:
        """Waits for room in the queue; False where nobody is going to take anything any more."""
        while not self.stopped.is_set() and threading.main_thread().is_alive():
            with contextlib.suppress(queue.Full):
                self.ready.put(content, timeout=0.1)
                return True
        return False

    def next_job(self) -> Iterator[Window | Exception]:
        """The windows of the next job, as they come."""
        while (content := self.ready.get()) is not None:
            if isinstance(content, _Bug):
                raise content.error
            yield content

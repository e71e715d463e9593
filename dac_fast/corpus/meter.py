"""Where the time goes: seconds that each phase was busy, and how much audio came of it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

Thing = TypeVar("Thing")

# "waiting" is what encoders do while nothing is read for them.
PHASES = ("reading", "waiting", "encoding", "writing")


@dataclass
class Meter:
    """What a run has done so far. Threads may share one.

    Attributes:
        total: seconds of audio to do.
        capacity: workers that can be in each phase at once; 0: not known.
        busy: seconds that they were, by phase.
        done: seconds of audio in shards that are written.
        records, failures: recordings in them, and others.
        written: called with the meter after every shard.
    """

    total: float = 0.0
    capacity: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 1))
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    done: float = 0.0
    records: int = 0
    failures: int = 0
    written: Callable[["Meter"], None] = lambda meter: None
    _started: float = field(default_factory=time.perf_counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Counts the time from now on."""
        self._started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    @property
    def speed(self) -> float:
        """Seconds of audio that are done in a second."""
        return self.done / max(self.elapsed, 1e-9)

    @property
    def left(self) -> float | None:
        """Seconds until the end, if it goes on like that; None: not known yet."""
        return (self.total - self.done) / self.speed if self.done else None

    def add(self, phase: str, seconds: float) -> None:
        """Says that a phase was busy for so long."""
        with self._lock:
            self.busy[phase] += seconds

    def shard(self, seconds: float, records: int, failures: int) -> None:
        """Says that a shard is written."""
        with self._lock:
            self.done += seconds
            self.records += records
            self.failures += failures
        self.written(self)

    def utilisation(self, phase: str) -> float:
        """The share of a phase's capacity that was in use."""
        return self.busy[phase] / max(self.capacity[phase] * self.elapsed, 1e-9)

    @property
    def bottleneck(self) -> str:
        """The phase that is nearest to its capacity."""
        return max(("reading", "encoding", "writing"), key=self.utilisation)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Counts the block's time as that phase's."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - begun)

    def taking(self, phase: str, things: Iterator[Thing]) -> Iterator[Thing]:
        """The same things; the time that each takes to come counts as that phase's."""
        while True:
            with self.during(phase):
                try:
                    thing = next(things)
                except StopIteration:
                    return
            yield thing

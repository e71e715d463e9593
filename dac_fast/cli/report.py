"""How many files go through a command: progress, failures in a line each, a summary."""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, TextColumn

from dac_fast.cli.terminal import err, fail, progress_bar

SKIPPED = "skipped"
# Between two lines of progress, where there is no terminal.
LINE_SECONDS = 60.0


class Lines:
    """Lines of progress, one a minute, where there is no terminal for a bar."""

    def __init__(self) -> None:
        self._said = time.perf_counter()

    def offer(self, text: str) -> None:
        """Prints the line, if it is time for one."""
        if not err.is_terminal and time.perf_counter() - self._said >= LINE_SECONDS:
            err.print(text)
            self._said = time.perf_counter()


class Report:
    """A bar on a terminal, elsewhere a line a minute; shown in its `with` block.

    Args:
        verb: what is done to the files, in the past tense.
        total: number of files.
    """

    def __init__(self, verb: str, total: int):
        self._verb, self._total = verb, total
        self._ended: Counter[str] = Counter()
        self._seconds = 0.0
        self._start = time.perf_counter()
        self._lines = Lines()
        # In bytes, what there is to do and how much of it has ended.
        self._sizes: dict[Path, int] = {}
        self._done = 0
        state = TextColumn("{task.fields[state]}")
        self._bar = progress_bar(TextColumn("{task.description}"), BarColumn(), state)
        self._task = self._bar.add_task(verb, total=None, state="")

    def __enter__(self) -> "Report":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, sources: Sequence[Path]) -> None:
        """These are what is to be done, after what was skipped or failed beforehand."""
        self._sizes = {path: path.stat().st_size if path.is_file() else 0 for path in sources}

    def advance(self, seconds: float) -> None:
        """So many more seconds of audio are done."""
        self._seconds += seconds
        self._show()

    def end(self, source: Path, outcome: float | str | Exception) -> None:
        """A file ended: with its seconds of audio, with what was done instead, or with a fault."""
        if isinstance(outcome, Exception):
            fail(outcome, source)
            outcome = "failed"
        self._ended[outcome if isinstance(outcome, str) else "done"] += 1
        self._done += self._sizes.get(source, 0)
        self._show()

    @property
    def failed(self) -> bool:
        """Whether a file has failed."""
        return self._ended["failed"] > 0

    def _show(self) -> None:
        state = f"{sum(self._ended.values())} of {self._total}, {self._speed()}"
        size = sum(self._sizes.values())
        if self._done:
            left = (time.perf_counter() - self._start) * (size / self._done - 1)
            state += f", {timedelta(seconds=round(left))} left"
        self._bar.update(self._task, total=size or None, completed=self._done, state=state)
        self._lines.offer(f"{self._verb} {state}")

    def _speed(self) -> str:
        elapsed = time.perf_counter() - self._start
        speed = self._seconds / elapsed
        return f"{self._seconds:.1f} s of audio in {elapsed:.1f} s, {speed:.1f} × real time"

    def summary(self) -> str:
        """What was done and what is left, in a line."""
        left = self._total - sum(self._ended.values())
        counts = [f"{self._verb} {self._ended['done']} of {self._total}"]
        counts += [
            f"{self._ended[what]} {what}" for what in (SKIPPED, "failed") if self._ended[what]
        ]
        counts += [f"{left} left"] if left else []
        return ", ".join(counts) + (f": {self._speed()}" if self._ended["done"] else "")

"""Trials: input made from a seed, given to a reader in a process with limits, counted by outcome.

A kind of input is a function that prepares in a folder and returns the trial: a function of a
random generator that makes one input, reads it, and compares what was accepted with a reference.
The outcome is one of four:

    clean       a `Refusal`: an error of ours, of one printable line
    equal       accepted, and what the reference reader gives
    unclean     any other error, a difference from the reference, a dead process
    limit       more than SECONDS, or more memory than HEADROOM

The numbers of trials are made for CI; FAULT_TRIALS is how many of each kind to run instead, and
FAULT_SEED (0) chooses others. A trial depends on its kind, seed and number alone, so any that fails
can be run again: `FAULT_SEED=s python -m faults.trials faults.test_x:kind NUMBER` in tests/.
"""

import importlib
import multiprocessing
import os
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch

from dac_fast.audio.reading import AudioError
from dac_fast.audio.sources import SourceError
from dac_fast.storage.checkpoint import CheckpointError
from dac_fast.storage.dac2 import DACFileError
from dac_fast.storage.download import DownloadError
from dac_fast.training.recipe import RecipeError

Trial = Callable[[Random], None]
Kind = Callable[[Path], Trial]

OUTCOMES = ("clean", "equal", "unclean", "limit")
SECONDS = 60
HEADROOM = 512 << 20
SHOWN = 5  # failures that a report quotes
Refusal = (DACFileError, CheckpointError, RecipeError, SourceError, AudioError, DownloadError)


@dataclass
class Report:
    """How the trials of a kind ended."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


REPORTS: list[Report] = []


def count(here: int, one_in: int) -> int:
    """How many times to do what takes as long as so many trials; so often without FAULT_TRIALS."""
    wanted = os.environ.get("FAULT_TRIALS")
    return here if wanted is None else max(int(wanted) // one_in, 1)


def run(kind: Kind, folder: Path, trials: int) -> None:
    """Runs trials of a kind; fails where one of them is unclean or passes a limit."""
    trials = int(os.environ.get("FAULT_TRIALS", trials))
    report = Report(kind.__name__)
    REPORTS.append(report)
    for number, outcome, detail in _outcomes(kind, folder, trials):
        report.outcomes[outcome] += 1
        if outcome not in ("clean", "equal") and len(report.failures) < SHOWN:
            report.failures.append(f"{kind.__name__}, trial {number}: {outcome}: {detail}")
    assert not report.failures, "\n".join(report.failures)


def _outcomes(kind: Kind, folder: Path, trials: int) -> Iterator[tuple[int, str, str]]:
    """The number, outcome and error of every trial; a process that ended is followed by another."""
    context = multiprocessing.get_context("spawn")
    done = 0
    while done < trials:
        ours, theirs = context.Pipe()
        arguments = kind, folder, range(done, trials), theirs
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        try:
            # The first answer says that all is prepared, which may take longer than a trial.
            ours.recv()
            while done < trials:
                if not ours.poll(SECONDS):
                    yield done, "limit", f"no end within {SECONDS} s"
                    done += 1
                    break
                yield ours.recv()
                done += 1
        except EOFError:
            process.join()
            yield done, "unclean", f"the process ended with {process.exitcode}"
            done += 1
        finally:
            process.kill()
            process.join()


def _work(kind: Kind, folder: Path, numbers: range, answers: Connection) -> None:
    torch.set_num_threads(1)
    trial = kind(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers.send("ready")
    for number in numbers:
        answers.send((number, *outcome_of(trial, random_of(kind, number))))


def random_of(kind: Kind, number: int) -> Random:
    """The generator of one trial."""
    return Random(f"{kind.__name__} {os.environ.get('FAULT_SEED', '0')} {number}")


def outcome_of(trial: Trial, random: Random) -> tuple[str, str]:
    """The outcome of a trial, and its error."""
    try:
        trial(random)
    except Exception as error:
        text = str(error)
        if any(_is_of_memory(part) for part in _chain(error)):
            return "limit", "".join(traceback.format_exception(error))
        if isinstance(error, Refusal) and text.isprintable() and len(text) < 1000:
            return "clean", text
        return "unclean", "".join(traceback.format_exception(error))
    return "equal", ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def mutated(random: Random, data: bytes, first: int = 0) -> bytes:
    """Bytes with a few changes, more of them near the beginning, none before `first`."""
    result = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        end = random.choice((first + 64, len(result), len(result)))
        at = random.randrange(first, max(min(end, len(result)), first + 1))
        length = random.choice((1, 2, 4, 8, 64))
        match random.randrange(8):
            case 0 | 1:
                result[at : at + 1] = bytes([random.randrange(256)])
            case 2:
                number = random.choice(NUMBERS) % 2 ** (8 * length)
                result[at : at + length] = number.to_bytes(length, random.choice(("little", "big")))
            case 3:
                del result[at : at + length]
            case 4:
                result[at:at] = random.randbytes(length)
            case 5:
                result[at:at] = result[at : at + length]
            case 6:
                source = random.randrange(len(result) + 1)
                result[at : at + length] = result[source : source + length]
            case 7:
                del result[at:]
    return bytes(result)


NUMBERS = (0, 1, -1, 2, 7, 127, 255, 2**15, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
# What stands in a mapping or list where something else should.
ODD = (
    *(None, True, False, 0, 1, -1, 3, 2**20, 10**9, 2**63, 10**30),
    *(0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf")),
    *("", "a", "7", "\x1b[31m\n", "é\ud800", "x" * 2000, b"", b"abc"),
    *([], {}, (), [[]], [1, "a"], [2] * 17, [2] * 5000, {"a": {"b": 1}}),
)


def changed(random: Random, value: object, odd: tuple[object, ...] = ODD) -> object:
    """A tree of dicts and lists with a change somewhere; the original stays as it is."""
    if random.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return random.choice(odd)
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    at = random.randrange(len(items))
    key, inner = items[at]
    match random.randrange(10):
        case 0:
            del items[at]
        case 1:
            items.insert(at, (random.choice(("a", "\n", "dtype", 7, key)), inner))
        case _:
            items[at] = key, changed(random, inner, odd)
    return dict(items) if isinstance(value, dict) else [inner for _, inner in items]


def main(name: str, number: str) -> None:
    """One trial, here and now, as it failed."""
    module, kind = name.split(":")
    folder = Path("fault")
    folder.mkdir(exist_ok=True)
    prepare = getattr(importlib.import_module(module), kind)
    print(*outcome_of(prepare(folder), random_of(prepare, int(number))))


if __name__ == "__main__":
    main(*sys.argv[1:])

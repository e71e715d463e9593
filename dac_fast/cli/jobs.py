"""Many files through one command: which becomes which, progress, and the faults of single files."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import ParamSpec, TypeAlias, TypeVar

import typer

from dac_fast.cli.report import SKIPPED, Report
from dac_fast.cli.stopping import Stop, Stopped
from dac_fast.cli.terminal import out
from dac_fast.files import files_below, make_folder
from dac_fast.recordings.pipeline import FAULTS

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Existing(str, Enum):
    """What to do where an output is there already."""

    error = "error"
    skip = "skip"
    overwrite = "overwrite"


def to_write(existing: Existing, *targets: Path) -> list[Path]:
    """The targets that are to be written: all, or those that are missing where others are skipped.

    Raises:
        FileExistsError: one is there, and that is an error.
    """
    found = [target for target in targets if target.exists()]
    if found and existing is Existing.error:
        raise FileExistsError(f"{found[0]} exists; --existing overwrite replaces it")
    kept = found if existing is Existing.skip else []
    return [target for target in targets if target not in kept]


@dataclass(frozen=True)
class Job:
    """One input and where its output goes.

    Attributes:
        source, target: the input and the output.
        extra: what is written beside the target.
        problem: why the job cannot be done; "" where it can.
    """

    source: Path
    target: Path
    extra: tuple[Path, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Kind:
    """What a command makes of what.

    Attributes:
        sources: suffixes of the files that are taken from folders.
        suffix: of the outputs.
        targets: suffixes that an output named by the user may have.
        extra: suffixes of what is written beside each output.
    """

    sources: tuple[str, ...]
    suffix: str
    targets: tuple[str, ...]
    extra: tuple[str, ...] = ()


def plan(inputs: list[Path], output: Path | None, kind: Kind) -> list[Job]:
    """Which file becomes which.

    Args:
        inputs: files and folders. A subfolder that cannot be read is a job with a problem.
        output: a folder, a file where there is one input file, or None: beside the inputs.
        kind: of the command.
    Raises:
        ValueError: there is nothing to do, or the output is none for these inputs.
    """
    as_file = _is_file(output, inputs, kind)
    jobs: list[Job] = []
    for item in inputs:
        found = [item]
        if item.is_dir():
            unreadable: list[OSError] = []
            found = files_below(item, kind.sources, unreadable.append)
            jobs += [Job(item, item, problem=str(error)) for error in unreadable]
            if not found and not unreadable:
                raise ValueError(f"{item} holds no file that ends in {', '.join(kind.sources)}")
        above = item if item.is_dir() else item.parent
        for source in found:
            target = (output or above) / source.relative_to(above)
            target = output if output and as_file else target.with_suffix(kind.suffix)
            extra = tuple(target.with_suffix(end) for end in kind.extra)
            jobs.append(Job(source, target, extra))
    claims = Counter(job.target for job in jobs)
    return [_checked(job, claims[job.target]) for job in jobs]


def _is_file(output: Path | None, inputs: list[Path], kind: Kind) -> bool:
    """Whether the output is a file; raises where it cannot be what the user means."""
    if output is None or output.is_dir():
        return False
    suffix = output.suffix.lower()
    if suffix in kind.targets:
        if len(inputs) != 1 or inputs[0].is_dir():
            raise ValueError(f"--output {output} is a file; accepted for several inputs: a folder")
        return True
    if suffix in kind.sources:
        accepted = f"a folder, or a file that ends in {', '.join(kind.targets)}"
        raise ValueError(f"--output is {output}; accepted: {accepted}")
    return False


def _checked(job: Job, claims: int) -> Job:
    """The job, with the problem that its output has."""
    problem = job.problem
    if not problem and claims > 1:
        problem = f"{job.source}: {claims} inputs would become {job.target}; convert them apart"
    elif not problem and job.target.resolve() == job.source.resolve():
        problem = f"{job.source} would be replaced by its own output; accepted: another --output"
    return replace(job, problem=problem)


def by_size(jobs: list[Job]) -> list[Job]:
    """Jobs by the size of their files, which stands for their length.

    A batch is as long as its longest item, so neighbours are to be about as long as each other.
    """
    return sorted(jobs, key=lambda job: job.source.stat().st_size if job.source.is_file() else 0)


# Is called with the seconds of audio done since its last call.
Advance: TypeAlias = Callable[[float], None]
# Does jobs and says how each ended: the seconds of audio in it, or the fault that it caused.
Work: TypeAlias = Callable[[list[Job], Advance], Iterator[tuple[Job, float | Exception]]]


def one_by_one(work: Callable[[Job, Advance], float]) -> Work:
    """Work on many jobs, of work on one that gives its seconds."""

    def all_of_them(jobs: list[Job], advance: Advance) -> Iterator[tuple[Job, float | Exception]]:
        for job in jobs:
            yield job, attempt(work, job, advance)

    return all_of_them


def attempt(
    work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result | Exception:
    """What `work` returns, or the exception, if its content, place or model is one file's fault."""
    try:
        return work(*args, **kwargs)
    except FAULTS as error:
        return error


def run(
    jobs: list[Job],
    work: Work,
    verb: str,
    existing: Existing,
    difference: Callable[[Path], str] = lambda target: "",
) -> None:
    """Does every job, shows how it goes, and reports failures in a line each.

    Args:
        jobs: what there is to do.
        work: does it.
        verb: what is done to the files, in the past tense.
        existing: what to do where an output is there already.
        difference: says in what the settings of an output that is there differ from those that it
            would be made with; "": in nothing.
    Raises:
        typer.Exit: with code 1, there were failures; 130 or 143, Ctrl-C or SIGTERM came.
    """
    code = 0
    report = Report(verb, len(jobs))
    # Of the jobs that have not ended, those whose output was not there.
    absent: set[Job] = set()
    try:
        with Stop() as stop, report:
            to_do = []
            for job in jobs:
                ready = attempt(_prepare, job, existing, difference)
                if ready is True:
                    to_do.append(job)
                else:
                    report.end(job.source, ready or SKIPPED)
            report.begin([job.source for job in to_do])
            absent.update(job for job in to_do if not job.target.exists())

            def advance(seconds: float) -> None:
                report.advance(seconds)
                stop.check()

            for job, outcome in work(to_do, advance) if to_do else ():
                # An output that came into being after it was looked for.
                late = isinstance(outcome, FileExistsError) and existing is Existing.skip
                absent.discard(job)
                report.end(job.source, SKIPPED if late else outcome)
                stop.check()
    except Stopped as stopped:
        code = 128 + stopped.number
        for job in absent:
            # The signal came between the last step of a file and its count.
            if job.target.exists():
                report.end(job.source, 0.0)
    out.print(report.summary())
    if code or report.failed:
        raise typer.Exit(code or 1)


def _prepare(job: Job, existing: Existing, difference: Callable[[Path], str]) -> bool:
    """Whether the job is to be done; then its output's folder is there."""
    if job.problem:
        raise ValueError(job.problem)
    if to_write(existing, job.target, *job.extra):
        make_folder(job.target.parent)
        return True
    if job.target.exists() and (other := difference(job.target)):
        raise ValueError(
            f"{job.target} is there with other settings: {other}; accepted: the same, "
            "--existing overwrite, or another --output"
        )
    return False

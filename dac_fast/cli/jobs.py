"""Many files through one command: which becomes which, progress, and the faults of single files."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dac_fast.files import make_folder

out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(soft_wrap=True, highlight=False, markup=False, stderr=True)


class Existing(str, Enum):
    """What to do where an output is there already."""

    error = "error"
    skip = "skip"
    overwrite = "overwrite"


def may_write(existing: Existing, *targets: Path) -> bool:
    """Whether to go on, and write the targets.

    Raises:
        FileExistsError: one is there, and that is an error.
    """
    found = next((target for target in targets if target.exists()), None)
    if found and existing is Existing.error:
        raise FileExistsError(f"{found} exists; --existing overwrite replaces it")
    return not found or existing is Existing.overwrite


def fail(error: Exception, subject=None):
    """One line about what went wrong, naming the file unless the message does."""
    message = " ".join(str(error).split()) or type(error).__name__
    prefix = f"{subject}: " if subject is not None and str(subject) not in message else ""
    err.print(f"error: {prefix}{message}")


@dataclass(frozen=True)
class Job:
    """One input and where its output goes."""

    source: Path
    target: Path
    # written beside the target
    extra: tuple[Path, ...] = ()
    # why it cannot be done
    problem: str | None = None


def plan(
    inputs: list[Path],
    output: Path | None,
    sources: tuple,
    suffix: str,
    targets: tuple,
    extra: tuple = (),
) -> list[Job]:
    """Which file becomes which.

    Args:
        inputs: files and folders; of folders, the files whose suffix is in `sources`.
        output: a folder, a file (by its suffix, in `targets`) where there is one input file, or None.
        suffix: of the outputs.
        extra: suffixes of what is written beside each output.
    Raises:
        ValueError: there is nothing to do, or the output is none for these inputs.
    """
    as_file = output is not None and output.suffix.lower() in targets and not output.is_dir()
    if as_file and (len(inputs) != 1 or inputs[0].is_dir()):
        raise ValueError(f"--output {output} is a file; accepted for several inputs: a folder")
    if (
        output is not None
        and not as_file
        and output.suffix.lower() in (*sources, *targets)
        and not output.is_dir()
    ):
        raise ValueError(
            f"--output is {output}; accepted: a folder, or a file that ends in {', '.join(targets)}"
        )
    found_jobs = []
    for item in inputs:
        found = (
            sorted(p for p in item.rglob("*") if p.suffix.lower() in sources)
            if item.is_dir()
            else [item]
        )
        if not found:
            raise ValueError(f"{item} holds no file that ends in {', '.join(sources)}")
        for source in found:
            relative = source.relative_to(item) if item.is_dir() else Path(source.name)
            folder = output if output is not None else (item if item.is_dir() else item.parent)
            found_jobs.append(
                (source, output if as_file else (folder / relative).with_suffix(suffix))
            )
    claims = Counter(target for _, target in found_jobs)
    jobs = []
    for source, target in found_jobs:
        problem = None
        if claims[target] > 1:
            problem = f"{source}: {claims[target]} inputs would become {target}; convert them apart"
        elif target.resolve() == source.resolve():
            problem = f"{source} would be replaced by its own output; accepted: another --output"
        jobs.append(Job(source, target, tuple(target.with_suffix(end) for end in extra), problem))
    return jobs


def by_size(jobs: list[Job]) -> list[Job]:
    """Jobs by the size of their files, which stands for their length: a batch is as long as its longest item."""
    return sorted(jobs, key=lambda job: job.source.stat().st_size if job.source.is_file() else 0)


# Does jobs and says how each ended: the seconds of audio in it, or the ValueError or OSError that it caused. Meanwhile
# it calls the function that it is given with the seconds done since the last call.
Work = Callable[[list[Job], Callable[[float], None]], Iterator[tuple[Job, float | Exception]]]


def one_by_one(work: Callable[[Job, Callable[[float], None]], float]) -> Work:
    """Work on many jobs of work on one, which gives its seconds."""

    def all_of_them(jobs, advance):
        for job in jobs:
            yield job, attempt(work, job, advance)

    return all_of_them


def attempt(work: Callable, *args):
    """What `work(*args)` returns, or the exception, if it is the fault of one file: its content, place, or model."""
    try:
        return work(*args)
    # anything else is a bug and stops the run
    except (ValueError, OSError) as error:
        return error


def run(jobs: list[Job], work: Work, verb: str, existing: Existing):
    """Do every job, under a progress bar; report failures in a line each, then exit with 1 if there were any."""
    ended = Counter()
    seconds, start = 0.0, time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[audio]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(verb, total=len(jobs), audio="")

        def advance(more: float):
            nonlocal seconds
            seconds += more
            progress.update(task, audio=f"{seconds:.0f} s of audio")

        def end(job: Job, outcome: str | Exception):
            if isinstance(outcome, Exception):
                fail(outcome, job.source)
                outcome = "failed"
            ended[outcome] += 1
            progress.advance(task)

        to_do = []
        for job in jobs:
            ready = attempt(_prepare, job, existing)
            if ready is True:
                to_do.append(job)
            else:
                end(job, ready or "skipped")
        for job, outcome in work(to_do, advance) if to_do else ():
            end(job, outcome if isinstance(outcome, Exception) else "done")
    elapsed = time.perf_counter() - start
    counts = [f"{verb} {ended['done']} of {len(jobs)}"]
    counts += [f"{ended[what]} {what}" for what in ("skipped", "failed") if ended[what]]
    speed = f": {seconds:.1f} s of audio in {elapsed:.1f} s, {seconds / elapsed:.1f} × real time"
    out.print(", ".join(counts) + (speed if ended["done"] else ""))
    if ended["failed"]:
        raise typer.Exit(1)


def _prepare(job: Job, existing: Existing) -> bool:
    """Whether the job is to be done; then its output's folder is there."""
    if job.problem:
        raise ValueError(job.problem)
    if not may_write(existing, job.target, *job.extra):
        return False
    make_folder(job.target.parent)
    return True

"""The frame of `python -m bench gpu`: its settings, its document, its clock, and its processes."""

import datetime
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.document import ROOT, SCHEMA, Json, environment, write
from bench.options import Step

# A program and its arguments.
Command = Sequence[str | Path]

# Seconds that a step, or each tool of the sanitizers, may take at most. The cases get all that is
# left of the budget once the steps after them have theirs.
LIMITS = {
    Step.build: 120,
    Step.kernels: 120,
    Step.tests: 150,
    Step.sanitizers: 150,
    Step.precisions: 40,
    Step.train: 80,
}
# Seconds below which a step is not worth starting.
LEAST = {Step.precisions: 20, Step.train: 40}
LEAST_OTHERWISE = 30
# Seconds kept back for the report.
RESERVE = 15


@dataclass(frozen=True)
class GpuSettings:
    """What to do.

    Attributes:
        folder: for the results.
        budget: seconds for everything.
        device: "cuda"; "cpu" for a rehearsal, at tiny sizes.
        commit: recorded where the tree is no git checkout.
        patterns: of case names; empty: all.
        skip: names of steps to leave out.
        resume: a document to go on with; None: a new one.
        published_python: see `bench.case.Settings`.
        recording: for the precisions; None: the bundled clip.
    """

    folder: Path
    budget: float
    device: str = "cuda"
    commit: str | None = None
    patterns: Sequence[str] = ()
    skip: Sequence[str] = ()
    resume: Path | None = None
    published_python: str | None = None
    recording: Path | None = None

    @property
    def rehearsal(self) -> bool:
        """Whether nothing is measured."""
        return self.device != "cuda"

    def options(self) -> list[str]:
        """Those that every command of `bench` gets."""
        quick = ["--quick"] if self.rehearsal else []
        commit = ["--commit", self.commit] if self.commit else []
        return ["--device", self.device, *quick, *commit]


@dataclass(frozen=True)
class Job:
    """A process of a step.

    Attributes:
        name: in the document.
        command: the program and its arguments.
        variables: added to its environment.
    """

    name: str
    command: Command
    variables: Mapping[str, str]


class Session:
    """The document, the log and the clock of one call."""

    def __init__(self, settings: GpuSettings):
        self.settings = settings
        self.deadline = time.monotonic() + settings.budget - RESERVE
        self.lock = threading.Lock()
        folder = settings.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if settings.resume:
            self.path = folder / settings.resume.name
            if settings.resume.resolve() != self.path:
                shutil.copy(settings.resume, self.path)
        else:
            now = datetime.datetime.now(datetime.timezone.utc)
            kind = "rehearsal" if settings.rehearsal else "gpu"
            self.path = folder / f"{kind}-{now:%Y%m%d-%H%M%S}.json"
            machine = environment(settings.device, settings.commit, quick=settings.rehearsal)
            write({"schema": SCHEMA, "environment": machine}, self.path)
        self.log = self.path.with_suffix(".log")
        self.work = self.path.with_suffix("")
        self.steps: list[Json] = self.document().get("steps", [])

    def document(self) -> Json:
        """The document as it is now: the steps' processes write it too."""
        document: Json = json.loads(self.path.read_text())
        return document

    def under_way(self, name: str) -> Path:
        """Where a step puts its result, and beside it its output, until it ends."""
        return self.work / f"{name}.json"

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def kept_for_later(self) -> float:
        """Seconds that the steps after the cases need."""
        later = (Step.precisions, Step.train)
        return sum(LIMITS[step] for step in later if step not in self.settings.skip)

    def wants(self, step: Step) -> bool:
        """Whether the step is to be run, and there is time for it."""
        least: float = LEAST.get(step, LEAST_OTHERWISE)
        if step is Step.cases:
            least += self.kept_for_later()
        return step not in self.settings.skip and self.left() > least

    def together(self, steps: Mapping[Step, Callable[["Session"], Iterator[Job]]]) -> None:
        """Runs all jobs of these steps at once."""
        jobs = [
            (job, LIMITS[step])
            for step, start in steps.items()
            if self.wants(step)
            for job in start(self)
        ]
        with ThreadPoolExecutor(max_workers=max(len(jobs), 1)) as threads:
            running = [
                threads.submit(self.run, job.name, job.command, limit, **job.variables)
                for job, limit in jobs
            ]
            for each in running:
                each.result()

    def run(self, name: str, command: Command, limit: float, **variables: str) -> int | None:
        """Runs and records a job; returns its exit status, None where it was out of time."""
        output = self.under_way(name).with_suffix(".log")
        output.parent.mkdir(exist_ok=True)
        result = run_step(name, command, min(limit, self.left()), output, **variables)
        with self.lock:
            with self.log.open("ab") as log:
                log.write(output.read_bytes())
            output.unlink()
            self.record(result)
        status: int | None = result["returncode"]
        return status

    def record(self, result: Json) -> None:
        """Adds a step to the document, with the result file that it left, if any."""
        self.steps.append(result)
        document = self.document() | {"steps": self.steps}
        if result["returncode"] is None:
            # The case that was under way did nothing wrong: it is still to be run.
            document.pop("running", None)
        found = self.under_way(result["name"])
        if found.exists():
            document[result["name"]] = json.loads(found.read_text())
            if result["returncode"] == 0:
                # Its last words name files that do not stay.
                result["result"] = "done"
        write(document, self.path)


def run_step(name: str, command: Command, limit: float, log: Path, **variables: str) -> Json:
    """Runs a command from the repository's root; returns the record of it.

    Args:
        name: for the record.
        command: the program and its arguments.
        limit: seconds until it is killed, with all that it started.
        log: the file that its output is appended to.
        variables: added to its environment.
    """
    words = [str(word) for word in command]
    packages = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    start = time.monotonic()
    print(f"{name}: at most {limit:.0f} s", flush=True)
    with log.open("a") as output:
        output.write(f"\n===== {name}: {' '.join(words)}\n")
        output.flush()
        beginning = output.tell()
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": packages} | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        returncode: int | None = None
        try:
            returncode = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            # The whole group: what the command itself started must not go on using the GPU.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log.open() as output:
        output.seek(beginning)
        last = ([line.strip() for line in output if line.strip()] or ["no output"])[-1]
    outcome = {None: "out of time", 0: "done"}.get(returncode, f"failed with status {returncode}")
    return {
        "name": name,
        "command": " ".join(words),
        "returncode": returncode,
        "seconds": time.monotonic() - start,
        "result": f"{outcome}: {last[:300]}",
    }

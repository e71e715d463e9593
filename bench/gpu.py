"""`python -m bench gpu`: everything that wants a GPU, in one command and within one time budget.

The steps, each in a process of its own so that none takes down the next: build the extension with
its CUDA half, run the tests marked `gpu`, run some of them under compute-sanitizer, run every CUDA
case (the whole codec first, then single layers and ops), the table of precisions, and the training
step. The output folder gets one JSON document (see run.py), its report, the results of the last two
steps, and the log of all.

One call of 500 s builds, tests, and times what matters most. Where a call may take ten minutes at
most, three of them do all of it:

    python -m bench gpu --budget 570 --skip precisions --skip train
    python -m bench gpu --budget 570 --skip tests --skip sanitizers --skip train --resume FIRST.json
    python -m bench gpu --budget 570 --skip tests --skip sanitizers --skip cases \\
        --skip precisions --resume FIRST.json

FIRST.json is the document that the first call wrote (copied to --out-dir if it lies elsewhere);
cases that it has are not run again. The build is repeated where the machine is a fresh one, and
takes a moment where it is not.
"""

import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.document import ROOT, SCHEMA, Json, write
from bench.options import Step
from bench.report import write_report

# A program and its arguments.
Command = Sequence[str | Path]

# Seconds that a step, or each tool of the sanitizers, may take at most. The cases get all that is
# left of the budget once the steps after them have theirs.
LIMITS = {
    "build": 150,
    "tests": 120,
    "memcheck": 45,
    "racecheck": 45,
    "synccheck": 45,
    "precisions": 40,
    "train": 100,
}
# Seconds below which a step is not worth starting.
LEAST = {"precisions": 20, "train": 40}
LEAST_OTHERWISE = 30
# Seconds kept back for the report.
RESERVE = 15
# Seconds after which a case starts no more peers: those of the whole codec compile for minutes.
PEER_SECONDS = "200"
# The tests of our own CUDA code: compute-sanitizer slows kernels down a hundredfold.
SANITIZED = "stft_bands or disc_preprocess"

BENCH = (sys.executable, "-m", "bench")
PYTEST = (
    *(sys.executable, "-m", "pytest", "-m", "gpu", "-q"),
    *("--continue-on-collection-errors", "-p", "no:cacheprovider"),
)


@dataclass(frozen=True)
class GpuSettings:
    """What to do.

    Attributes:
        folder: for the results.
        budget: seconds for everything.
        commit: recorded where the tree is no git checkout.
        patterns: of case names; empty: all.
        skip: names of steps to leave out.
        resume: a document to go on with; None: a new one.
        published_python: see `bench.case.Settings`.
        recording: for the precisions; None: the bundled clip.
    """

    folder: Path
    budget: float
    commit: str | None = None
    patterns: Sequence[str] = ()
    skip: Sequence[str] = ()
    resume: Path | None = None
    published_python: str | None = None
    recording: Path | None = None


def run_everything(settings: GpuSettings) -> Path:
    """Runs all steps, the next one too where one fails; returns the document's path."""
    session = Session(settings)
    steps: dict[Step, Callable[[Session], None]] = {
        Step.build: build,
        Step.tests: tests,
        Step.sanitizers: sanitizers,
        Step.cases: cases,
        Step.precisions: precisions,
        Step.train: train,
    }
    for name, step in steps.items():
        if session.wants(name):
            step(session)
    document = session.document()
    if "environment" in document:
        write_report(session.path)
    for result in session.steps:
        print(f"{result['name']}: {result['result']} ({result['seconds']:.0f} s)")
    rows = document.get("rows", [])
    failed = sum(row["status"] == "failed" for row in rows)
    print(f"{len(rows)} rows, {failed} failed, {len(document.get('not_run', []))} cases not run")
    print(f"results: {os.path.relpath(session.path)}")
    return session.path


class Session:
    """The document, the log and the clock of one call."""

    def __init__(self, settings: GpuSettings):
        self.settings = settings
        self.deadline = time.monotonic() + settings.budget - RESERVE
        folder = settings.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if settings.resume:
            self.path = folder / settings.resume.name
            if settings.resume.resolve() != self.path:
                shutil.copy(settings.resume, self.path)
        else:
            now = datetime.datetime.now(datetime.timezone.utc)
            self.path = folder / f"gpu-{now:%Y%m%d-%H%M%S}.json"
        self.log = self.path.with_suffix(".log")
        self.steps: list[Json] = self.document().get("steps", [])

    def document(self) -> Json:
        """The document as it is now: the steps' processes write it too."""
        return json.loads(self.path.read_text()) if self.path.exists() else {"schema": SCHEMA}

    def beside(self, name: str) -> Path:
        """The path of another result of this call."""
        return self.path.with_name(f"{self.path.stem}_{name}.json")

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

    def run(self, name: str, command: Command, limit: float, **variables: str) -> int | None:
        """Runs and records a step; returns its exit status, None where it was out of time."""
        result = run_step(name, command, min(limit, self.left()), self.log, **variables)
        self.steps.append(result)
        document = self.document() | {"steps": self.steps}
        if result["returncode"] is None:
            # The case that was under way did nothing wrong: it is still to be run.
            document.pop("running", None)
        write(document, self.path)
        status: int | None = result["returncode"]
        return status


def build(session: Session) -> None:
    """Builds the extension for this GPU alone, several times quicker than for all."""
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    session.run(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        LIMITS["build"],
        DAC_KERNELS_BUILD="cuda",
        DAC_KERNELS_CUDA_ARCH=architecture,
    )


def tests(session: Session) -> None:
    """Runs the tests marked `gpu`, side by side: most of their time goes into compiling kernels."""
    processes = str(min(8, os.cpu_count() or 1))
    parallel = ["-n", processes] if importlib.util.find_spec("xdist") else []
    session.run("tests", [*PYTEST, *parallel], LIMITS["tests"])


def sanitizers(session: Session) -> None:
    """Runs the tests of our own CUDA code under compute-sanitizer, where it is installed."""
    if not shutil.which("compute-sanitizer"):
        return
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST]
        command += ["-x", "-k", SANITIZED]
        # PyTorch's caching allocator hides accesses past the end of a tensor.
        session.run(tool, command, LIMITS[tool], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def cases(session: Session) -> None:
    """Runs the CUDA cases, again after each that killed its process, which the next one records."""
    settings = session.settings
    while session.wants(Step.cases):
        limit = session.left() - session.kept_for_later()
        before = progress(session.document())
        command: list[str | Path] = [*BENCH, "run", "--device", "cuda", "--seconds", "0.2"]
        command += ["--budget", f"{limit - 20:.0f}", "--peer-seconds", PEER_SECONDS]
        command += ["--resume", "--out", session.path, *commit(settings)]
        if settings.published_python:
            command += ["--published-python", settings.published_python]
        for pattern in settings.patterns:
            command += ["--case", pattern]
        status = session.run("cases", command, limit)
        if status in (0, None) or progress(session.document()) == before:
            break


def progress(document: Json) -> tuple[int, str | None]:
    """Changes whenever a run of cases got any further."""
    return len(document.get("rows", [])), document.get("running")


def precisions(session: Session) -> None:
    """Makes the table of precisions."""
    command: list[str | Path] = [*BENCH, "parity", "--device", "cuda"]
    command += ["--out", session.beside("precisions"), *commit(session.settings)]
    if session.settings.recording:
        command += ["--recording", session.settings.recording]
    session.run("precisions", command, LIMITS["precisions"])


def train(session: Session) -> None:
    """Times the training step, in all the time that is left."""
    limit = session.left()
    command: list[str | Path] = [*BENCH, "train", "--device", "cuda"]
    command += ["--budget", f"{limit - 30:.0f}", "--out", session.beside("train")]
    session.run("train", [*command, *commit(session.settings)], limit)


def commit(settings: GpuSettings) -> list[str]:
    """The option that tells a step the commit."""
    return ["--commit", settings.commit] if settings.commit else []


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

"""`python -m bench gpu`: everything that wants a GPU, in one command and within one time budget.

The steps, each in a process of its own so that none takes down the next: build the extension with its CUDA half, run
the tests marked `gpu`, run some of them under compute-sanitizer, run every CUDA case (the whole codec first, then
single layers and ops), the table of precisions, the training step, and write the report. The output folder gets one
JSON document (see run.py), its report, the tables of the last two steps, and the log of every step.

One call of 500 s builds, tests, and times what matters most. Where a call may take ten minutes at most, three of them
do all of it:

    python -m bench gpu --budget 570 --skip precisions --skip train
    python -m bench gpu --budget 570 --skip tests --skip sanitizers --skip train --resume FIRST.json
    python -m bench gpu --budget 570 --skip tests --skip sanitizers --skip cases --skip precisions --resume FIRST.json

FIRST.json is the document that the first call wrote (copied to --out-dir if it lies elsewhere); cases it has are not
run again. The build is repeated where the machine is a fresh one and takes a moment where it is not.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.document import ROOT, SCHEMA, write
from bench.report import write_report

STEPS = ("build", "tests", "sanitizers", "cases", "precisions", "train")
# Seconds that each step may take at most; the cases get what is left of the budget when the later ones have theirs.
LIMITS = {
    "build": 150,
    "tests": 120,
    "memcheck": 45,
    "racecheck": 45,
    "precisions": 40,
    "train": 100,
}
# A case starts no more providers after that long: those of the whole codec compile for minutes the first time.
PROVIDER_SECONDS = 200
# Kept back for the report.
RESERVE = 15
# What runs under compute-sanitizer, which slows kernels down a hundredfold: the tests of our own CUDA code.
SANITIZED = "stft_bands or disc_preprocess"


@dataclass(frozen=True)
class GpuSettings:
    """What to do.

    Attributes:
        folder: for the results.
        budget: seconds for everything.
        commit: to be recorded where this is no git checkout.
        patterns: of case names; empty: all.
        skip: of `STEPS`, what to leave out.
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


class _Session:
    """The document, the log and the clock of one call."""

    def __init__(self, settings: GpuSettings):
        self.deadline = time.monotonic() + settings.budget - RESERVE
        folder = settings.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if settings.resume:
            self.path = folder / settings.resume.name
            if settings.resume.resolve() != self.path:
                shutil.copy(settings.resume, self.path)
        else:
            self.path = (
                folder / f"gpu-{datetime.datetime.now(datetime.timezone.utc):%Y%m%d-%H%M%S}.json"
            )
        self.log = self.path.with_suffix(".log")
        self.steps = self.document().get("steps", [])

    def document(self) -> dict:
        return json.loads(self.path.read_text()) if self.path.exists() else {"schema": SCHEMA}

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def step(self, name: str, command: list, limit: float, **variables: str) -> int | None:
        """Run and record it; returns its status, None where it was out of time."""
        result = run_step(name, command, min(limit, self.left()), self.log, **variables)
        self.steps.append(result)
        document = self.document() | {"steps": self.steps}
        if result["returncode"] is None:
            # The case that was under way did nothing wrong: it is still to be run.
            document.pop("running", None)
        write(document, self.path)
        return result["returncode"]


def run_everything(settings: GpuSettings) -> Path:
    """Run all steps; whatever fails is recorded and the next one runs. Returns the document's path."""
    session, python = _Session(settings), sys.executable
    bench, commit = (
        [python, "-m", "bench"],
        ["--commit", settings.commit] if settings.commit else [],
    )
    later = sum(LIMITS[name] for name in ("precisions", "train") if name not in settings.skip)

    def wanted(name, seconds):
        return name not in settings.skip and session.left() > seconds

    if wanted("build", 30):
        # For this GPU alone, which is several times quicker than for all that are supported.
        architecture = "".join(map(str, torch.cuda.get_device_capability()))
        variables = {"DAC_KERNELS_BUILD": "cuda", "DAC_KERNELS_CUDA_ARCH": architecture}
        session.step(
            "build", [python, "setup.py", "build_ext", "--inplace"], LIMITS["build"], **variables
        )
    pytest = [
        python,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
    ]
    if wanted("tests", 30):
        # Most of the time goes into compiling kernels, which processes can do side by side.
        parallel = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
        session.step("tests", [*pytest, *parallel], LIMITS["tests"])
    if wanted("sanitizers", 30) and shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = [
                "compute-sanitizer",
                "--tool",
                tool,
                "--error-exitcode",
                "9",
                *pytest,
                "-x",
                "-k",
                SANITIZED,
            ]
            # PyTorch's caching allocator hides accesses past the end of a tensor.
            session.step(tool, command, LIMITS[tool], PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    # A case that kills its process is recorded as failed by the next one, which goes on behind it.
    while wanted("cases", later + 30):
        limit, before = session.left() - later, _progress(session.document())
        command = [
            *bench,
            "run",
            "--device",
            "cuda",
            "--seconds",
            "0.2",
            "--budget",
            f"{limit - 20:.0f}",
        ]
        command += [
            "--provider-seconds",
            PROVIDER_SECONDS,
            "--resume",
            "--out",
            session.path,
            *commit,
        ]
        command += (
            ["--published-python", settings.published_python] if settings.published_python else []
        )
        command += [word for pattern in settings.patterns for word in ("--case", pattern)]
        if (
            session.step("cases", command, limit) in (0, None)
            or _progress(session.document()) == before
        ):
            break

    def beside(name):
        return session.path.with_name(f"{session.path.stem}_{name}.json")

    if wanted("precisions", 20):
        recording = ["--recording", settings.recording] if settings.recording else []
        command = [
            *bench,
            "parity",
            "--device",
            "cuda",
            "--out",
            beside("precisions"),
            *recording,
            *commit,
        ]
        session.step("precisions", command, LIMITS["precisions"])
    if wanted("train", 40):
        limit = session.left()
        command = [
            *bench,
            "train",
            "--device",
            "cuda",
            "--budget",
            f"{limit - 30:.0f}",
            "--out",
            beside("train"),
        ]
        session.step("train", [*command, *commit], limit)

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


def _progress(document: dict) -> tuple:
    """Changes whenever a run got any further."""
    return len(document.get("rows", [])), document.get("running")


def run_step(name: str, command: list, limit: float, log: Path, **variables: str) -> dict:
    """Run one step from the repository's root, its output appended to the log; returns its record.

    Args:
        name: for the record.
        command: the program and its arguments.
        limit: seconds until it is killed, with all that it started.
        log: the file.
        variables: added to its environment.
    """
    packages = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    start = time.monotonic()
    print(f"{name}: at most {limit:.0f} s", flush=True)
    with log.open("a") as output:
        output.write(f"\n===== {name}: {' '.join(map(str, command))}\n")
        output.flush()
        beginning = output.tell()
        process = subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=os.environ | {"PYTHONPATH": packages} | variables,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            returncode = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            # The whole group: what the command itself started must not go on using the GPU.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            returncode = None
    with log.open() as output:
        output.seek(beginning)
        last = ([line.strip() for line in output if line.strip()] or ["no output"])[-1]
    outcome = (
        "out of time"
        if returncode is None
        else "done"
        if returncode == 0
        else f"failed with status {returncode}"
    )
    return {
        "name": name,
        "command": " ".join(map(str, command)),
        "returncode": returncode,
        "seconds": time.monotonic() - start,
        "result": f"{outcome}: {last[:300]}",
    }

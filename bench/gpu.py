"""`python -m bench gpu`: everything that wants a GPU, in one command and within one time budget.

The steps, each in a process of its own so that none takes down the next: build the extension with its CUDA half, run
the tests marked `gpu`, run some of them under compute-sanitizer, run every CUDA case, write the report. The output
folder gets one JSON document (see harness.py), its report, and the log of every step.
"""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.environment import ROOT
from bench.harness import SCHEMA, write
from bench.report import write_report

# Seconds that each step may take at most; the cases get what is left.
LIMITS = {"build": 150, "tests": 150, "memcheck": 60, "racecheck": 60}
# Kept back for the report.
RESERVE = 15
# What runs under compute-sanitizer, which slows kernels down a hundredfold: the tests of our own CUDA code.
SANITIZED = "stft_bands or disc_preprocess"


def run_everything(
    folder: Path, budget: float, commit: str | None, patterns: Sequence[str] | None, skip: Sequence[str]
):
    """Run all steps; whatever fails is recorded and the next one runs.

    Args:
        folder: for the results.
        budget: seconds for everything.
        commit: to be recorded where this is no git checkout.
        patterns: of case names; None: all.
        skip: of "build", "tests" and "sanitizers", what to leave out.
    """
    deadline = time.monotonic() + budget
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"gpu-{datetime.datetime.now(datetime.timezone.utc):%Y%m%d-%H%M%S}"
    path, log = stem.with_suffix(".json"), stem.with_suffix(".log")
    steps = []

    def step(name, command, limit, **variables):
        result = run_step(name, command, min(limit, deadline - RESERVE - time.monotonic()), log, **variables)
        steps.append(result)
        document = json.loads(path.read_text()) if path.exists() else {"schema": SCHEMA}
        write(document | {"steps": steps}, path)
        return result

    python = sys.executable
    if "build" not in skip:
        build = [python, "setup.py", "build_ext", "--inplace"]
        # For this GPU alone, which is several times quicker than for all that are supported.
        architecture = "".join(map(str, torch.cuda.get_device_capability()))
        step("build", build, LIMITS["build"], DAC_KERNELS_BUILD="cuda", DAC_KERNELS_CUDA_ARCH=architecture)
    pytest = [python, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if "tests" not in skip:
        step("tests", pytest, LIMITS["tests"])
    if "sanitizers" not in skip and shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *pytest, "-x", "-k", SANITIZED]
            # PyTorch's caching allocator hides accesses past the end of a tensor.
            step(tool, command, LIMITS[tool], PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    # A case that kills its process is recorded as failed by the next one, which goes on behind it.
    while True:
        left = deadline - RESERVE - time.monotonic()
        before = _progress(path)
        command = [python, "-m", "bench", "run", "--device", "cuda", "--seconds", "0.2", "--budget", str(left - 20)]
        command += ["--resume", "--out", str(path), *(["--commit", commit] if commit else [])]
        command += [word for pattern in patterns or () for word in ("--case", pattern)]
        if left < 30 or step("cases", command, left)["returncode"] == 0 or _progress(path) == before:
            break
    document = json.loads(path.read_text())
    if "environment" in document:
        write_report(path)
    for result in steps:
        print(f"{result['name']}: {result['result']} ({result['seconds']:.0f} s)")
    failed = [row for row in document.get("rows", []) if row["status"] == "failed"]
    print(
        f"{len(document.get('rows', []))} rows, {len(failed)} failed, {len(document.get('not_run', []))} cases not run"
    )
    print(f"results: {os.path.relpath(path)}")


def _progress(path: Path) -> tuple:
    """Changes whenever a run got any further."""
    document = json.loads(path.read_text()) if path.exists() else {}
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
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": packages} | variables,
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
    outcome = "out of time" if returncode is None else "done" if returncode == 0 else f"failed with status {returncode}"
    return {
        "name": name,
        "command": " ".join(map(str, command)),
        "returncode": returncode,
        "seconds": time.monotonic() - start,
        "result": f"{outcome}: {last[:300]}",
    }

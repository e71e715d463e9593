"""`python -m bench gpu`: everything that wants a GPU, in one command and within one time budget.

The steps, each in processes of its own so that none takes down the next: build the extension with
its CUDA half, and compile the Triton kernels of the cases beside it; run the tests marked `gpu`,
and beside them some under compute-sanitizer; run the CUDA cases, those of the README first; make
the table of precisions; time the training step. The output folder gets one JSON document with all
results (see run.py; `precisions` and `train` are those of the last two steps), its page and
pictures, and the log of every step. The document is written again after every case, so a call that
is cut off loses nothing.

One call of nine minutes does all of it, as far as it gets with the cases; another one goes on with
those that are left:

    python -m bench gpu
    python -m bench gpu --skip tests --skip sanitizers --skip precisions --skip train \\
        --resume bench/out/gpu-DATE-TIME.json

The machine needs torch, Triton, nvcc, and the modules of `NEEDS`; neither soundfile nor a network.
`--rehearse` goes through the same steps on a CPU, at sizes that measure nothing.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.document import ROOT, Json
from bench.options import Step
from bench.report import headlines, write_report
from bench.session import LIMITS, GpuSettings, Job, Session

# Seconds after which a case starts no more peers: those of the whole codec compile for minutes.
PEER_SECONDS = "60"
# What steps import beyond torch, Triton and numpy. Neither the cases nor the sanitizers need more.
NEEDS = {
    Step.build: ("setuptools", "pybind11"),
    Step.tests: ("pytest", "hypothesis", "yaml", "pydantic", "rich", "safetensors"),
    Step.precisions: ("safetensors",),
    Step.train: ("yaml", "pydantic", "rich"),
}
# By tool, which tests of our own CUDA code it sees: compute-sanitizer slows kernels down a
# hundredfold. Most of these tests fill new memory with NaN, where no read is one of memory that
# nobody wrote, so initcheck gets the others.
OURS = "(stft_bands or disc_preprocess)"
SANITIZED = {
    "memcheck": OURS,
    "racecheck": OURS,
    "synccheck": OURS,
    "initcheck": f"{OURS} and (golden or odd_addresses or training_size)",
}

BENCH = (sys.executable, "-m", "bench")
PYTEST = (
    *(sys.executable, "-m", "pytest", "-m", "gpu", "-q"),
    *("--continue-on-collection-errors", "-p", "no:cacheprovider"),
)


def missing(skip: Sequence[str]) -> list[str]:
    """The steps that are wanted and cannot run here, each with the modules that it lacks."""
    found = []
    for step, modules in NEEDS.items():
        absent = [module for module in modules if not importlib.util.find_spec(module)]
        if absent and step not in skip:
            found.append(f"{step.value} ({', '.join(absent)})")
    return found


def run_everything(settings: GpuSettings) -> Path:
    """Runs all steps, the next one too where one fails; returns the document's path."""
    session = Session(settings)
    # Nothing is timed in these, so they run side by side.
    session.together({Step.build: build, Step.kernels: kernels})
    session.together({Step.tests: tests, Step.sanitizers: sanitizers})
    for step in (cases, precisions, train):
        step(session)
    shutil.rmtree(session.work, ignore_errors=True)
    document = session.document()
    write_report(session.path)
    print("\n".join(headlines(document)))
    for result in session.steps:
        print(f"{result['name']}: {result['result']} ({result['seconds']:.0f} s)")
    rows = document.get("rows", [])
    failed = sum(row["status"] == "failed" for row in rows)
    print(f"{len(rows)} rows, {failed} failed, {len(document.get('not_run', []))} cases not run")
    print(f"results: {os.path.relpath(session.path)}")
    return session.path


def gpu_architecture() -> int:
    """That of the GPU, such as 90."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def build(session: Session) -> Iterator[Job]:
    """Builds the extension for this GPU alone, several times quicker than for all.

    In a rehearsal its CPU half is built, elsewhere.
    """
    command: list[str | Path] = [sys.executable, "setup.py", "build_ext"]
    if session.settings.rehearsal:
        command += ["--build-lib", ROOT / "build/rehearsal"]
        yield Job("build", command, {"DAC_KERNELS_BUILD": "cpu"})
    else:
        variables = {"DAC_KERNELS_CUDA_ARCH": str(gpu_architecture())}
        yield Job("build", [*command, "--inplace"], {"DAC_KERNELS_BUILD": "cuda"} | variables)


def kernels(session: Session) -> Iterator[Job]:
    """Compiles the Triton kernels of the cases, which would take one process minutes."""
    rehearsal = session.settings.rehearsal
    options = ["--arch", "90", "--quick"] if rehearsal else ["--arch", str(gpu_architecture())]
    yield Job("kernels", [*BENCH, "compile", *options], {"TRITON_INTERPRET": "0"})


def tests(_: Session) -> Iterator[Job]:
    """Runs the tests marked `gpu`; most of their time goes into compiling kernels."""
    processes = str(min(12, os.cpu_count() or 1))
    parallel = ["-n", processes] if importlib.util.find_spec("xdist") else []
    yield Job("tests", [*PYTEST, *parallel, *gpu_tests()], {})


def sanitizers(session: Session) -> Iterator[Job]:
    """Runs the tests of our own CUDA code under each tool of compute-sanitizer."""
    reason = "it needs a GPU" if session.settings.rehearsal else "it is not installed"
    if session.settings.rehearsal or not shutil.which("compute-sanitizer"):
        result = f"skipped: compute-sanitizer: {reason}"
        nothing = {"command": "", "returncode": None, "seconds": 0.0, "result": result}
        session.record({"name": "sanitizers"} | nothing)
        return
    for tool, which in SANITIZED.items():
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST]
        command += ["-x", "-k", which, "tests/test_native.py"]
        # PyTorch's caching allocator hides accesses past the end of a tensor.
        yield Job(tool, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def gpu_tests() -> list[str]:
    """The files with tests for a GPU; others may need packages that its machine lacks."""
    marks = ("mark.gpu", "mark.triton")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [
        str(file.relative_to(ROOT))
        for file in files
        if any(mark in file.read_text() for mark in marks)
    ]


def cases(session: Session) -> None:
    """Runs the cases, again after each that killed its process, which the next one records."""
    settings = session.settings
    while session.wants(Step.cases):
        limit = session.left() - session.kept_for_later()
        before = progress(session.document())
        command: list[str | Path] = [*BENCH, "run", *settings.options(), "--seconds", "0.2"]
        command += ["--budget", f"{limit - 20:.0f}", "--peer-seconds", PEER_SECONDS]
        command += ["--resume", "--out", session.path]
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
    if not session.wants(Step.precisions):
        return
    command: list[str | Path] = [*BENCH, "parity", *session.settings.options()]
    if session.settings.recording:
        command += ["--recording", session.settings.recording]
    command += ["--out", session.under_way("precisions")]
    session.run("precisions", command, LIMITS[Step.precisions])


def train(session: Session) -> None:
    """Times the training step, in all the time that is left."""
    if not session.wants(Step.train):
        return
    limit = session.left()
    command: list[str | Path] = [*BENCH, "train", *session.settings.options()]
    command += ["--budget", f"{limit - 30:.0f}", "--out", session.under_way("train")]
    session.run("train", command, limit)

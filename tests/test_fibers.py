"""The CUDA kernels of csrc on a CPU: g++ compiles them against tests/fibers/cuda_runtime.h.

Each thread of a block is a fiber, and every barrier a chance to run another. All kernels, forward
and backward, are compared with the CPU ops in float64: once with every access to memory recorded,
so that two accesses with no barrier between them are an error, in whatever order they happened; and
once under the address and undefined-behaviour sanitizers.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC, FIBERS = ROOT / "csrc", ROOT / "tests/fibers"
EMULATION = [FIBERS / "fibers.cpp", FIBERS / "races.cpp"]
KERNELS = sorted(CSRC.glob("*.cu"))
CPU_OPS = [CSRC / f"{name}.cpp" for name in (*(path.stem for path in KERNELS), "parallel")]
# Calls each access to memory; races.cpp has what is called in place of g++'s own library, and none
# of the locks of statics.
RECORDED = ["-fsanitize=thread", "-fno-threadsafe-statics"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# What kernels wait for: other threads, or a copy.
WAITS = re.compile(r"\b(__syncthreads|__syncwarp|cudaStreamSynchronize)\(")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


def run(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def gxx(*arguments):
    made = run("g++", "-std=c++17", "-O1", "-g1", "-pthread", *arguments)
    assert made.returncode == 0, made.stderr


def build(folder, kernels, others, of_kernels, of_all=()):
    """An executable of these sources, compiled with options of the kernels and of all."""

    def compiled(source):
        target = folder / f"{source.name}.o"
        options = ["-x", "c++", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", *of_all]
        options += of_kernels if source in kernels else []
        gxx(*options, f"-I{FIBERS}", f"-I{CSRC}", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        gxx(*of_all, *pool.map(compiled, [*kernels, *others]), "-o", folder / "program")
    return folder / "program"


ALL = [FIBERS / "main.cpp", *EMULATION, *CPU_OPS]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return build(tmp_path_factory.mktemp("recorded"), KERNELS, ALL, RECORDED)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sanitized"), KERNELS, ALL, [], SANITIZED)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    return build(folder, [FIBERS / "faults.cpp"], EMULATION, RECORDED)


def waits():
    """file.cu:12 for each call that waits."""
    return [
        f"{path.name}:{number}"
        for path in KERNELS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if WAITS.search(line)
    ]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_results_and_races(recorded, order):
    """Threads and blocks run by number, or shuffled; every wait in the sources is reached."""
    ran = run(recorded, order)
    assert ran.returncode == 0, ran.stderr
    passed = dict(line.split() for line in ran.stdout.splitlines())
    assert sorted(passed) == sorted(waits())


def test_memory_and_undefined_behaviour(sanitized):
    ran = run(sanitized, 1)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize("wait", waits())
def test_every_wait_is_needed(recorded, wait):
    """Left out, it is noticed: a race, or a wrong result."""
    ran = run(recorded, 1, wait)
    assert ran.returncode == 1
    assert re.search("race in|: error", ran.stderr), ran.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", ""),
        ("ends", "divergent barrier: one thread is at faults.cpp:.*, another at its end"),
        ("elsewhere", "divergent barrier: one thread is at faults.cpp:.*, another at faults.cpp"),
        ("write_write", "race in shared memory: .* writes, .* writes"),
        ("write_read", "race in shared memory: .* (writes, .* reads|reads, .* writes)"),
        ("read_write", "race in shared memory: .* reads, .* writes"),
        ("warp", "race in shared memory: thread 32 .* writes, thread 31 .* reads"),
        ("blocks", "race in global memory: thread 0 of block 0 writes, thread 0 of block 1 writes"),
        ("unwritten", "wrong number -?nan"),
    ],
)
def test_the_fibers_notice(faulty, fault, message):
    ran = run(faulty, fault)
    assert ran.returncode == (1 if message else 0)
    assert re.match(message, ran.stderr), ran.stderr

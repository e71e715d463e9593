"""The CUDA kernels of csrc on a CPU: g++ compiles them against tests/fibers/cuda_runtime.h.

Each thread of a block is a fiber, and every barrier a chance to run another. All kernels, forward
and backward, are compared with the CPU ops or with sums in float64: once with every access to
memory recorded, so that two accesses with no barrier between them are an error, in whatever order
they happened; and once under the address and undefined-behaviour sanitizers.

What Hopper does beside its threads, copies and products of matrices, happens as late as it may.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench.peers import hopper
from dac_fast.ops import reference

ROOT = Path(__file__).parents[1]
CSRC, FIBERS = ROOT / "csrc", ROOT / "tests/fibers"
EMULATION = [FIBERS / "fibers.cpp", FIBERS / "races.cpp"]
SPECTRA = sorted(CSRC.glob("*.cu"))
CPU_OPS = [CSRC / f"{name}.cpp" for name in (*(path.stem for path in SPECTRA), "parallel")]
# By the program that runs them: the kernels, and all else that it is made of.
PROGRAMS = {
    "spectra": (SPECTRA, [FIBERS / "main.cpp", *CPU_OPS, *EMULATION]),
    "unit": (
        [CSRC / "hopper/residual_unit.cu"],
        [FIBERS / "unit_main.cpp", FIBERS / "hopper.cpp", *EMULATION],
    ),
}
# Calls each access to memory; races.cpp has what is called in place of g++'s own library, and none
# of the locks of statics.
RECORDED = ["-fsanitize=thread", "-fno-threadsafe-statics"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# What kernels wait for, other threads or a copy, and what others wait for.
WAITS = re.compile(
    r"\b(__syncthreads|__syncwarp|cudaStreamSynchronize|wait|arrive|wait_for_copies|show_to_products"
    r"|fence_registers|wait_for_products)\("
)

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


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The programs with every access to memory recorded."""
    return {
        name: build(tmp_path_factory.mktemp(name), *sources, RECORDED)
        for name, sources in PROGRAMS.items()
    }


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    return build(folder, [FIBERS / "faults.cpp"], EMULATION, RECORDED)


@pytest.fixture(scope="module")
def unit_library(tmp_path_factory):
    kernels, _ = PROGRAMS["unit"]
    emulation = [FIBERS / "hopper.cpp", *EMULATION]
    options = ["-fPIC", "-shared"]
    return build(tmp_path_factory.mktemp("library"), kernels, emulation, [], options)


def waits(program):
    """file.cu:12 for each call that waits, or is waited for."""
    return [
        f"{path.name}:{number}"
        for path in PROGRAMS[program][0]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if WAITS.search(line)
    ]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("program", PROGRAMS)
def test_results_and_races(recorded, program, order):
    """Threads and blocks run by number, or shuffled; every wait in the sources is reached."""
    ran = run(recorded[program], order)
    assert ran.returncode == 0, ran.stderr
    passed = dict(line.split() for line in ran.stdout.splitlines())
    assert sorted(passed) == sorted(waits(program))


@pytest.mark.parametrize("program", PROGRAMS)
def test_memory_and_undefined_behaviour(tmp_path, program):
    ran = run(build(tmp_path, *PROGRAMS[program], [], SANITIZED), 1)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize(
    ("program", "wait"), [(program, wait) for program in PROGRAMS for wait in waits(program)]
)
def test_every_wait_is_needed(recorded, program, wait):
    """Left out, it is noticed: a race, a wrong result, or threads that wait forever."""
    ran = run(recorded[program], 1, wait)
    assert ran.returncode == 1
    assert re.search("race in|: error|deadlock|a product", ran.stderr), ran.stderr


@pytest.mark.parametrize(("dtype", "channels"), [("float16", 96), ("bfloat16", 64)])
def test_the_unit_as_bench_calls_it(unit_library, dtype, channels):
    torch.manual_seed(0)
    shape = (2, 200, channels)
    x, snaked = (torch.randn(shape).to(getattr(torch, dtype)).transpose(1, 2) for _ in range(2))
    weight1 = torch.randn(channels, channels, 7).div(channels).to(x.dtype)
    weight2 = torch.randn(channels, channels, 1).div(channels**0.5).to(x.dtype)
    bias1, bias2 = torch.randn(2, channels)
    alpha1, alpha2 = torch.rand(2, 1, channels, 1) + 0.5
    args = (x, snaked, weight1, bias1, alpha1, weight2, bias2)
    options = {"alpha": alpha2, "lengths": torch.tensor([200, 70])}
    actual = hopper.ResidualUnit(unit_library)(*args, 3, 9, **options)
    exact = reference.residual_unit(
        *(tensor.double() for tensor in args), 3, 9, **options | {"alpha": alpha2.double()}
    )
    for found, expected in zip(actual, exact, strict=True):
        # Rounded once in the middle and once at the end.
        unit = 2 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=unit, atol=unit)


@pytest.mark.parametrize(
    ("channels", "dilation", "message"),
    [(64, 10, "dilation 10; accepted: 1 to 9"), (32, 9, "32 channels; accepted: 64, 96")],
)
def test_the_unit_refuses_what_it_has_no_room_for(unit_library, channels, dilation, message):
    x = torch.zeros(1, 100, channels, dtype=torch.float16).transpose(1, 2)
    bias = torch.ones(channels)
    weight1, weight2 = (torch.zeros(channels, channels, taps, dtype=x.dtype) for taps in (7, 1))
    unit = hopper.ResidualUnit(unit_library)
    with pytest.raises(RuntimeError, match=message):
        unit(x, x, weight1, bias, bias, weight2, bias, dilation, 3 * dilation)


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

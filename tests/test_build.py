"""The compiled module as it is shipped: its use of a GPU, sanitizers over its CPU half, wheels and their options."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dac_kernels import native

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.skipif(
    not (native._C and native._C.cuda_architectures), reason="the CUDA half is not built"
)
def test_kernels_need_no_local_memory():
    """No kernel, for any architecture, has a stack frame or spills registers."""
    triton = importlib.util.find_spec("triton")
    folders = [
        Path(folder, "backends/nvidia/bin")
        for folder in (triton.submodule_search_locations if triton else [])
    ]
    cuobjdump = shutil.which(
        "cuobjdump", path=os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    )
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH or in Triton")
    usage = run(cuobjdump, "--dump-resource-usage", native._C.__file__, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    architectures = native._C.cuda_architectures.split(";")
    # Of stft_bands forward and backward for two dtypes, of disc_preprocess two passes forward and two backward.
    assert len(kernels) == 8 * len(architectures)
    assert [kernel for kernel in kernels if kernel[2] != "0" or kernel[4] != "0"] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_cpu_half_under_sanitizers(tmp_path):
    flags = [
        "-std=c++17",
        "-O0",
        "-g1",
        "-pthread",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    (tmp_path / "empty.cpp").write_text("int main() {}")
    if run("g++", *flags, tmp_path / "empty.cpp", "-o", tmp_path / "empty").returncode:
        pytest.skip("g++ has no address sanitizer")
    sources = [
        ROOT / "csrc" / f"{name}.cpp"
        for name in ("snake", "stft_bands", "disc_preprocess", "parallel")
    ]
    built = run(
        "g++",
        *flags,
        "-Wno-psabi",
        ROOT / "tests" / "native_main.cpp",
        *sources,
        "-o",
        tmp_path / "main",
    )
    assert built.returncode == 0, built.stderr
    ran = run(tmp_path / "main")
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def sources(tmp_path):
    """What a build needs, away from the checkout and its build folder."""
    folder = tmp_path / "sources"
    shutil.copytree(
        ROOT,
        folder,
        ignore=shutil.ignore_patterns(
            ".*", "build", "dist", "tests", "bench", "*.so", "*.egg-info"
        ),
    )
    (folder / "README.md").touch()
    return folder


def build(sources, tmp_path, kind, **environment):
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(tmp_path)!r}))"
    return run(
        sys.executable, "-c", code, cwd=sources, env={**os.environ, "CUDA_HOME": "", **environment}
    )


def run_installed(tmp_path, code):
    """Run code with the package of tmp_path / "installed"; an editable install must not lend its compiled module."""
    alone = 'import sys; sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in f.__module__]\n'
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    return run(sys.executable, "-c", alone + code, cwd=tmp_path, env=environment)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_wheel_from_source_archive(sources, tmp_path):
    """The source archive holds all that a wheel needs, and the module in that wheel runs."""
    archived = build(sources, tmp_path, "sdist")
    assert archived.returncode == 0, archived.stderr
    shutil.unpack_archive(tmp_path / archived.stdout.split()[-1], tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    built = build(unpacked, tmp_path, "wheel", DAC_KERNELS_BUILD="cpu", CXXFLAGS="-O0")
    assert built.returncode == 0, built.stderr
    shutil.unpack_archive(tmp_path / built.stdout.split()[-1], tmp_path / "installed", "zip")
    code = """
import torch
from dac_kernels import native
assert torch.equal(native.snake(torch.zeros(1, 2, 3), torch.ones(1, 2, 1)), torch.zeros(1, 2, 3))
print(native._C.__file__, native.status(), sep="\\n")
"""
    ran = run_installed(tmp_path, code)
    assert ran.returncode == 0, ran.stderr
    file, status = ran.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path / "installed")
    assert status == "CPU ops; no CUDA ops: install again with nvcc on PATH"


def test_wheel_without_a_compiler(sources, tmp_path):
    """The package still installs, and says what is absent."""
    built = build(sources, tmp_path, "wheel", DAC_KERNELS_BUILD="none")
    assert built.returncode == 0, built.stderr
    assert "py3-none-any" in built.stdout
    shutil.unpack_archive(tmp_path / built.stdout.split()[-1], tmp_path / "installed", "zip")
    code = """
import torch
from dac_kernels import native
print(native.status(), native.snake_unsupported(torch.zeros(1, 2, 3), torch.ones(1, 2, 1)), sep="\\n")
"""
    ran = run_installed(tmp_path, code)
    status, reason = ran.stdout.splitlines()
    assert status.startswith("absent (")
    assert "install again with a C++ compiler" in status
    assert reason.startswith("the compiled module is absent (")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"DAC_KERNELS_BUILD": "gpu"},
            "DAC_KERNELS_BUILD is 'gpu'; accepted: auto, cpu, cuda, none",
        ),
        (
            {"DAC_KERNELS_BUILD": "cuda", "PATH": ""},
            "DAC_KERNELS_BUILD is 'cuda', but there is no C++ compiler on PATH",
        ),
        (
            {"DAC_KERNELS_CUDA_ARCH": "hopper"},
            "DAC_KERNELS_CUDA_ARCH has 'hopper'; accepted: numbers such as 80;90 or 90a",
        ),
    ],
)
def test_build_options_are_checked(environment, message):
    if "DAC_KERNELS_CUDA_ARCH" in environment and not (native._C and native._C.cuda_architectures):
        pytest.skip("architectures are read where there is nvcc")
    ran = run(
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert ran.returncode != 0
    assert message in ran.stderr.splitlines()[-1]

"""The compiled module: what is built for which GPUs, what is shipped, and csrc under sanitizers."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
from dac_kernels import native

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def cuda_package(tmp_path_factory):
    """A folder with dac_kernels, both halves compiled for the GPUs that wheels are compiled for."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("no nvcc or no g++ on PATH")
    folder = tmp_path_factory.mktemp("cuda")
    shutil.copytree(
        ROOT / "kernels/dac_kernels", folder / "dac_kernels", ignore=shutil.ignore_patterns("*.so")
    )
    # Objects stay in build/, so that the next run of the tests compiles what changed.
    environment = {**os.environ, "DAC_KERNELS_BUILD": "cuda"}
    environment.pop("DAC_KERNELS_CUDA_ARCH", None)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", folder]
    built = run(*command, cwd=ROOT, env=environment)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_kernels_need_no_local_memory(cuda_package):
    """No kernel, for any architecture, has a stack frame or spills registers."""
    triton = importlib.util.find_spec("triton")
    folders = [
        Path(folder, "backends/nvidia/bin")
        for folder in (triton.submodule_search_locations if triton else [])
    ]
    search = os.pathsep.join([*map(str, folders), "/usr/local/cuda/bin", os.environ["PATH"]])
    cuobjdump = shutil.which("cuobjdump", path=search)
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH or in Triton")
    (module,) = (cuda_package / "dac_kernels").glob("_C*.so")
    usage = run(cuobjdump, "--dump-resource-usage", module, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    # For each of four architectures: of stft_bands forward and backward for two dtypes, and a pass
    # backward for both; of disc_preprocess two passes forward and two backward.
    assert len(kernels) == 4 * 9
    assert [kernel for kernel in kernels if kernel[2] != "0" or kernel[4] != "0"] == []


def test_cuda_half_without_a_gpu(cuda_package, tmp_path):
    """The CUDA half imports, and says in one line why it cannot run."""
    code = """
from dac_kernels import native
print(native.status())
native.extension.disc_preprocess_forward_cuda_float32(
    native.extension.Signals(1, 8, 8, 8), 0, 0, 0, 0, 0, 0
)
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = run_installed(cuda_package, code, tmp_path, **environment)
    assert "CUDA ops for sm_80, sm_86, sm_89, sm_90, which cannot run here" in ran.stdout
    assert re.match(r"RuntimeError: disc_preprocess: .*(driver|device)", ran.stderr.split("\n")[-2])


def test_loops_are_vectors_with_avx2():
    """A compiler leaves a loop scalar, some times slower, for as little as a condition in it."""
    objdump = shutil.which("objdump")
    if native.extension is None or objdump is None:
        pytest.skip("no compiled module, or no objdump on PATH")
    module = native.extension.__file__
    code = run(objdump, "-d", "--demangle", "--no-show-raw-insn", module, check=True).stdout
    # In double precision Snake calls the C library for each element.
    functions = [
        function
        for function in code.split("\n\n")
        if re.match(r"\w+ <void dac::run_avx2<(?!.*double)", function)
    ]
    if not functions:
        pytest.skip("the compiled module has no symbols, or is for another processor")
    for function in functions:
        assert len(re.findall(r"vfn?m\w+ps .*%ymm", function)) > 8, function.splitlines()[0]


class Sanitized:
    """C++ compiled and linked by g++ with its sanitizers, or without; each object once."""

    def __init__(self, folder):
        self.folder = folder

    def flags(self, sanitizers):
        options = ["-std=c++17", "-O1", "-g1", "-fPIC", "-pthread", "-Wno-psabi"]
        if not sanitizers:
            return options
        return [*options, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]

    def compile(self, sanitizers, source):
        made = self.folder / f"{source.stem}-{sanitizers}.o"
        if not made.exists():
            include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
            built = run("g++", *self.flags(sanitizers), *include, "-c", source, "-o", made)
            assert built.returncode == 0, built.stderr
        return made

    def link(self, sanitizers, sources, target, *options):
        """Skips the test where g++ has no such sanitizer."""
        empty = self.folder / "empty.cpp"
        empty.write_text("int main() {}")
        if run("g++", *self.flags(sanitizers), empty, "-o", self.folder / "empty").returncode:
            pytest.skip(f"g++ has no {sanitizers} sanitizer")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self.compile(sanitizers, source), sources))
        built = run("g++", *self.flags(sanitizers), *options, *objects, "-o", target)
        assert built.returncode == 0, built.stderr


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    return Sanitized(tmp_path_factory.mktemp("sanitized"))


# Random calls, by so many callers at once, and forked children while all but one of these are
# inside an op. (AddressSanitizer's memory is not safe to fork while others use it, and with
# ThreadSanitizer no child may start threads.)
SANITIZERS = {"address,undefined": (2000, 1, 50), "thread": (800, 8, 0), "": (400, 3, 200)}


@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_cpu_half_under_sanitizers(sanitizers, sanitized, tmp_path, capsys):
    csrc = [path for path in sorted(CSRC.glob("*.cpp")) if path.stem != "bindings"]
    sanitized.link(sanitizers, [ROOT / "tests/native_main.cpp", *csrc], tmp_path / "main")
    ran = run(tmp_path / "main", *map(str, SANITIZERS[sanitizers]), timeout=300)
    assert ran.returncode == 0, ran.stderr
    with capsys.disabled():
        print(f"\ncsrc, sanitizer {sanitizers or 'none'}: {ran.stdout.strip()}")


def test_registered_ops_under_sanitizers(sanitized, tmp_path, capsys):
    """Whatever the arguments: a whole result or a refusal, and no access outside the tensors."""
    package = tmp_path / "dac_kernels"
    shutil.copytree(ROOT / "kernels/dac_kernels", package, ignore=shutil.ignore_patterns("*.so"))
    csrc = sorted(CSRC.glob("*.cpp"))
    sanitized.link("address,undefined", csrc, package / "_C.so", "-shared")
    runtimes = [
        run("g++", f"-print-file-name=lib{name}.so").stdout.strip() for name in ("asan", "ubsan")
    ]
    environment = {
        "LD_PRELOAD": " ".join(runtimes),
        # Python's own memory lives to the end, and an allocation may fail.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }
    code = (ROOT / "tests/native_fuzz.py").read_text()
    ran = run_installed(tmp_path, code, tmp_path, **environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    with capsys.disabled():
        print(f"\nregistered ops, sanitizers address,undefined: {ran.stdout.strip()}")


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


def run_installed(folder, code, elsewhere, **environment):
    """Run code with the packages of a folder; an editable install must not lend its module."""
    alone = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in f.__module__]
"""
    environment = {**os.environ, **environment, "PYTHONPATH": str(folder)}
    return run(sys.executable, "-c", alone + code, cwd=elsewhere, env=environment, timeout=300)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_wheel_from_source_archive(sources, tmp_path):
    """The source archive holds all that a wheel needs, and that wheel passes the smoke test."""
    archived = build(sources, tmp_path, "sdist")
    assert archived.returncode == 0, archived.stderr
    shutil.unpack_archive(tmp_path / archived.stdout.split()[-1], tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    built = build(unpacked, tmp_path, "wheel", DAC_KERNELS_BUILD="cpu", CXXFLAGS="-O0")
    assert built.returncode == 0, built.stderr
    shutil.unpack_archive(tmp_path / built.stdout.split()[-1], tmp_path / "installed", "zip")
    code = (ROOT / "release/smoke.py").read_text() + "    print(native.extension.__file__)"
    ran = run_installed(tmp_path / "installed", code, tmp_path)
    assert ran.returncode == 0, ran.stderr
    said, file = ran.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path / "installed")
    assert said.endswith(
        "CPU ops; no CUDA ops: install again with nvcc on PATH and DAC_KERNELS_BUILD=cuda"
    )


def test_wheel_without_a_compiler(sources, tmp_path):
    """The package still installs, and says what is absent."""
    built = build(sources, tmp_path, "wheel", DAC_KERNELS_BUILD="none")
    assert built.returncode == 0, built.stderr
    assert "py3-none-any" in built.stdout
    shutil.unpack_archive(tmp_path / built.stdout.split()[-1], tmp_path / "installed", "zip")
    code = """
import torch
from dac_kernels import native
print(native.status())
print(native.snake_unsupported(torch.zeros(1, 2, 3), torch.ones(1, 2, 1)))
"""
    ran = run_installed(tmp_path / "installed", code, tmp_path)
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
            "DAC_KERNELS_BUILD is 'cuda', but there is no C++ compiler with Python's headers",
        ),
        (
            {"DAC_KERNELS_CUDA_ARCH": "hopper"},
            "DAC_KERNELS_CUDA_ARCH has 'hopper'; accepted: numbers such as 80;90 or 90a",
        ),
    ],
)
def test_build_options_are_checked(environment, message):
    if "DAC_KERNELS_CUDA_ARCH" in environment and shutil.which("nvcc") is None:
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


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, "NVIDIA-SMI has failed 12.0", []),
        ({}, "9.0\n8.6\n9.0\n5.2", ["86", "90"]),
        ({"DAC_KERNELS_CUDA_ARCH": "90a"}, "8.6", ["90a"]),
        ({"DAC_KERNELS_BUILD": "cuda"}, "8.6", ["80", "86", "89", "90"]),
        ({"DAC_KERNELS_BUILD": "cpu"}, "8.6", []),
    ],
)
def test_the_gpus_that_are_here_decide(environment, gpus, expected, tmp_path):
    """Without being asked, nothing is compiled for GPUs of other machines, or unknown to nvcc."""
    (tmp_path / "bin").mkdir()
    for tool, says in (("nvidia-smi", gpus), ("nvcc", "sm_80\nsm_86\nsm_90")):
        (tmp_path / "bin" / tool).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    code = """
import runpy, sys
sys.argv = ["setup.py", "--quiet", "--version"]
print(runpy.run_path("setup.py")["architectures"]())
"""
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DAC_KERNELS")}
    environment = {**inherited, "PATH": path, "CUDA_HOME": str(tmp_path), **environment}
    ran = run(sys.executable, "-c", code, cwd=ROOT, env=environment)
    assert ran.stdout.splitlines()[-1] == str(expected), ran.stderr

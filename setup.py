"""Builds the native extension dac_kernels._C with ninja; everything else about the package is in pyproject.toml.

DAC_KERNELS_BUILD: "auto" (default: the CPU half where there is a C++ compiler, the CUDA half where there is nvcc as
well), "cpu", "cuda" (an error without nvcc) or "none". DAC_KERNELS_CUDA_ARCH: GPU architectures to compile for,
default "80;86;89;90"; the last one's PTX goes along, for newer GPUs. CXX, CXXFLAGS, CUDA_HOME:
the compilers, if not on PATH, and more flags.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = ["bindings.cpp", "disc_preprocess.cpp", "parallel.cpp", "snake.cpp", "stft_bands.cpp"]
CUDA_SOURCES = ["disc_preprocess.cu", "stft_bands.cu"]

MODE = os.environ.get("DAC_KERNELS_BUILD", "auto")
if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"DAC_KERNELS_BUILD is {MODE!r}; accepted: auto, cpu, cuda, none")
CXX = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
NVCC = shutil.which(
    str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"))
) or shutil.which("nvcc")
if MODE == "cuda" and not (CXX and NVCC):
    raise SystemExit(
        f"DAC_KERNELS_BUILD is 'cuda', but there is no {'nvcc' if CXX else 'C++ compiler'} on PATH"
    )


def architectures() -> list[str]:
    """The GPU architectures to compile for, as nvcc numbers them."""
    names = re.split(r"[;,\s]+", os.environ.get("DAC_KERNELS_CUDA_ARCH", "80;86;89;90").strip())
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name):
            raise SystemExit(
                f"DAC_KERNELS_CUDA_ARCH has {name!r}; accepted: numbers such as 80;90 or 90a"
            )
    return names


def build_file(target: Path) -> str:
    """The build.ninja that compiles csrc into `target`."""
    import pybind11

    flags = f"-std=c++17 -O3 -DNDEBUG -I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    host = "-fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas"
    link = (
        "-shared -pthread -undefined dynamic_lookup"
        if sys.platform == "darwin"
        else "-shared -pthread"
    )
    sources, nvcc = CPU_SOURCES, ""
    if NVCC and MODE != "cpu":
        archs = architectures()
        sources = CPU_SOURCES + CUDA_SOURCES
        flags += f" '-DDAC_KERNELS_CUDA=\"{';'.join(archs)}\"' -I{Path(NVCC).resolve().parents[1] / 'include'}"
        nvcc = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
        nvcc += f" -gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]} -Xcompiler {host.replace(' ', ',')}"
        home = Path(NVCC).resolve().parents[1]
        folder = next(
            (p for p in (home / "lib64", *home.glob("targets/*/lib")) if p.is_dir()), home / "lib"
        )
        link += f" -L{folder} -lcudart_static -ldl -lrt"
    objects = " ".join(f"{source}.o" for source in sources)
    edges = "\n".join(f"build {s}.o: {Path(s).suffix[1:]} {ROOT / 'csrc' / s}" for s in sources)
    return f"""
rule cpp
  description = c++ $in
  command = {CXX} -MMD -MF $out.d {flags} {host} {os.environ.get("CXXFLAGS", "")} -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cu
  description = nvcc $in
  command = {NVCC} -MD -MF $out.d {flags} {nvcc} -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {CXX} $in {link} -o $out
{edges}
build {target}: link {objects}
"""


class Ninja(build_ext):
    """Compiles in build/native-*, which stays: the next build compiles what changed."""

    def build_extension(self, ext):
        """Called by setuptools for the one extension."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = (
            ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(build_file(folder / target.name))
        search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        subprocess.run([shutil.which("ninja", path=search) or "ninja", "-C", folder], check=True)
        # A new file, not new contents: a process that has the old one loaded keeps it.
        target.unlink(missing_ok=True)
        shutil.copy2(folder / target.name, target)


native = [Extension("dac_kernels._C", [f"csrc/{source}" for source in CPU_SOURCES])]
if MODE == "none" or not CXX:
    print(
        f"dac_kernels._C is not built: {'DAC_KERNELS_BUILD is none' if CXX else 'no C++ compiler on PATH'}"
    )
    native = []
setup(ext_modules=native, cmdclass={"build_ext": Ninja})

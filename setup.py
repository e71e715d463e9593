"""Builds the native extension dac_kernels._C with ninja; pyproject.toml has all the rest.

DAC_KERNELS_BUILD: "auto" (default: the CPU half if there is a C++ compiler with Python's headers,
the CUDA half for this machine's GPUs if there is nvcc), "cpu", "cuda" (for many GPUs; an error
without nvcc), "none".
DAC_KERNELS_CUDA_ARCH: the GPU architectures to compile for, with "cuda" by default "80;86;89;90";
the last one's PTX goes along, for newer GPUs. CXX, CXXFLAGS, LDFLAGS, CUDA_HOME: as usual.
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
MODE = os.environ.get("DAC_KERNELS_BUILD", "auto")
HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
CXX = HEADERS and (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++"))
CUDA_BIN = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
NVCC = shutil.which("nvcc", path=CUDA_BIN) or shutil.which("nvcc")
if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"DAC_KERNELS_BUILD is {MODE!r}; accepted: auto, cpu, cuda, none")
if MODE == "cuda" and not (CXX and NVCC):
    missing = "nvcc" if CXX else "C++ compiler with Python's headers"
    raise SystemExit(f"DAC_KERNELS_BUILD is 'cuda', but there is no {missing}")


def architectures() -> list[str]:
    """The GPU architectures to compile for, as nvcc numbers them; none: the CPU half alone."""
    if MODE == "cpu" or not NVCC:
        return []
    default = "80;86;89;90" if MODE == "cuda" else ""
    names = re.findall(r"[^;,\s]+", os.environ.get("DAC_KERNELS_CUDA_ARCH", default))
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name):
            accepted = "numbers such as 80;90 or 90a"
            raise SystemExit(f"DAC_KERNELS_CUDA_ARCH has {name!r}; accepted: {accepted}")
    if not names:
        gpus = subprocess.getoutput("nvidia-smi --query-gpu=compute_cap --format=csv,noheader")
        known = subprocess.getoutput(f"'{NVCC}' --list-gpu-code").split()
        found = {"".join(digits) for digits in re.findall(r"^(\d+)\.(\d)$", gpus, re.MULTILINE)}
        names = sorted((name for name in found if f"sm_{name}" in known), key=int)
    if not names:
        print("nvcc, but no GPU: only the CPU half is built; DAC_KERNELS_BUILD=cuda builds both.")
    return names


def build_file(target: Path, archs: list[str]) -> str:
    """The build.ninja that compiles csrc into `target`."""
    import pybind11

    flags = "-std=c++17 -O3 -DNDEBUG"
    python = f" -I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    host = "-fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas"
    # Else loops with conditions are no vectors without AVX-512: four times as long.
    host += " -fno-trapping-math"
    link = "-shared -pthread " + os.environ.get("LDFLAGS", "")
    link += " -undefined dynamic_lookup" * (sys.platform == "darwin")
    compilers = {".cpp": f"{CXX} {host} {os.environ.get('CXXFLAGS', '')}"}
    if archs:
        home = Path(NVCC).resolve().parents[1]
        libraries = [home / "lib64", *home.glob("targets/*/lib"), home / "lib"]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        compilers[".cu"] = " ".join([NVCC, *codes, "-Xcompiler", host.replace(" ", ",")])
        flags += f" '-DDAC_KERNELS_CUDA=\"{';'.join(archs)}\"' -I{home / 'include'}"
        link += f" -L{next(filter(Path.is_dir, libraries))} -lcudart_static -ldl -lrt"
    sources = [p for p in sorted((ROOT / "csrc").iterdir()) if p.suffix in compilers]
    objects, edges = [], ""
    for source in sources:
        # The other objects are the same for all Pythons.
        binds = source.stem == "bindings"
        objects.append(f"{target.name if binds else source.name}.o")
        compiler = compilers[source.suffix] + python * binds
        edges += f"build {objects[-1]}: compile {source}\n  compiler = {compiler}\n"
    return f"""
rule compile
  command = $compiler -MD -MF $out.d {flags} -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {CXX} $in {link} -o $out
{edges}build {target}: link {" ".join(objects)}
"""


class Ninja(build_ext):
    """Compiles in build/csrc*, which stays: the next build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Called by setuptools for the one extension."""
        archs, target = architectures(), Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / "-".join(["csrc", *archs])
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(build_file(folder / target.name, archs))
        search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        subprocess.run([shutil.which("ninja", path=search) or "ninja", "-C", folder], check=True)
        # A new file, not new contents: a process that has the old one loaded keeps it.
        target.unlink(missing_ok=True)
        shutil.copy2(folder / target.name, target)


native = Extension("dac_kernels._C", ["csrc/bindings.cpp"])
setup(ext_modules=[native] if CXX and MODE != "none" else [], cmdclass={"build_ext": Ninja})

"""The CUDA kernels of csrc compiled ahead of time, where there is nvcc."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.document import ROOT, Json
from bench.static.bound import RESERVED, ctas
from bench.static.compiled import disassembled, output, resources
from bench.static.sass import Program, facts

# For sm_90a alone.
RESIDUAL_UNIT = ROOT / "csrc/hopper/residual_unit.cu"
SOURCES = [*sorted((ROOT / "csrc").glob("*.cu")), RESIDUAL_UNIT]
# As in setup.py, these and where nvcc is.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")
CUDA_BIN = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
NVCC = shutil.which("nvcc", path=CUDA_BIN) or shutil.which("nvcc")


def versions() -> dict[str, str]:
    """Of nvcc, if there is one."""
    found = re.search(r"V([\d.]+)", output(NVCC, "--version")) if NVCC else None
    return {"nvcc": found[1]} if found else {}


def name_of(source: Path) -> str:
    """What a source is called among launches."""
    return str(source.relative_to(ROOT).with_suffix(""))


def compile_source(source: Path, architecture: int, target: Path, *options: str) -> None:
    """Has nvcc compile a source to a file.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    assert NVCC
    number = f"{architecture}a" if source == RESIDUAL_UNIT else str(architecture)
    code = f"-gencode=arch=compute_{number},code=sm_{number}"
    command = [NVCC, *FLAGS, code, f"-I{source.parent}", *options, str(source), "-o", str(target)]
    subprocess.run(command, check=True)


def rows(source: Path, architecture: int) -> Iterator[Json]:
    """What is known of each kernel in a source; nothing without nvcc."""
    if not NVCC or (source == RESIDUAL_UNIT and architecture != 90):
        return
    # A CTA's `kThreads` are 384 there, elsewhere 256.
    warps = 12 if source == RESIDUAL_UNIT else 8
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "cubin")
        compile_source(source, architecture, cubin, "-cubin")
        used, sass = resources(cubin), disassembled(cubin)
    # A section for each kernel follows its heading.
    _, *sections = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", sass, flags=re.MULTILINE)
    for symbol, text in zip(sections[::2], sections[1::2], strict=True):
        program, taken = Program(text), used[symbol]
        # The compiler counts what the system takes from sm_90 on.
        taken["shared"] -= RESERVED if architecture >= 90 and taken["shared"] else 0
        kernel = demangled(symbol)
        yield {
            "name": f"{name_of(source)}/{kernel}",
            "kernel": kernel,
            "architecture": architecture,
            **taken,
            "ctas": ctas(taken, warps, architecture),
            "all": facts(program.instructions),
        }


def demangled(symbol: str) -> str:
    """A kernel's name with the types that it is made for, without its namespaces and arguments."""
    whole = output("c++filt", symbol).strip()
    found = re.search(r"(\w+)(<[\w:, ]+>)?\(", whole)
    assert found, whole
    return found[1] + (found[2] or "").replace("dac::", "")

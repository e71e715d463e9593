"""A launch compiled ahead of time: its machine code, and what it takes of an SM."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from bench.document import Json
from bench.static.launches import Launch

# Triton brings these.
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


def signature(launch: Launch) -> tuple[Json, Json, Json]:
    """Types, constants and attributes of the arguments, as Triton itself tells them apart.

    Of an integer it notices whether it is 1 or a multiple of 16; of tensors that they are aligned.
    """
    types: Json = {}
    constants: Json = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        tensor = torch.is_tensor(value)
        noticed = not tensor and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (noticed and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        types[name] = POINTERS[value.dtype] if tensor else "i32"
        if tensor or (noticed and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def key(launch: Launch) -> str:
    """Equal for launches that run the same machine code."""
    return repr((launch.kernel.__name__, *signature(launch), sorted(launch.options.items())))


def compiled(launch: Launch, architecture: int) -> tuple[Json, str]:
    """The kernel's `registers`, and bytes of `stack`, `spilled` and `shared` memory; and its SASS.

    Args:
        architecture: 80, 86, 89, 90 or 100.
    """
    source = ASTSource(launch.kernel, *signature(launch))
    target = GPUTarget("cuda", architecture, 32)
    options = {**launch.options, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (found,) = resources(Path(file.name)).values()
        sass = disassembled(Path(file.name))
    # That of a launch, which its machine code does not know.
    return found | {"shared": kernel.metadata.shared}, sass


def resources(cubin: Path) -> dict[str, Json]:
    """Of each kernel in a file its `registers`, and bytes of `stack`, `spilled` and `shared`."""
    usage = output(TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
    found = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    names = ("registers", "stack", "shared", "spilled")
    return {name: dict(zip(names, map(int, numbers), strict=True)) for name, *numbers in found}


def disassembled(cubin: Path) -> str:
    """The SASS of a file."""
    return output(TOOLS / "nvdisasm", "-c", cubin)


def output(*command: str | Path) -> str:
    """What a program prints.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def versions() -> Json:
    """Of Triton, and of the assembler that it takes for sm_90."""
    return {"triton": triton.__version__, "ptxas": get_ptxas(90).version}

"""Ahead-of-time compilation of every Triton configuration to sm_90: registers, spills and stack, without a GPU.

The launches are recorded from the public functions themselves, in a process of its own: kernels that the interpreter
runs cannot be compiled. `python tests/test_aot.py` prints the table.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def record_launches():
    """(kernel, arguments, options) of every configuration that the cases below can take."""
    from dac_kernels import rvq, rvq_kernels, snake

    launches = []
    for module in (snake, rvq, rvq_kernels):
        module.device_unsupported = lambda x: None
        module.launch = lambda kernel, programs, *args, **options: launches.append((kernel, args, options))
        module.tuned = lambda key, configs, run: [run(config) for config in configs] and configs[0]

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for channels_last in (False, True):
            snake.warmup([(1, 96, 4096)], dtype, "cpu", channels_last, backward=True)
        rvq.warmup([(1, 64, 48)], 9, 1024, 8, dtype, "cpu")
    snake.warmup([(2, 64, 33)], torch.float32, "cpu", backward=True)
    for dim in (5, 16, 32):
        rvq.warmup([(1, 64, 33)], 3, 100, dim, torch.float32, "cpu")
    x, alpha = torch.zeros(1, 64, 512), torch.ones(1, 64, 1, requires_grad=True)
    snake.snake_beta(x, alpha, alpha, log_scale=True).sum().backward()
    return launches


def compile_launch(kernel, args, options):
    """The kernel compiled as Triton's launcher would for these arguments: integers that are 1 or divide by 16 count."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    compiler_options = {"num_warps": options.pop("num_warps")}
    signature, constants, attributes = {}, {}, {}
    values = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
    for i, (name, value) in enumerate(zip(kernel.arg_names, values, strict=True)):
        if i >= len(args) or (not torch.is_tensor(value) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = pointers[value.dtype] if torch.is_tensor(value) else "i32"
        if torch.is_tensor(value) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=compiler_options)


def resources(cubin):
    """REG, STACK and LOCAL of the cubin's kernel, as cuobjdump reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    return dict(zip(("registers", "stack", "local"), map(int, usage.groups()), strict=True))


def main():
    seen = set()
    for kernel, args, options in record_launches():
        compiled = compile_launch(kernel, args, dict(options))
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        dtype = str(args[1].dtype if kernel.__name__ == "_project_kernel" else args[0].dtype).removeprefix("torch.")
        row = {"kernel": kernel.__name__, "dtype": dtype, "options": options, **resources(compiled.asm["cubin"])}
        row["shared"] = compiled.metadata.shared
        row["wide_loads"] = bool(re.search(r"ld\.global\S*\.v[248]", compiled.asm["ptx"]))
        print(json.dumps(row), flush=True)


@pytest.fixture(scope="module")
def table():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_nothing_spills_and_nothing_has_a_stack(table, capsys):
    kernels = {row["kernel"] for row in table}
    assert kernels == {f"_{name}_kernel" for name in ("forward", "backward", "project", "search", "decode")}
    with capsys.disabled():
        print("\nregisters on sm_90, least and most over all configurations:")
        for kernel, dtype in sorted({(row["kernel"], row["dtype"]) for row in table}):
            counts = [row["registers"] for row in table if (row["kernel"], row["dtype"]) == (kernel, dtype)]
            print(f"  {kernel.strip('_').removesuffix('_kernel'):8} {dtype:8} {min(counts):3} to {max(counts):3}")
    spilling = [row for row in table if row["stack"] or row["local"]]
    assert not spilling, spilling


def test_aligned_tensors_load_in_vectors(table):
    aligned = [row for row in table if row["options"].get("ALIGN") == 16]
    assert aligned
    assert all(row["wide_loads"] for row in aligned)


if __name__ == "__main__":
    main()

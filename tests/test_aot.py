"""Every Triton configuration compiled to sm_90 without a GPU: registers, spills and stack.

The launches are recorded from the public functions themselves, in a process of its own, because
kernels that the interpreter runs cannot be compiled. `python tests/test_aot.py` prints the table;
with `every` it has every kind of layer in every dtype, many of which compile to much the same.
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
from dac_kernels.residual_unit import SHARED_TF32

ROOT = Path(__file__).parents[1]


def record_launches(every):
    """(kernel, arguments, options) of every configuration that the cases below can take."""
    from dac_kernels import conv1d, residual_unit, rvq, rvq_kernels, snake, tiles

    launches = []
    for module in (snake, rvq, rvq_kernels, conv1d, residual_unit, tiles):
        module.device_unsupported = lambda x: None
        module.launch = lambda kernel, programs, *args, **options: launches.append(
            (kernel, args, options)
        )
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
    convolutions(conv1d, residual_unit, every)
    return launches


# Layers of the presets, by what they ask of the compiler: channels in and out, kernel, stride,
# padding, dilation.
LAYERS = {
    "wide": (768, 768, 7, 1, 9, 3),
    "narrow": (96, 96, 7, 1, 3, 1),
    "strided": (64, 128, 4, 2, 1, 1),
    "first": (1, 64, 7, 1, 3, 1),
    "last": (96, 1, 7, 1, 3, 1),
    "tiny": (24, 12, 7, 1, 3, 1),
}


def convolutions(conv1d, residual_unit, every):
    """Call both modules as the engine does: alpha and bias in float32, ragged, both outputs."""
    lengths = torch.zeros(2, dtype=torch.int64)

    def layer(name, dtype, tf32):
        channels, out, kernel, stride, padding, dilation = LAYERS[name]
        x, weight = (
            torch.zeros(2, 128, channels, dtype=dtype).mT,
            torch.zeros(out, kernel, channels, dtype=dtype).mT,
        )
        time = conv1d.output_length(128, kernel, stride, padding, dilation, False)
        residual = torch.zeros(2, time, out, dtype=dtype).mT if channels == out else None
        options = (
            {"tanh": True} if out == 1 else {"alpha": torch.zeros(1, out, 1), "residual": residual}
        )
        arguments = x, weight, torch.zeros(out), stride, padding, dilation
        conv1d.conv1d(*arguments, lengths=lengths, tf32=tf32, **options)

    def transposed(dtype, tf32):
        x, bias, alpha = (
            torch.zeros(2, 128, 768, dtype=dtype).mT,
            torch.zeros(384),
            torch.zeros(1, 384, 1),
        )
        # output channels innermost, as `WeightNorm.fold` leaves them; then input channels
        for weight in (
            torch.zeros(768, 16, 384, dtype=dtype).mT,
            torch.zeros(16, 384, 768, dtype=dtype).permute(2, 1, 0),
        ):
            conv1d.conv_transpose1d(x, weight, bias, 8, 4, alpha=alpha, lengths=lengths, tf32=tf32)

    def unit(channels, dtype, tf32):
        x, bias, alpha = (
            torch.zeros(2, 128, channels, dtype=dtype).mT,
            torch.zeros(channels),
            torch.zeros(1, channels, 1),
        )
        seven, one = (torch.zeros(channels, kernel, channels, dtype=dtype).mT for kernel in (7, 1))
        arguments = x, x, seven, bias, alpha, one, bias, 3, 9
        residual_unit.residual_unit(*arguments, alpha=alpha, lengths=lengths, tf32=tf32)

    layer("wide", torch.float16, False)
    unit(24, torch.float32, False)
    kinds = (
        (torch.float16, False),
        (torch.float32, True),
        (torch.float32, False),
        (torch.bfloat16, False),
    )
    for dtype, tf32 in kinds[:3]:
        unit(192, dtype, tf32)
    for dtype, tf32 in kinds if every else ():
        for name in LAYERS:
            layer(name, dtype, tf32)
        transposed(dtype, tf32)
        for channels in (24, 64, 96, 128, 192):
            unit(channels, dtype, tf32)


def compile_launch(kernel, args, options):
    """The kernel compiled as for these arguments, of which integers count if 1 or 16 n."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.int64: "*i64",
    }
    compiler_options = {
        name: options.pop(name) for name in ("num_warps", "num_stages") if name in options
    }
    signature, constants, attributes = {}, {}, {}
    values = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
    for i, (parameter, value) in enumerate(zip(kernel.params, values, strict=True)):
        name = parameter.name
        special = not torch.is_tensor(value) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = pointers[value.dtype] if torch.is_tensor(value) else "i32"
        if torch.is_tensor(value) or (special and value % 16 == 0):
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


def main(every):
    seen = set()
    for kernel, args, options in record_launches(every):
        compiled = compile_launch(kernel, args, dict(options))
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        dtype = str(
            args[1].dtype if kernel.__name__ == "_project_kernel" else args[0].dtype
        ).removeprefix("torch.")
        row = {
            "kernel": kernel.__name__,
            "dtype": dtype,
            "options": options,
            **resources(compiled.asm["cubin"]),
        }
        row["shared"] = compiled.metadata.shared
        ptx = compiled.asm["ptx"]
        row["async_copies"] = bool(re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", ptx))
        row["wide_loads"] = row["async_copies"] or bool(re.search(r"ld\.global\S*\.v[248]", ptx))
        row["tensor_cores"] = "wgmma.mma_async" in ptx
        print(json.dumps(row), flush=True)


@pytest.fixture(scope="module")
def table():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_nothing_spills_and_nothing_has_a_stack(table, capsys):
    kernels = {row["kernel"] for row in table}
    names = ("forward", "backward", "project", "search", "decode", "conv1d", "residual_unit")
    assert kernels == {f"_{name}_kernel" for name in names}
    with capsys.disabled():
        print("\nregisters on sm_90, least and most over all configurations:")
        for kernel, dtype in sorted({(row["kernel"], row["dtype"]) for row in table}):
            counts = [
                row["registers"]
                for row in table
                if (row["kernel"], row["dtype"]) == (kernel, dtype)
            ]
            name = kernel.strip("_").removesuffix("_kernel")
            print(f"  {name:13} {dtype:8} {min(counts):3} to {max(counts):3}")
    spilling = [row for row in table if row["stack"] or row["local"]]
    assert not spilling, spilling


def test_aligned_tensors_load_in_vectors(table):
    aligned = [row for row in table if row["options"].get("ALIGN") == 16]
    assert aligned
    assert all(row["wide_loads"] for row in aligned)


def test_convolutions_use_tensor_cores_and_asynchronous_copies(table):
    products = [
        row
        for row in table
        if row["options"].get("PRECISION") == "tf32" and row["options"]["ALIGN"] == 16
    ]
    assert {row["dtype"] for row in products} == {"float16", "float32"}
    assert all(row["tensor_cores"] and row["async_copies"] for row in products), products


def test_convolutions_fit_in_shared_memory(table):
    for row in table:
        if row["kernel"] in ("_conv1d_kernel", "_residual_unit_kernel"):
            tf32 = row["kernel"] == "_residual_unit_kernel" and row["dtype"] == "float32"
            assert row["shared"] <= (SHARED_TF32 if tf32 else 99 << 10), row


if __name__ == "__main__":
    main("every" in sys.argv)

"""The command `doctor`: versions, devices, and the backend of every op."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch
from dac_kernels import native
from rich.table import Table

from dac_fast import ops
from dac_fast.cli.terminal import out
from dac_fast.config import PRESETS
from dac_fast.storage.download import cached
from dac_fast.version import __version__


def doctor() -> None:
    """Say which versions, devices and backends there are, and why an op runs where it does."""
    for title, rows in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("models", _models()),
        ("ops", _ops()),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*map(str, row))
        out.print(table)


def _versions() -> Iterator[tuple[object, ...]]:
    yield "dac_fast", __version__
    yield "python", platform.python_version()
    for package in ("torch", "triton", "numpy", "soundfile"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "CUDA (of torch)", torch.version.cuda or "none: a CPU build of torch"


def _devices() -> Iterator[tuple[object, ...]]:
    yield "cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield (
            f"cuda:{index}",
            f"{properties.name}, {memory}, sm_{properties.major}{properties.minor}",
        )
    if not torch.cuda.is_available():
        yield "cuda", "no device"


def _models() -> Iterator[tuple[object, ...]]:
    for name in PRESETS:
        path = cached(name)
        yield name, path if path.exists() else f"not downloaded (dac-fast download {name})"


def _ops() -> Iterator[tuple[object, ...]]:
    """Per op and device: the backend that `auto` picks, and why none of the faster ones."""
    yield "native extension", native.status(), ""
    yield "DAC_FAST_BACKEND", os.environ.get("DAC_FAST_BACKEND", "not set: auto"), ""
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for name, arguments in _examples(device).items():
            backend, reason = ops.choose(name, *arguments)
            yield f"{name} on {device}", backend, reason
    # What the processor can do differs by dtype.
    x, weight, bias, *options = _examples("cpu")["conv1d"]
    backend, reason = ops.choose("conv1d", x.bfloat16(), weight.bfloat16(), bias, *options)
    yield "conv1d in bfloat16 on cpu", backend, reason


def _examples(device: str) -> dict[str, tuple[Any, ...]]:
    """Small arguments of every op."""
    x, vector, alpha = (
        torch.zeros(shape, device=device) for shape in ((1, 8, 64), (8,), (1, 8, 1))
    )
    seven, four, one = (torch.zeros(8, 8, kernel, device=device) for kernel in (7, 4, 1))
    project = [torch.zeros(4, 8, device=device)], [torch.zeros(4, device=device)]
    codebooks = [torch.zeros(16, 4, device=device)]
    restore = [torch.zeros(8, 4, device=device)], [torch.zeros(8, device=device)]
    return {
        "snake": (x, alpha),
        "conv1d": (x, seven, vector, 1, 3),
        "conv_transpose1d": (x, four, vector, 2, 1),
        "residual_unit": (x, x, seven, vector, alpha, one, vector, 1, 3),
        "rvq_encode": (x, *project, codebooks, *restore),
        "rvq_decode": (
            torch.zeros(1, 1, 64, dtype=torch.int64, device=device),
            codebooks,
            *restore,
        ),
        "stft_bands": (torch.zeros(1, 4096, device=device), [1024]),
        "disc_preprocess": (torch.zeros(1, 4096, device=device),),
    }

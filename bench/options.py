"""Options that several commands share, and the checks of their values."""

import fnmatch
import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.case import Case
from bench.cases import all_cases


class Device(str, Enum):
    """Where cases run."""

    cpu = "cpu"
    cuda = "cuda"


class Precision(str, Enum):
    """Precisions of the engine."""

    fp32 = "fp32"
    tf32x3 = "tf32x3"
    tf32 = "tf32"
    fp16 = "fp16"
    bf16 = "bf16"


class StepPrecision(str, Enum):
    """Precisions of the training step."""

    fp32 = "fp32"
    bf16 = "bf16"


class Step(str, Enum):
    """The steps of `gpu`, in their order."""

    build = "build"
    kernels = "kernels"
    tests = "tests"
    sanitizers = "sanitizers"
    cases = "cases"
    precisions = "precisions"
    train = "train"


OnDevice = Annotated[
    Device | None, typer.Option("--device", help="Default: cuda where there is one, else cpu.")
]
CaseNames = Annotated[
    list[str] | None,
    typer.Option(
        "--case",
        metavar="GLOB",
        help="Cases whose name matches, such as 'snake/*' or '*/backward/*'; may be repeated. "
        "Default: all.",
    ),
]
PeerNames = Annotated[
    list[str] | None,
    typer.Option("--peer", metavar="NAME", help="Only this one; may be repeated. Default: all."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Tiny sizes: tests the benchmark, says nothing of speed.")
]
Threads = Annotated[int | None, typer.Option(help="Of the CPU. Default: torch's own choice.")]
Budget = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Start nothing more after that long.")
]
PublishedPython = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="A Python that can import the published package: times it in the same run, with the "
        "same weights.",
    ),
]
Recording = Annotated[
    Path | None,
    typer.Option(help="A .wav of 16 bits, or a format of soundfile's. Default: a bundled clip."),
]
Commit = Annotated[str | None, typer.Option(help="Recorded where this is no git checkout.")]
Out = Annotated[
    Path | None, typer.Option(help="The result file. Default: one in bench/out, for the device.")
]


def name_of(device: Device | None) -> str:
    """The name of the device, by default of the fastest."""
    if device:
        return device.value
    return "cuda" if torch.cuda.is_available() else "cpu"


def must_be_there(device: str) -> None:
    """Ends the command where the device is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda, but torch sees no CUDA device")


def must_be_files(*paths: Path | None) -> None:
    """Ends the command where one of the paths is no file; None is passed over."""
    for path in paths:
        if path and not path.is_file():
            raise typer.BadParameter(f"{path} is no file")


def accepted(
    option: str, values: list[str] | None, available: Sequence[str], device: str
) -> list[str]:
    """The available values that are wanted, all of them where none is named."""
    for value in values or ():
        if value not in available:
            choice = ", ".join(map(repr, available))
            raise typer.BadParameter(f"{option} is {value!r}; accepted on {device}: {choice}")
    return [value for value in available if value in (values or available)]


def matching(patterns: list[str] | None, device: str, quick: bool) -> list[Case]:
    """The cases that match, in the order in which they are run."""
    patterns = patterns or ["*"]
    found = [
        case
        for case in all_cases(device, quick)
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)
    ]
    if not found:
        wanted = " or ".join(map(repr, patterns))
        hint = "`python -m bench list` prints them"
        raise typer.BadParameter(f"no case matches {wanted}; {hint}")
    return sorted(found, key=lambda case: case.priority)


def without_tf32() -> None:
    """Has single precision mean single precision in this process: the codes depend on it."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def say_written(paths: list[Path]) -> None:
    """Prints the paths of new files."""
    for path in paths:
        print(f"wrote {os.path.relpath(path)}")

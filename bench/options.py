"""Options that several commands share."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Device(str, Enum):
    """Where cases run."""

    cpu = "cpu"
    cuda = "cuda"


class Precision(str, Enum):
    """Precisions of the engine."""

    fp32 = "fp32"
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

"""Options that several commands share, and what they mean."""

import math
import os
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dac_fast import DAC, load
from dac_fast.audio.reading import readable_suffixes
from dac_fast.audio.sources import left_out
from dac_fast.cli.jobs import Existing
from dac_fast.cli.terminal import err, out
from dac_fast.cli.weights import fetch_if_published
from dac_fast.config import PRESETS
from dac_fast.ops.device import checked_device
from dac_fast.recordings.compress import Batching


class Format(str, Enum):
    """Formats of .dac files."""

    dac2 = "dac2"
    dac1 = "dac1"


class Precision(str, Enum):
    """Precisions of the convolutions."""

    fp32 = "fp32"
    tf32x3 = "tf32x3"
    tf32 = "tf32"
    fp16 = "fp16"
    bf16 = "bf16"


class Part(str, Enum):
    """Halves of a model."""

    encoder = "encoder"
    decoder = "decoder"


class Program(str, Enum):
    """Formats of exported models."""

    onnx = "onnx"
    onnx_streaming = "onnx-streaming"
    pt2 = "pt2"
    aoti = "aoti"


class ProgramPrecision(str, Enum):
    """Precisions of exported models."""

    fp32 = "fp32"
    fp16 = "fp16"


Inputs = Annotated[
    list[Path],
    typer.Argument(
        help="Files, or folders to go through with their subfolders; -: standard input."
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="A folder (subfolders are kept), or a file for a single input; -: standard output. "
        "Default: beside the input.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help=f"One of {', '.join(PRESETS)}, or the path of a checkpoint."
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")]
Parts = Annotated[
    Part | None, typer.Option(help="Load that half of the model alone. Default: both.")
]
Codebooks = Annotated[
    int | None,
    typer.Option(
        "--n-quantizers", "--codebooks", help="Use the first that many codebooks. Default: all."
    ),
]
ChunkSeconds = Annotated[
    float | None,
    typer.Option(
        help="Seconds that are encoded at once: changes memory and speed, not codes. Default: 10."
    ),
]
NormalizeDb = Annotated[
    float, typer.Option(help="Loudness in LUFS that a recording is brought to for encoding.")
]
NoNormalize = Annotated[
    bool, typer.Option("--no-normalize", help="Encode at the recording's own loudness.")
]
BatchSeconds = Annotated[
    float | None,
    typer.Option(
        help="Seconds of audio, of one or several files, that are computed at once; 0: one channel "
        "of one chunk. Default: 60 on a GPU, 0 on the CPU, where batches are slower."
    ),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="On a GPU, first time the ways to run each layer: minutes, for many hours of audio.",
    ),
]
WhenExisting = Annotated[
    Existing, typer.Option(help="What to do where an output is there already.")
]


def load_codec(name: str, device: str, parts: str | None = None) -> DAC:
    """The codec of that name, or half of it, on that device, folded for inference."""
    place = checked_device(device, "--device")
    fetch_if_published(name)
    return load(name, device=place, parts=parts).fold_weight_norm()


def say_toy(model: str) -> None:
    """Says that the default model is a small one, where it is taken."""
    if model == "tiny":
        out.print("model tiny: bundled to try things out, and small; --model 44khz sounds better")


def say_left_out(
    sources: Iterable[str | os.PathLike[str]], suffixes: Sequence[str] | None = None
) -> None:
    """Names the audio in those of the sources that are folders which is not of these suffixes.

    None: of what can be read.
    """
    for folder in filter(os.path.isdir, sources):
        if line := left_out(folder, readable_suffixes() if suffixes is None else suffixes):
            err.print(line)


def counts_in(codebooks: str) -> list[int]:
    """The numbers of codebooks in the text of `--codebooks`, as "1,3,9"."""
    try:
        return [int(part) for part in codebooks.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--codebooks is {codebooks!r}; accepted: whole numbers with commas, as 1,2,4,9"
        ) from error


def batching(device: str, seconds: float | None) -> Batching:
    """How much is computed at once, by `--device` and `--batch-seconds`."""
    if seconds is not None and not 0 <= seconds < math.inf:
        raise ValueError(f"--batch-seconds is {seconds}; accepted: 0 or above")
    return Batching.on(checked_device(device, "--device"), seconds)

"""Options that several commands of the command line share, and what they mean."""

import math
import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dac_fast.cli.jobs import Existing
from dac_fast.config import PRESETS


class Format(str, Enum):
    """Formats of .dac files."""

    dac2 = "dac2"
    dac1 = "dac1"


class Precision(str, Enum):
    """Precisions of the convolutions."""

    fp32 = "fp32"
    tf32 = "tf32"
    fp16 = "fp16"
    bf16 = "bf16"


class Program(str, Enum):
    """Formats of exported models."""

    onnx = "onnx"
    pt2 = "pt2"


Inputs = Annotated[
    list[Path], typer.Argument(help="Files, or folders to go through with their subfolders.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="A folder (subfolders are kept), or a file for a single input. Default: beside it.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help=f"One of {', '.join(PRESETS)}, or the path of a checkpoint."
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")]
Codebooks = Annotated[
    int | None,
    typer.Option(
        "--n-quantizers", "--codebooks", help="Use the first that many codebooks. Default: all."
    ),
]
ChunkSeconds = Annotated[
    float | None,
    typer.Option(
        help="Seconds that are encoded at once. Changes memory and speed, not the codes. Default: 10."
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
        help="Seconds of audio, of one or several files, that are computed at once; 0: chunk by chunk. "
        "Default: 60 on a GPU, 0 on the CPU, where batches are slower."
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


def load_codec(name: str, device: str):
    """The codec of that name on that device, folded for inference."""
    from dac_fast import load
    from dac_fast.ops.device import checked_device

    return load(name, device=checked_device(device, "--device")).fold_weight_norm()


def use_engine(codec, stage: str, precision: Precision | None, tuned_seconds: float):
    """Have an engine run that stage where a precision is asked for, and on a GPU.

    tuned_seconds: audio of the batches that its layers are timed on first; 0: they are not.
    """
    from dac_fast.recordings.compress import DEFAULT_CHUNK_SECONDS
    from dac_fast.recordings.windows import reach

    on_gpu = next(codec.parameters()).is_cuda
    if precision is None and not (on_gpu and codec.config.activation == "snake"):
        return
    frame = codec.hop_length / codec.sample_rate
    frames = round(DEFAULT_CHUNK_SECONDS / frame) + 2 * reach(codec.decoder)
    shapes = [(max(int(tuned_seconds / frame / frames), 1), frames)] if tuned_seconds else []
    # batches are too long for graphs to be of use
    codec.optimize({stage: precision and precision.value}, {stage: shapes}, memory=0)


def batching(device: str, batch_seconds: float | None) -> dict:
    """How many files are read and computed at once: options of `compress_all` and `decompress_all`."""
    from dac_fast.ops.device import checked_device

    on_gpu = checked_device(device, "--device").type == "cuda"
    if batch_seconds is None:
        batch_seconds = 60.0 if on_gpu else 0.0
    if not 0 <= batch_seconds < math.inf:
        raise ValueError(f"--batch-seconds is {batch_seconds}; accepted: 0 or above")
    return {"batch_seconds": batch_seconds, "threads": min(4, os.cpu_count() or 1) if on_gpu else 1}

"""Commands about models: `convert`, `export`, `download`."""

import io
from pathlib import Path
from typing import Annotated

import torch
import typer

from dac_fast import inference, load
from dac_fast.cli.jobs import Existing, may_write
from dac_fast.cli.options import Codebooks, Model, Parts, Program, WhenExisting
from dac_fast.cli.terminal import out
from dac_fast.cli.weights import fetch, fetch_if_published
from dac_fast.files import make_folder, write_bytes
from dac_fast.model.halves import PARTS


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint, or the name of a model.")],
    target: Annotated[
        Path, typer.Argument(help=".safetensors, .pth (published), or a folder (Hugging Face).")
    ],
    fold: Annotated[
        bool, typer.Option("--fold", help="Store folded weights (.safetensors): for inference.")
    ] = False,
    existing: WhenExisting = Existing.error,
) -> None:
    """Convert a checkpoint to another format."""
    if fold and target.suffix != ".safetensors":
        raise ValueError(f"--fold with {target}; accepted: with a target that ends in .safetensors")
    if not may_write(existing, target):
        return
    make_folder(target.parent)
    fetch_if_published(source)
    codec = load(source)
    (codec.fold_weight_norm() if fold else codec).save(target)
    out.print(f"wrote {target}")


def export(
    folder: Annotated[
        Path,
        typer.Argument(help="Where encoder and decoder are written; made where it is missing."),
    ],
    model: Model = "tiny",
    n_quantizers: Codebooks = None,
    parts: Parts = None,
    format: Annotated[Program, typer.Option(help="pt2 is torch.export's.")] = Program.onnx,
    existing: WhenExisting = Existing.error,
) -> None:
    """Write encoder (audio to codes) and decoder (codes to audio) for other runtimes.

    Both take any batch and length.
    """
    written = [parts.value] if parts else PARTS
    paths = [folder / f"{part}.{format.value}" for part in written]
    if not may_write(existing, *paths):
        return
    make_folder(folder)
    fetch_if_published(model)
    codec = load(model, parts=parts and parts.value)
    if format is Program.onnx:
        inference.export_onnx(codec, folder, n_quantizers)
    else:
        for path in paths:
            # Into a file, PyTorch's writer would turn a full disk into a RuntimeError.
            program = io.BytesIO()
            torch.export.save(inference.export(codec, path.stem, n_quantizers), program)
            write_bytes(path, program.getvalue())
    out.print(f"wrote {' and '.join(map(str, paths))}")


def download(
    names: Annotated[list[str], typer.Argument(help="Models: 44khz, 44khz_16kbps, 24khz, 16khz.")],
    mirror: Annotated[
        str | None,
        typer.Option(
            help="Address or folder laid out as the published releases, also DAC_FAST_MIRROR."
        ),
    ] = None,
) -> None:
    """Download published weights into the cache; a download that broke off is continued."""
    for name in names:
        out.print(f"{name}: {fetch(name, mirror)}")

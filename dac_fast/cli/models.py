"""Commands about checkpoints: `convert`, `download`."""

from pathlib import Path
from typing import Annotated

import typer

from dac_fast import load
from dac_fast.cli.jobs import Existing, to_write
from dac_fast.cli.options import WhenExisting
from dac_fast.cli.terminal import out
from dac_fast.cli.weights import fetch, fetch_if_published
from dac_fast.files import make_folder


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
    if not to_write(existing, target):
        return
    make_folder(target.parent)
    fetch_if_published(source)
    codec = load(source)
    (codec.fold_weight_norm() if fold else codec).save(target)
    out.print(f"wrote {target}")


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

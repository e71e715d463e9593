"""The command line, `dac-fast`: every command is a thin layer over the library.

Over several files, one that fails is reported in a line and the others are done; the exit code is
then 1. A command is a function with typer's annotations, entered in `COMMANDS`.
"""

import sys
from typing import Annotated

import torch
import typer

from dac_fast.cli.doctor import doctor
from dac_fast.cli.evaluation import evaluate
from dac_fast.cli.export import export
from dac_fast.cli.files import decode, encode
from dac_fast.cli.info import info
from dac_fast.cli.models import convert, download
from dac_fast.cli.reconstruct import reconstruct
from dac_fast.cli.serve import serve
from dac_fast.cli.terminal import fail, out
from dac_fast.cli.tokenize import tokenize
from dac_fast.cli.training import TrainCommand, curves, train
from dac_fast.processors import processors
from dac_fast.version import __version__

# In the order in which the help lists them.
COMMANDS = (
    encode,
    decode,
    reconstruct,
    train,
    curves,
    tokenize,
    serve,
    evaluate,
    info,
    convert,
    export,
    download,
    doctor,
)

app = typer.Typer(
    help="Descript Audio Codec: audio to codes and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command(cls=TrainCommand if command is train else None)(command)


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Descript Audio Codec: audio to codes and back."""
    if version:
        out.print(__version__)
        raise typer.Exit
    torch.set_num_threads(min(torch.get_num_threads(), processors()))


def main() -> None:
    """Entry point: what a user can cause ends in one line and exit code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        fail(error)
        sys.exit(1)

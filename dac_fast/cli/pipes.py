"""`-` in the place of a file: standard input, and standard output."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dac_fast.cli.terminal import out

STANDARD = Path("-")


@contextmanager
def piped(
    inputs: list[Path], output: Path | None, suffix: str
) -> Iterator[tuple[list[Path], Path | None]]:
    """The inputs and the output of a command, with files in place of `-`.

    What is read and written has to be gone through more than once. Where standard output is
    written, whatever else the command says goes to standard error.

    Args:
        inputs, output: as given. Without an output, standard input goes to standard output.
        suffix: of the output.
    Raises:
        ValueError: `-` stands beside other inputs, for what comes of a folder, or for a terminal.
    """
    if STANDARD not in (*inputs, output):
        yield inputs, output
        return
    if len(inputs) != 1 or inputs[0].is_dir():
        raise ValueError("- is one file; accepted: a single input, which is no folder")
    if (output or inputs[0]) == STANDARD and sys.stdout.isatty():
        raise ValueError("standard output is a terminal; accepted: a pipe, or --output FILE")
    with tempfile.TemporaryDirectory() as folder:
        if inputs == [STANDARD]:
            inputs, output = [Path(folder, "standard input")], output or STANDARD
            with open(inputs[0], "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        if output != STANDARD:
            yield inputs, output
            return
        written = Path(folder, f"standard output{suffix}")
        out.stderr = True
        try:
            yield inputs, written
        finally:
            out.stderr = False
        with open(written, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)

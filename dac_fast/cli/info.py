"""The command `info`: what a .dac file or a checkpoint holds."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dac_fast.cli.jobs import attempt
from dac_fast.cli.terminal import fail, one_line, out
from dac_fast.config import PRESETS, QUANTIZER_FIELDS
from dac_fast.storage import checkpoint, download
from dac_fast.storage.dac2 import DACFile


def info(
    paths: Annotated[
        list[Path], typer.Argument(help=".dac files, checkpoints, or names of models.")
    ],
) -> None:
    """Say what a .dac file or a checkpoint holds."""
    failed = False
    for path in paths:
        facts = attempt(describe, path)
        if isinstance(facts, Exception):
            fail(facts, path)
            failed = True
            continue
        table = Table(title=str(path), show_header=False, title_justify="left")
        for key, value in facts.items():
            table.add_row(key, one_line(str(value)))
        out.print(table)
    if failed:
        raise typer.Exit(1)


def describe(path: Path) -> dict[str, object]:
    """Facts by their name, for a table.

    Args:
        path: of a .dac file or a checkpoint, or the name of a preset.
    Raises:
        ValueError: it cannot be read, or is not downloaded.
    """
    return _of_file(path) if path.suffix == ".dac" else _of_checkpoint(path)


def _of_file(path: Path) -> dict[str, object]:
    file = DACFile.load(path)
    bitrate = f"{file.bitrate / 1000:.2f} kbit/s" if file.bitrate else "not known without the model"
    return {
        "model": file.model or "not named in the file",
        "recording": f"{file.duration:.3f} s, {file.sample_rate} Hz, {file.channels} channels",
        "loudness": f"{file.input_db:.2f} LUFS",
        "codes": f"{file.n_codebooks} codebooks × {file.n_frames} frames per "
        f"{'pair of channels' if file.stereo else 'channel'}",
        "bitrate": bitrate,
        "chunks": f"{file.chunk_length} frames, {'padded' if file.padding else 'without padding'}",
        "size": f"{path.stat().st_size} bytes",
    }


def _of_checkpoint(path: Path) -> dict[str, object]:
    name = str(path)
    if name in PRESETS:
        path = download.cached(name)
        if not path.exists():
            raise ValueError(f"{name} is not downloaded; dac-fast download {name} does that")
    config, state = checkpoint.read(path)
    values = config.to_dict()
    bitrate = {"bitrate": f"{config.bitrate / 1000:.2f} kbit/s"}
    if config.continuous:
        values = {key: value for key, value in values.items() if key not in QUANTIZER_FIELDS}
        bitrate = {}
    return {
        "checkpoint": path,
        **{key.replace("_", " "): value for key, value in values.items()},
        "hop length": config.hop_length,
        **bitrate,
        "parameters": f"{sum(tensor.numel() for tensor in state.values()):,}",
    }

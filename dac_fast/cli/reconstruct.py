"""The command `reconstruct`: recordings through the codec and back, to be measured and heard."""

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.table import Column, Table

from dac_fast import plots
from dac_fast.audio import writing
from dac_fast.audio.reading import KNOWN_SUFFIXES, read, readable_suffixes
from dac_fast.cli.jobs import Advance, Existing, Job, Kind, one_by_one, plan, run, to_write
from dac_fast.cli.options import (
    Device,
    Inputs,
    Model,
    WhenExisting,
    counts_in,
    load_codec,
    say_left_out,
    say_toy,
)
from dac_fast.cli.pipes import STANDARD
from dac_fast.cli.terminal import out
from dac_fast.evaluation.listen import Clip, compared, write_page
from dac_fast.recordings.checks import check_options
from dac_fast.recordings.compress import use_engine

COLUMNS = (
    "code-\nbooks",
    "kbit/s",
    "ratio",
    "× real\ntime",
    "SI-SDR\ndB",
    "mel\ndistance",
    "the copy\nis",
)
# Of mel distances up to the number; the published codec has about 1.1 at 8 kbit/s.
WORDS = {1.2: "close", 1.7: "fair", math.inf: "rough"}


def reconstruct(
    inputs: Inputs,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder (subfolders are kept), or a file.")
    ],
    model: Model = "tiny",
    device: Device = "auto",
    codebooks: Annotated[
        str | None,
        typer.Option(
            "--codebooks",
            "--n-quantizers",
            help="Use the first that many codebooks. Of several, as 1,3,9, the most give the "
            "output, the others wav files beside it. Default: all.",
        ),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Also a PNG of all spectrograms beside each output.")
    ] = False,
    listen: Annotated[
        bool, typer.Option("--listen", help="Also a page with players beside each output.")
    ] = False,
    existing: WhenExisting = Existing.error,
) -> None:
    """Compress and restore recordings, and say what it cost and how near they come."""
    if STANDARD in (*inputs, output):
        raise ValueError("- with reconstruct; accepted: files and folders; encode, decode take -")
    if plot:
        plots.require()
    codec = load_codec(model, device)
    counts = sorted({codec.config.n_codebooks} if codebooks is None else set(counts_in(codebooks)))
    for count in counts:
        check_options(codec, n_quantizers=count)
    fewer = {count: f".{count}_codebooks.wav" for count in counts[:-1]}
    extra = (*fewer.values(), *([".png"] if plot else []), *([".html"] if listen else []))
    say_left_out(inputs)
    jobs = plan(inputs, output, Kind(readable_suffixes(), ".wav", KNOWN_SUFFIXES, extra))
    use_engine(codec, "decode", None, 0)
    say_toy(model)
    # What is imported and set up at the first call is not the codec's speed.
    warm_up = np.zeros((1, codec.sample_rate // 10), np.float32)
    compared(codec, "", warm_up, codec.sample_rate, counts)
    table = Table(Column("file", overflow="fold"), *COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)

    def work(job: Job, advance: Advance) -> float:
        wanted = to_write(existing, job.target, *job.extra)
        audio, rate = read(job.source)
        clip = compared(codec, job.source.name, audio, rate, counts)
        replace = existing is Existing.overwrite
        for version in clip.versions:
            beside = fewer.get(version.codebooks)
            target = job.target.with_suffix(beside) if beside else job.target
            if target in wanted:
                writing.write(target, version.audio, rate, replace=replace)
        if (picture := job.target.with_suffix(".png")) in wanted:
            plots.spectrograms(picture, _pictures(clip), rate)
        if (page := job.target.with_suffix(".html")) in wanted:
            write_page(page, codec, [clip])
        for row in _rows(clip):
            table.add_row(*row)
        seconds: float = audio.shape[1] / rate
        advance(seconds)
        return seconds

    try:
        run(jobs, one_by_one(work), "reconstructed", existing)
    finally:
        if table.row_count:
            out.print(table)


def _pictures(clip: Clip) -> dict[str, np.ndarray]:
    restored = {}
    for version in reversed(clip.versions):
        codebooks = "1 codebook" if version.codebooks == 1 else f"{version.codebooks} codebooks"
        restored[f"restored, {codebooks}, {version.quality.kbps:.2f} kbit/s"] = version.audio
    return {"original": clip.audio, **restored}


def _rows(clip: Clip) -> list[tuple[str, ...]]:
    """Rows of the table, the most codebooks first."""
    seconds = clip.audio.shape[1] / clip.sample_rate
    return [
        (
            clip.name,
            str(version.codebooks),
            _number(version.quality.kbps, 2),
            _number(version.quality.ratio, 0),
            _number(seconds / version.seconds, 1),
            _number(version.quality.si_sdr, 2),
            _number(version.quality.mel_distance, 3),
            _in_words(version.quality.mel_distance),
        )
        for version in reversed(clip.versions)
    ]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _in_words(mel_distance: float | None) -> str:
    if mel_distance is None:
        return "too short"
    return next(words for most, words in WORDS.items() if mel_distance <= most)

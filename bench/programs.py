"""Commands that measure whole programs: the server, streams, a corpus, loading, codes of files."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.document import OUT
from bench.options import (
    Commit,
    OnDevice,
    Out,
    PublishedPython,
    Quick,
    Threads,
    must_be_there,
    name_of,
    say_written,
)
from bench.report import write_report


def serve(
    model: Annotated[str, typer.Option(help="Of all servers.")] = "tiny",
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 60.0,
    most_streams: Annotated[int, typer.Option(help="Streams to try at most.")] = 256,
    soak: Annotated[
        float, typer.Option(metavar="MINUTES", help="Of streams that come and go at random.")
    ] = 0.0,
    published_python: PublishedPython = None,
    out: Out = None,
    commit: Commit = None,
) -> None:
    """Load the server, and its peers: latencies, time to first audio, streams held."""
    # Imported here, since it needs the extra `serve`.
    from bench.serving.measure import ServeSettings, run_serve

    settings = ServeSettings(
        model=model,
        seconds=seconds,
        most_streams=most_streams,
        published_python=published_python,
        soak_minutes=soak,
    )
    path = out or OUT / "serve.json"
    run_serve(settings, path, commit)
    say_written([path, *write_report(path)])


def soak(
    minutes: Annotated[float, typer.Option(help="How long.")] = 10.0,
    model: Annotated[str, typer.Option(help="A preset, or the path of a checkpoint.")] = "tiny",
    slots: Annotated[int, typer.Option(help="For streams, in each direction.")] = 64,
    threads: Threads = None,
    out: Out = None,
    commit: Commit = None,
) -> None:
    """Stream and batch at random on the CPU, check every result, and watch memory and handles."""
    # Imported here, since its picture needs matplotlib.
    from bench.soak import SoakSettings, run_soak

    if threads:
        torch.set_num_threads(threads)
    path = out or OUT / "soak.json"
    document = run_soak(SoakSettings(minutes, model, slots), path, commit)
    say_written([path, *write_report(path)])
    if document["samples"][-1]["wrong"]:
        raise typer.Exit(1)


def corpus(
    device: OnDevice = None,
    model: Annotated[str, typer.Option(help="Of all ways.")] = "tiny",
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of recordings. Default: a clip, often.")
    ] = None,
    most: Annotated[int, typer.Option(help="Recordings to encode at most.")] = 100,
    rounds: Annotated[int, typer.Option(help="In which the ways take turns.")] = 1,
    published_python: PublishedPython = None,
    quick: Quick = False,
    out: Out = None,
    commit: Commit = None,
) -> None:
    """Time a corpus to codes: one and two workers, a loop, the published package in a pool."""
    # Imported here, since it needs Ray, which a machine that only times kernels may lack.
    from bench.corpus import CLIP, CorpusSettings, run_corpus
    from dac_fast.audio.sources import files_below

    name = name_of(device)
    must_be_there(name)
    count = 4 if quick else most
    files = [Path(file.path) for file in files_below(data)] if data else [CLIP] * count
    settings = CorpusSettings(name, model, files[:count], rounds, published_python)
    path = out or OUT / f"{name}_corpus.json"
    run_corpus(settings, path, commit)
    say_written([path, *write_report(path)])


def codes(
    published_python: Annotated[
        str, typer.Option(metavar="PATH", help="A Python that can import the published package.")
    ],
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Of recordings.")],
    minutes: Annotated[float, typer.Option(help="Of audio, at most.")] = 5.0,
    preset: Annotated[str, typer.Option(help="The model's size.")] = "44khz",
    out: Out = None,
    commit: Commit = None,
) -> None:
    """Compare codes of recordings with the published package's, on the CPU."""
    from bench.codes import run_codes
    from dac_fast.audio.sources import files_below

    path = out or OUT / "cpu_codes.json"
    files = [Path(file.path) for file in files_below(data)]
    run_codes(files, minutes, published_python, path, preset, commit)
    say_written([path, *write_report(path)])


def halves(
    preset: Annotated[str, typer.Option(help="Of the codec.")] = "44khz",
    rounds: Annotated[int, typer.Option(help="How often each part is loaded.")] = 3,
    out: Out = None,
    commit: Commit = None,
) -> None:
    """Measure memory and time of loading half a codec, against the whole."""
    from bench.halves import run_halves

    path = out or OUT / "cpu_halves.json"
    run_halves(preset, rounds, path, commit)
    say_written([path, *write_report(path)])

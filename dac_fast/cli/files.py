"""Commands that make files of files: `encode`, `decode`."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from dac_fast import DAC
from dac_fast.audio import writing
from dac_fast.audio.reading import KNOWN_SUFFIXES, readable_suffixes
from dac_fast.audio.resample import Samples
from dac_fast.cli.jobs import Advance, Existing, Job, Kind, attempt, by_size, plan, run
from dac_fast.cli.options import (
    BatchSeconds,
    ChunkSeconds,
    Codebooks,
    Device,
    Format,
    Inputs,
    Model,
    NoNormalize,
    NormalizeDb,
    Output,
    Precision,
    Tune,
    WhenExisting,
    batching,
    load_codec,
    say_left_out,
    say_toy,
)
from dac_fast.cli.pipes import piped
from dac_fast.config import PRESETS
from dac_fast.recordings.checks import check_options
from dac_fast.recordings.compress import compress_all, decompress_all, use_engine
from dac_fast.storage.dac2 import DACFile


def encode(
    inputs: Inputs,
    output: Output = None,
    model: Model = "tiny",
    device: Device = "auto",
    n_quantizers: Codebooks = None,
    chunk_seconds: ChunkSeconds = None,
    normalize_db: NormalizeDb = -16.0,
    no_normalize: NoNormalize = False,
    format: Annotated[Format, typer.Option(help="dac1 is the published package's.")] = Format.dac2,
    no_padding: Annotated[
        bool,
        typer.Option(
            "--no-padding",
            help="The published package's chunk mode: chunks stand alone. For dac1 files.",
        ),
    ] = False,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of the encoder. Default: fp32, which gives the published codes."),
    ] = None,
    batch_seconds: BatchSeconds = None,
    tune: Tune = False,
    existing: WhenExisting = Existing.error,
) -> None:
    """Compress recordings to .dac files."""
    if no_padding and format is not Format.dac1:
        raise ValueError(
            "--no-padding makes files for the published package; accepted: with --format dac1"
        )
    normalize = None if no_normalize else normalize_db
    with piped(inputs, output, ".dac") as (sources, target):
        say_left_out(sources)
        jobs = plan(sources, target, Kind(readable_suffixes(), ".dac", (".dac",)))
        codec = load_codec(model, device, "encoder")
        check_options(codec, chunk_seconds, n_quantizers, normalize)
        batches = batching(device, batch_seconds)
        use_engine(codec, "encode", _name(precision), batches.seconds if tune else 0)
        say_toy(model)

        def save(job: Job, file: DACFile) -> float:
            file.save(job.target, format.value, replace=existing is Existing.overwrite)
            return file.duration

        def work(jobs: list[Job], advance: Advance) -> Iterator[tuple[Job, float | Exception]]:
            jobs = by_size(jobs)
            compressed = compress_all(
                codec,
                [job.source for job in jobs],
                chunk_seconds,
                n_quantizers,
                normalize,
                not no_padding,
                batch_seconds=batches.seconds,
                threads=batches.threads,
                progress=advance,
            )
            for number, file in compressed:
                job = jobs[number]
                yield job, file if isinstance(file, Exception) else attempt(save, job, file)

        def difference(target: Path) -> str:
            return _difference(DACFile.load(target), codec, format, n_quantizers)

        run(jobs, work, "encoded", existing, difference)


def _difference(file: DACFile, codec: DAC, format: Format, n_quantizers: int | None) -> str:
    """In what a file differs from one that is made with these settings; "": in nothing."""
    wanted: dict[str, object] = {
        "format": format.value,
        "codebooks": n_quantizers or codec.config.n_codebooks,
        "model": codec.name,
        "rate": codec.sample_rate,
    }
    made: dict[str, object] = {
        "format": "dac1" if file.codebook_size is None else "dac2",
        "codebooks": file.n_codebooks,
        "model": file.model,
        "rate": file.model_sample_rate,
    }
    # These files do not say it.
    known = ("format", "codebooks") if made["format"] == "dac1" else tuple(made)
    return ", ".join(
        f"{name} {made[name]!r}, now {wanted[name]!r}"
        for name in known
        if made[name] != wanted[name]
    )


def decode(
    inputs: Inputs,
    output: Output = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Default: the model that the file names.")
    ] = None,
    device: Device = "auto",
    suffix: Annotated[
        str, typer.Option(help="Audio format, where the output is a folder.")
    ] = ".wav",
    subtype: Annotated[
        str, typer.Option(help="Sample format: PCM_16, PCM_24, FLOAT, … as soundfile names it.")
    ] = "",
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of the decoder. Default: fp16 on a GPU, fp32 on the CPU."),
    ] = None,
    batch_seconds: BatchSeconds = None,
    tune: Tune = False,
    existing: WhenExisting = Existing.error,
) -> None:
    """Restore recordings from .dac files."""
    suffix = f".{suffix.lower().removeprefix('.')}"
    if suffix not in writing.WRITABLE:
        raise ValueError(f"--suffix is {suffix!r}; accepted: {', '.join(writing.WRITABLE)}")
    batches = batching(device, batch_seconds)
    codecs: dict[str, DAC] = {}
    loading = threading.Lock()

    def load(path: Path) -> tuple[DAC, DACFile]:
        file = DACFile.load(path)
        # A file names a preset at most: it is not to choose which path is opened.
        if not model and file.model not in PRESETS:
            named = f"names the model {file.model!r}" if file.model else "does not name its model"
            raise ValueError(f"the file {named}; give it by --model")
        name = model or file.model
        with loading:
            if name not in codecs:
                codec = load_codec(name, device, "decoder")
                use_engine(codec, "decode", _name(precision), batches.seconds if tune else 0)
                codecs[name] = codec
            return codecs[name], file

    def save(job: Job, file: DACFile, blocks: Iterator[Samples], advance: Advance) -> float:
        rate, replace = file.sample_rate, existing is Existing.overwrite
        with writing.AudioWriter(
            job.target, rate, file.channels, subtype or None, replace
        ) as writer:
            for block in blocks:
                writer.write(block)
                advance(block.shape[1] / rate)
        return file.duration

    def work(jobs: list[Job], advance: Advance) -> Iterator[tuple[Job, float | Exception]]:
        jobs = by_size(jobs)
        decompressed = decompress_all(
            load,
            [job.source for job in jobs],
            batch_seconds=batches.seconds,
            threads=batches.threads,
        )
        for number, result in decompressed:
            job = jobs[number]
            if isinstance(result, Exception):
                yield job, result
            else:
                yield job, attempt(save, job, *result, advance)

    with piped(inputs, output, suffix) as (sources, target):
        run(
            plan(sources, target, Kind((".dac",), suffix, KNOWN_SUFFIXES)),
            work,
            "decoded",
            existing,
        )


def _name(precision: Precision | None) -> str | None:
    return None if precision is None else precision.value

"""The command line, `dac-fast`: every command is a thin layer over the library.

Over several files, one that fails is reported in a line and the others are done; the exit code is then 1.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dac_fast.config import PRESETS
from dac_fast.version import __version__

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")

app = typer.Typer(
    help="Descript Audio Codec: audio to codes and back.", no_args_is_help=True, pretty_exceptions_enable=False
)
out = Console(soft_wrap=True, highlight=False)
err = Console(soft_wrap=True, highlight=False, stderr=True)


class Existing(str, Enum):
    """What to do where an output is there already."""

    error = "error"
    skip = "skip"
    overwrite = "overwrite"


class Format(str, Enum):
    """Formats of .dac files."""

    dac2 = "dac2"
    dac1 = "dac1"


Inputs = Annotated[list[Path], typer.Argument(help="Files, or folders to go through with their subfolders.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="A folder (subfolders are kept), or a file for a single input. Default: beside it."
    ),
]
Model = Annotated[
    str, typer.Option("--model", "-m", help=f"One of {', '.join(PRESETS)}, or the path of a checkpoint.")
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")]
Codebooks = Annotated[
    int | None,
    typer.Option("--n-quantizers", "--codebooks", help="Use the first that many codebooks. Default: all."),
]
ChunkSeconds = Annotated[
    float | None,
    typer.Option(help="Seconds that are encoded at once. Changes memory and speed, not the codes. Default: 10."),
]
NormalizeDb = Annotated[float, typer.Option(help="Loudness in LUFS that a recording is brought to for encoding.")]
NoNormalize = Annotated[bool, typer.Option("--no-normalize", help="Encode at the recording's own loudness.")]
WhenExisting = Annotated[Existing, typer.Option(help="What to do where an output is there already.")]


@app.callback(invoke_without_command=True)
def version_option(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False):
    """Descript Audio Codec: audio to codes and back."""
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
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
        typer.Option("--no-padding", help="The published package's chunk mode: chunks stand alone. For dac1 files."),
    ] = False,
    existing: WhenExisting = Existing.error,
):
    """Compress recordings to .dac files."""
    if no_padding and format is not Format.dac1:
        raise ValueError("--no-padding makes files for the published package; accepted: with --format dac1")
    jobs = plan(inputs, output, AUDIO_SUFFIXES, ".dac", (".dac",))
    codec = load_codec(model, device)

    def work(job: Job, advance):
        from dac_fast.model.recordings import compress

        file = compress(
            codec, job.source, chunk_seconds, n_quantizers, None if no_normalize else normalize_db, not no_padding,
            advance,
        )  # fmt: skip
        job.target.parent.mkdir(parents=True, exist_ok=True)
        file.save(job.target, format=format.value)
        return file.duration

    run(jobs, work, "encoded", existing)


@app.command()
def decode(
    inputs: Inputs,
    output: Output = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the model that the file names.")] = None,
    device: Device = "auto",
    suffix: Annotated[str, typer.Option(help="Audio format, where the output is a folder.")] = ".wav",
    subtype: Annotated[str, typer.Option(help="Sample format: PCM_16, PCM_24, FLOAT, … as soundfile names it.")] = "",
    existing: WhenExisting = Existing.error,
):
    """Restore recordings from .dac files."""
    from dac_fast.audio import AudioWriter
    from dac_fast.container import DACFile
    from dac_fast.model.recordings import decompressed_blocks

    suffix = suffix if suffix.startswith(".") else f".{suffix}"
    jobs = plan(inputs, output, (".dac",), suffix, AUDIO_SUFFIXES)
    codecs = {}

    def work(job: Job, advance):
        file = DACFile.load(job.source)
        name = model or file.model
        if not name:
            raise ValueError("the file does not name its model; give it by --model")
        if name not in codecs:
            codecs[name] = load_codec(name, device)
        job.target.parent.mkdir(parents=True, exist_ok=True)
        options = {"subtype": subtype} if subtype else {}
        with AudioWriter(job.target, file.sample_rate, file.channels, **options) as writer:
            for block in decompressed_blocks(codecs[name], file):
                writer.write(block)
                advance(block.shape[1] / file.sample_rate)
        return file.duration

    run(jobs, work, "decoded", existing)


@app.command()
def reconstruct(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder (subfolders are kept), or a file.")],
    model: Model = "tiny",
    device: Device = "auto",
    n_quantizers: Codebooks = None,
    plot: Annotated[bool, typer.Option("--plot", help="Also a PNG of both spectrograms beside each output.")] = False,
    existing: WhenExisting = Existing.error,
):
    """Compress and restore recordings, and say what it cost and how near they come."""
    from dac_fast.audio import read, write
    from dac_fast.reconstruction import report

    jobs = plan(inputs, output, AUDIO_SUFFIXES, ".wav", AUDIO_SUFFIXES)
    codec = load_codec(model, device)
    table = Table("file", "kbit/s", "ratio", "× real time", "SI-SDR dB", "mel distance", title=f"model {model}")

    def work(job: Job, advance):
        audio, rate = read(job.source)
        start = time.perf_counter()
        file = codec.compress((audio, rate), n_quantizers=n_quantizers)
        restored, _ = codec.decompress(file)
        elapsed = time.perf_counter() - start
        job.target.parent.mkdir(parents=True, exist_ok=True)
        write(job.target, restored, rate)
        if plot:
            from dac_fast.plots import spectrograms

            spectrograms(job.target.with_suffix(".png"), audio, restored, rate)
        numbers = report(file, audio, restored, elapsed)
        table.add_row(str(job.source.name), *numbers)
        advance(file.duration)
        return file.duration

    try:
        run(jobs, work, "reconstructed", existing)
    finally:
        out.print(table)


@app.command()
def info(paths: Annotated[list[Path], typer.Argument(help=".dac files, checkpoints, or names of models.")]):
    """Say what a .dac file or a checkpoint holds."""
    from dac_fast import checkpoint, download
    from dac_fast.container import DACFile

    def describe(path: Path) -> dict:
        if path.suffix == ".dac":
            file = DACFile.load(path)
            return {
                "model": file.model or "not named in the file",
                "recording": f"{file.duration:.3f} s, {file.sample_rate} Hz, {file.channels} channels",
                "loudness": f"{file.input_db:.2f} LUFS",
                "codes": f"{file.n_codebooks} codebooks × {file.n_frames} frames per channel",
                "bitrate": "not known without the model" if file.bitrate is None else f"{file.bitrate / 1000:.2f} kbit/s",
                "chunks": f"{file.chunk_length} frames, {'padded' if file.padding else 'without padding'}",
                "size": f"{path.stat().st_size} bytes",
            }
        source = path if path.exists() or path.suffix else download.cached(str(path))
        config, state = checkpoint.read(source)
        parameters = sum(tensor.numel() for tensor in state.values())
        return {"checkpoint": source, **config.to_dict(), "hop length": config.hop_length,
                "bitrate": f"{config.bitrate / 1000:.2f} kbit/s", "parameters": f"{parameters:,}"}  # fmt: skip

    failed = 0
    for path in paths:
        try:
            facts = describe(path)
        except (ValueError, OSError) as error:
            fail(error, path)
            failed += 1
            continue
        table = Table(title=str(path), show_header=False, title_justify="left")
        for key, value in facts.items():
            table.add_row(key.replace("_", " "), str(value))
        out.print(table)
    if failed:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint, or the name of a model.")],
    target: Annotated[Path, typer.Argument(help=".safetensors, .pth (published), or a folder (Hugging Face).")],
    fold: Annotated[bool, typer.Option("--fold", help="Store folded weights (.safetensors): for inference.")] = False,
    existing: WhenExisting = Existing.error,
):
    """Convert a checkpoint to another format."""
    from dac_fast import load

    if target.exists() and existing is not Existing.overwrite:
        if existing is Existing.skip:
            return
        raise FileExistsError(f"{target} exists; --existing overwrite replaces it")
    codec = load(source)
    (codec.fold_weight_norm() if fold else codec).save(target)
    out.print(f"wrote {target}")


@app.command()
def download(
    names: Annotated[list[str], typer.Argument(help="Models: 44khz, 44khz_16kbps, 24khz, 16khz.")],
    mirror: Annotated[
        str | None, typer.Option(help="Address or folder laid out as the published releases, also DAC_FAST_MIRROR.")
    ] = None,
):
    """Download published weights into the cache; a download that broke off is continued."""
    from dac_fast.download import download as fetch

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    for name in names:
        with Progress(*columns, console=err, transient=True) as progress:
            task = progress.add_task(name, total=None)
            path = fetch(name, mirror, lambda done, total: progress.update(task, completed=done, total=total))  # noqa: B023
        out.print(f"{name}: {path}")


@app.command()
def doctor():
    """Say which versions, devices and backends there are, and why an op runs where it does."""
    from dac_fast.doctor import report

    report(out)


@dataclass(frozen=True)
class Job:
    """One input and where its output goes."""

    source: Path
    target: Path


def plan(inputs: list[Path], output: Path | None, sources: tuple, suffix: str, targets: tuple) -> list[Job]:
    """Which file becomes which.

    Args:
        inputs: files and folders; of folders, the files whose suffix is in `sources`.
        output: a folder, a file (by its suffix, in `targets`) where there is one input file, or None.
        suffix: of the outputs.
    Raises:
        ValueError: there is nothing to do, or two outputs would be one file.
    """
    as_file = output is not None and output.suffix.lower() in targets and not output.is_dir()
    if as_file and (len(inputs) != 1 or inputs[0].is_dir()):
        raise ValueError(f"--output {output} is a file; accepted for several inputs: a folder")
    jobs = []
    for item in inputs:
        found = sorted(p for p in item.rglob("*") if p.suffix.lower() in sources) if item.is_dir() else [item]
        if not found:
            raise ValueError(f"{item} holds no file that ends in {', '.join(sources)}")
        for source in found:
            relative = source.relative_to(item) if item.is_dir() else Path(source.name)
            folder = output if output is not None else (item if item.is_dir() else item.parent)
            jobs.append(Job(source, output if as_file else (folder / relative).with_suffix(suffix)))
    by_target = {}
    for job in jobs:
        other = by_target.setdefault(job.target, job)
        if other is not job:
            raise ValueError(f"{other.source} and {job.source} would both become {job.target}; convert them apart")
    return jobs


def run(jobs: list[Job], work: Callable[[Job, Callable[[float], None]], float], verb: str, existing: Existing):
    """Do every job, under a progress bar; report failures in a line each, then exit with 1 if there were any."""
    done = failed = skipped = 0
    seconds, start = 0.0, time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[audio]}"))
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(verb, total=len(jobs), audio="")

        def advance(more: float):
            nonlocal seconds
            seconds += more
            progress.update(task, audio=f"{seconds:.0f} s of audio")

        for job in jobs:
            if job.target.exists() and existing is not Existing.overwrite:
                if existing is Existing.skip:
                    skipped += 1
                else:
                    failed += 1
                    fail(FileExistsError(f"{job.target} exists; --existing overwrite replaces it"), job.source)
            else:
                try:
                    work(job, advance)
                    done += 1
                # the faults of one file: its content, its place, its model; anything else is a bug and stops the run
                except (ValueError, OSError) as error:
                    failed += 1
                    fail(error, job.source)
            progress.advance(task)
    elapsed = time.perf_counter() - start
    counts = [f"{verb} {done} of {len(jobs)}"]
    counts += [f"{number} {what}" for number, what in ((skipped, "skipped"), (failed, "failed")) if number]
    speed = f": {seconds:.1f} s of audio in {elapsed:.1f} s, {seconds / elapsed:.1f} × real time" if done else ""
    out.print(", ".join(counts) + speed)
    if failed:
        raise typer.Exit(1)


def load_codec(name: str, device: str):
    """The codec of that name on that device, folded for inference."""
    import torch

    from dac_fast import load

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device!r}; accepted: auto, cpu, cuda, cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {device!r}; there are {torch.cuda.device_count()} CUDA devices")
    return load(name, device=resolved).fold_weight_norm()


def fail(error: Exception, subject=None):
    """One line about what went wrong, naming the file unless the message does."""
    message = " ".join(str(error).split()) or type(error).__name__
    prefix = f"{subject}: " if subject is not None and str(subject) not in message else ""
    err.print(f"error: {prefix}{message}", markup=False)


def main():
    """Entry point: what a user can cause ends in one line and exit code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        fail(error)
        sys.exit(1)

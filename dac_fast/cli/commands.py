"""The command line, `dac-fast`: every command is a thin layer over the library.

Over several files, one that fails is reported in a line and the others are done; the exit code is then 1.
"""

import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dac_fast.audio.reading import AUDIO_SUFFIXES
from dac_fast.cli.jobs import (
    Existing,
    Job,
    attempt,
    by_size,
    err,
    fail,
    may_write,
    one_by_one,
    out,
    plan,
    run,
)
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
    Program,
    Tune,
    WhenExisting,
    batching,
    load_codec,
    use_engine,
)
from dac_fast.cli.serve import serve
from dac_fast.config import PRESETS
from dac_fast.files import make_folder
from dac_fast.version import __version__

app = typer.Typer(
    help="Descript Audio Codec: audio to codes and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
):
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
):
    """Compress recordings to .dac files."""
    if no_padding and format is not Format.dac1:
        raise ValueError(
            "--no-padding makes files for the published package; accepted: with --format dac1"
        )
    from dac_fast.recordings.compress import check_options, compress_all

    normalize = None if no_normalize else normalize_db
    jobs = plan(inputs, output, AUDIO_SUFFIXES, ".dac", (".dac",))
    codec = load_codec(model, device)
    check_options(codec, chunk_seconds, n_quantizers, normalize)
    reading = batching(device, batch_seconds)
    use_engine(codec, "encode", precision, reading["batch_seconds"] if tune else 0)
    options = chunk_seconds, n_quantizers, normalize, not no_padding

    def save(job: Job, file):
        file.save(job.target, format=format.value)
        return file.duration

    def work(jobs: list[Job], advance):
        jobs = by_size(jobs)
        for number, file in compress_all(
            codec, [job.source for job in jobs], *options, **reading, progress=advance
        ):
            job = jobs[number]
            yield job, file if isinstance(file, Exception) else attempt(save, job, file)

    run(jobs, work, "encoded", existing)


@app.command()
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
):
    """Restore recordings from .dac files."""
    from dac_fast.audio.writing import WRITABLE, AudioWriter
    from dac_fast.recordings.compress import decompress_all
    from dac_fast.storage.dac2 import DACFile

    suffix = f".{suffix.lower().removeprefix('.')}"
    if suffix not in WRITABLE:
        raise ValueError(f"--suffix is {suffix!r}; accepted: {', '.join(WRITABLE)}")
    jobs = plan(inputs, output, (".dac",), suffix, AUDIO_SUFFIXES)
    reading = batching(device, batch_seconds)
    codecs, loading = {}, threading.Lock()

    def load(path: Path):
        file = DACFile.load(path)
        # a file names a preset at most: it is not to choose which path is opened
        if not model and file.model not in PRESETS:
            named = f"names the model {file.model!r}" if file.model else "does not name its model"
            raise ValueError(f"the file {named}; give it by --model")
        name = model or file.model
        with loading:
            if name not in codecs:
                codecs[name] = load_codec(name, device)
                use_engine(
                    codecs[name], "decode", precision, reading["batch_seconds"] if tune else 0
                )
            return codecs[name], file

    def save(job: Job, file: DACFile, blocks, advance):
        options = {"subtype": subtype} if subtype else {}
        with AudioWriter(job.target, file.sample_rate, file.channels, **options) as writer:
            for block in blocks:
                writer.write(block)
                advance(block.shape[1] / file.sample_rate)
        return file.duration

    def work(jobs: list[Job], advance):
        jobs = by_size(jobs)
        for number, result in decompress_all(load, [job.source for job in jobs], **reading):
            job = jobs[number]
            yield (
                job,
                result if isinstance(result, Exception) else attempt(save, job, *result, advance),
            )

    run(jobs, work, "decoded", existing)


@app.command()
def reconstruct(
    inputs: Inputs,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder (subfolders are kept), or a file.")
    ],
    model: Model = "tiny",
    device: Device = "auto",
    n_quantizers: Codebooks = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Also a PNG of both spectrograms beside each output.")
    ] = False,
    existing: WhenExisting = Existing.error,
):
    """Compress and restore recordings, and say what it cost and how near they come."""
    import numpy as np

    from dac_fast.audio.reading import read
    from dac_fast.audio.writing import write
    from dac_fast.cli.reconstruction import report
    from dac_fast.recordings.compress import check_options

    jobs = plan(inputs, output, AUDIO_SUFFIXES, ".wav", AUDIO_SUFFIXES, (".png",) if plot else ())
    codec = load_codec(model, device)
    check_options(codec, n_quantizers=n_quantizers)
    use_engine(codec, "decode", None, 0)
    # what is imported and set up at the first call is not the codec's speed
    codec.decompress(
        codec.compress((np.zeros(codec.sample_rate // 10, np.float32), codec.sample_rate))
    )
    table = Table(
        "file",
        "kbit/s",
        "ratio",
        "× real time",
        "SI-SDR dB",
        "mel distance",
        title=f"model {model}",
    )

    def work(job: Job, advance):
        audio, rate = read(job.source)
        start = time.perf_counter()
        file = codec.compress((audio, rate), n_quantizers=n_quantizers)
        restored, _ = codec.decompress(file)
        elapsed = time.perf_counter() - start
        write(job.target, restored, rate)
        if plot:
            from dac_fast.plots import spectrograms

            spectrograms(job.target.with_suffix(".png"), audio, restored, rate)
        numbers = report(file, audio, restored, elapsed)
        table.add_row(str(job.source.name), *numbers)
        advance(file.duration)
        return file.duration

    try:
        run(jobs, one_by_one(work), "reconstructed", existing)
    finally:
        out.print(table)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as data.train=FOLDER.")
    ] = None,
):
    """Train a codec by a recipe, or go on with the run in its folder. Several processes: under torchrun."""
    from dac_fast.training import train as run_training

    summary = run_training(recipe, overrides or [])
    best = "" if summary.best is None else f", best mel distance on validation {summary.best:.4f}"
    out.print(f"{summary.folder}: step {summary.step}{best}")
    if summary.signal is not None:
        raise typer.Exit(128 + summary.signal)


@app.command()
def curves(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture, a PNG.")] = Path(
        "curves.png"
    ),
    existing: WhenExisting = Existing.error,
):
    """Draw the training and validation curves of runs, to compare them."""
    from dac_fast.plots import training_curves

    if may_write(existing, output):
        training_curves(output, runs)
        out.print(f"wrote {output}")


@app.command()
def evaluate(
    data: Annotated[
        Path,
        typer.Argument(help="A folder (its first-level folders are the domains), or a manifest."),
    ],
    restored: Annotated[
        Path | None,
        typer.Option(
            help="Measure this folder of reconstructions, matched by name, in place of a model."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for CSV, JSON and PNG.")
    ] = Path("evaluation"),
    model: Model = "tiny",
    device: Device = "auto",
    codebooks: Annotated[
        str | None,
        typer.Option(
            help="Numbers of codebooks: 1,2,4,9. Default: all, and half as many, down to one."
        ),
    ] = None,
    sample_rate: Annotated[
        int | None,
        typer.Option(help="Compare at this rate, Hz. Default: the model's, or each reference's."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Only the beginning of each file.")] = None,
    visqol: Annotated[
        bool | None,
        typer.Option(
            "--visqol/--no-visqol", help="Slow. Default: where visqol-python is installed."
        ),
    ] = None,
    plot: Annotated[bool, typer.Option(help="Draw rate-distortion curves.")] = True,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Processes. Default: one per core; 1 on a GPU."),
    ] = None,
    listen: Annotated[
        Path | None,
        typer.Option(help="Also write a page, an HTML file, to hear clips of them by."),
    ] = None,
    existing: WhenExisting = Existing.error,
):
    """Measure how near a model, or a folder of reconstructions, comes to the originals."""
    if listen and restored:
        raise ValueError("--listen with --restored; accepted: with a model")
    from dac_fast.evaluation.run import evaluate_codec, evaluate_folders

    picture = output / "rate_distortion.png"
    if not may_write(
        existing,
        *(output / name for name in ("files.csv", "summary.csv", "evaluation.json")),
        picture,
        *([listen] if listen else []),
    ):
        return
    make_folder(output)
    try:
        counts = None if codebooks is None else [int(part) for part in codebooks.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--codebooks is {codebooks!r}; accepted: whole numbers with commas, as 1,2,4,9"
        ) from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("measured", total=None)
        options = {
            "sample_rate": sample_rate, "seconds": seconds, "visqol": visqol, "jobs": jobs,
            "progress": lambda done, total: progress.update(task, completed=done, total=total),
        }  # fmt: skip
        if restored:
            evaluation = evaluate_folders(data, restored, **options)
        else:
            evaluation = evaluate_codec(load_codec(model, device), data, counts, **options)
    for failure in evaluation.failures:
        fail(ValueError(failure["problem"]), failure["file"])
    for name in evaluation.without_reference:
        err.print(f"without a reference: {name}")
    out.print(evaluation.table())
    for note in evaluation.notes:
        out.print(note)
    # one of an earlier evaluation would not be of these numbers
    picture.unlink(missing_ok=True)
    evaluation.save(output, plot)
    out.print(f"wrote {output}; {len(evaluation.failures)} files failed")
    if listen:
        from dac_fast.evaluation.listen import write_page

        measured = {row["codebooks"] for row in evaluation.summary}
        write_page(listen, load_codec(model, device), data, sorted(measured), seconds=seconds or 10)
        out.print(f"wrote {listen}")
    if evaluation.failures:
        raise typer.Exit(1)


@app.command()
def info(
    paths: Annotated[
        list[Path], typer.Argument(help=".dac files, checkpoints, or names of models.")
    ],
):
    """Say what a .dac file or a checkpoint holds."""
    from dac_fast.cli.info import describe

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
            table.add_row(key, str(value))
        out.print(table)
    if failed:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint, or the name of a model.")],
    target: Annotated[
        Path, typer.Argument(help=".safetensors, .pth (published), or a folder (Hugging Face).")
    ],
    fold: Annotated[
        bool, typer.Option("--fold", help="Store folded weights (.safetensors): for inference.")
    ] = False,
    existing: WhenExisting = Existing.error,
):
    """Convert a checkpoint to another format."""
    from dac_fast import load

    if fold and target.suffix != ".safetensors":
        raise ValueError(f"--fold with {target}; accepted: with a target that ends in .safetensors")
    if not may_write(existing, target):
        return
    make_folder(target.parent)
    codec = load(source)
    (codec.fold_weight_norm() if fold else codec).save(target)
    out.print(f"wrote {target}")


@app.command()
def export(
    folder: Annotated[
        Path,
        typer.Argument(help="Where encoder and decoder are written; made where it is missing."),
    ],
    model: Model = "tiny",
    n_quantizers: Codebooks = None,
    format: Annotated[Program, typer.Option(help="pt2 is torch.export's.")] = Program.onnx,
    existing: WhenExisting = Existing.error,
):
    """Write encoder (audio to codes) and decoder (codes to audio) for other runtimes, for any batch and length."""
    import torch

    from dac_fast import load
    from dac_fast.files import atomic_path
    from dac_fast.inference import export as program
    from dac_fast.inference import export_onnx

    paths = [folder / f"{part}.{format.value}" for part in ("encoder", "decoder")]
    if not may_write(existing, *paths):
        return
    make_folder(folder)
    codec = load(model)
    if format is Program.onnx:
        export_onnx(codec, folder, n_quantizers)
    else:
        for path in paths:
            with atomic_path(path) as temporary:
                torch.export.save(program(codec, path.stem, n_quantizers), temporary)
    out.print(f"wrote {paths[0]} and {paths[1]}")


@app.command()
def download(
    names: Annotated[list[str], typer.Argument(help="Models: 44khz, 44khz_16kbps, 24khz, 16khz.")],
    mirror: Annotated[
        str | None,
        typer.Option(
            help="Address or folder laid out as the published releases, also DAC_FAST_MIRROR."
        ),
    ] = None,
):
    """Download published weights into the cache; a download that broke off is continued."""
    from dac_fast.storage.download import download as fetch

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    for name in names:
        with Progress(
            *columns, console=err, transient=True, disable=not err.is_terminal
        ) as progress:
            task = progress.add_task(name, total=None)
            path = fetch(
                name, mirror, lambda done, total: progress.update(task, completed=done, total=total)
            )  # noqa: B023
        out.print(f"{name}: {path}")


app.command()(serve)


@app.command()
def doctor():
    """Say which versions, devices and backends there are, and why an op runs where it does."""
    from dac_fast.cli.doctor import report

    report(out)


def main():
    """Entry point: what a user can cause ends in one line and exit code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        fail(error)
        sys.exit(1)

"""`dac-fast tokenize`: a corpus to codes, with what it would take, how it goes and what it took."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.table import Table

from dac_fast.audio.reading import AUDIO_SUFFIXES
from dac_fast.cli.options import (
    Codebooks,
    Device,
    Model,
    NoNormalize,
    NormalizeDb,
    Precision,
    say_left_out,
    say_toy,
)
from dac_fast.cli.report import Lines
from dac_fast.cli.stopping import Stop, Stopped
from dac_fast.cli.terminal import err, out
from dac_fast.ops.device import checked_device

if TYPE_CHECKING:
    from dac_fast.corpus.meter import Meter
    from dac_fast.corpus.tokenize import Forecast
    from dac_fast.corpus.verify import Verdict


class ShardFormat(str, Enum):
    """Formats of shards."""

    webdataset = "webdataset"
    parquet = "parquet"
    npy = "npy"


class CodesForm(str, Enum):
    """Forms of the codes in a tar."""

    npy = "npy"
    dac = "dac"


def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders, .jsonl manifests, .tar and .parquet files, recordings; here or at an "
            "address (s3://, gs://, hf://, …). With --verify and no --output: a dataset's folder."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The dataset's folder. What it has is not made again."),
    ] = None,
    model: Model = "tiny",
    format: Annotated[ShardFormat, typer.Option(help="Of the shards.")] = ShardFormat.webdataset,
    codes: Annotated[
        CodesForm, typer.Option(help="In a tar: arrays, or packed .dac files.")
    ] = CodesForm.npy,
    shard_hours: Annotated[
        float, typer.Option(help="A shard ends with the recording that reaches that length.")
    ] = 1.0,
    shuffle: Annotated[
        int | None,
        typer.Option(help="A seed to shuffle recordings by. Default: in the order of their keys."),
    ] = None,
    n_quantizers: Codebooks = None,
    normalize_db: NormalizeDb = -16.0,
    no_normalize: NoNormalize = False,
    precision: Annotated[
        Precision, typer.Option(help="Of the encoder. fp32 gives the published codes.")
    ] = Precision.fp32,
    audio_column: Annotated[
        str, typer.Option(help="Of Parquet files: bytes, or paths of files.")
    ] = "audio",
    device: Device = "auto",
    workers: Annotated[
        str | None,
        typer.Option(
            help="Workers that encode, or LEAST:MOST of a pool that grows and shrinks. "
            "Default: one per GPU, or one per core."
        ),
    ] = None,
    readers: Annotated[
        int | None,
        typer.Option(help="Tasks that read at once. Default: one per core, or what a cluster has."),
    ] = None,
    batch_seconds: Annotated[
        float | None,
        typer.Option(
            help="Audio that a worker holds to encode together; codes do not depend on it. "
            "Default: 240 on a GPU, 0 on the CPU, where windows are encoded one by one."
        ),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster. Default: a Ray of this machine's own.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Every Nth shard only, without Ray: for job arrays."),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on where the folder's dataset has been begun.")
    ] = True,
    budget_hours: Annotated[
        float | None, typer.Option(help="Begin no shard after so many hours of audio.")
    ] = None,
    retry_failures: Annotated[
        bool, typer.Option("--retry-failures", help="Only what failed, in shards that are there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is to do, and write nothing.")
    ] = False,
    verify: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Encode that share of the recordings again, each alone and in fp32, and compare.",
        ),
    ] = None,
) -> None:
    """Turn a corpus into codes for a language model: exact, resumable, on one machine or many."""
    from dac_fast.corpus.encoding import EncodingError
    from dac_fast.corpus.meter import Meter
    from dac_fast.corpus.tokenize import Options, forecast
    from dac_fast.corpus.tokenize import tokenize as run
    from dac_fast.corpus.verify import verify as check

    if verify is not None and not 0 < verify <= 1:
        raise ValueError(f"--verify is {verify}; accepted: above 0, up to 1")
    if output is None:
        if dry_run:
            output = Path()
        elif verify is None:
            raise ValueError("--output is missing; accepted: the folder of the dataset")
        elif len(sources) != 1:
            raise ValueError(f"--verify of {len(sources)} folders; accepted: one, or --output")
        else:
            out.print(_verdict(check(Path(sources[0]), verify)))
            return
    options = Options(
        model=model,
        format=format.value,
        codes=codes.value,
        shard_hours=shard_hours,
        shuffle=shuffle,
        n_quantizers=n_quantizers,
        normalize_db=None if no_normalize else normalize_db,
        precision=precision.value,
        audio_column=audio_column,
        # A cluster's devices are not this machine's.
        device=device if address else str(checked_device(device, "--device")),
        workers=_workers(workers),
        readers=readers,
        batch_seconds=batch_seconds,
        local=local or shard is not None,
        address=address,
        share=(0, 1) if shard is None else _share(shard),
        budget_hours=float("inf") if budget_hours is None else budget_hours,
        retry_failures=retry_failures,
    )
    say_toy(model)
    # Not by ffmpeg, whose versions decode differently: a dataset is to be the same everywhere.
    say_left_out(sources, AUDIO_SUFFIXES)
    if dry_run:
        out.print(_forecast(forecast(sources, options)))
        return
    if not resume and (output / "dataset.json").exists():
        raise FileExistsError(f"{output} has a dataset; accepted: --resume, or another folder")
    lines = Lines()
    meter = Meter(written=lambda meter: lines.offer(_state(meter)))
    try:
        with (
            Stop(),
            Live(
                console=err,
                get_renderable=lambda: _progress(meter),
                transient=True,
                auto_refresh=err.is_terminal,
            ),
        ):
            card = run(sources, output, options, meter)
    except EncodingError as error:
        raise ValueError(str(error)) from error
    except Stopped as stopped:
        out.print(f"{_state(meter)}; the same command goes on after the shards that are written")
        raise typer.Exit(128 + stopped.number) from stopped
    out.print(_progress(meter))
    whole = "complete" if card.complete else "not complete yet"
    out.print(
        f"{output}: {whole}; {card.items} recordings, {card.hours:.2f} h, {card.failures} failures"
    )
    if verify is not None:
        out.print(_verdict(check(output, verify, model)))


def _workers(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    try:
        least, _, most = text.partition(":")
        return (int(least), int(most)) if most else int(least)
    except ValueError as error:
        raise ValueError(f"--workers is {text!r}; accepted: a number, or LEAST:MOST") from error


def _share(text: str) -> tuple[int, int]:
    try:
        number, of = text.split("/")
        return int(number), int(of)
    except ValueError as error:
        raise ValueError(f"--shard is {text!r}; accepted: I/N, as 3/100") from error


def _forecast(found: "Forecast") -> Table:
    table = Table(show_header=False, title="to do", title_justify="left")
    table.add_row("files", str(found.files))
    table.add_row("recordings", str(found.items))
    table.add_row("known to be unreadable", str(found.problems))
    table.add_row("hours", f"{found.hours:.2f}")
    table.add_row("shards", str(found.shards))
    table.add_row("disk needed", f"{found.gigabytes:.3f} GB")
    return table


def _progress(meter: "Meter") -> Table:
    """Hours, speed and what each phase has of its capacity in use; it names the bottleneck."""
    table = Table("phase", "busy", "of its capacity", title=_state(meter), title_justify="left")
    for phase, seconds in meter.busy.items():
        mark = " ← bottleneck" if meter.done and phase == meter.bottleneck else ""
        table.add_row(phase, f"{seconds:.1f} s", f"{meter.utilisation(phase):.0%}{mark}")
    return table


def _state(meter: "Meter") -> str:
    left = "?" if meter.left is None else _clock(meter.left)
    return (
        f"{meter.done / 3600:.2f} of {meter.total / 3600:.2f} h, {meter.speed:.1f} × real time, "
        f"{_clock(meter.elapsed)} gone, {left} left"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _verdict(verdict: "Verdict") -> Table:
    table = Table(show_header=False, title="encoded again", title_justify="left")
    table.add_row("recordings", str(verdict.items))
    table.add_row("codes", str(verdict.codes))
    table.add_row("codes that differ", str(verdict.differing))
    table.add_row("largest regret of these", f"{verdict.regret:.3g}")
    return table

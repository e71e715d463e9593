"""The command `evaluate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from dac_fast import plots
from dac_fast.cli.jobs import Existing, to_write
from dac_fast.cli.options import (
    Device,
    Model,
    WhenExisting,
    counts_in,
    load_codec,
    say_left_out,
    say_toy,
)
from dac_fast.cli.report import Lines
from dac_fast.cli.stopping import Stop, Stopped
from dac_fast.cli.terminal import err, fail, out, progress_bar
from dac_fast.evaluation.listen import clips_of, write_page
from dac_fast.evaluation.outcome import Evaluation
from dac_fast.evaluation.run import evaluate_codec, evaluate_folders
from dac_fast.files import make_folder


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
    plot: Annotated[
        bool, typer.Option(help="Draw rate-distortion curves, which takes matplotlib.")
    ] = True,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Processes. Default: one per core; 1 on a GPU."),
    ] = None,
    listen: Annotated[
        Path | None,
        typer.Option(help="Also write a page, an HTML file, to hear clips of them by."),
    ] = None,
    existing: WhenExisting = Existing.error,
) -> None:
    """Measure how near a model, or a folder of reconstructions, comes to the originals."""
    if listen and restored:
        raise ValueError("--listen with --restored; accepted: with a model")
    if plot and not restored:
        try:
            plots.require()
        except plots.PlotError as error:
            raise ValueError(f"{error}, or --no-plot") from error
    picture = output / "rate_distortion.png"
    tables = (output / name for name in ("files.csv", "summary.csv", "evaluation.json"))
    targets = (*tables, picture, *([listen] if listen else []))
    # They are of one evaluation: where one is kept, no other is written beside it.
    if len(to_write(existing, *targets)) < len(targets):
        return
    make_folder(output)
    say_left_out([data, *([restored] if restored else [])])
    if not restored:
        say_toy(model)
    counts = None if codebooks is None else counts_in(codebooks)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    lines = Lines()
    so_far = "measured nothing yet"
    try:
        with Stop(), progress_bar(*columns) as bar:
            task = bar.add_task("measured", total=None)

            def show(done: int, total: int) -> None:
                nonlocal so_far
                so_far = f"measured {done} of {total}, {total - done} left"
                bar.update(task, completed=done, total=total)
                lines.offer(so_far)

            if restored:
                evaluation = evaluate_folders(
                    data,
                    restored,
                    sample_rate=sample_rate,
                    seconds=seconds,
                    visqol=visqol,
                    jobs=jobs,
                    progress=show,
                )
            else:
                evaluation = evaluate_codec(
                    load_codec(model, device),
                    data,
                    counts,
                    sample_rate=sample_rate,
                    seconds=seconds,
                    visqol=visqol,
                    jobs=jobs,
                    progress=show,
                )
    except Stopped as stopped:
        out.print(f"{so_far}; nothing is written")
        raise typer.Exit(128 + stopped.number) from stopped
    _report(evaluation)
    evaluation.save(output, plot)
    out.print(f"wrote {output}; {len(evaluation.failures)} files failed")
    if listen:
        measured = {row["codebooks"] for row in evaluation.summary}
        codec = load_codec(model, device)
        write_page(listen, codec, clips_of(codec, data, sorted(measured), seconds=seconds or 10))
        out.print(f"wrote {listen}")
    if evaluation.failures:
        raise typer.Exit(1)


def _report(evaluation: Evaluation) -> None:
    for failure in evaluation.failures:
        fail(ValueError(failure["problem"]), failure["file"])
    for name in evaluation.without_reference:
        err.print(f"without a reference: {name}")
    out.print(evaluation.table())
    for note in evaluation.notes:
        out.print(note)

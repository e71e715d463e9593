"""The command line, `python -m bench`: every command is a function here."""

import fnmatch
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import house as checkout
from bench import precisions, run
from bench.case import Case, Settings
from bench.cases import all_cases
from bench.document import ROOT
from bench.gpu import GpuSettings, run_everything
from bench.options import (
    Budget,
    CaseNames,
    Commit,
    OnDevice,
    Out,
    PeerNames,
    Precision,
    PublishedPython,
    Quick,
    Recording,
    Step,
    StepPrecision,
    Threads,
    accepted,
    must_be_files,
    must_be_there,
    name_of,
    say_written,
    without_tf32,
)
from bench.report import write_report

# Git ignores this folder. A result to keep is copied to bench/results and committed.
OUT = ROOT / "bench/out"

app = typer.Typer(
    help="Time every op and the codec against their peers. The outputs of each peer are checked "
    "before it is timed: one that is wrong is reported as failed. Run from the repository's root.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_cases(device: OnDevice = None, case: CaseNames = None, quick: Quick = False) -> None:
    """Print the names of the cases."""
    for found in matching(case, name_of(device), quick):
        print(found.name)


@app.command("run")
def run_cases(
    device: OnDevice = None,
    case: CaseNames = None,
    quick: Quick = False,
    peer: PeerNames = None,
    seconds: Annotated[float, typer.Option(help="Of timing per case and peer.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="In which the peers take turns.")] = 7,
    threads: Threads = None,
    budget: Budget = None,
    peer_seconds: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Start no more peers of a case after that long."),
    ] = float("inf"),
    published_python: PublishedPython = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the file, running the cases it lacks.")
    ] = False,
    commit: Commit = None,
) -> None:
    """Run cases and write a result file."""
    name = name_of(device)
    cases = matching(case, name, quick)
    must_be_there(name)
    if threads:
        torch.set_num_threads(threads)
    without_tf32()
    settings = Settings(
        device=name,
        seconds=0.02 if quick else seconds,
        rounds=2 if quick else rounds,
        peers=peer or (),
        published_python=published_python,
        quick=quick,
        peer_seconds=peer_seconds,
    )
    path = out or OUT / f"{name}.json"
    if not resume:
        path.unlink(missing_ok=True)
    run.run_all(cases, settings, path, budget, commit)
    say_written([path])


@app.command()
def gpu(
    out_dir: Annotated[Path, typer.Option(help="Folder of the results.")] = OUT,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="For all of it.")] = 500,
    commit: Commit = None,
    case: CaseNames = None,
    skip: Annotated[
        list[Step] | None, typer.Option(help="Leave a step out; may be repeated.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="Go on with the result file of an earlier call."),
    ] = None,
    published_python: PublishedPython = None,
    recording: Recording = None,
) -> None:
    """Build, test and time everything on a GPU, see bench/gpu.py."""
    if not torch.cuda.is_available():
        hint = "`python -m bench run --device cpu` runs the CPU cases"
        raise typer.BadParameter(f"torch sees no CUDA device here; {hint}")
    must_be_files(resume, recording)
    run_everything(
        GpuSettings(
            folder=out_dir,
            budget=budget,
            commit=commit,
            patterns=case or (),
            skip=skip or (),
            resume=resume,
            published_python=published_python,
            recording=recording,
        )
    )


@app.command()
def parity(
    device: OnDevice = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(help="May be repeated. Default: all; tf32 on cuda only."),
    ] = None,
    recording: Recording = None,
    seconds: Annotated[float, typer.Option(help="Of the recording.")] = 1.0,
    out: Out = None,
    commit: Commit = None,
) -> None:
    """Measure what each precision costs, against float64."""
    name = name_of(device)
    must_be_there(name)
    must_be_files(recording)
    available = [each.value for each in Precision if name == "cuda" or each is not Precision.tf32]
    wanted = accepted("--precision", [each.value for each in precision or ()], available, name)
    without_tf32()
    path = out or OUT / f"{name}_precisions.json"
    precisions.run_table(name, wanted, recording or precisions.CLIP, seconds, path, commit)
    say_written([path, *write_report(path)])


@app.command()
def train(
    device: OnDevice = None,
    recipe: Annotated[
        str | None, typer.Option(help="Default: 44khz on cuda, tiny on the CPU.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key of the recipe; may be repeated."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="May be repeated. Default: 72 and 12 on cuda, else 1."),
    ] = None,
    precision: Annotated[
        list[StepPrecision] | None,
        typer.Option(help="May be repeated. Default: both on cuda, else fp32."),
    ] = None,
    peer: PeerNames = None,
    seconds: Annotated[float, typer.Option(help="Of timing per row.")] = 5.0,
    budget: Budget = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of audio: time reading it, too.")
    ] = None,
    compare: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="Instead, train a small codec for that many steps in each way, and compare them.",
        ),
    ] = None,
    count_only: Annotated[
        bool, typer.Option("--count-only", help="Count flops and memory, and time nothing.")
    ] = False,
    threads: Threads = None,
    quick: Quick = False,
    out: Out = None,
    commit: Commit = None,
) -> None:
    """Time the training step, part by part."""
    # Imported here, since training needs packages that a machine which only times kernels may lack.
    from bench.training.compare import main_line, run_compare
    from bench.training.step import PEERS, QUICK, TAKEN_APART, TrainSettings, run_train
    from dac_fast.training import RecipeError, load_recipe

    name = name_of(device)
    must_be_there(name)
    if threads:
        torch.set_num_threads(threads)
    path = out or OUT / f"{name}_train{'_compare' if compare else ''}.json"
    quick_overrides = QUICK if quick else ()
    if compare:
        print(main_line(run_compare(name, compare, path, quick_overrides, commit)))
        say_written([path, *write_report(path)])
        return
    on_gpu = name == "cuda"
    overrides = [*quick_overrides, *(override or ())]
    try:
        loaded = load_recipe(recipe or ("44khz" if on_gpu else "tiny"), overrides)
    except RecipeError as error:
        raise typer.BadParameter(str(error)) from error
    precisions_wanted = precision or (list(StepPrecision) if on_gpu else [StepPrecision.fp32])
    settings = TrainSettings(
        device=name,
        recipe=loaded,
        batches=batch or ([72, 12] if on_gpu else [1]),
        precisions=[each.value for each in precisions_wanted],
        peers=accepted("--peer", peer, TAKEN_APART if count_only else PEERS[name], name),
        seconds=0.2 if quick else seconds,
        count_only=count_only,
        data=data,
        quick=quick,
    )
    run_train(settings, path, budget, commit)
    say_written([path, *write_report(path)])


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def static(
    architecture: Annotated[
        list[int] | None,
        typer.Option("--arch", metavar="N", help="sm_N; may be repeated. Default: all."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Such as 'fp16/unit*', 'csrc/*'; may be repeated. Default: all."
        ),
    ] = None,
    out: Out = None,
    commit: Commit = None,
) -> None:
    """Compile every GPU kernel at the real sizes, and read the machine code; needs no GPU."""
    # Imported here, since it needs Triton.
    from bench.static.table import ARCHITECTURES, run_static

    for number in architecture or ():
        if number not in ARCHITECTURES:
            choice = ", ".join(map(str, ARCHITECTURES))
            raise typer.BadParameter(f"--arch is {number}; accepted: {choice}")
    path = out or OUT / "static.json"
    run_static(architecture or ARCHITECTURES, only or (), path, commit)
    say_written([path, *write_report(path)])


@app.command()
def report(results: Annotated[list[Path], typer.Argument(metavar="JSON...")]) -> None:
    """Turn result files into pages and pictures."""
    for path in results:
        must_be_files(path)
        say_written(write_report(path))


@app.command()
def house(
    root: Annotated[Path, typer.Option(help="The checkout. Default: this one.")] = ROOT,
) -> None:
    """Print size, style and import graph of a checkout."""
    print(checkout.markdown(root))


def matching(patterns: list[str] | None, device: str, quick: bool) -> list[Case]:
    """The cases that match, in the order in which they are run."""
    patterns = patterns or ["*"]
    found = [
        case
        for case in all_cases(device, quick)
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)
    ]
    if not found:
        wanted = " or ".join(map(repr, patterns))
        hint = "`python -m bench list` prints them"
        raise typer.BadParameter(f"no case matches {wanted}; {hint}")
    return sorted(found, key=lambda case: case.priority)


if __name__ == "__main__":
    app(prog_name="python -m bench")

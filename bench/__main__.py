"""The command line, `python -m bench`: every command is a function here."""

from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit("no typer here, which `python -m bench` needs: install it") from None
import torch

from bench import house as checkout
from bench import precisions, programs, run
from bench.case import Settings
from bench.document import OUT, ROOT
from bench.gpu import gpu_architecture, missing, run_everything
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
    matching,
    must_be_files,
    must_be_there,
    name_of,
    say_written,
    without_tf32,
)
from bench.report import write_report
from bench.session import GpuSettings

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
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="For all of it.")] = 540,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The same steps on a CPU, at tiny sizes.")
    ] = False,
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
    if not rehearse and not torch.cuda.is_available():
        hint = "`--rehearse` goes through all steps on a CPU"
        raise typer.BadParameter(f"torch sees no CUDA device here; {hint}")
    must_be_files(resume, recording)
    if unable := missing(skip or ()):
        hint = "install them, bring their wheels, or --skip the steps"
        raise typer.BadParameter(f"modules are missing here: {', '.join(unable)}; {hint}")
    run_everything(
        GpuSettings(
            folder=out_dir,
            budget=budget,
            device="cpu" if rehearse else "cuda",
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
    quick: Quick = False,
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
    precisions.run_table(name, wanted, recording or precisions.CLIP, seconds, path, commit, quick)
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
        peers=accepted("--peer", peer, TAKEN_APART if count_only or quick else PEERS[name], name),
        seconds=0.2 if quick else seconds,
        count_only=count_only,
        data=data,
        quick=quick,
    )
    run_train(settings, path, budget, commit)
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


@app.command("compile")
def compile_kernels(
    architecture: Annotated[
        int | None, typer.Option("--arch", metavar="N", help="sm_N. Default: the GPU's.")
    ] = None,
    quick: Quick = False,
) -> None:
    """Compile the kernels of the cases for a GPU, into Triton's cache, by all cores."""
    # Imported here, since it needs Triton.
    from bench.static.cache import fill

    print(f"{fill(architecture or gpu_architecture(), quick=quick)} kernels")


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


for command in (programs.serve, programs.soak, programs.corpus, programs.codes, programs.halves):
    app.command()(command)


if __name__ == "__main__":
    app(prog_name="python -m bench")

"""The command line: python -m bench list | run | gpu | parity | train | report."""

import argparse
import fnmatch
import os
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main(arguments=None):
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time every op and the codec against their peers. Each provider's outputs are checked before it "
        "is timed: one that is wrong is reported as failed. Run from the repository's root.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu"
    )
    common.add_argument(
        "--case", action="append", metavar="GLOB",
        help="cases whose name matches, such as 'snake/*' or '*/backward/*'; may be repeated; default: all",
    )  # fmt: skip
    common.add_argument(
        "--quick", action="store_true", help="tiny shapes: tests the harness, says nothing of speed"
    )

    commands.add_parser("list", parents=[common], help="print the names of the cases")

    run = commands.add_parser("run", parents=[common], help="run cases and write a result file")
    run.add_argument(
        "--provider",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one; may be repeated; default: all",
    )
    run.add_argument(
        "--seconds", type=float, default=1.0, help="of timing per case and provider (default: 1)"
    )
    run.add_argument(
        "--rounds", type=int, default=7, help="in which the providers take turns (default: 7)"
    )
    run.add_argument("--threads", type=int, help="of the CPU (default: torch's own choice)")
    run.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no case after that long"
    )
    run.add_argument(
        "--provider-seconds", type=float, default=float("inf"), metavar="SECONDS",
        help="start no more providers of a case after that long",
    )  # fmt: skip
    published = {
        "metavar": "PATH",
        "help": "a Python that can import the published package: times it in the same run, with the same weights",
    }
    run.add_argument("--published-python", **published)
    run.add_argument("--out", type=Path, help="default: bench/results/<device>.json")
    run.add_argument(
        "--resume", action="store_true", help="go on with the file, running the cases it lacks"
    )
    run.add_argument("--commit", help="to be recorded where this is no git checkout")

    gpu = commands.add_parser(
        "gpu",
        help="everything for a machine with a GPU, see bench/gpu.py: build, tests, every CUDA case, report",
    )
    gpu.add_argument("--out-dir", type=Path, default=RESULTS, help="default: bench/results")
    gpu.add_argument(
        "--budget", type=float, default=500, metavar="SECONDS", help="for all of it (default: 500)"
    )
    gpu.add_argument("--commit", help="to be recorded where this is no git checkout")
    gpu.add_argument("--case", action="append", metavar="GLOB", help="as for run")
    gpu.add_argument(
        "--skip", action="append", default=[], metavar="STEP",
        choices=("build", "tests", "sanitizers", "cases", "precisions", "train"),
        help="leave a step out: build, tests, sanitizers, cases, precisions or train; may be repeated",
    )  # fmt: skip
    gpu.add_argument(
        "--resume", type=Path, metavar="JSON", help="go on with the result file of an earlier call"
    )
    gpu.add_argument("--published-python", **published)
    gpu.add_argument("--recording", type=Path, help="as for parity")

    parity = commands.add_parser(
        "parity",
        help="what each precision costs on a real recording: codes that agree, audio in dB, against float64",
    )
    parity.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu"
    )
    parity.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "tf32", "fp16", "bf16"),
        help="default: all; tf32 on cuda only",
    )
    parity.add_argument(
        "--recording", type=Path, help="a .wav of 16 bit, or what soundfile reads; default: a clip"
    )
    parity.add_argument("--seconds", type=float, default=1.0, help="of the recording (default: 1)")
    parity.add_argument("--out", type=Path, help="default: bench/results/<device>_precisions.json")
    parity.add_argument("--commit", help="to be recorded where this is no git checkout")

    train = commands.add_parser(
        "train",
        help="time the training step: the published composition, torch.compile of it, ours; part by part",
    )
    train.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu"
    )
    train.add_argument("--recipe", help="default: 44khz on cuda, tiny on the CPU")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the recipe",
    )
    train.add_argument(
        "--batch", type=int, nargs="+", metavar="N", help="default: 72 12 on cuda, 1 on the CPU"
    )
    train.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), help="default: both; on the CPU fp32"
    )
    train.add_argument(
        "--implementation", action="append", metavar="NAME", help="only this one; may be repeated"
    )
    train.add_argument("--seconds", type=float, default=5.0, help="of timing per row (default: 5)")
    train.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no row after that long"
    )
    train.add_argument("--data", type=Path, metavar="FOLDER", help="of audio: time reading it too")
    train.add_argument(
        "--compare", type=int, metavar="STEPS",
        help="instead: train a small codec for that many steps in each way, and compare the losses",
    )  # fmt: skip
    train.add_argument(
        "--count-only",
        action="store_true",
        help="count flops and memory in a step, and time nothing",
    )
    train.add_argument("--threads", type=int, help="of the CPU (default: torch's own choice)")
    train.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model: tests the harness, says nothing of speed",
    )
    train.add_argument(
        "--out", type=Path, help="default: bench/results/<device>_train[_compare].json"
    )
    train.add_argument("--commit", help="to be recorded where this is no git checkout")

    report = commands.add_parser(
        "report", help="turn result files into a Markdown table and PNG plots beside each"
    )
    report.add_argument("results", type=Path, nargs="+", metavar="JSON")

    options = parser.parse_args(arguments)
    run = {
        "list": _list,
        "run": _run,
        "gpu": _gpu,
        "parity": _parity,
        "train": _train,
        "report": _report,
    }
    run[options.command](options, parser)


def _selected(options, parser):
    import torch

    from bench.cases import all_cases

    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    names = options.case or ["*"]
    cases = all_cases(options.device, options.quick)
    found = [case for case in cases if any(fnmatch.fnmatch(case.name, name) for name in names)]
    if not found:
        parser.error(
            f"no case matches {' or '.join(map(repr, names))}; `python -m bench list` prints them"
        )
    return sorted(found, key=lambda case: case.priority)


def _list(options, parser):
    for case in _selected(options, parser):
        print(case.name)


def _run(options, parser):
    import torch

    from bench.case import Settings
    from bench.run import run_all

    cases = _selected(options, parser)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)
    # Single precision means single precision: the codes depend on it.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    settings = Settings(
        options.device,
        0.02 if options.quick else options.seconds,
        2 if options.quick else options.rounds,
        options.provider,
        options.published_python,
        options.quick,
        options.provider_seconds,
    )
    out = options.out or RESULTS / f"{options.device}.json"
    if not options.resume:
        out.unlink(missing_ok=True)
    run_all(cases, settings, out, options.budget, options.commit)
    print(f"wrote {os.path.relpath(out)}")


def _gpu(options, parser):
    import torch

    from bench.gpu import GpuSettings, run_everything

    if not torch.cuda.is_available():
        parser.error(
            "torch sees no CUDA device here; `python -m bench run --device cpu` runs the CPU cases"
        )
    for path in filter(None, (options.resume, options.recording)):
        if not path.is_file():
            parser.error(f"{path} is no file")
    run_everything(
        GpuSettings(
            options.out_dir,
            options.budget,
            options.commit,
            options.case or (),
            options.skip,
            options.resume,
            options.published_python,
            options.recording,
        )
    )


def _parity(options, parser):
    import torch

    from bench.precisions import CLIP, markdown, run_table

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precisions = options.precision or [
        "fp32",
        *(["tf32"] if device == "cuda" else []),
        "fp16",
        "bf16",
    ]
    if device == "cpu" and "tf32" in precisions:
        parser.error("--precision tf32 on the CPU; accepted there: fp32, fp16, bf16")
    # As in _run.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    out = options.out or RESULTS / f"{device}_precisions.json"
    document = run_table(
        device, precisions, options.recording or CLIP, options.seconds, out, options.commit
    )
    out.with_suffix(".md").write_text(markdown(document))
    print(f"wrote {os.path.relpath(out)} and {os.path.relpath(out.with_suffix('.md'))}")


def _train(options, parser):
    import torch

    from bench.training.compare import main_line, run_compare
    from bench.training.report import write_train_report
    from bench.training.step import IMPLEMENTATIONS, QUICK, TrainSettings, run_train

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)
    out = options.out or RESULTS / f"{device}_train{'_compare' if options.compare else ''}.json"
    quick = QUICK if options.quick else ()
    if options.compare:
        print(main_line(run_compare(device, options.compare, out, quick, options.commit)))
        return
    # Elsewhere there are no graphs, and compiled code does not show what it keeps.
    available = IMPLEMENTATIONS if on_gpu else IMPLEMENTATIONS[:3]
    available = ("published", "ours") if options.count_only else available
    for name in options.implementation or ():
        if name not in available:
            parser.error(
                f"--implementation is {name!r}; accepted on {device}: {', '.join(available)}"
            )
    settings = TrainSettings(
        device,
        options.recipe or ("44khz" if on_gpu else "tiny"),
        (*quick, *options.set),
        options.batch or ([72, 12] if on_gpu else [1]),
        options.precision or (["fp32", "bf16"] if on_gpu else ["fp32"]),
        [name for name in available if name in (options.implementation or available)],
        0.2 if options.quick else options.seconds,
        options.count_only,
        options.data,
        options.quick,
    )
    run_train(settings, out, options.budget, options.commit)
    for written in [out, *write_train_report(out)]:
        print(f"wrote {os.path.relpath(written)}")


def _report(options, parser):
    from bench.report import write_report

    for path in options.results:
        if not path.is_file():
            parser.error(f"{path} is no file; a result file of `python -m bench run` is accepted")
        for written in write_report(path):
            print(f"wrote {os.path.relpath(written)}")


if __name__ == "__main__":
    main()

"""The command line: python -m bench list | run | gpu | report."""

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
    common.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    common.add_argument(
        "--case", action="append", metavar="GLOB",
        help="cases whose name matches, such as 'snake/*' or '*/backward/*'; may be repeated; default: all",
    )  # fmt: skip
    common.add_argument("--quick", action="store_true", help="tiny shapes: tests the harness, says nothing of speed")

    commands.add_parser("list", parents=[common], help="print the names of the cases")

    run = commands.add_parser("run", parents=[common], help="run cases and write a result file")
    run.add_argument(
        "--provider", action="append", default=[], metavar="NAME", help="only this one; may be repeated; default: all"
    )
    run.add_argument("--seconds", type=float, default=1.0, help="of timing per case and provider (default: 1)")
    run.add_argument("--rounds", type=int, default=7, help="in which the providers take turns (default: 7)")
    run.add_argument("--threads", type=int, help="of the CPU (default: torch's own choice)")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after that long")
    run.add_argument(
        "--published-python", metavar="PATH",
        help="a Python that can import the published package: times it in the same run, with the same weights",
    )  # fmt: skip
    run.add_argument("--out", type=Path, help="default: bench/results/<device>.json")
    run.add_argument("--resume", action="store_true", help="go on with the file, running the cases it lacks")
    run.add_argument("--commit", help="to be recorded where this is no git checkout")

    gpu = commands.add_parser(
        "gpu", help="everything for a machine with a GPU: build, gpu tests, sanitizers, every CUDA case, report"
    )
    gpu.add_argument("--out-dir", type=Path, default=RESULTS, help="default: bench/results")
    gpu.add_argument("--budget", type=float, default=500, metavar="SECONDS", help="for all of it (default: 500)")
    gpu.add_argument("--commit", help="to be recorded where this is no git checkout")
    gpu.add_argument("--case", action="append", metavar="GLOB", help="as for run")
    gpu.add_argument(
        "--skip", action="append", default=[], metavar="STEP", choices=("build", "tests", "sanitizers"),
        help="leave a step out: build, tests or sanitizers; may be repeated",
    )  # fmt: skip

    report = commands.add_parser("report", help="turn result files into a Markdown table and PNG plots beside each")
    report.add_argument("results", type=Path, nargs="+", metavar="JSON")

    options = parser.parse_args(arguments)
    {"list": _list, "run": _run, "gpu": _gpu, "report": _report}[options.command](options, parser)


def _selected(options, parser):
    import torch

    from bench.cases import all_cases

    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    names = options.case or ["*"]
    cases = all_cases(options.device, options.quick)
    found = [case for case in cases if any(fnmatch.fnmatch(case.name, name) for name in names)]
    if not found:
        parser.error(f"no case matches {' or '.join(map(repr, names))}; `python -m bench list` prints them")
    return sorted(found, key=lambda case: case.priority)


def _list(options, parser):
    for case in _selected(options, parser):
        print(case.name)


def _run(options, parser):
    import torch

    from bench.harness import Settings, run_all

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
    )
    out = options.out or RESULTS / f"{options.device}.json"
    if not options.resume:
        out.unlink(missing_ok=True)
    run_all(cases, settings, out, options.budget, options.commit)
    print(f"wrote {os.path.relpath(out)}")


def _gpu(options, parser):
    import torch

    from bench.gpu import run_everything

    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; `python -m bench run --device cpu` runs the CPU cases")
    run_everything(options.out_dir, options.budget, options.commit, options.case, options.skip)


def _report(options, parser):
    from bench.report import write_report

    for path in options.results:
        if not path.is_file():
            parser.error(f"{path} is no file; a result file of `python -m bench run` is accepted")
        for written in write_report(path):
            print(f"wrote {os.path.relpath(written)}")


if __name__ == "__main__":
    main()

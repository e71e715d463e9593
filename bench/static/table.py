"""`python -m bench static`: compiles every launch, and writes what was found to a result file."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import typer

from bench.document import SCHEMA, Json, environment, write
from bench.static import csrc
from bench.static.bound import bound, ctas, work
from bench.static.compiled import compiled, key, versions
from bench.static.launches import Launch, every_launch
from bench.static.requests import launches_of_requests
from bench.static.sass import Program, facts

ARCHITECTURES = (80, 86, 89, 90, 100)
# The one that bounds are computed for, and all launches are compiled for.
HOPPER = 90
# What is compiled for the others: each kind of layer at one width, since a tile's code is nearly
# the same at all, and Snake and the quantizer.
ELSEWHERE = (
    "*/conv 7 dilated, 768*",
    "*/conv 1, 768*: y and snake*",
    "*/transposed 16 stride 8, 1536*",
    "fp16/unit, *: y and snake*",
    "fp32/unit, *: y and snake*",
    "fp16/conv 4 stride 2*",
    "fp16/conv 7, 1 to 64*",
    "fp16/conv 7, 96 to 1:*",
    "fp16/snake*",
    "fp32/rvq*",
)


def run_static(
    architectures: Sequence[int], patterns: Sequence[str], path: Path, commit: str | None
) -> Json:
    """Writes the document, and returns it.

    Args:
        architectures: some of `ARCHITECTURES`.
        patterns: of launches' names, and of csrc's sources (`csrc.name_of`); empty: all.
        path: of the result file.
        commit: recorded where the tree is no git checkout.
    Raises:
        typer.BadParameter: a pattern matches nothing.
    """
    patterns = patterns or ["*"]
    recorded = every_launch()
    names = {launch.name for launch in recorded} | set(map(csrc.name_of, csrc.SOURCES))
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            example = f"{min(names)!r} and {len(names) - 1} others"
            raise typer.BadParameter(f"--only is {pattern!r}, which matches none of {example}")
    groups: dict[tuple[str, str], list[Launch]] = {}
    whole: dict[str, bool] = {}
    for launch in recorded:
        wanted = matches(launch.name, patterns)
        whole[launch.precision] = wanted and whole.get(launch.precision, True)
        if wanted:
            groups.setdefault((launch.name, key(launch)), []).append(launch)
    rows = []
    native = []
    known: dict[tuple[str, int], tuple[Json, Program]] = {}
    for architecture in architectures:
        for (name, code), launches in groups.items():
            if architecture != HOPPER and not matches(name, ELSEWHERE):
                continue
            if (code, architecture) not in known:
                resources, sass = compiled(launches[0], architecture)
                known[code, architecture] = resources, Program(sass)
            rows.append(row(launches, architecture, *known[code, architecture]))
        for source in csrc.SOURCES:
            if matches(csrc.name_of(source), patterns):
                native += csrc.rows(source, architecture)
        print(f"sm_{architecture}: {len(rows)} rows", flush=True)
    machine = environment("cpu", commit)
    kept = {name: machine[name] for name in ("date", "commit", "dirty", "python", "torch")}
    document = {"schema": SCHEMA, "environment": kept | versions() | csrc.versions()}
    document |= {"static": rows, "csrc": native, "launches": launches_of_requests()}
    document["complete"] = [precision for precision, all_of_it in whole.items() if all_of_it]
    write(document, path)
    return document


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the patterns does."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def row(launches: list[Launch], architecture: int, resources: Json, program: Program) -> Json:
    """What is known of launches of one name that share their machine code."""
    first = launches[0]
    warps = first.options["num_warps"]
    count = len(program.instructions)
    found = {
        "name": first.name,
        "precision": first.precision,
        "op": first.op,
        "tile": first.tile,
        "kernel": first.kernel.__name__,
        "architecture": architecture,
        **resources,
        "ctas": ctas(resources, warps, architecture),
        "instructions": count,
        "loops": len(program.loops),
        "hot": facts(program.hot(work(first).trips)),
        "all": facts(program.instructions),
    }
    if not program.loops:
        found["per_element"] = count * warps * 32 / work(first).elements
    if architecture == HOPPER:
        found["sizes"] = {
            size: bound(of_size[0], program, resources) | {"layers": len(of_size)}
            for size, of_size in by_size(launches).items()
        }
    return found


def by_size(launches: Iterable[Launch]) -> dict[str, list[Launch]]:
    """The launches of each size."""
    sizes: dict[str, list[Launch]] = {}
    for launch in launches:
        sizes.setdefault(launch.size, []).append(launch)
    return sizes

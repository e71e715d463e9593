"""`python -m bench corpus`: a corpus to codes, ours beside the loop and the pool that people write.

Every way encodes the same recordings with the same weights, from files to files. The result file is
one JSON document: `environment`, `corpus` (what was encoded), and `rows`, one per way and round. A
row of ours has the seconds that each phase was busy; `predict` makes of these what more machines
would come to.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import soundfile

from bench.document import (
    ROOT,
    SCHEMA,
    Json,
    environment,
    facts,
    one_line,
    table_head,
    table_row,
    title,
    write,
)
from dac_fast.codec import load
from dac_fast.corpus.meter import Meter
from dac_fast.corpus.tokenize import Options, tokenize

CLIP = ROOT / "bench/tabla_cc0.wav"
POOL = ROOT / "bench/peers/pool.py"
# Of the usual pool, as it is found in scripts for one GPU.
PROCESSES = 2
GPUS = (8, 64)
READERS_PER_GPU = (2, 4, 8, 16)


@dataclass(frozen=True)
class CorpusSettings:
    """What is measured.

    Attributes:
        device: "cpu" or "cuda".
        model: of all ways.
        recordings: files to encode.
        rounds: times that each way is run, in turns.
        published_python: a Python that can import the published package; None: without its pool.
    """

    device: str
    model: str
    recordings: Sequence[Path]
    rounds: int = 1
    published_python: str | None = None


def run_corpus(settings: CorpusSettings, path: Path, commit: str | None = None) -> Json:
    """Runs every way and writes the document, again after each; returns it."""
    seconds = sum(soundfile.info(file).duration for file in settings.recordings)
    rows: list[Json] = []
    document = {
        "schema": SCHEMA,
        "environment": environment(settings.device, commit),
        "corpus": {
            "model": settings.model,
            "recordings": len(settings.recordings),
            "seconds": round(seconds, 2),
        },
        "rows": rows,
    }
    ways: dict[str, tuple[int, Callable[[Path, Path], Json]]] = {
        "one process looping DAC.compress": (1, lambda source, out: _loop(settings, source, out)),
    }
    if settings.published_python:
        ways["the published package in a process pool"] = (
            PROCESSES,
            lambda source, out: _pool(settings, source, out),
        )
    for workers in (1, 2):
        for local, name in ((True, "--local"), (False, "Ray")):
            options = Options(
                model=settings.model,
                device=settings.device,
                workers=workers,
                local=local,
                shard_hours=seconds / 3600 / 8,
            )
            ways[f"dac-fast tokenize, {name}, {workers} workers"] = (workers, _ours(options))
    for number in range(settings.rounds):
        for way, (workers, run) in ways.items():
            row: Json = {"way": way, "workers": workers, "round": number}
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "source"
                source.mkdir()
                for count, file in enumerate(settings.recordings):
                    (source / f"{count:05d}{file.suffix}").symlink_to(file.resolve())
                begun = time.perf_counter()
                try:
                    row |= run(source, Path(folder) / "out")
                except (OSError, ValueError) as error:
                    row["reason"] = one_line(error)
                else:
                    row["wall_s"] = time.perf_counter() - begun
                    row["times_real_time"] = seconds / row["wall_s"]
            rows.append(row)
            print(f"{way}: {row.get('times_real_time', 0):.1f} × real time", flush=True)
            write(document, path)
    return document


def _loop(settings: CorpusSettings, source: Path, out: Path) -> Json:
    """A script of five lines."""
    out.mkdir()
    codec = load(settings.model, device=settings.device).fold_weight_norm()
    begun = time.perf_counter()
    for file in sorted(source.iterdir()):
        codec.compress(file).save(out / f"{file.stem}.dac")
    return {"encoding_s": time.perf_counter() - begun}


def _pool(settings: CorpusSettings, source: Path, out: Path) -> Json:
    """The published package's `compress`, in a pool of processes that share the files."""
    assert settings.published_python
    out.mkdir()
    codec = load(settings.model)
    checkpoint = out.parent / "weights.pth"
    codec.save(checkpoint)
    command = [settings.published_python, "-W", "ignore", str(POOL), str(checkpoint)]
    command += [str(source), str(out), settings.device, str(PROCESSES)]
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=others, check=False)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
    return {}


def _ours(options: Options) -> Callable[[Path, Path], Json]:
    def run(source: Path, out: Path) -> Json:
        meter = Meter()
        card = tokenize([str(source)], out, options, meter)
        encoders = meter.capacity["encoding"] * meter.elapsed
        return {
            "busy_s": dict(meter.busy),
            "failures": card.failures,
            "efficiency": meter.busy["encoding"] / encoders,
        }

    return run


@dataclass(frozen=True)
class Prediction:
    """What so many GPUs would come to, as times of real time, and what holds them back."""

    gpus: int
    readers: int
    speed: float
    bottleneck: str


def predict(reading: float, encoding: float, writing: float, gpus: int, readers: int) -> Prediction:
    """The slowest phase decides, since phases run beside each other.

    Args:
        reading: times real time that one reader core comes to.
        encoding: of one GPU.
        writing: of one task that writes; there are `WRITERS` of them.
        gpus: how many there are.
        readers: cores that read for each of them.
    """
    from dac_fast.corpus.on_ray import WRITERS

    speeds = {
        "reading": reading * readers * gpus,
        "encoding": encoding * gpus,
        "writing": writing * WRITERS,
    }
    slowest = min(speeds, key=lambda phase: speeds[phase])
    return Prediction(gpus, readers, speeds[slowest], slowest)


def rates(document: Json) -> dict[str, float]:
    """Times real time that one core or worker comes to in each phase: medians over our rows."""
    seconds = document["corpus"]["seconds"]
    busy = [row["busy_s"] for row in document["rows"] if "busy_s" in row]
    phases = ("reading", "encoding", "writing")
    return {phase: seconds / median(row[phase] for row in busy) for phase in phases}


def markdown(document: Json, gpu_speeds: Sequence[float] = (100.0, 300.0, 1000.0)) -> str:
    """The page with both tables."""
    machine, corpus = document["environment"], document["corpus"]
    lines = [
        f"# A corpus to codes: {title(machine)}",
        "",
        *facts(machine),
        "",
        f"{corpus['recordings']} recordings, {corpus['seconds']:.0f} s, model {corpus['model']}, "
        "from files to files; medians over rounds. Wall time has the start of Ray and of its "
        "workers in it. Efficiency is the share of the workers' time in which they encoded.",
        "",
        *table_head(("way", "wall, s", "× real time", "efficiency")),
    ]
    for way in dict.fromkeys(row["way"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["way"] == way and "wall_s" in row]
        if not rows:
            continue
        shares = [row["efficiency"] for row in rows if "efficiency" in row]
        share = f"{median(shares):.0%}" if shares else ""
        wall, speed = (median(row[key] for row in rows) for key in ("wall_s", "times_real_time"))
        lines.append(table_row((way, f"{wall:.1f}", f"{speed:.1f}", share)))
    measured = rates(document)
    lines += [
        "",
        "## On paper: more GPUs",
        "",
        f"Measured above: a core reads {measured['reading']:.0f} × real time, a task writes "
        f"{measured['writing']:.0f} ×. What a GPU encodes was **not measured**: the columns take "
        "it to be so many times real time. Each cell is what all GPUs come to, and the phase that "
        "holds them back; the network and the disk are not in it.",
        "",
        *table_head(("GPUs", "reader cores each", *(f"{speed:.0f} ×" for speed in gpu_speeds))),
    ]
    for gpus in GPUS:
        for readers in READERS_PER_GPU:
            found = [
                predict(measured["reading"], speed, measured["writing"], gpus, readers)
                for speed in gpu_speeds
            ]
            cells = (f"{cell.speed:.0f} ×, {cell.bottleneck}" for cell in found)
            lines.append(table_row((str(gpus), str(readers), *cells)))
    needed = ", ".join(f"{speed / measured['reading']:.1f}" for speed in gpu_speeds)
    lines += ["", f"Reader cores that a GPU of these speeds needs: {needed}."]
    return "\n".join(lines) + "\n"

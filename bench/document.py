"""A result file: one JSON document with the machine it is from, and what all pages about it share.

A row names its peer under the key `provider`, in the training step's files `implementation`: the
format is older than the word.
"""

import datetime
import importlib
import json
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dac_fast.files import atomic_path

ROOT = Path(__file__).parents[1]
# Git ignores this folder. A result to keep is copied to bench/results and committed.
OUT = ROOT / "bench/out"
SCHEMA = 1
# An object in a result file: a whole document, its environment, a row.
Json = dict[str, Any]


# What the environment of a run at tiny sizes says of its figures.
QUICK = "tiny sizes, no measurement"


def environment(device: str, commit: str | None = None, quick: bool = False) -> Json:
    """The machine, its software and the commit.

    Args:
        device: "cpu" or "cuda".
        commit: recorded where the tree is no git checkout.
        quick: whether sizes are tiny, for the test of the benchmark itself.
    """
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    record: Json = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD") or commit,
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": _cpu_model(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if quick:
        record["figures"] = QUICK
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        record |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _output("nvidia-smi", *query),
            "cuda": torch.version.cuda,
        }
    return record


def _output(*command: str) -> str | None:
    """The stripped output of a program; None where it is missing or fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def write(document: Json, path: Path) -> None:
    """Replaces the file in one step, so that a process that dies never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")


def one_line(error: Exception) -> str:
    """The `reason` of a failed row: the error's type and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def speedup(base: list[float], rounds: list[float]) -> float:
    """How many times as fast as the base a peer is: the median of its ratios, round by round."""
    return float(np.median([b / r for b, r in zip(base, rounds, strict=False)]))


def speedups(rows: list[Json]) -> dict[str, float]:
    """The speedup of each peer of a case against the first."""
    return {row["provider"]: speedup(rows[0]["round_ms"], row["round_ms"]) for row in rows}


def title(environment: Json) -> str:
    """The device in a few words, and whether its figures mean nothing."""
    device = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    return f"{device}: {environment['figures']}" if "figures" in environment else device


def facts(environment: Json) -> list[str]:
    """The environment as a Markdown list."""
    return [f"- {key}: {value}" for key, value in environment.items() if value is not None]


def limits_fact(limits: Json) -> str:
    """The measured limits of the device as an item of that list."""
    rates = ", ".join(
        f"{rate:.3g} TFLOP/s {name}" for name, rate in limits["matmul_tflop_s"].items()
    )
    copy = f"copy {limits['copy_gb_s']:.4g} GB/s (read plus written)"
    return f"- measured limits: {copy}; matrix product {rates}"


def table_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table_head(cells: Iterable[str]) -> list[str]:
    """The two lines that head a Markdown table."""
    names = list(cells)
    return [table_row(names), table_row(["---"] * len(names))]

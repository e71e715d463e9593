"""Where the numbers were taken: the machine, its software and the commit."""

import datetime
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]


def _output(*command: str) -> str | None:
    """What a program prints, stripped; None where there is no such program or it fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def environment(device: str, commit: str | None = None) -> dict:
    """The record that heads a result file.

    Args:
        device: "cpu" or "cuda".
        commit: what was checked out, where the tree is not a git checkout.
    """
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD") or commit,
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _output(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
            ),
            "cuda": torch.version.cuda,
        }
    return record


SCHEMA = 1


def write(document: dict, path: Path):
    """Replace the file in one step: a reader, or a process that dies, never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def speedups(rows: list[dict]) -> dict[str, float]:
    """Per provider of one case, how many times as fast as the first: the median over rounds of the paired ratio."""
    base = rows[0]["round_ms"]
    return {
        row["provider"]: float(
            np.median([b / r for b, r in zip(base, row["round_ms"], strict=True)])
        )
        for row in rows
    }


def title(environment: dict) -> str:
    """The device in a few words."""
    return environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"


def facts(environment: dict) -> list[str]:
    """The record of `environment` as a list."""
    return [f"- {key}: {value}" for key, value in environment.items() if value is not None]


def table_row(cells) -> str:
    return "| " + " | ".join(cells) + " |"

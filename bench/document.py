"""Where the numbers were taken: the machine, its software and the commit."""

import datetime
import platform
import shutil
import subprocess
from pathlib import Path

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
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
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
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "cuda": torch.version.cuda,
        }
    return record

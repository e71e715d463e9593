"""The published package in the usual pool: python pool.py CHECKPOINT SOURCE OUT DEVICE PROCESSES.

Nothing of this repository is needed. Each process has a model of its own, and the files are handed
out one by one.
"""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import dac
import torch
from audiotools import AudioSignal

model: Any = None


def prepare(checkpoint: str, device: str) -> None:
    """Loads the model of a process."""
    global model
    torch.set_num_threads(1)
    model = dac.DAC.load(checkpoint).eval().to(device)


def encode(paths: tuple[Path, Path]) -> None:
    """A recording to a file of codes."""
    source, target = paths
    with torch.inference_mode():
        # Given a path, the package reads it by ffmpeg, which may be missing.
        model.compress(AudioSignal(source)).save(target)


if __name__ == "__main__":
    checkpoint, source, out, device, processes = sys.argv[1:]
    files = sorted(Path(source).iterdir())
    jobs = [(file, Path(out) / f"{file.stem}.dac") for file in files]
    context = multiprocessing.get_context("spawn")
    with context.Pool(int(processes), prepare, (checkpoint, device)) as pool:
        for _ in pool.imap_unordered(encode, jobs):
            pass

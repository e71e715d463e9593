"""`dac-fast` in processes that can be killed, begun in a moment: all are forks of one that waits.

The outputs of a command are the files below a folder, by their names there. What is hidden is no
output: a process that is killed may leave it, and the next one sweeps it.
"""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import soundfile
import torch
from served import SIZES, noise, small_codec

from dac_fast import DAC
from dac_fast.config import PRESETS, Config

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("dac_fast.cli.commands", "dac_fast.corpus.tokenize", "dac_fast.serving.app", "served"),
        *("pyloudnorm", "scipy.signal", "safetensors.torch", "soundfile"),
        *("uvicorn.loops.auto", "uvicorn.protocols.http.auto", "torch._dynamo", "torch._refs"),
    ]
)

# What `download` and `load` take for the preset: a model that computes in a moment.
PRESET = "16khz"


def begin(
    arguments: list[str], log: Path, environment: dict[str, str] | None = None
) -> BaseProcess:
    """`dac-fast` with arguments in a new process; what it prints goes to a file."""
    process = CONTEXT.Process(target=_main, args=(arguments, log, environment or {}), daemon=True)
    process.start()
    return process


def _main(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    from dac_fast.cli import main

    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ |= environment
    PRESETS[PRESET] = Config(**SIZES)
    sys.argv = ["dac-fast", *arguments]
    torch.set_num_threads(1)
    main()


def end(process: BaseProcess, log: Path) -> str:
    """What the command printed; fails unless it ended well."""
    process.join(60)
    printed = log.read_text()
    assert process.exitcode == 0, printed
    return printed


def a_model(path: Path) -> DAC:
    """A checkpoint of a codec that computes in a moment, and the codec."""
    small_codec().save(path)
    return DAC.load(path)


def recordings(folder: Path, seconds: list[float]) -> Path:
    """A folder of noise."""
    folder.mkdir()
    for number, length in enumerate(seconds):
        samples = np.ascontiguousarray(noise(length, seed=number).T)
        soundfile.write(folder / f"{number}.wav", samples, 8000)
    return folder


def outputs(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, but of those hidden or in hidden folders."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def hidden(folder: Path) -> list[str]:
    """The names of hidden files and folders below a folder."""
    return [path.name for path in folder.rglob(".*")]

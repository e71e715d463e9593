"""`python -m bench parity`: what each precision costs on a real recording, against float64.

Two things are compared with the same codec in float64: the codes of the recording, and the audio of
float64's codes. The result file is one JSON document: `environment`, `recording`, and `rows`, one
per model and way to run it. On a CPU `tf32x3` is emulated, for codes alone: it takes minutes.
"""

import copy
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dac_fast
from bench.checks.codec import agreement, decibels
from bench.checks.random_codec import random_codec
from bench.checks.tensor_cores import emulated_convolutions
from bench.document import (
    ROOT,
    SCHEMA,
    Json,
    environment,
    facts,
    table_head,
    table_row,
    title,
    write,
)
from dac_fast import ops
from dac_fast.codec import DAC

# The beginning of the bundled clip, in a format that is read where soundfile is missing.
CLIP = ROOT / "bench/tabla_cc0.wav"
GOLDEN = ROOT / "tests/golden"
# Functions that make a codec on the CPU, its weights not folded.
MODELS: dict[str, Callable[[], DAC]] = {
    "golden, even strides": lambda: dac_fast.load(GOLDEN / "weights_even.pth"),
    "golden, odd strides": lambda: dac_fast.load(GOLDEN / "weights_odd.pth"),
    "tiny": lambda: dac_fast.load("tiny"),
    "44khz, random weights": lambda: random_codec("44khz"),
}
REFERENCE = "reference, fp32"


def run_table(
    device: str,
    precisions: Sequence[str],
    recording: Path,
    seconds: float,
    path: Path,
    commit: str | None = None,
    quick: bool = False,
) -> Json:
    """Computes every row and writes the document, again after each model; returns it.

    Args:
        device: "cpu" or "cuda".
        precisions: of `DAC.optimize`.
        recording, seconds: see `read_clip`.
        path: of the document.
        commit: see `environment`.
        quick: the first model and a tenth of a second, for the test of the benchmark itself.
    """
    models = list(MODELS.items())[: 1 if quick else None]
    seconds = 0.1 if quick else seconds
    audio = read_clip(recording, seconds).to(device)
    rows: list[Json] = []
    document = {
        "schema": SCHEMA,
        "environment": environment(device, commit, quick),
        "rows": rows,
        "recording": f"the first {seconds:g} s of {recording.name}",
    }
    for name, make in models:
        for row in measure(copy.deepcopy(make()).to(device), audio, precisions):
            rows.append({"model": name} | row)
            print(f"{name}, {row['way']}: {row['agreement']:.2%} {audio_of(row)}", flush=True)
        write(document, path)
    return document


def read_clip(path: Path, seconds: float) -> Tensor:
    """The beginning of a recording's first channel, [1, 1, T].

    Args:
        path: a .wav of 16 bits, which is read without any library, or another format of
            soundfile's.
        seconds: of the recording.
    Raises:
        ValueError: a .wav has samples of another size.
    """
    if path.suffix != ".wav":
        import soundfile

        with soundfile.SoundFile(path) as file:
            samples = file.read(round(seconds * file.samplerate), always_2d=True)
        return torch.tensor(samples[:, 0], dtype=torch.float32)[None, None]
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"{path} has samples of {8 * file.getsampwidth()} bits; accepted: 16")
        data = file.readframes(round(seconds * file.getframerate()))
        samples = np.frombuffer(data, dtype="<i2").reshape(-1, file.getnchannels()) / 32768
    return torch.tensor(samples[:, 0], dtype=torch.float32)[None, None]


@torch.no_grad()
def measure(codec: DAC, audio: Tensor, precisions: Sequence[str]) -> list[Json]:
    """The rows of one model: the reference in single precision, the engine in each precision."""
    # Whole frames, so that the end of the recording does not matter.
    audio = audio[..., : audio.shape[2] // codec.hop_length * codec.hop_length]
    exact = copy.deepcopy(codec).double()
    with ops.use_backend("reference"):
        codes = exact.encode(audio.double()).codes
        truth = exact.decode_codes(codes)

    def compared(found: Tensor) -> Json:
        first = agreement(found[:, 0], codes[:, 0])
        return {"agreement": agreement(found, codes), "first_codebook": first}

    def row(way: str, codec: DAC) -> Json:
        found = codec.encode(audio).codes
        snr = decibels(codec.decode_codes(codes), truth)
        return {"way": way, "codes": codes.numel()} | compared(found) | {"snr_db": snr}

    def emulated(name: str) -> Json:
        with ops.use_backend("reference"):
            with emulated_convolutions():
                z = codec.encoder(audio)
            found = codec.quantizer(z)[1]
        return {"way": f"{name}, emulated", "codes": codes.numel()} | compared(found)

    with ops.use_backend("reference"):
        rows = [row(REFERENCE, codec)]
    for name in precisions:
        if name == "tf32x3" and audio.device.type == "cpu":
            rows.append(emulated(name))
        else:
            rows.append(row(name, copy.deepcopy(codec).optimize(name)))
    return rows


def audio_of(row: Json) -> str:
    """The signal-to-noise ratio of a row's audio, if there is any."""
    return f"{row['snr_db']:.1f}" if "snr_db" in row else ""


def markdown(document: Json) -> str:
    """The page with the table."""
    machine = document["environment"]
    lines = [
        f"# Precisions: {title(machine)}",
        "",
        *facts(machine),
        "",
        f"Against the same codec in float64, on {document['recording']}: the share of its codes "
        "that are equal (in brackets those of the first codebook: one that differs may change "
        "those after it in its frame), and the signal-to-noise ratio of the audio that float64's "
        "codes decode to.",
        "",
        *table_head(("model", "precision", "codes", "equal", "audio, dB")),
    ]
    for row in document["rows"]:
        equal = f"{row['agreement']:.2%} ({row['first_codebook']:.2%})"
        cells = (row["model"], row["way"], str(row["codes"]), equal, audio_of(row))
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"

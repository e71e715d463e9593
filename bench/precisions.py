"""`python -m bench parity`: what each precision costs, on a real recording: codes that agree and audio in decibels.

Against the same codec in float64: the codes of the recording, and the audio of float64's codes. The result file is one
JSON document: `environment`, `recording`, and `rows`, one per model and way to run it.
"""

import copy
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import dac_fast
from bench.checks.codec import agreement, decibels
from bench.checks.random_codec import random_codec
from bench.document import ROOT, SCHEMA, environment, facts, table_row, title, write
from dac_fast import ops
from dac_fast.codec import DAC

# The beginning of the bundled clip, in a format that is read where soundfile is missing.
CLIP = ROOT / "bench/tabla_cc0.wav"
GOLDEN = ROOT / "tests/golden"
# By name; each makes a codec with weight norm, on the CPU.
MODELS: dict[str, Callable[[], DAC]] = {
    "golden, even strides": lambda: dac_fast.load(GOLDEN / "weights_even.pth"),
    "golden, odd strides": lambda: dac_fast.load(GOLDEN / "weights_odd.pth"),
    "tiny": lambda: dac_fast.load("tiny"),
    "44khz, random weights": lambda: random_codec("44khz"),
}
REFERENCE = "reference, fp32"


def read_clip(path: Path, seconds: float) -> torch.Tensor:
    """The first seconds of a recording's first channel [1, 1, T]; .wav (16 bit) without any library."""
    if path.suffix == ".wav":
        with wave.open(str(path)) as file:
            rate, channels = file.getframerate(), file.getnchannels()
            samples = (
                np.frombuffer(file.readframes(round(seconds * rate)), dtype="<i2").reshape(
                    -1, channels
                )
                / 32768
            )
    else:
        import soundfile

        with soundfile.SoundFile(path) as file:
            samples = file.read(round(seconds * file.samplerate), always_2d=True)
    return torch.tensor(samples[:, 0], dtype=torch.float32)[None, None]


def run_table(
    device: str,
    precisions: Sequence[str],
    recording: Path,
    seconds: float,
    path: Path,
    commit: str | None = None,
) -> dict:
    """Compute every row and write the document, again after each model; returns it.

    Args:
        precisions: of `DAC.optimize`.
        recording, seconds: see `read_clip`.
        commit: see `environment`.
    """
    audio = read_clip(recording, seconds).to(device)
    rows = []
    document = {"schema": SCHEMA, "environment": environment(device, commit), "rows": rows}
    document["recording"] = f"the first {seconds:g} s of {recording.name}"
    for name, make in MODELS.items():
        codec = copy.deepcopy(make()).to(device)
        # Whole frames, so that the recording's end is no matter.
        whole = audio[..., : audio.shape[2] // codec.hop_length * codec.hop_length]
        with torch.no_grad():
            exact = copy.deepcopy(codec).double()
            with ops.use_backend("reference"):
                codes = exact.encode(whole.double()).codes
                truth = exact.decode_codes(codes)
            for way in (REFERENCE, *precisions):
                if way == REFERENCE:
                    with ops.use_backend("reference"):
                        found = codec.encode(whole).codes, codec.decode_codes(codes)
                else:
                    optimized = copy.deepcopy(codec).optimize(way)
                    found = optimized.encode(whole).codes, optimized.decode_codes(codes)
                rows.append(
                    {
                        "model": name,
                        "way": way,
                        "codes": codes.numel(),
                        "agreement": agreement(found[0], codes),
                        "first_codebook": agreement(found[0][:, 0], codes[:, 0]),
                        "snr_db": decibels(found[1], truth),
                    }
                )
                print(
                    f"{name}, {way}: {rows[-1]['agreement']:.2%}, {rows[-1]['snr_db']:.1f} dB",
                    flush=True,
                )
        write(document, path)
    return document


def markdown(document: dict) -> str:
    """The table."""
    lines = [
        f"# Precisions: {title(document['environment'])}",
        "",
        *facts(document["environment"]),
        "",
    ]
    lines += [
        f"Against the same codec in float64, on {document['recording']}: the share of its codes that are equal "
        "(in brackets those of the first codebook: one that differs may change those after it in its frame), "
        "and the signal-to-noise ratio of the audio that float64's codes decode to.",
        "",
        table_row(("model", "precision", "codes", "equal", "audio, dB")),
        table_row(["---"] * 5),
    ]
    for row in document["rows"]:
        equal = f"{row['agreement']:.2%} ({row['first_codebook']:.2%})"
        lines.append(
            table_row((row["model"], row["way"], str(row["codes"]), equal, f"{row['snr_db']:.1f}"))
        )
    return "\n".join(lines) + "\n"

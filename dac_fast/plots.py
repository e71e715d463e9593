"""Pictures, as PNG files: rate-distortion and training curves, spectrograms of a recording before and after.

They need matplotlib (the extra `plot`), which is imported when one is drawn.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dac_fast.files import atomic_path
from dac_fast.spectral import analysis_window, hz_to_mel, mel_filters

# Okabe and Ito's colours, told apart by everyone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GRID = "#222222", "#dddddd"

COLUMNS, MELS = 1600, 192
FLOOR_DB, RANGE_DB = -100, 80
TICKS_HZ = (0, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000)


class PlotError(ValueError):
    """A picture cannot be drawn."""


def rate_distortion(path: str | os.PathLike, summary: Sequence[dict], overall: str):
    """Metrics over the bitrate, a line per domain and a black one for all files together.

    Args:
        path: of the PNG file.
        summary: `Evaluation.summary` of a codec.
        overall: the domain that stands for all files together.
    Raises:
        PlotError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    panels = [
        ("mel_distance", "mel distance  (lower is better)"),
        ("si_sdr", "SI-SDR, dB  (higher is better)"),
    ]
    if any(row.get("visqol") is not None for row in summary):
        panels.append(("visqol", "ViSQOL, MOS-LQO  (higher is better)"))
    figure = _figure(4.6 * len(panels), 4.2)
    axes = figure.subplots(1, len(panels))
    domains = sorted({row["domain"] for row in summary} - {overall})
    styles = {
        name: {"color": COLOURS[i % len(COLOURS)], "lw": 1.8, "ms": 5}
        for i, name in enumerate(domains)
    }
    styles[overall] = {"color": INK, "lw": 2.4, "ms": 6}
    for ax, (metric, title) in zip(axes, panels, strict=True):
        for domain, style in styles.items():
            rows = [r for r in summary if r["domain"] == domain and r[metric] is not None]
            ax.plot(
                [r["kbps"] for r in rows], [r[metric] for r in rows], "o-", label=domain, **style
            )
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("bitrate, kbit/s per channel")
        ax.set_xlim(left=0)
        ax.grid(color=GRID, lw=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    if domains:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False
        )
    _save(figure, path)


def training_curves(path: str | os.PathLike, runs: Sequence[str | os.PathLike]):
    """Mel loss of training (a moving average over a tenth of the run) and mel distance on validation, over the steps.

    Args:
        path: of the PNG file.
        runs: folders of training runs; each is a line, labelled with the folder's name.
    Raises:
        PlotError: matplotlib is not installed, or a folder has no readable log.
        OutputError: the file cannot be written.
    """
    figure = _figure(10, 4)
    axes = figure.subplots(1, 2)
    for run, colour in zip(map(Path, runs), COLOURS * len(runs), strict=False):
        try:
            rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise PlotError(f"{run}: no readable log.jsonl of a training run: {error}") from error
        for ax, part, key in zip(
            axes, ("train", "validation"), ("mel", "mel_distance"), strict=True
        ):
            points = np.array(
                [(r["step"], r[key]) for r in rows if r["part"] == part and r.get(key) is not None]
            )
            if not len(points):
                continue
            values, width = points[:, 1], 1
            if part == "train":
                ax.plot(*points.T, color=colour, lw=0.8, alpha=0.3)
                width = max(len(points) // 10, 1)
                values = np.convolve(values, np.ones(width) / width, "valid")
            ax.plot(points[width - 1 :, 0], values, color=colour, lw=2, label=run.resolve().name)
    for ax, title in zip(axes, ("mel loss, training", "mel distance, validation"), strict=True):
        ax.set_title(f"{title}  (lower is better)", loc="left", fontsize=10)
        ax.set_xlabel("step")
        ax.grid(color=GRID, lw=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False
    )
    _save(figure, path)


def spectrograms(
    path: str | os.PathLike, original: np.ndarray, restored: np.ndarray, sample_rate: int
):
    """Mel spectrograms of two recordings, one above the other, at one scale: 80 dB below the original's loudest bin.

    Args:
        path: of the PNG file.
        original, restored: float arrays [C, T] or [T]; channels are mixed to one.
        sample_rate: of both, in Hz.
    Raises:
        PlotError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure = _figure(11, 6)
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    spectra = [mel_decibels(np.asarray(audio), sample_rate) for audio in (original, restored)]
    seconds = [np.atleast_2d(audio).shape[1] / sample_rate for audio in (original, restored)]
    # Silence is to be dark.
    top = max(spectra[0].max(), FLOOR_DB + RANGE_DB)
    highest = hz_to_mel(torch.tensor(sample_rate / 2)).item()
    for ax, spectrum, duration, title in zip(
        axes, spectra, seconds, ("original", "restored"), strict=True
    ):
        image = ax.imshow(
            spectrum - top, origin="lower", aspect="auto", extent=(0, duration, 0, highest), cmap="magma",
            vmin=-RANGE_DB, vmax=0, interpolation="antialiased",
        )  # fmt: skip
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_ylabel("frequency, kHz")
    axes[0].set_xlim(0, max(seconds))
    ticks = [hz for hz in TICKS_HZ if hz <= sample_rate / 2]
    axes[1].set_yticks(
        hz_to_mel(torch.tensor(ticks, dtype=torch.float32)).tolist(),
        [f"{hz / 1000:g}" for hz in ticks],
    )
    axes[1].set_xlabel("time, s")
    figure.colorbar(image, ax=axes, label="level, dB", pad=0.01, aspect=40)
    _save(figure, path)


def mel_decibels(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Mel spectrogram in dB, [mels, columns], of [C, T] or [T], its channels mixed to one.

    Windows of about 45 ms, a column per quarter of one, but at most 1600 columns: of a long recording, single windows
    at even distances.
    """
    window = 2 ** math.ceil(math.log2(0.042 * sample_rate))
    mono = torch.from_numpy(np.atleast_2d(audio).mean(axis=0)).float()
    mono = torch.nn.functional.pad(mono, (window // 2, window // 2))
    hop = max(window // 4, -(-(len(mono) - window) // COLUMNS))
    frames = mono.unfold(0, window, hop) * analysis_window(window)
    power = torch.fft.rfft(frames).abs().square()
    # Few enough filters that each covers a bin. Unit sums in place of unit areas: noise looks as level as it is.
    filters = mel_filters(sample_rate, window, min(MELS, window // 8))
    filters = filters / filters.sum(1, keepdim=True)
    return (10 * (power @ filters.T).clamp(min=10 ** (FLOOR_DB / 10)).log10()).T.numpy()


def _figure(width: float, height: float):
    """An empty figure, in inches; without pyplot, whose state is global."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("drawing needs matplotlib: pip install 'dac-fast[plot]'") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _save(figure, path: str | os.PathLike):
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})

"""Pictures, as PNG files: rate-distortion and training curves, spectrograms before and after.

They need matplotlib (the extra `plot`), which is imported when a picture is drawn.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dac_fast.files import atomic_path
from dac_fast.spectral import analysis_window, hz_to_mel, mel_filters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by everyone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#222222"
GRID = "#dddddd"

# Of a mel spectrogram: the most columns, and the most rows.
COLUMNS = 1600
MELS = 192
# The level of silence, and the levels below the loudest that a spectrogram shows.
FLOOR_DB = -100
RANGE_DB = 80
TICKS_HZ = (0, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000)


class PlotError(ValueError):
    """A picture cannot be drawn."""


def rate_distortion(
    path: str | os.PathLike[str], summary: Sequence[dict[str, Any]], overall: str
) -> None:
    """Metrics over the bitrate, a line per domain and a black one for all files together.

    Args:
        path: of the PNG file.
        summary: `Evaluation.summary` of a codec.
        overall: the domain that stands for all files together.
    Raises:
        PlotError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    panels = {
        "mel_distance": "mel distance  (lower is better)",
        "si_sdr": "SI-SDR, dB  (higher is better)",
    }
    if any(row.get("visqol") is not None for row in summary):
        panels["visqol"] = "ViSQOL, MOS-LQO  (higher is better)"
    figure = _figure(4.6 * len(panels), 4.2)
    axes = figure.subplots(1, len(panels))
    domains = sorted({row["domain"] for row in summary} - {overall})
    for ax, (metric, title) in zip(axes, panels.items(), strict=True):
        for number, domain in enumerate([*domains, overall]):
            rows = [r for r in summary if r["domain"] == domain and r[metric] is not None]
            ax.plot(
                [row["kbps"] for row in rows],
                [row[metric] for row in rows],
                "o-",
                label=domain,
                color=INK if domain == overall else COLOURS[number % len(COLOURS)],
                linewidth=2.4 if domain == overall else 1.8,
                markersize=6 if domain == overall else 5,
            )
        _finish(ax, title, "bitrate, kbit/s per channel")
        ax.set_xlim(left=0)
    if domains:
        _legend(figure, axes[0])
    _save(figure, path)


def training_curves(path: str | os.PathLike[str], runs: Sequence[str | os.PathLike[str]]) -> None:
    """Mel loss of training and mel distance on validation, over the steps.

    The mel loss is a moving average over a tenth of the run.

    Args:
        path: of the PNG file.
        runs: folders of training runs; each is a line, labelled with the folder's name.
    Raises:
        PlotError: matplotlib is not installed, or a folder has no readable log.
        OutputError: the file cannot be written.
    """
    figure = _figure(10, 4)
    training, validation = figure.subplots(1, 2)
    for number, run in enumerate(map(Path, runs)):
        colour = COLOURS[number % len(COLOURS)]
        name = run.resolve().name
        steps, losses = _logged(run, "train", "mel")
        if len(steps):
            training.plot(steps, losses, color=colour, lw=0.8, alpha=0.3)
            width = max(len(steps) // 10, 1)
            means = np.convolve(losses, np.ones(width) / width, "valid")
            training.plot(steps[width - 1 :], means, color=colour, lw=2, label=name)
        steps, distances = _logged(run, "validation", "mel_distance")
        if len(steps):
            validation.plot(steps, distances, color=colour, lw=2, label=name)
    _finish(training, "mel loss, training  (lower is better)", "step")
    _finish(validation, "mel distance, validation  (lower is better)", "step")
    _legend(figure, training)
    _save(figure, path)


def _logged(run: Path, part: str, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The steps at which a run logged a value of that part, and the values."""
    try:
        # A run that was killed, or goes on, may have written part of its last line.
        lines = (run / "log.jsonl").read_text().rpartition("\n")[0].splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise PlotError(f"{run}: no readable log.jsonl of a training run: {error}") from error
    there = [row for row in rows if row["part"] == part and row.get(key) is not None]
    steps, values = ([row[name] for row in there] for name in ("step", key))
    return np.array(steps, np.float64), np.array(values, np.float64)


def spectrograms(
    path: str | os.PathLike[str],
    recordings: Mapping[str, NDArray[np.floating]],
    sample_rate: int,
) -> None:
    """Mel spectrograms of recordings, one above the other, at one scale.

    The scale goes from the first recording's loudest bin to 80 dB below.

    Args:
        path: of the PNG file.
        recordings: [C, T] or [T], by their titles; channels are mixed to one.
        sample_rate: of all, in Hz.
    Raises:
        PlotError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure = _figure(11, 3 * len(recordings))
    (axes,) = figure.subplots(len(recordings), 1, sharex=True, sharey=True, squeeze=False).T
    pictures = {title: mel_decibels(audio, sample_rate) for title, audio in recordings.items()}
    # Silence is to be dark.
    top = max(next(iter(pictures.values())).max(), FLOOR_DB + RANGE_DB)
    seconds = {title: audio.shape[-1] / sample_rate for title, audio in recordings.items()}
    highest = hz_to_mel(torch.tensor(sample_rate / 2)).item()
    for ax, (title, decibels) in zip(axes, pictures.items(), strict=True):
        image = ax.imshow(
            decibels - top,
            origin="lower",
            aspect="auto",
            extent=(0, seconds[title], 0, highest),
            cmap="magma",
            vmin=-RANGE_DB,
            vmax=0,
            interpolation="antialiased",
        )
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_ylabel("frequency, kHz")
    axes[0].set_xlim(0, max(seconds.values()))
    ticks = [hz for hz in TICKS_HZ if hz <= sample_rate / 2]
    places = hz_to_mel(torch.tensor(ticks, dtype=torch.float32)).tolist()
    axes[0].set_yticks(places, [f"{hz / 1000:g}" for hz in ticks])
    axes[-1].set_xlabel("time, s")
    figure.colorbar(image, ax=axes, label="level, dB", pad=0.01, aspect=40)
    _save(figure, path)


def mel_decibels(audio: NDArray[np.floating], sample_rate: int) -> NDArray[np.float32]:
    """Mel spectrogram in dB, [mels, columns], of [C, T] or [T], its channels mixed to one.

    Windows last about 45 ms, and a column is a quarter of one, but there are at most 1600 columns:
    of a long recording, single windows at even distances.
    """
    window = 2 ** math.ceil(math.log2(0.042 * sample_rate))
    mono = torch.from_numpy(np.atleast_2d(audio).mean(axis=0)).float()
    mono = torch.nn.functional.pad(mono, (window // 2, window // 2))
    hop = max(window // 4, -(-(len(mono) - window) // COLUMNS))
    frames = mono.unfold(0, window, hop) * analysis_window(window)
    power = torch.fft.rfft(frames).abs().square()
    # Few enough filters that each covers a bin. Their sums, not their areas, are made one: noise
    # looks as level as it is.
    filters = mel_filters(sample_rate, window, min(MELS, window // 8))
    filters = filters / filters.sum(1, keepdim=True)
    decibels = 10 * (power @ filters.T).clamp(min=10 ** (FLOOR_DB / 10)).log10()
    return np.asarray(decibels.T.numpy(), np.float32)


def require() -> None:
    """Raises PlotError where matplotlib is not installed: to be called before long work."""
    _figure(1, 1)


def _figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches; without pyplot, whose state is global."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("drawing needs matplotlib: pip install 'dac-fast[plot]'") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _finish(ax: "Axes", title: str, label: str) -> None:
    """Title, label of the horizontal axis, and grid of a panel of curves."""
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel(label)
    ax.grid(color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(figure: "Figure", ax: "Axes") -> None:
    handles, labels = ax.get_legend_handles_labels()
    columns = max(min(len(labels), 6), 1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})

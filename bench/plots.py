"""The plots of a report: providers per case, and each kernel's share of what the device can do."""

from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.document import speedups, title

COLORS = matplotlib.colormaps["tab20"].colors


def requests(timed: list[dict], document: dict, path: Path) -> bool:
    """Bars per input: how many times faster than real time each provider encodes and decodes it."""
    bars = [
        (row["shape"], row["provider"], row["real_time"])
        for row in timed
        if row["direction"] == "both"
    ]
    if not bars:
        return False
    axes = _bars(
        bars, f"Encode and decode, items x seconds\n{title(document['environment'])}", path
    )
    _log(axes)
    axes.set_xlabel("times faster than real time")
    return _save(axes, path)


def providers(timed: list[dict], document: dict, path: Path) -> bool:
    """Bars per case: how many times as fast as its first provider each one is. Returns whether there was any."""
    bars = [
        (case, name, ratio)
        for case, rows in groupby(timed, key=lambda row: row["case"])
        for name, ratio in speedups(list(rows)).items()
    ]
    if not bars:
        return False
    axes = _bars(
        bars,
        f"Speed against the first provider of each case\n{title(document['environment'])}",
        path,
    )
    _log(axes)
    axes.set_xlabel("times as fast")
    return _save(axes, path)


def roofline(timed: list[dict], document: dict, path: Path) -> bool:
    """Bars per case: share of the roof, which is the copy bandwidth or the matrix product rate measured in the run."""
    bars = [
        (row["case"], row["provider"], 100 * row["share_of_roof"])
        for row in timed
        if "share_of_roof" in row
    ]
    if not bars:
        return False
    copy = document["limits"]["copy_gb_s"]
    axes = _bars(
        bars,
        f"Share of the roof (copy measured at {copy:.0f} GB/s)\n{title(document['environment'])}",
        path,
    )
    axes.set_xlim(0, max(105, *(value for *_, value in bars)))
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("percent")
    return _save(axes, path)


def _bars(bars: list[tuple[str, str, float]], heading: str, path: Path):
    """Horizontal bars (case, provider, value), one colour a provider, the cases apart."""
    names = list(dict.fromkeys(name for _, name, _ in bars))
    figure = Figure(
        figsize=(11, 1.6 + 0.2 * (len(bars) + len({case for case, *_ in bars}))),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    position, ticks = 0.0, []
    for case, group in groupby(bars, key=lambda bar: bar[0]):
        group = list(group)
        ticks.append((position + (len(group) - 1) / 2, case))
        for _, name, value in group:
            axes.barh(position, value, height=0.9, color=COLORS[names.index(name) % len(COLORS)])
            axes.text(value, position, f" {value:.3g}", va="center", fontsize=7)
            position += 1
        position += 1
    axes.set_yticks([y for y, _ in ticks], [case for _, case in ticks], fontsize=7)
    axes.set_ylim(position - 1, -1)
    handles = [axes.barh(0, 0, color=color) for _, color in zip(names, COLORS, strict=False)]
    axes.legend(handles, names, fontsize=8)
    axes.set_title(heading, fontsize=10)
    return axes


def _log(axes):
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)


def _save(axes, path: Path) -> bool:
    axes.figure.savefig(path, dpi=120)
    return True

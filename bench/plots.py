"""The pictures of a report: peers per case, and each one's share of what the device can do."""

from itertools import groupby

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.document import Json, speedups, title

COLORS = matplotlib.colormaps["tab20"].colors

# A case, a peer, and how long its bar is.
Bar = tuple[str, str, float]


def figures(document: Json) -> dict[str, Figure]:
    """The pictures by suffix, those without any bar left out."""
    timed = [row for row in document["rows"] if row["status"] == "timed"]
    requests = [row for row in timed if "real_time" in row]
    ops = [row for row in timed if "real_time" not in row]
    found = {
        ".requests.png": real_time(requests, document),
        ".peers.png": peers(ops, document),
        ".roofline.png": roofline(ops, document),
    }
    return {suffix: axes.figure for suffix, axes in found.items() if axes}


def real_time(timed: list[Json], document: Json) -> Axes | None:
    """Bars per input: how many times faster than real time each peer encodes and decodes it."""
    bars = [
        (row["shape"], row["provider"], row["real_time"])
        for row in timed
        if row["direction"] == "both"
    ]
    axes = _bars(bars, "Encode and decode, items x seconds", document)
    return axes and _log(axes, "times faster than real time")


def peers(timed: list[Json], document: Json) -> Axes | None:
    """Bars per case: how many times as fast as its first peer each one is."""
    bars = [
        (case, name, ratio)
        for case, rows in groupby(timed, key=lambda row: row["case"])
        for name, ratio in speedups(list(rows)).items()
    ]
    axes = _bars(bars, "Speed against the first peer of each case", document)
    return axes and _log(axes, "times as fast")


def roofline(timed: list[Json], document: Json) -> Axes | None:
    """Bars per case: the share of the roof that the run's own copy and matrix product set."""
    bars = [
        (row["case"], row["provider"], 100 * row["share_of_roof"])
        for row in timed
        if "share_of_roof" in row
    ]
    copy = document["limits"]["copy_gb_s"]
    axes = _bars(bars, f"Share of the roof (copy measured at {copy:.0f} GB/s)", document)
    if axes:
        axes.set_xlim(0, max(105, *(length for *_, length in bars)))
        axes.axvline(100, color="black", linewidth=0.8)
        axes.set_xlabel("percent")
    return axes


def _bars(bars: list[Bar], heading: str, document: Json) -> Axes | None:
    """Horizontal bars, one colour per peer, the cases apart; None where there is no bar."""
    if not bars:
        return None
    names = list(dict.fromkeys(name for _, name, _ in bars))
    cases = {case for case, *_ in bars}
    figure = Figure(figsize=(11, 1.6 + 0.2 * (len(bars) + len(cases))), layout="constrained")
    axes = figure.add_subplot()
    position = 0.0
    ticks = []
    for case, of_case in groupby(bars, key=lambda bar: bar[0]):
        group = list(of_case)
        ticks.append((position + (len(group) - 1) / 2, case))
        for _, name, length in group:
            axes.barh(position, length, height=0.9, color=COLORS[names.index(name) % len(COLORS)])
            axes.text(length, position, f" {length:.3g}", va="center", fontsize=7)
            position += 1
        position += 1
    axes.set_yticks([y for y, _ in ticks], [case for _, case in ticks], fontsize=7)
    axes.set_ylim(position - 1, -1)
    handles = [axes.barh(0, 0, color=color) for _, color in zip(names, COLORS, strict=False)]
    axes.legend(handles, names, fontsize=8)
    axes.set_title(f"{heading}\n{title(document['environment'])}", fontsize=10)
    return axes


def _log(axes: Axes, label: str) -> Axes:
    """Makes the axis of a ratio logarithmic."""
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set_xlabel(label)
    return axes

"""A result file as a Markdown table, and as two plots. Only what was measured appears."""

import json
from itertools import groupby
from pathlib import Path

import numpy as np

HEADER = ("case", "provider", "p50 ms", "p20 to p80", "GB/s", "of copy", "TFLOP/s", "of roof", "times baseline")


def write_report(path: Path) -> list[Path]:
    """Write the .md, and the plots where matplotlib is installed, beside a result file; returns what was written."""
    document = json.loads(path.read_text())
    written = [path.with_suffix(".md")]
    written[0].write_text(markdown(document))
    timed = [row for row in document["rows"] if row["status"] == "timed"]
    try:
        from bench import plots
    except ImportError:
        print("no plots: matplotlib is not installed")
        return written
    for suffix, plot in ((".providers.png", plots.providers), (".roofline.png", plots.roofline)):
        target = path.with_suffix(suffix)
        if plot(timed, document, target):
            written.append(target)
    return written


def speedups(rows: list[dict]) -> dict[str, float]:
    """Per provider of one case, how many times as fast as the first: the median over rounds of the paired ratio."""
    base = rows[0]["round_ms"]
    return {
        row["provider"]: float(np.median([b / r for b, r in zip(base, row["round_ms"], strict=True)])) for row in rows
    }


def title(environment: dict) -> str:
    """The device in a few words."""
    return environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"


def markdown(document: dict) -> str:
    """The whole report."""
    environment, limits = document["environment"], document["limits"]
    matmul = ", ".join(f"{value:.3g} TFLOP/s {dtype}" for dtype, value in limits["matmul_tflop_s"].items())
    lines = [f"# {title(environment)}", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items() if value is not None]
    lines += [
        f"- measured limits: copy {limits['copy_gb_s']:.4g} GB/s (read plus written); matrix product {matmul}",
        "",
        "Times are of one call, percentiles over all iterations; backward is the backward pass alone, its graph kept. "
        "Ratios are medians over interleaved rounds, against the case's first timed provider. "
        "GB/s count the bytes that the op cannot do without. 'Of roof' is the floor set by the measured limits over "
        "the time.",
    ]
    for step in document.get("steps", []):
        lines += ["", f"## {step['name']}", "", f"{step['result']} ({step['seconds']:.0f} s)"]
    timed = [row for row in document["rows"] if row["status"] == "timed"]
    for (op, direction), group in groupby(sorted(timed, key=_group), key=_group):
        lines += ["", f"## {op}, {direction}", "", _row(HEADER), _row(["---"] * len(HEADER))]
        for _, rows in groupby(group, key=lambda row: row["case"]):
            rows = list(rows)
            ratios = speedups(rows)
            lines += [_row(_cells(row, ratios[row["provider"]])) for row in rows]
    for status, heading in (("failed", "Failed"), ("skipped", "Skipped")):
        rows = [row for row in document["rows"] if row["status"] == status]
        if rows:
            lines += ["", f"## {heading}", ""]
            lines += [f"- {row['case']}, {row['provider']}: {row['reason']}" for row in rows]
    if document.get("not_run"):
        lines += ["", "## Not run (out of time)", "", *(f"- {name}" for name in document["not_run"])]
    return "\n".join(lines) + "\n"


def _group(row: dict) -> tuple[str, str]:
    return row["op"], row["direction"]


def _row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: dict, ratio: float) -> list[str]:
    def cell(key, form):
        return format(row[key], form) if key in row else ""

    return [
        f"{row['shape']} {row['dtype']}",
        row["provider"],
        cell("p50_ms", ".4g"),
        f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}",
        cell("gb_s", ".4g"),
        cell("share_of_copy", ".0%"),
        cell("tflop_s", ".3g"),
        cell("share_of_roof", ".0%"),
        f"{ratio:.2f}",
    ]

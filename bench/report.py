"""A result file as a Markdown table, and as two plots. Only what was measured appears."""

import json
from functools import partial
from itertools import groupby
from pathlib import Path

from bench.document import facts, speedups, table_row, title

HEADER = (
    "case",
    "provider",
    "p50 ms",
    "p20 to p80",
    "GB/s",
    "of copy",
    "TFLOP/s",
    "of roof",
    "times baseline",
)
# Of requests: the whole codec, or a step of a stream.
REQUEST_HEADER = (
    "input", "provider", "precision", "p50 ms", "p99 ms", "× real time", "peak GB", "start s", "of roof", "check",
    "times baseline",
)  # fmt: skip
# Fewer calls have no 99th percentile.
MANY = 100


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
    requests = [row for row in timed if "real_time" in row]
    ops = [row for row in timed if "real_time" not in row]
    for suffix, plot, rows in (
        (".requests.png", plots.requests, requests),
        (".providers.png", plots.providers, ops),
        (".roofline.png", plots.roofline, ops),
    ):
        target = path.with_suffix(suffix)
        if plot(rows, document, target):
            written.append(target)
    return written


def markdown(document: dict) -> str:
    """The whole report."""
    environment, limits = document["environment"], document["limits"]
    matmul = ", ".join(
        f"{value:.3g} TFLOP/s {dtype}" for dtype, value in limits["matmul_tflop_s"].items()
    )
    lines = [f"# {title(environment)}", "", *facts(environment)]
    lines += [
        f"- measured limits: copy {limits['copy_gb_s']:.4g} GB/s (read plus written); matrix product {matmul}",
        "",
        "Times are of one call, percentiles over all iterations; backward is the backward pass alone, its graph kept. "
        "Ratios are medians over interleaved rounds, against the case's first timed provider. "
        "GB/s count the bytes that the op cannot do without. 'Of roof' is the floor set by the measured limits over "
        "the time.",
    ]
    timed = [row for row in document["rows"] if row["status"] == "timed"]
    if any("real_time" in row for row in timed):
        lines += [
            "",
            "Codec and stream: times are what a caller waits, wall clock; the roof is that of the convolutions at the "
            "matrix product rate of the provider's precision. Start: from weights in memory to the first result, with "
            "compilation, choice of kernels and capture. Peak: GPU memory over start and first call. Check: audio "
            "against float64, and codes equal to float64's. Precision tf32: convolutions only, PyTorch's default.",
        ]
    for step in document.get("steps", []):
        lines += ["", f"## {step['name']}", "", f"{step['result']} ({step['seconds']:.0f} s)"]
    for (op, direction), group in groupby(sorted(timed, key=_group), key=_group):
        group = list(group)
        header, cells = (
            (REQUEST_HEADER, _request_cells) if "real_time" in group[0] else (HEADER, _cells)
        )
        lines += [
            "",
            f"## {op}, {direction}",
            "",
            table_row(header),
            table_row(["---"] * len(header)),
        ]
        for _, rows in groupby(group, key=lambda row: row["case"]):
            rows = list(rows)
            ratios = speedups(rows)
            lines += [table_row(cells(row, ratios[row["provider"]])) for row in rows]
    for status, heading in (("failed", "Failed"), ("skipped", "Skipped")):
        rows = [row for row in document["rows"] if row["status"] == status]
        if rows:
            lines += ["", f"## {heading}", ""]
            lines += [f"- {row['case']}, {row['provider']}: {row['reason']}" for row in rows]
    if document.get("not_run"):
        lines += [
            "",
            "## Not run (out of time)",
            "",
            *(f"- {name}" for name in document["not_run"]),
        ]
    return "\n".join(lines) + "\n"


def _group(row: dict) -> tuple[str, str]:
    return row["op"], row["direction"]


def _cell(row: dict, key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def _request_cells(row: dict, ratio: float) -> list[str]:
    check = [_cell(row, "snr_db", ".0f") + " dB"] if "snr_db" in row else []
    check += [_cell(row, "agreement", ".1%")] if "agreement" in row else []
    return [
        row["shape"],
        row["provider"],
        row["precision"],
        _cell(row, "p50_ms", ".4g"),
        _cell(row, "p99_ms", ".4g") if row["iterations"] >= MANY else "",
        _cell(row, "real_time", ".4g"),
        f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "",
        _cell(row, "start_s", ".2f"),
        _cell(row, "share_of_roof", ".0%"),
        ", ".join(check),
        f"{ratio:.2f}",
    ]


def _cells(row: dict, ratio: float) -> list[str]:
    cell = partial(_cell, row)
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

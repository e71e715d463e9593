"""A result file as a page in Markdown, and as pictures. Only what was measured appears."""

import json
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from bench.document import Json, facts, limits_fact, speedups, table_head, table_row, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = (
    "case",
    "peer",
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
    "input",
    "peer",
    "precision",
    "p50 ms",
    "p99 ms",
    "× real time",
    "peak GB",
    "start s",
    "of roof",
    "check",
    "times baseline",
)
# Fewer calls have no 99th percentile.
MANY = 100
# Results that the document of `python -m bench gpu` has beside its own rows.
PARTS = ("precisions", "train")

TIMES = (
    "Times are of one call, percentiles over all iterations; backward is the backward pass alone, "
    "its graph kept. Ratios are medians over interleaved rounds, against the case's first timed "
    "peer. GB/s count the bytes that the op cannot do without. 'Of roof' is the floor set by the "
    "measured limits over the time."
)
REQUEST_TIMES = (
    "Codec and stream: times are what a caller waits, wall clock; the roof is that of the "
    "convolutions at the matrix product rate of the peer's precision. Start: from weights in "
    "memory to the first result, with compilation, choice of kernels and capture. Peak: GPU memory "
    "over start and first call. Check: audio against float64, and codes equal to float64's. "
    "Precision tf32: convolutions only, PyTorch's default."
)
COMPILED_BEFOREHAND = (
    "The Triton kernels of dac_fast were compiled before the cases, by all cores: the start of an "
    "engine has none of that."
)


def write_report(path: Path) -> list[Path]:
    """Writes the page, and the pictures where matplotlib is installed, beside any result file.

    Returns:
        the paths of what was written.
    """
    document = json.loads(path.read_text())
    page, pictures = kind(document)
    written = [path.with_suffix(".md")]
    written[0].write_text(page(document))
    try:
        figures = pictures(document)
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return written
    for suffix, figure in figures.items():
        written.append(path.with_suffix(suffix))
        figure.savefig(written[-1], dpi=120)
    return written


def kind(
    document: Json,
) -> tuple[Callable[[Json], str], Callable[[Json], "dict[str, Figure]"]]:
    """The functions that make the page and, by suffix, the pictures of such a document.

    Each kind is imported when it is met: training needs packages that a bare GPU machine may lack.
    """
    if "runs" in document:
        from bench.training import compare

        return compare.markdown, compare.figures
    if "recipe" in document:
        from bench.training import report

        return report.markdown, report.figures
    if "recording" in document:
        from bench import precisions

        return precisions.markdown, lambda _: {}
    if "compared" in document:
        from bench import codes

        return codes.markdown, lambda _: {}
    if "load" in document:
        from bench.serving import page

        return page.markdown, lambda document: {".png": page.figure(document)}
    if "halves" in document:
        from bench import halves

        return halves.markdown, lambda _: {}
    if "corpus" in document:
        from bench import corpus

        return corpus.markdown, lambda _: {}
    if "static" in document:
        from bench.static import page as static_page

        return static_page.markdown, lambda document: {".png": static_page.figure(document)}
    if "soak" in document:
        from bench import soak

        return soak.markdown, lambda document: {".png": soak.figure(document)}
    return markdown, figures


def figures(document: Json) -> "dict[str, Figure]":
    """The pictures of cases and parts, by suffix."""
    from bench import plots

    found = plots.figures(document)
    for part in PARTS:
        if part in document:
            _, pictures = kind(document[part])
            of_part = pictures(document[part])
            found |= {f".{part}{suffix}": figure for suffix, figure in of_part.items()}
    return found


def markdown(document: Json) -> str:
    """The page of cases: the machine, a table per op and direction, parts, what is missing."""
    environment, all_rows = document["environment"], document.get("rows", [])
    timed = [row for row in all_rows if row["status"] == "timed"]
    lines = [f"# {title(environment)}", "", *facts(environment)]
    if "limits" in document:
        lines.append(limits_fact(document["limits"]))
    lines += ["", TIMES]
    if any("real_time" in row for row in timed):
        lines += ["", REQUEST_TIMES, "", *headlines(document)]
    if any(step["name"] == "kernels" for step in document.get("steps", ())):
        lines += ["", COMPILED_BEFOREHAND]
    if steps := document.get("steps"):
        lines += ["", "## Steps", ""]
        lines += [f"- {each['name']}: {each['result']} ({each['seconds']:.0f} s)" for each in steps]

    def group(row: Json) -> tuple[str, str]:
        return row["op"], row["direction"]

    for (op, direction), of_op in groupby(sorted(timed, key=group), key=group):
        lines += ["", f"## {op}, {direction}", "", *table(list(of_op))]
    for part in PARTS:
        if part in document:
            page, _ = kind(document[part])
            lines += ["", "#" + page(document[part]).replace("\n#", "\n##").rstrip()]
    for status, heading in (("failed", "Failed"), ("skipped", "Skipped")):
        rows = [row for row in all_rows if row["status"] == status]
        if rows:
            lines += ["", f"## {heading}", ""]
            lines += [f"- {row['case']}, {row['provider']}: {row['reason']}" for row in rows]
    if document.get("not_run"):
        lines += ["", "## Not run (out of time)", ""]
        lines += [f"- {name}" for name in document["not_run"]]
    return "\n".join(lines) + "\n"


def headlines(document: Json) -> list[str]:
    """The table of a README: each peer at the first input of the codec and stream per direction.

    Cells: milliseconds, times faster than real time, times as fast as the first peer.
    """
    timed = [row for row in document.get("rows", []) if row["status"] == "timed"]
    firsts: dict[tuple[str, str], list[Json]] = {}
    for row in timed:
        if "real_time" in row:
            of_case = firsts.setdefault((row["op"], row["direction"]), [])
            if not of_case or row["case"] == of_case[0]["case"]:
                of_case.append(row)
    if not firsts:
        return []
    columns = []
    for rows in firsts.values():
        ratios = speedups(rows)
        columns.append(
            {
                row["provider"]: f"{row['p50_ms']:.4g} ms, {row['real_time']:.4g}×, "
                f"{ratios[row['provider']]:.2f}"
                for row in rows
            }
        )
    names = dict.fromkeys(name for column in columns for name in column)
    heads = [f"{op}, {direction}: {rows[0]['shape']}" for (op, direction), rows in firsts.items()]
    lines = table_head(["ms, × real time, times baseline", *heads])
    for name in names:
        lines.append(table_row([name, *(column.get(name, "") for column in columns)]))
    return lines


def table(rows: list[Json]) -> list[str]:
    """A table of timed rows of one op and direction."""
    requests = "real_time" in rows[0]
    lines = table_head(REQUEST_HEADER if requests else HEADER)
    cells = request_cells if requests else op_cells
    for _, of_case in groupby(rows, key=lambda row: row["case"]):
        group = list(of_case)
        ratios = speedups(group)
        lines += [table_row(cells(row, ratios[row["provider"]])) for row in group]
    return lines


def request_cells(row: Json, ratio: float) -> list[str]:
    """The cells of `REQUEST_HEADER`."""
    cell = partial(value, row)
    check = [cell("snr_db", ".0f") + " dB"] if "snr_db" in row else []
    check += [cell("agreement", ".1%")] if "agreement" in row else []
    return [
        row["shape"],
        row["provider"],
        row["precision"],
        cell("p50_ms", ".4g"),
        cell("p99_ms", ".4g") if row["iterations"] >= MANY else "",
        cell("real_time", ".4g"),
        f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "",
        cell("start_s", ".2f"),
        cell("share_of_roof", ".0%"),
        ", ".join(check),
        f"{ratio:.2f}",
    ]


def op_cells(row: Json, ratio: float) -> list[str]:
    """The cells of `HEADER`."""
    cell = partial(value, row)
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


def value(row: Json, key: str, form: str) -> str:
    """A number of a row in a format; nothing where the row has none."""
    return format(row[key], form) if key in row else ""

"""The result file of `python -m bench train` as a Markdown table and a plot of stacked bars. Only what was measured."""

import json
from pathlib import Path

import numpy as np

from bench.document import table_row, title


def write_train_report(path: Path) -> list[Path]:
    """Write the .md, and the .png where matplotlib is installed, beside a result file; returns what was written."""
    document = json.loads(path.read_text())
    written = [path.with_suffix(".md")]
    written[0].write_text(markdown(document))
    if not any(row["status"] == "timed" for row in document["rows"]):
        return written
    try:
        plot(document, path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")
        return written
    return [*written, path.with_suffix(".png")]


def markdown(document: dict) -> str:
    """The whole report."""
    environment, limits, recipe = document["environment"], document["limits"], document["recipe"]
    matmul = ", ".join(
        f"{value:.3g} TFLOP/s {dtype}" for dtype, value in limits["matmul_tflop_s"].items()
    )
    seconds, name = recipe["data"]["seconds"], recipe["name"]
    lines = [f"# Training step of `{name}`: {title(environment)}", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items() if value is not None]
    lines += [
        f"- measured limits: copy {limits['copy_gb_s']:.4g} GB/s (read plus written); matrix product {matmul}",
        f"- batches of {seconds} s of made-up audio; one step updates both networks",
    ]
    if data := document.get("data"):
        lines.append(
            f"- data: {data['excerpts_s_per_worker']:.0f} excerpts a second and worker, from {data['files']} files"
        )
    lines += ["", table_row(HEADER), table_row(["---"] * len(HEADER))]
    done = [row for row in document["rows"] if row["status"] in ("timed", "counted")]
    for row in done:
        baseline = next(r for r in done if r["batch"] == row["batch"])
        lines.append(table_row(_cells(row, baseline)))
    lines += [
        "",
        "Kept for backward: the most memory that autograd held at once, each storage counted once, parameters not. "
        "Times are medians; ratios too, over rounds, to the first row of the same batch.",
    ]
    for row in done:
        if "work" in row:
            lines += _parts(row)
    failed = [row for row in document["rows"] if row["status"] == "failed"]
    if failed:
        lines += ["", "## Failed", "", *(f"- {label(row)}: {row['reason']}" for row in failed)]
    if document["not_run"]:
        lines += [
            "",
            "## Not run (out of time)",
            "",
            *(f"- {label(row)}" for row in document["not_run"]),
        ]
    return "\n".join(lines) + "\n"


HEADER = ("batch", "precision", "implementation", "steps/s", "ms a step", "p20 to p80", "times first", "peak GB",
          "kept for backward, GB", "of first's")  # fmt: skip


def label(row: dict) -> str:
    """A row in words."""
    return f"batch {row['batch']}, {row['precision']}, {row['implementation']}"


def _cells(row: dict, baseline: dict) -> list[str]:
    def gigabytes(key):
        return f"{row[key] / 1e9:.3g}" if key in row else ""

    memory = "peak_bytes" if "peak_bytes" in row else "saved_peak_bytes"
    share = f"{row[memory] / baseline[memory]:.2f}" if memory in row and memory in baseline else ""
    return [
        str(row["batch"]), row["precision"], row["implementation"],
        *(_times(row, baseline) if row["status"] == "timed" else [""] * 4),
        gigabytes("peak_bytes"), gigabytes("saved_peak_bytes"), share,
    ]  # fmt: skip


def _times(row: dict, baseline: dict) -> list[str]:
    pairs = zip(baseline.get("round_ms", ()), row["round_ms"], strict=False)
    ratios = [b / r for b, r in pairs]
    ratio = f"{np.median(ratios):.2f}" if ratios else ""
    return [
        f"{row['steps_s']:.3g}",
        f"{row['step_ms']:.4g}",
        f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}",
        ratio,
    ]


def _parts(row: dict) -> list[str]:
    header = ("part", "GFLOP", "GB", "floor ms", "ms", "of floor")
    lines = ["", f"## {label(row)}", "", table_row(header), table_row(["---"] * len(header))]
    for part, work in row["work"].items():
        cells = [
            part,
            f"{work['flops'] / 1e9:.3g}",
            f"{work['bytes'] / 1e9:.3g}",
            f"{work['floor_ms']:.3g}",
            "",
            "",
        ]
        if "parts" in row:
            milliseconds = row["parts"][part]
            cells[4:] = f"{milliseconds:.4g}", f"{work['floor_ms'] / milliseconds:.0%}"
        lines.append(table_row(cells))
    lines += [
        "",
        "Floor: the larger of flops (matrix products and convolutions; FFTs are not counted) and bytes (kept for the "
        "backward pass, or taken back in it; optimizers: parameters, gradients, moments) at the measured limits.",
    ]
    if "discriminators" in row:
        times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in row["discriminators"].items())
        lines += [
            "",
            f"An update's passes through each discriminator alone, forward and backward: {times}.",
        ]
    return lines


def plot(document: dict, path: Path):
    """Stacked bars: the parts of a step of each row that was taken apart; whole bars where it was not."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if row["status"] == "timed"]
    names = list(dict.fromkeys(part for row in rows for part in row.get("parts", {})))
    figure = Figure(figsize=(11, 2 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for position, row in enumerate(rows):
        left = 0.0
        for part, milliseconds in row.get("parts", {"whole step": row["step_ms"]}).items():
            color = f"C{names.index(part)}" if part in names else "lightgray"
            axes.barh(position, milliseconds, left=left, color=color)
            left += milliseconds
        axes.text(left, position, f" {left:.4g} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("ms a step")
    handles = [axes.barh(0, 0, color=f"C{i}") for i in range(len(names))]
    axes.legend(handles, names, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(
        f"Training step of {document['recipe']['name']}, {title(document['environment'])}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)

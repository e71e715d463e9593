"""The result file of `python -m bench train` as a page in Markdown and a picture."""

from typing import TYPE_CHECKING

from bench.document import Json, facts, limits_fact, speedup, table_head, table_row, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = (
    "batch",
    "precision",
    "peer",
    "steps/s",
    "ms a step",
    "p20 to p80",
    "times first",
    "peak GB",
    "kept for backward, GB",
    "of first's",
)
PART_HEADER = ("part", "GFLOP", "GB", "floor ms", "ms", "of floor")

KEPT = (
    "Kept for backward: the most memory that autograd held at once, each storage counted once, "
    "parameters not. Times are medians; ratios too, over rounds, to the first row of the batch."
)
FLOOR = (
    "Floor: the larger of flops (matrix products and convolutions; FFTs are not counted) and bytes "
    "(kept for the backward pass, or taken back in it; optimizers: parameters, gradients, moments) "
    "at the measured limits."
)


def markdown(document: Json) -> str:
    """The page: the machine, a table of rows, the parts of those taken apart, and failures."""
    environment, recipe = document["environment"], document["recipe"]
    seconds = recipe["data"]["seconds"]
    lines = [
        f"# Training step of `{recipe['name']}`: {title(environment)}",
        "",
        *facts(environment),
        limits_fact(document["limits"]),
        f"- batches of {seconds} s of made-up audio; one step updates both networks",
    ]
    if data := document.get("data"):
        speed = f"{data['excerpts_s_per_worker']:.0f} excerpts a second and worker"
        lines.append(f"- data: {speed}, from {data['files']} files")
    done = [row for row in document["rows"] if row["status"] in ("timed", "counted")]
    lines += ["", *table_head(HEADER)]
    for row in done:
        first = next(other for other in done if other["batch"] == row["batch"])
        lines.append(table_row(cells(row, first)))
    lines += ["", KEPT]
    for row in done:
        if "work" in row:
            lines += parts(row)
    failed = [row for row in document["rows"] if row["status"] == "failed"]
    if failed:
        lines += ["", "## Failed", "", *(f"- {label(row)}: {row['reason']}" for row in failed)]
    if document["not_run"]:
        lines += ["", "## Not run (out of time)", ""]
        lines += [f"- {label(row)}" for row in document["not_run"]]
    return "\n".join(lines) + "\n"


def label(row: Json) -> str:
    """A row in words."""
    return f"batch {row['batch']}, {row['precision']}, {row['implementation']}"


def cells(row: Json, first: Json) -> list[str]:
    """The cells of `HEADER`; `first` is the first row of the same batch."""

    def gigabytes(key: str) -> str:
        return f"{row[key] / 1e9:.3g}" if key in row else ""

    memory = "peak_bytes" if "peak_bytes" in row else "saved_peak_bytes"
    share = f"{row[memory] / first[memory]:.2f}" if memory in row and memory in first else ""
    return [
        str(row["batch"]),
        row["precision"],
        row["implementation"],
        *(times(row, first) if row["status"] == "timed" else [""] * 4),
        gigabytes("peak_bytes"),
        gigabytes("saved_peak_bytes"),
        share,
    ]


def times(row: Json, first: Json) -> list[str]:
    """The cells of a timed row's times."""
    timed = "round_ms" in first
    return [
        f"{row['steps_s']:.3g}",
        f"{row['step_ms']:.4g}",
        f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}",
        f"{speedup(first['round_ms'], row['round_ms']):.2f}" if timed else "",
    ]


def parts(row: Json) -> list[str]:
    """The section of a row that was taken apart."""
    lines = ["", f"## {label(row)}", "", *table_head(PART_HEADER)]
    for part, work in row["work"].items():
        floor = work["floor_ms"]
        measured = ["", ""]
        if "parts" in row:
            milliseconds = row["parts"][part]
            measured = [f"{milliseconds:.4g}", f"{floor / milliseconds:.0%}"]
        counted = [f"{work['flops'] / 1e9:.3g}", f"{work['bytes'] / 1e9:.3g}", f"{floor:.3g}"]
        lines.append(table_row([part, *counted, *measured]))
    lines += ["", FLOOR]
    if "discriminators" in row:
        each = ", ".join(f"{name} {ms:.4g} ms" for name, ms in row["discriminators"].items())
        passes = "An update's passes through each discriminator alone, forward and backward"
        lines += ["", f"{passes}: {each}."]
    return lines


def figures(document: Json) -> "dict[str, Figure]":
    """One picture: a bar per timed row, stacked of its parts where it was taken apart."""
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if row["status"] == "timed"]
    if not rows:
        return {}
    names = list(dict.fromkeys(part for row in rows for part in row.get("parts", {})))
    figure = Figure(figsize=(11, 2 + 0.45 * len(rows)), layout="constrained")
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
    heading = f"Training step of {document['recipe']['name']}, {title(document['environment'])}"
    axes.set_title(heading, fontsize=10)
    return {".png": figure}

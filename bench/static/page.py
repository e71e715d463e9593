"""The page and the picture of `python -m bench static`."""

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from bench.document import Json, facts, table_head, table_row
from bench.static.bound import CLOCK, COUNT, HBM, L2, LATENCY, PRODUCTS
from bench.static.launches import SIZES
from bench.static.table import HOPPER

# Of the 44khz codec: samples of a frame, and of a second.
HOP, RATE = 512, 44100

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MACHINE_CODE = (
    "Registers are a thread's, shared memory a CTA's; *stack* counts bytes of stack frame and of "
    "spilled registers, and should be 0. *CTAs* is how many an SM holds. The hot loop is the "
    "innermost one that computes most, or the whole kernel where there is no loop (per element: "
    "instructions of all threads over the tile's outputs). Loads and stores of global memory are "
    "given as bytes per thread × how many; *waits* are what the loop stands still for."
)
ANALYSIS = (
    "**Nothing here was measured.** Each launch needs its instructions issued "
    f"(4 warps' a clock and SM), its products computed ({PRODUCTS['fp16']} operations a clock and "
    f"SM in half precision, {PRODUCTS['tf32']} in TF32), its operands read from L2 and its tensors "
    "moved to or from HBM once; and no more operands are under way to a CTA than its stages hold. "
    f"Assumed are an H100 SXM of {COUNT} SMs at {CLOCK / 1e9:.1f} GHz, {L2:.0f} bytes from L2 a "
    f"clock and SM, {HBM * COUNT * CLOCK / 1e12:.1f} TB/s of HBM, and {LATENCY} clocks from load "
    "to operand. If all five overlapped perfectly, the slowest would be the time: the bound. "
    "*Products* and *HBM* say how much of either peak the bound "
    "leaves. Of the tiles of an op, the one of the lowest bound is shown; on a GPU timing chooses."
)
ARCHITECTURES = (
    "Each cell has registers, KB of shared memory and CTAs per SM, and in brackets bytes of stack "
    "frame and of spilled registers, if any. A tile that *does not fit* in the shared memory that "
    "an architecture gives a CTA is passed over there. Besides sm_90, each kind of layer is "
    "compiled at one width (residual units at all, but in TF32 they need an SM of 180 KB), since a "
    "tile's registers hardly depend on it."
)
CSRC = (
    "Compiled by nvcc, 256 threads each; those of `hopper` have 384, and the shared memory that "
    "they ask for at their launch is not in the table. A kernel of `stft_bands` has code for every "
    "window, of which a block runs one; instructions, loads and stores are counted over all."
)
NO_ROOM = "does not fit"
NO_NVCC = "The CUDA kernels of csrc are left out: nvcc was not found."
KINDS = ("float", "integer", "shared load", "async copy", "load", "special function", "sync")


def markdown(document: Json) -> str:
    """The bounds of whole codecs on an H100, then all machine code."""
    rows = document["static"]
    lines = ["# The kernels as machine code", "", *facts(document["environment"])]
    lines += ["", "`python -m bench static` makes this page on any machine.", "", "## Bounds"]
    lines += ["", ANALYSIS, ""]
    counts_of = [f"{count} to {what}" for what, count in document["launches"].items()]
    lines += [
        f"Launches in the graph of a request, Triton's and PyTorch's: {', '.join(counts_of)}."
    ]
    for size in ("training", *SIZES):
        for precision, found in grouped(best(rows, size), "precision"):
            lines += ["", f"### {size}, {precision}", "", *bounds(found, size)]
            if precision in document["complete"] and size in SIZES:
                lines += ["", total(found, size)]
    lines += ["", "## Machine code", "", MACHINE_CODE]
    hopper = [row for row in rows if row["architecture"] == HOPPER]
    for precision, found in grouped(hopper, "precision"):
        lines += ["", f"### sm_{HOPPER}, {precision}", "", *code(found)]
    elsewhere = {row["name"] for row in rows if row["architecture"] != HOPPER}
    if compared := [row for row in rows if row["name"] in elsewhere]:
        lines += ["", "### Each architecture", "", ARCHITECTURES, "", *architectures(compared)]
    if native := document.get("csrc"):
        lines += ["", "### CUDA kernels", "", CSRC, "", *cuda(native), "", *architectures(native)]
    elif "nvcc" not in document["environment"]:
        lines += ["", NO_NVCC]
    return "\n".join(lines) + "\n"


def grouped(rows: Iterable[Json], name: str) -> Iterable[tuple[str, list[Json]]]:
    """The rows of each value."""
    ordered = sorted(rows, key=lambda row: row[name])
    return [(value, list(found)) for value, found in groupby(ordered, lambda row: row[name])]


def best(rows: list[Json], size: str) -> list[Json]:
    """Of each op of a size the row of the lowest bound, in the order of the layers."""
    found: dict[tuple[str, str], Json] = {}
    for row in rows:
        if size in row.get("sizes", ()):
            key = row["precision"], row["op"]
            if key not in found or ms(row, size) < ms(found[key], size):
                found[key] = row
    return list(found.values())


def ms(row: Json, size: str) -> float:
    """The bound of a row's launch."""
    return float(row["sizes"][size]["ms"])


def bounds(rows: list[Json], size: str) -> list[str]:
    """A line per op."""
    head = ("op", "layers", "tile", "CTAs", "waves", "HBM MB", "L2 MB", "limit", "bound ms",
            "products", "HBM")  # fmt: skip
    lines = table_head(head)
    for row in rows:
        found = row["sizes"][size]
        clocks, layers = found["clocks"], found["layers"]
        slowest = clocks[found["limit"]]
        shares = [f"{clocks[name] / slowest:.0%}" if name in clocks else "" for name in
                  ("products", "HBM")]  # fmt: skip
        numbers = [f"{found['waves']:.2f}", f"{found['hbm'] / 1e6:.1f}", f"{found['l2'] / 1e6:.1f}"]
        cells = [row["op"], layers, row["tile"], found["programs"], *numbers, found["limit"]]
        lines.append(table_row(map(str, [*cells, f"{found['ms']:.4f}", *shares])))
    return lines


def total(rows: list[Json], size: str) -> str:
    """The sum over all layers."""
    milliseconds = sum(row["sizes"][size]["layers"] * ms(row, size) for row in rows)
    items, frames = SIZES[size]
    speed = items * frames * HOP / RATE / milliseconds * 1e3
    return (
        f"All of these: a bound of {milliseconds:.3g} ms, which is {speed:.0f} times real time. "
        "Launches, lengths and copies between layers come on top."
    )


def code(rows: list[Json]) -> list[str]:
    """A line per configuration."""
    head = ("op", "tile", "registers", "shared KB", "stack", "CTAs", "hot loop", "per product",
            "waits", "loads", "stores")  # fmt: skip
    lines = table_head(head)
    for row in rows:
        hot, whole = row["hot"], row["all"]
        products = sum(hot["mma"].values())
        each = [f"{hot['kinds'][kind] / products:.1f} {kind}" for kind in KINDS
                if products and kind in hot["kinds"]]  # fmt: skip
        shapes = [f"{count} {shape}" for shape, count in hot["mma"].items()]
        size = ", ".join([f"{hot['instructions']}", *shapes])
        if "per_element" in row:
            size = f"{row['per_element']:.1f} per element"
        cells = [row["op"], row["tile"], row["registers"], f"{row['shared'] / 1024:.0f}",
                 row["stack"] + row["spilled"], row["ctas"], size, ", ".join(each),
                 counts(hot["waits"]), counts(hot["loads"]), counts(whole["stores"])]  # fmt: skip
        lines.append(table_row(map(str, cells)))
    return lines


def counts(found: dict[str, int]) -> str:
    """What there is how often."""
    return ", ".join(f"{name} × {count}" for name, count in found.items())


def cuda(rows: list[Json]) -> list[str]:
    """A line per kernel of csrc, as compiled for sm_90."""
    head = ("kernel", "registers", "shared KB", "CTAs", "instructions", "loads", "stores",
            "barriers")  # fmt: skip
    lines = table_head(head)
    for row in rows:
        found = row["all"]
        kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
        cells = [row["name"], row["registers"], f"{row['shared'] / 1024:.0f}", row["ctas"],
                 f"{found['instructions']}: {kinds}", counts(found["loads"]),
                 counts(found["stores"]), found["waits"].get("barrier", 0)]  # fmt: skip
        if row["architecture"] == HOPPER:
            lines.append(table_row(map(str, cells)))
    return lines


def architectures(rows: list[Json]) -> list[str]:
    """A line per kernel with what it takes on each architecture; see `ARCHITECTURES`."""
    known = sorted({row["architecture"] for row in rows})
    lines = table_head(["kernel", *(f"sm_{number}" for number in known)])
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        stack = row["stack"] + row["spilled"]
        text = f"{row['registers']}, {row['shared'] / 1024:.0f} KB, {row['ctas']}"
        text += f" ({stack})" if stack else ""
        cells.setdefault(row["name"], {})[row["architecture"]] = text if row["ctas"] else NO_ROOM
    for name, found in cells.items():
        lines.append(table_row([name, *(found.get(number, "") for number in known)]))
    return lines


def figure(document: Json) -> "Figure":
    """Bars per op of 16 × 10 s in fp16: what each resource would take alone."""
    from matplotlib.figure import Figure

    size = next(iter(SIZES))
    rows = [row for row in best(document["static"], size) if row["precision"] == "fp16"]
    drawing = Figure(figsize=(11, 1.6 + 0.28 * len(rows)), layout="constrained")
    axes = drawing.add_subplot()
    names = ("issue", "products", "L2", "HBM", "latency")
    for i, name in enumerate(names):
        layers = [row["sizes"][size] for row in rows]
        each = [found["clocks"].get(name, 0) / CLOCK * 1e3 * found["layers"] for found in layers]
        places = [at + 0.16 * i for at in range(len(rows))]
        axes.barh(places, each, height=0.15, label=name, color=f"C{i}")
    labels = [f"{row['sizes'][size]['layers']} × {row['op']}" for row in rows]
    axes.set_yticks([at + 0.32 for at in range(len(rows))], labels, fontsize=7)
    axes.set_ylim(len(rows), -0.2)
    axes.set_xlabel("ms on an H100, if nothing else took any time: analysis, not measured")
    axes.set_title(f"What limits each layer of {size}, fp16 (sm_{HOPPER} machine code)")
    axes.legend()
    return drawing

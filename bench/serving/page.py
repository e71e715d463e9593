"""The page and the picture of a result file."""

from matplotlib.figure import Figure

from bench.document import Json, facts, table_row, title
from bench.serving.load import FRAMES


def markdown(document: Json) -> str:
    """The page of a result file."""
    asked, machine = document["load"], document["environment"]
    rows = document["rows"]
    lines = [
        f"# A server under load: {title(machine)}",
        "",
        f"Model {asked['model']}, {asked['seconds']:g} s each. A stream gets {FRAMES} frames at a "
        f"time, in real time; each piece is due {asked['deadline_ms']:g} ms after its codes.",
        "",
        "Real-time streams held without a late piece, the latency of their pieces, and the time to "
        "first audio at half that load:",
        "",
        table_row(("server", "streams", "p50", "p95", "p99", "first audio p50", "p95", "p99")),
        table_row(["---"] * 8),
    ]
    first = {row["server"]: row for row in rows if row["what"] == "first"}
    for row in (row for row in rows if row["what"] == "streams"):
        cells = [row["server"], str(row["streams"]), *_ms(row)]
        lines.append(table_row([*cells, *_ms(first.get(row["server"], {}))]))
    lines += [
        "",
        "Requests, and requests beside streams:",
        "",
        table_row(("server", "requests/s", "streams", "late pieces", "answered", "refused", "× real time", "p50", "p95", "p99")),  # noqa: E501
        table_row(["---"] * 10),
    ]  # fmt: skip
    for row in (row for row in rows if row["what"] in ("requests", "mixed")):
        cells = [row["server"], f"{row['rate']:g}", str(row.get("streams", 0))]
        cells += [str(row.get("late", "")), str(row["answered"]), str(row["refused"])]
        lines.append(table_row([*cells, f"{row['times_real_time']:.1f}", *_ms(row)]))
    for row in (row for row in rows if row["what"] == "soak"):
        memory = row["memory_mib"]
        lines += [
            "",
            f"Streams at random: {row['right']} right, {row['wrong']} wrong, {row['died']} died on "
            f"purpose, {row['refused']} refused; {row['slots_left_taken']:g} slots left taken; "
            f"memory {memory[0]:.0f} MiB at first, {max(memory):.0f} at most, {memory[-1]:.0f} at "
            "the end.",
        ]
    return "\n".join([*lines, "", *facts(machine), ""])


def _ms(row: Json) -> list[str]:
    return [f"{row[key]:.1f} ms" if key in row else "–" for key in ("p50_ms", "p95_ms", "p99_ms")]


def figure(document: Json) -> Figure:
    """The picture: streams held, and request latencies by rate."""
    rows = document["rows"]
    names = list(dict.fromkeys(row["server"] for row in rows))
    picture = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    held = {row["server"]: row["streams"] for row in rows if row["what"] == "streams"}
    bars = left.barh(names, [held.get(name, 0) for name in names], color="#2459d3")
    left.bar_label(bars, padding=3)
    left.invert_yaxis()
    left.set_title("Real-time streams without a late piece", fontsize=10)
    for name in names:
        asked = [row for row in rows if row["server"] == name and row["what"] == "requests"]
        asked = [row for row in asked if "p95_ms" in row]
        right.plot(
            [row["rate"] for row in asked], [row["p95_ms"] for row in asked], "o-", label=name
        )
    right.set_yscale("log")
    right.set_xlabel("requests per second")
    right.set_ylabel("p95, ms")
    right.set_title("Latency of requests", fontsize=10)
    right.legend(fontsize=8)
    picture.suptitle(title(document["environment"]), fontsize=10)
    return picture

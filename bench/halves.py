"""`python -m bench halves`: memory and time that loading half a codec takes, against the whole.

Every load is in a process of its own, which has read nothing before, from files that the system has
in memory. The result file is one JSON document: `environment`, `halves` (the preset), and `rows`,
one per format and part.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.document import (
    ROOT,
    SCHEMA,
    Json,
    environment,
    facts,
    table_head,
    table_row,
    title,
    write,
)
from dac_fast.codec import DAC
from dac_fast.config import PRESETS

FORMATS = {"safetensors": "a.safetensors", "published .pth": "a.pth"}
PARTS = ("both", "encoder", "decoder")
MEGABYTE = 1e6

# Arguments: a path and a part. Prints a row's numbers: seconds, and bytes.
LOAD = """
import json, sys, time
import torch, dac_fast
import safetensors.torch, zipfile, dac_fast.storage.torch_archive

def kilobytes(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1])

path, parts = sys.argv[1], None if sys.argv[2] == "both" else sys.argv[2]
# The most that was held, from now on.
open("/proc/self/clear_refs", "w").write("5")
before, begun = kilobytes("VmRSS"), time.perf_counter()
codec = dac_fast.load(path, parts=parts)
seconds = time.perf_counter() - begun
peak, held = (1024 * (kilobytes(name) - before) for name in ("VmHWM", "VmRSS"))
weights = sum(p.numel() * p.element_size() for p in codec.parameters())
print(json.dumps({"seconds": seconds, "peak": peak, "held": held, "weights": weights}))
"""


def run_halves(preset: str, rounds: int, path: Path, commit: str | None = None) -> Json:
    """Measures every format and part, and writes the document after each format; returns it.

    Args:
        preset: of the codec, whose weights are random.
        rounds: how often each is loaded; the medians count.
        path: of the document.
        commit: see `environment`.
    """
    rows: list[Json] = []
    document = {
        "schema": SCHEMA,
        "environment": environment("cpu", commit),
        "halves": preset,
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as folder:
        codec = DAC(**PRESETS[preset].to_dict())
        for name in FORMATS.values():
            codec.save(f"{folder}/{name}")
        for format, name in FORMATS.items():
            loads: dict[str, list[Json]] = {parts: [] for parts in PARTS}
            for _ in range(rounds):
                for parts in PARTS:
                    loads[parts].append(_loaded(f"{folder}/{name}", parts))
            for parts, found in loads.items():
                values = {key: median(load[key] for load in found) for key in found[0]}
                rows.append({"format": format, "parts": parts} | values)
                print(rows[-1], flush=True)
            write(document, path)
    return document


def _loaded(path: str, parts: str) -> Json:
    command = [sys.executable, "-c", LOAD, path, parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: Json = json.loads(done.stdout)
    return found


def markdown(document: Json) -> str:
    """The page with the table."""
    machine = document["environment"]
    lines = [
        f"# Halves of {document['halves']}: {title(machine)}",
        "",
        *facts(machine),
        "",
        "Loaded by `dac_fast.load(path, parts=...)` in a new process, in MB beyond what it had "
        "before: at most, and afterwards. Medians; the files were in the system's memory.",
        "",
        *table_head(("format", "parts", "weights", "peak", "held", "seconds")),
    ]
    for row in document["rows"]:
        sizes = (f"{row[key] / MEGABYTE:.0f}" for key in ("weights", "peak", "held"))
        lines.append(table_row((row["format"], row["parts"], *sizes, f"{row['seconds']:.2f}")))
    return "\n".join(lines) + "\n"

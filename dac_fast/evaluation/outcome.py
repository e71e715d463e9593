"""The outcome of an evaluation: rows per file, means per domain and overall, and the files they are written to."""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from dac_fast.files import atomic_path, make_folder
from dac_fast.metrics import efficiency

METRICS = ("mel_distance", "stft_distance", "si_sdr", "visqol")
OVERALL = "overall"

# Columns of the printed table: title, short enough for 80 characters in all, and digits after the point.
TITLES = {
    "domain": ("domain", None),
    "codebooks": ("code\nbooks", None),
    "kbps": ("kbit/s", 2),
    "files": ("files", None),
    "mel_distance": ("mel ↓", 3),
    "stft_distance": ("STFT ↓", 3),
    "si_sdr": ("SI-SDR\ndB ↑", 2),
    "visqol": ("ViSQOL\n↑", 3),
    "bitrate_efficiency": ("effic.\n↑", 3),
}


@dataclass
class Measured:
    """What was found about one file.

    Attributes:
        rows: one, or one per codebook count; see `Evaluation.files`.
        counts: how often each codebook used each entry, int64 [N, codebook size]; None without a codec.
        problem: why there are no rows; "" where there are.
    """

    rows: list[dict]
    counts: torch.Tensor | None = None
    problem: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Everything an evaluation found; nothing in it (rounding aside) depends on when, where or in what order it ran.

    Attributes:
        settings: what was measured, and how.
        files: rows with "file", "domain", "seconds", "sample_rate" (Hz, at which it was compared), with a codec
            "codebooks" and "kbps" (kbit/s per channel), and the metrics; None where a file has no such value.
        summary: the same per domain (where there are several) and overall, with "files", their number, and, with a
            codec, "bitrate_efficiency".
        failures: files that could not be measured: "file" and "problem".
        without_reference: names of reconstructions that nothing was compared with.
        notes: what the reader should know of, a line each.
    """

    settings: dict
    files: list[dict]
    summary: list[dict]
    failures: list[dict] = field(default_factory=list)
    without_reference: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def save(self, folder: str | os.PathLike, plot: bool = True):
        """Write `files.csv`, `summary.csv`, `evaluation.json` and, with a codec, `rate_distortion.png`.

        Args:
            folder: made where there is none; files of these names are replaced.
            plot: draw the picture.
        Raises:
            OSError: a file cannot be written.
            PlotError: matplotlib is not installed; the other files are written.
        """
        folder = Path(folder)
        make_folder(folder)
        _write(folder / "files.csv", _csv(self.files))
        _write(folder / "summary.csv", _csv(self.summary))
        _write(
            folder / "evaluation.json", json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
        if plot and any("kbps" in row for row in self.summary):
            from dac_fast.plots import rate_distortion

            rate_distortion(folder / "rate_distortion.png", self.summary, OVERALL)

    def table(self):
        """The summary as a `rich.table.Table`."""
        from rich.table import Table

        columns = [name for name in TITLES if any(name in row for row in self.summary)]
        table = Table()
        for name in columns:
            table.add_column(TITLES[name][0], justify="left" if name == "domain" else "right")
        previous = None
        for row in self.summary:
            if previous not in (None, row["domain"]):
                table.add_section()
            previous = row["domain"]
            table.add_row(*(_cell(row.get(name), TITLES[name][1]) for name in columns))
        return table


def summarize(measured: Sequence[tuple], settings: dict, notes: Sequence[str], config=None, without_reference=()):
    """An `Evaluation` of what was found.

    Args:
        measured: (source, `Measured`) of every file, in the order to report them; a source has a name and a domain.
        settings, notes, without_reference: as of `Evaluation`.
        config: the codec's `Config`; None where there is none.
    """
    groups = {OVERALL: []}
    for source, found in measured:
        if not found.problem:
            groups.setdefault(source.domain, []).append(found)
            groups[OVERALL].append(found)
    domains = sorted(groups.keys() - {OVERALL})
    summary = []
    for domain in [*domains, OVERALL] if len(domains) > 1 else [OVERALL]:
        summary += _means(domain, groups[domain], config)
    return Evaluation(
        settings=settings,
        files=[row for _, found in measured for row in found.rows],
        summary=summary,
        failures=[{"file": source.name, "problem": found.problem} for source, found in measured if found.problem],
        without_reference=list(without_reference),
        notes=list(notes),
    )


def _means(domain: str, group: list[Measured], config) -> list[dict]:
    """Summary rows of a group of files, one per codebook count."""
    rows = []
    for same_count in zip(*(found.rows for found in group), strict=True):
        row = {"domain": domain}
        if config:
            row |= {name: same_count[0][name] for name in ("codebooks", "kbps")}
        row |= {"files": len(group), "seconds": round(math.fsum(r["seconds"] for r in same_count), 6)}
        for name in METRICS:
            if name in same_count[0]:
                values = [r[name] for r in same_count if r[name] is not None]
                row[name] = round(math.fsum(values) / len(values), 6) if values else None
        if config:
            parts = (found.counts[: row["codebooks"]] for found in group)
            counts = sum(parts, start=torch.tensor(0))
            row["bitrate_efficiency"] = round(efficiency(counts), 6)
        rows.append(row)
    return rows


def _cell(value, digits: int | None) -> str:
    if value is None:
        return "-"
    return str(value) if digits is None else f"{value:.{digits}f}"


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["file"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str):
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

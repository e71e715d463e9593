"""The outcome of an evaluation: rows per file, means per domain and overall, and their files."""

import csv
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rich.table import Table
from torch import Tensor

from dac_fast import plots
from dac_fast.files import make_folder, write_bytes
from dac_fast.metrics import efficiency

METRICS = ("mel_distance", "stft_distance", "si_sdr", "visqol")
OVERALL = "overall"

# Columns of the printed table: title, short enough for 80 characters in all, and how a value is
# written.
COLUMNS = {
    "domain": ("domain", "{}"),
    "codebooks": ("code\nbooks", "{}"),
    "kbps": ("kbit/s", "{:.2f}"),
    "files": ("files", "{}"),
    "mel_distance": ("mel ↓", "{:.3f}"),
    "stft_distance": ("STFT ↓", "{:.3f}"),
    "si_sdr": ("SI-SDR\ndB ↑", "{:.2f}"),
    "visqol": ("ViSQOL\n↑", "{:.3f}"),
    "bitrate_efficiency": ("effic.\n↑", "{:.3f}"),
}

# A line of a table, by the names of its columns.
Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """How near one file came.

    Attributes:
        seconds, sample_rate: what was compared, in seconds and Hz.
        metrics: by their names in `METRICS`; None: the file has no such value.
        codebooks, kbps: used by the codec, and its kbit/s per channel; None without a codec.
    """

    seconds: float
    sample_rate: int
    metrics: dict[str, float | None]
    codebooks: int | None = None
    kbps: float | None = None

    def rate(self) -> Row:
        """The columns that only a codec has."""
        return {} if self.codebooks is None else {"codebooks": self.codebooks, "kbps": self.kbps}


@dataclass(frozen=True)
class Measured:
    """What was found about one file.

    Attributes:
        name, domain: of the file, see `dac_fast.audio.sources.AudioFile`.
        comparisons: one, or one per number of codebooks.
        counts: how often each codebook used each entry, int64 [N, codebook size]; None without a
            codec.
        problem: why there are no comparisons; "" where there are.
    """

    name: str
    domain: str
    comparisons: list[Comparison] = field(default_factory=list)
    counts: Tensor | None = None
    problem: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Everything an evaluation found.

    Nothing in it (rounding aside) depends on when, where or in what order it ran.

    Attributes:
        settings: what was measured, and how.
        files: rows with "file", "domain", "seconds", "sample_rate" (Hz, at which it was compared),
            with a codec "codebooks" and "kbps" (kbit/s per channel), and the metrics; None where a
            file has no such value.
        summary: the same per domain (where there are several) and overall, with "files", their
            number, and, with a codec, "bitrate_efficiency".
        failures: files that could not be measured: "file" and "problem".
        without_reference: names of reconstructions that nothing was compared with.
        notes: what the reader should know of, a line each.
    """

    settings: dict[str, Any]
    files: list[Row]
    summary: list[Row]
    failures: list[dict[str, str]] = field(default_factory=list)
    without_reference: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def save(self, folder: str | os.PathLike[str], plot: bool = True) -> None:
        """Writes `files.csv`, `summary.csv`, `evaluation.json` and, with a codec, a picture.

        The picture is `rate_distortion.png`. Files of these names are replaced, and a picture of an
        earlier evaluation is removed where none is drawn.

        Args:
            folder: made where there is none.
            plot: draw the picture.
        Raises:
            OSError: a file cannot be written.
            PlotError: matplotlib is not installed; the other files are written.
        """
        folder = Path(folder)
        make_folder(folder)
        document = json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False)
        write_bytes(folder / "files.csv", _csv(self.files))
        write_bytes(folder / "summary.csv", _csv(self.summary))
        write_bytes(folder / "evaluation.json", _encoded(f"{document}\n"))
        picture = folder / "rate_distortion.png"
        if plot and any("kbps" in row for row in self.summary):
            plots.rate_distortion(picture, self.summary, OVERALL)
        else:
            picture.unlink(missing_ok=True)

    def table(self) -> Table:
        """The summary, to be printed."""
        names = [name for name in COLUMNS if any(name in row for row in self.summary)]
        table = Table()
        for name in names:
            table.add_column(COLUMNS[name][0], justify="left" if name == "domain" else "right")
        previous = ""
        for row in self.summary:
            if previous not in ("", row["domain"]):
                table.add_section()
            previous = row["domain"]
            table.add_row(*(_cell(name, row.get(name)) for name in names))
        return table


def _cell(name: str, value: object) -> str:
    return "-" if value is None else COLUMNS[name][1].format(value)


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["file"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return _encoded(text.getvalue())


def _encoded(text: str) -> bytes:
    """UTF-8; what a file's name has that is none of UTF-8 as an escape, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def summarize(
    files: Sequence[Measured],
    settings: dict[str, Any],
    notes: Sequence[str],
    without_reference: Sequence[str] = (),
) -> Evaluation:
    """An `Evaluation` of what was found.

    Args:
        files: in the order to report them.
        settings, notes, without_reference: as of `Evaluation`.
    """
    measured = [file for file in files if not file.problem]
    domains: dict[str, list[Measured]] = defaultdict(list)
    for file in measured:
        domains[file.domain].append(file)
    groups = sorted(domains.items()) if len(domains) > 1 else []
    groups.append((OVERALL, measured))
    return Evaluation(
        settings=settings,
        files=[row for file in measured for row in _rows(file)],
        summary=[row for name, group in groups for row in _means(name, group)],
        failures=[{"file": file.name, "problem": file.problem} for file in files if file.problem],
        without_reference=list(without_reference),
        notes=list(notes),
    )


def _rows(file: Measured) -> list[Row]:
    """The rows of one file, one per number of codebooks."""
    return [
        {
            "file": file.name,
            "domain": file.domain,
            "seconds": each.seconds,
            "sample_rate": each.sample_rate,
            **each.rate(),
            **each.metrics,
        }
        for each in file.comparisons
    ]


def _means(domain: str, group: list[Measured]) -> list[Row]:
    """Summary rows of a group of files, one per number of codebooks."""
    rows = []
    for same in zip(*(file.comparisons for file in group), strict=True):
        first = same[0]
        row: Row = {
            "domain": domain,
            **first.rate(),
            "files": len(group),
            "seconds": round(math.fsum(each.seconds for each in same), 6),
        }
        for name in first.metrics:
            row[name] = _mean([each.metrics[name] for each in same])
        counts = [file.counts[: first.codebooks] for file in group if file.counts is not None]
        if counts:
            row["bitrate_efficiency"] = round(efficiency(sum(counts[1:], counts[0])), 6)
        rows.append(row)
    return rows


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return round(math.fsum(there) / len(there), 6) if there else None

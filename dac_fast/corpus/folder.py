"""A dataset's folder: what it is made of, which shards are there, and who is making which.

    dataset.json                 the card: model, settings, sources; hours and counts
    plan.jsonl                   a line per shard: its recordings
    shard-000000.tar             or .parquet, or .npy with .jsonl
    reports/shard-000000.json    counts, checksum and failures of that shard, written after it
    failures.jsonl               a line per recording that has no record: key, reason, shard
    .lock                        while shards are missing

A shard is there if its file and its report are. Both are written whole or not at all, and follow
from the card and the plan, so it does no harm if two processes make the same shard; locks only
spare the work.
"""

import fcntl
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from dac_fast.corpus import shards
from dac_fast.corpus.encoding import named_fields
from dac_fast.corpus.plan import Plan, Shard, save
from dac_fast.corpus.shards import Layout, Record
from dac_fast.files import make_folder, sweep, write_bytes
from dac_fast.version import __version__

CARD = "dataset.json"
POLL_SECONDS = 0.2


class DatasetError(ValueError):
    """A folder that is no dataset, or another one than was asked for; one line that says why."""


class Failure(NamedTuple):
    """Why a recording has no record."""

    key: str
    reason: str


@dataclass(frozen=True)
class Model:
    """The model that codes are of.

    Attributes:
        name: the preset, or the checkpoint's path.
        sha256: of its weights.
        sample_rate, hop_length, codebook_size: of its configuration.
    """

    name: str
    sha256: str
    sample_rate: int
    hop_length: int
    codebook_size: int


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the shards, beside the model and the sources.

    Attributes:
        format, codes: see `Layout`.
        codebooks: that are used, the first ones.
        shard_hours: a shard ends with the recording that reaches that length.
        shuffle: seed of the order of recordings; None: by key.
        normalize_db: loudness that recordings are brought to, in LUFS; None: their own.
        precision: of the encoder.
        audio_column: of Parquet files.
    """

    format: str
    codes: str
    codebooks: int
    shard_hours: float
    shuffle: int | None
    normalize_db: float | None
    precision: str
    audio_column: str


@dataclass(frozen=True)
class Sources:
    """Where recordings are from: as named, and the files that were found by these names."""

    named: list[str]
    files: int
    sha256: str


@dataclass(frozen=True)
class Card:
    """What a dataset is made of, and, of the shards that are there, how much that came to."""

    model: Model
    settings: Settings
    sources: Sources
    fields: dict[str, str]
    shards: int
    version: str = __version__
    complete: bool = False
    items: int = 0
    failures: int = 0
    frames: int = 0
    hours: float = 0.0

    @property
    def layout(self) -> Layout:
        """Of the shards."""
        return Layout(
            self.settings.format,
            self.settings.codes,
            self.settings.codebooks,
            self.model.codebook_size,
            self.model.sample_rate,
            self.model.hop_length,
            self.fields,
        )


class Folder:
    """A dataset's folder with its card and plan; `create` or `open` gives one."""

    def __init__(self, path: Path):
        self.path = path
        self.card = read_card(path)
        self.plan = Plan(path / "plan.jsonl")
        self.locks = _Locks(path / ".lock")

    @classmethod
    def create(
        cls,
        path: Path,
        model: Model,
        settings: Settings,
        sources: Sources,
        make: Callable[[], Iterable[Shard]],
    ) -> "Folder":
        """The folder of that dataset, planned unless it is there.

        Raises:
            DatasetError: it is there, but of another model, of other settings or sources.
            OutputError: it cannot be written.
        """
        make_folder(path / "reports")
        locks = _Locks(path / ".lock")
        if not (path / CARD).exists():
            with locks.held(0):
                if not (path / CARD).exists():
                    planned = list(make())
                    save(path / "plan.jsonl", planned)
                    fields = _fields(planned)
                    _save_card(path, Card(model, settings, sources, fields, len(planned)))
            locks.close()
        folder = cls(path)
        folder._check(model, settings, sources)
        return folder

    def _check(self, model: Model, settings: Settings, sources: Sources) -> None:
        card = self.card
        if model.sha256 != card.model.sha256:
            raise DatasetError(
                f"{self.path} has codes of the model {card.model.name} (sha256 "
                f"{card.model.sha256}), not of {model.name} (sha256 {model.sha256}); "
                "accepted: the same model, or another folder"
            )
        for name, there in asdict(card.settings).items():
            if there != getattr(settings, name):
                raise DatasetError(
                    f"{self.path} is made with {name} {there}, not {getattr(settings, name)}; "
                    "accepted: the same settings, or another folder"
                )
        there = card.sources
        if sources.sha256 != there.sha256:
            raise DatasetError(
                f"{self.path} is made of {' '.join(there.named)} ({there.files} files, sha256 "
                f"{there.sha256}), not of {' '.join(sources.named)} ({sources.files} files, sha256 "
                f"{sources.sha256}); accepted: the same sources, or another folder"
            )

    def shard_path(self, number: int) -> Path:
        """Where a shard is, or is going to be."""
        return self.path / f"shard-{number:06d}{self.card.layout.suffix}"

    def is_there(self, number: int) -> bool:
        """Whether a shard is complete."""
        path = self.shard_path(number)
        return path.exists() and report_path(path).exists()

    def present(self) -> Iterator[Path]:
        """The shards that are complete, in order."""
        paths = (self.shard_path(number) for number in range(self.card.shards))
        return (path for path in paths if path.exists() and report_path(path).exists())

    def failed(self) -> dict[int, set[str]]:
        """The keys of failures, by the number of their shard."""
        found = {}
        for path in self.present():
            if failures := read_report(path)["failures"]:
                found[int(path.stem.split("-")[1])] = {failure["key"] for failure in failures}
        return found

    def finish(self) -> Card:
        """Adds up what is there. Once all shards are, leftovers of killed processes go.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self.locks.held(0):
            reports = [(path.stem, read_report(path)) for path in self.present()]
            complete = len(reports) == self.card.shards
            lines = [
                json.dumps({**failure, "shard": name}, ensure_ascii=False) + "\n"
                for name, report in reports
                for failure in report["failures"]
            ]
            write_bytes(self.path / "failures.jsonl", "".join(lines).encode())
            self.card = replace(
                self.card,
                complete=complete,
                items=sum(report["items"] for _, report in reports),
                failures=len(lines),
                frames=sum(report["frames"] for _, report in reports),
                hours=sum(report["seconds"] for _, report in reports) / 3600,
            )
            _save_card(self.path, self.card)
            if complete:
                sweep(self.path)
                sweep(self.path / "reports")
                (self.path / ".lock").unlink(missing_ok=True)
        return self.card


class Work:
    """Shards of a folder that are to be made, each claimed before it is handed out.

    Args:
        folder: of the dataset.
        share: (I, N): every Nth shard only; I counts from 0 or from 1.
        most_seconds: no shard is handed out once that much audio was.
        retry: only what failed, in shards that are there.
    """

    def __init__(
        self,
        folder: Folder,
        share: tuple[int, int] = (0, 1),
        most_seconds: float = float("inf"),
        retry: bool = False,
    ):
        self.folder, self.left = folder, most_seconds
        self._failed = folder.failed() if retry else {}
        numbers = self._failed if retry else range(len(folder.plan))
        mine = [number for number in numbers if number % share[1] == share[0] % share[1]]
        self._retry = retry
        self._numbers = deque(number for number in mine if retry or not folder.is_there(number))
        self._busy: list[int] = []
        self._lock = threading.Lock()
        self.seconds = min(sum(folder.plan.seconds[number] for number in self._numbers), self.left)

    def __len__(self) -> int:
        return len(self._numbers)

    def shards(self) -> Iterator[Shard]:
        """The shards that are to be made, without claiming them, as far as the budget goes."""
        left = self.left
        for number in self._numbers:
            if left <= 0:
                return
            yield self._shard(number)
            left -= self.folder.plan.seconds[number]

    def claim(self, most: int = 1, stopped: threading.Event | None = None) -> list[Shard]:
        """Up to so many shards; none when all that was to do is done, or once it is stopped.

        Waits for what other processes are making: where one dies, its shard is handed out here.
        """
        with self._lock:
            claimed: list[Shard] = []
            while len(claimed) < most and self.left > 0 and (self._numbers or self._busy):
                if not self._numbers:
                    if claimed:
                        break
                    time.sleep(POLL_SECONDS)
                    if stopped is not None and stopped.is_set():
                        break
                    self._numbers, self._busy = deque(self._busy), []
                number = self._numbers.popleft()
                if not self._retry and self.folder.is_there(number):
                    continue
                if not self.folder.locks.take(number + 1):
                    self._busy.append(number)
                elif not self._retry and self.folder.is_there(number):
                    self.folder.locks.release(number + 1)
                else:
                    claimed.append(self._shard(number))
                    self.left -= self.folder.plan.seconds[number]
            return claimed

    def _shard(self, number: int) -> Shard:
        shard = self.folder.plan.shard(number)
        if not self._retry:
            return shard
        items = [item for item in shard.items if item.key in self._failed[number]]
        return replace(shard, items=items)

    def written(self, shard: Shard) -> None:
        """Says that a claimed shard is there."""
        self.folder.locks.release(shard.number + 1)


def write_shard(
    path: Path, layout: Layout, keys: Sequence[str], outcomes: Iterable[Record | Failure]
) -> None:
    """Writes a shard and then its report, which makes it complete.

    Args:
        path: of the shard.
        layout: of the dataset.
        keys: of all recordings of the shard, in order.
        outcomes: what became of them; of others, the record that the shard has already.
    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    by_key: dict[str, Record | Failure] = {outcome.key: outcome for outcome in outcomes}
    if len(by_key) < len(keys):
        kept = shards.read(path, layout)
        by_key = {**{record.key: _in_memory(record) for record in kept}, **by_key}
    records = [outcome for key in keys if isinstance(outcome := by_key[key], Record)]
    failures = [outcome for key in keys if isinstance(outcome := by_key[key], Failure)]
    shards.write(path, records, layout)
    report = {
        "items": len(records),
        "frames": sum(record.codes.shape[0] * record.codes.shape[2] for record in records),
        "seconds": sum(record.metadata["duration"] for record in records),
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "failures": [failure._asdict() for failure in failures],
    }
    write_bytes(report_path(path), json.dumps(report, indent=1, ensure_ascii=False).encode())


def _in_memory(record: Record) -> Record:
    return record._replace(codes=record.codes.copy())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def report_path(shard: Path) -> Path:
    """Where a shard's report is."""
    return shard.parent / "reports" / f"{shard.stem}.json"


def read_report(shard: Path) -> dict[str, Any]:
    """A shard's report."""
    report: dict[str, Any] = json.loads(report_path(shard).read_text(encoding="utf-8"))
    return report


def read_card(path: Path) -> Card:
    """A dataset's card.

    Raises:
        DatasetError: the folder has none, or it is damaged.
    """
    if not (path / CARD).is_file():
        raise DatasetError(f"{path}: no dataset of codes; accepted: a folder with a {CARD}")
    try:
        values = json.loads((path / CARD).read_text(encoding="utf-8"))
        parts = {"model": Model, "settings": Settings, "sources": Sources}
        return Card(**values | {name: kind(**values[name]) for name, kind in parts.items()})
    except (ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{path / CARD}: damaged, or of another version ({error})") from error


def _save_card(path: Path, card: Card) -> None:
    text = json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n"
    write_bytes(path / CARD, text.encode())


def _fields(planned: Iterable[Shard]) -> dict[str, str]:
    """What sources say of recordings, and its types."""
    kinds: dict[str, set[str]] = {}
    for shard in planned:
        for item in shard.items:
            for name, value in named_fields(item.metadata).items():
                if value is not None:
                    kinds.setdefault(name, set()).add(shards.kind_of(value))
    return {name: shards.field_type(kinds[name]) for name in sorted(kinds)}


class _Locks:
    """Numbered locks in one file, which end with the process that holds them.

    Where the filesystem has no locks, all are granted.
    """

    def __init__(self, path: Path):
        self.path = path
        # Opened by the first lock, and open as long as locks are held.
        self._file: IO[bytes] | None = None

    def take(self, number: int) -> bool:
        """Takes a lock, unless another process holds it."""
        return self._lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self, number: int) -> None:
        """Gives a lock back."""
        self._lock(number, fcntl.LOCK_UN)

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Waits for a lock and holds it as long as the block runs."""
        self._lock(number, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self.release(number)

    def close(self) -> None:
        """Gives all locks back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lock(self, number: int, operation: int) -> bool:
        if self._file is None:
            self._file = open(self.path, "ab")  # noqa: SIM115 (open until the locks are given back)
        try:
            fcntl.lockf(self._file, operation, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True
        return True

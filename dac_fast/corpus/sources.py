"""Recordings to tokenize: in folders, JSONL manifests, WebDataset tars and Parquet files.

A source is a path or an address of a filesystem that fsspec knows (s3://, gs://, hf://, …), with or
without wildcards. `files_of` lists what the sources name; `items_of` looks into one such file and
gives its recordings with their lengths, reading headers only; `opened` makes a recording readable.
"""

import contextlib
import datetime
import decimal
import hashlib
import io
import json
import re
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeVar

import fsspec

from dac_fast.audio.reading import AUDIO_SUFFIXES, UNKNOWN_FRAMES, AudioError
from dac_fast.audio.sources import MANIFEST, UNFIT
from dac_fast.files import files_below

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# Values of a JSON object.
Metadata: TypeAlias = dict[str, Any]
Value = TypeVar("Value", str, list[str], Metadata)

KINDS = (".tar", ".parquet", *AUDIO_SUFFIXES)
# Columns and manifest entries that say how long a recording is, in seconds.
SECONDS = ("seconds", "duration")
# Three decades: what is longer is no length.
MOST_SECONDS = 1e9
# Levels of lists and objects in what sources say.
MOST_LEVELS = 100
# Rows of a Parquet file whose audio is held at once to look at its headers.
ROWS = 16
COPY_BYTES = 8 << 20
# Bytes of a file's name that are not UTF-8 come as such, and JSON may have them in any text.
_SURROGATE = re.compile("[\ud800-\udfff]")


def require_pyarrow() -> None:
    """Raises ValueError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"Parquet needs pyarrow ({error}); accepted: pip install 'dac-fast[corpus]'"
        ) from error


class SourceError(ValueError):
    """Sources that are missing, empty or contradictory; one line that names them."""


@dataclass(frozen=True)
class Item:
    """A recording.

    Attributes:
        key: its name in the dataset, the same in every run.
        path: of the file that it is, or that it lies in.
        place: offset and size within a tar, in bytes; row group and row within a Parquet file.
        seconds: its length as the header says; 0: not known.
        channels: as the header says; 1 where the header was not read.
        metadata: what its source says of it.
        problem: why it cannot be read, where that is known already.
    """

    key: str
    path: str
    place: tuple[int, int] | None = None
    seconds: float = 0.0
    channels: int = 1
    metadata: Metadata = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Found:
    """A file that a source names: a recording, a tar or a Parquet file.

    Attributes:
        path: absolute, or an address.
        name: its path within the source, which keys are made of.
        entry: the manifest's line about it.
    """

    path: str
    name: str
    entry: Metadata = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """The path's suffix, in lower case."""
        return PurePosixPath(self.path).suffix.lower()


def files_of(sources: Sequence[str]) -> list[Found]:
    """The files that the sources name, folders searched and manifests read.

    Raises:
        SourceError: a source is missing, empty, or of no kind that can be read.
    """
    return [found for source in sources for found in _files_of(source)]


def digest(files: Iterable[Found]) -> str:
    """A hash of the files' names and manifest entries, to tell sources apart."""
    lines = (json.dumps([file.path, file.name, file.entry]) for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def items_of(file: Found, audio_column: str = "audio") -> list[Item]:
    """The recordings in a file, in the order in which they lie there.

    What cannot be read becomes an item with a problem, so that it is reported with the others.

    Raises:
        SourceError: a Parquet file has no such column.
    """
    return [
        replace(item, key=encodable(item.key), metadata=encodable(item.metadata))
        for item in _items_of(file, audio_column)
    ]


def encodable(value: Value) -> Value:
    r"""A JSON value with `\udce9` spelled out for each lone surrogate, which UTF-8 has not."""
    text = json.dumps(value, ensure_ascii=False)
    found: Value = json.loads(_SURROGATE.sub(lambda match: rf"\\u{ord(match[0]):x}", text))
    return found


def _items_of(file: Found, audio_column: str) -> Iterable[Item]:
    if file.suffix == ".tar":
        return _items_of_tar(file)
    if file.suffix == ".parquet":
        return _items_of_parquet(file, audio_column)
    entry = dict(file.entry)
    key = str(entry.pop("key", "")) or _key(file.name)
    seconds, channels = _known_seconds(entry), 1
    # A manifest tells them for the plan; a record has its own.
    for name in (*SECONDS, "rate"):
        entry.pop(name, None)
    if seconds is None:
        seconds, channels = _header_of_file(file.path)
    return [Item(key, file.path, None, seconds, channels, entry)]


@contextlib.contextmanager
def opened(item: Item, audio_column: str = "audio") -> Iterator[str]:
    """The path of a local file with the recording in it, as long as the block runs.

    What lies in a container or elsewhere is copied to a file without a name, which is gone with the
    process however that ends.

    Raises:
        AudioError, OSError: the recording cannot be had.
    """
    if item.problem:
        raise AudioError(item.problem)
    if item.place is None and "://" not in item.path:
        yield item.path
        return
    with tempfile.TemporaryFile() as copy:
        for piece in _bytes_of(item, audio_column):
            copy.write(piece)
        copy.flush()
        yield f"/dev/fd/{copy.fileno()}"


def _located(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or address, and the path in it."""
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise SourceError(f"{source}: {error}") from error
    return filesystem, path


def _open(path: str) -> IO[bytes]:
    filesystem, inside = _located(path)
    file: IO[bytes] = filesystem.open(inside, "rb")
    return file


def _files_of(source: str) -> list[Found]:
    filesystem, path = _located(source)

    def found(inside: str, name: str) -> Found:
        local = "file" in filesystem.protocol
        return Found(inside if local else filesystem.unstrip_protocol(inside), name)

    def is_source(name: str) -> bool:
        parts = PurePosixPath(name).parts
        hidden = any(part.startswith(".") for part in parts)
        return PurePosixPath(name).suffix.lower() in KINDS and not hidden

    if filesystem.isdir(path):
        root = path.rstrip("/")
        if filesystem.exists(f"{root}/{MANIFEST}"):
            return _files_of(f"{source.rstrip('/')}/{MANIFEST}")
        names = _names_below(filesystem, root)
        files = [found(f"{root}/{name}", name) for name in names if is_source(name)]
    elif not filesystem.exists(path):
        if not any(mark in source for mark in "*?["):
            raise SourceError(f"{source}: no such file or folder")
        named = {inside: PurePosixPath(inside).name for inside in sorted(filesystem.glob(path))}
        files = [found(inside, name) for inside, name in named.items() if is_source(name)]
    elif PurePosixPath(path).suffix == ".jsonl":
        folder = found(path, "").path.rsplit("/", 1)[0]
        files = list(_manifest_files(source, filesystem.cat_file(path), folder))
    elif PurePosixPath(path).suffix.lower() in KINDS:
        files = [found(path, PurePosixPath(path).name)]
    else:
        raise SourceError(
            f"{source}: not a source; accepted: a folder, a .jsonl manifest, {', '.join(KINDS)}"
        )
    if not files:
        raise SourceError(f"{source}: nothing to tokenize in it")
    return files


def _names_below(filesystem: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """The files in a folder and its subfolders; on this machine, links to folders are followed."""

    def refuse(error: OSError) -> None:
        raise SourceError(str(error))

    if "file" in filesystem.protocol:
        below = files_below(Path(root), KINDS, refuse)
        return sorted(path.relative_to(root).as_posix() for path in below)
    return [inside[len(root) + 1 :] for inside in sorted(filesystem.find(root))]


def _manifest_files(source: str, content: bytes, folder: str) -> Iterator[Found]:
    """The files that a manifest's lines name, relative to its folder."""
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = _parsed(line)
            name = entry.pop("file")
            outside = name.startswith("/") or "://" in name
            parts = PurePosixPath(name.split("://")[-1]).parts
            inside = "/".join(part for part in parts if part not in ("/", ".."))
            _key(inside)
        except UNFIT as error:
            accepted = 'a JSON object with at least "file"'
            raise SourceError(
                f"{source}: line {number} is {line.strip()[:80]!r}; accepted: {accepted}"
            ) from error
        yield Found(name if outside else f"{folder}/{name}", inside, entry)


def _parsed(text: str) -> Any:
    """JSON; raises one of `UNFIT` where it is none, or too deep to be copied and written again."""
    value = json.loads(text)
    if _levels(value) > MOST_LEVELS:
        raise ValueError
    return value


def _levels(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_levels, parts), default=0)


def _key(name: str) -> str:
    """A file's name within its source, without its suffix; raises ValueError where it has none."""
    return str(PurePosixPath(name).with_suffix(""))


def _known_seconds(metadata: Metadata) -> float | None:
    """The length that the source itself tells; None where it does not."""
    for name in SECONDS:
        value = metadata.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if 0 <= value <= MOST_SECONDS:
            return float(value)
    return None


def _header_of_file(path: str) -> tuple[float, int]:
    try:
        with _open(path) as file:
            return _header(file)
    # ValueError: a name with a null byte, or a protocol that there is not.
    except (OSError, ValueError):
        return 0.0, 1


def _header(file: IO[bytes] | io.RawIOBase) -> tuple[float, int]:
    """A recording's seconds and channels; (0, 1) where encoding is going to say what is wrong."""
    import soundfile

    try:
        with soundfile.SoundFile(file) as audio:
            frames = 0 if audio.frames == UNKNOWN_FRAMES else audio.frames
            return float(frames / audio.samplerate), int(audio.channels)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError):
        return 0.0, 1


class _Part(io.RawIOBase):
    """A part of a seekable file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, size: int):
        self.file = file
        self.offset = offset
        self.size = size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = start + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        data = self.file.read(max(min(len(buffer), self.size - self.position), 0))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _items_of_tar(file: Found) -> Iterator[Item]:
    """The audio members of a tar; `.json` and `.txt` members of the same name are metadata."""
    members: list[tuple[str, tuple[int, int], tuple[float, int]]] = []
    metadata: dict[str, Metadata] = {}
    problems: dict[str, str] = {}
    broken = ""
    try:
        with _open(file.path) as content, tarfile.open(fileobj=content, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                # Hidden members, as macOS's `._x.wav`, are passed over as in folders.
                hidden = any(part.startswith(".") and part != ".." for part in name.parts)
                if hidden or not member.isfile():
                    continue
                if name.suffix.lower() in AUDIO_SUFFIXES:
                    place = (member.offset_data, member.size)
                    members.append((member.name, place, _header(_Part(content, *place))))
                elif name.suffix in (".json", ".txt"):
                    data = _Part(content, member.offset_data, member.size).read()
                    try:
                        text = data.decode()
                        found = _parsed(text) if name.suffix == ".json" else {"text": text}
                        metadata.setdefault(_sample(member.name), {}).update(found)
                    except UNFIT:
                        problems[_sample(member.name)] = f"its {name.suffix} is damaged"
            # A damaged or missing header ends the loop like the two blocks of zeros at the end do.
            content.seek(tar.offset)
            if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a member nor the end at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        broken = f"a damaged tar; what it holds beyond {len(members)} recordings is lost ({error})"
    for audio, place, header in members:
        own = metadata.get(_sample(audio), {})
        problem = problems.get(_sample(audio), "")
        yield Item(_key(audio), file.path, place, *header, own, problem)
    if broken or not members:
        yield Item(file.name, file.path, problem=broken or "a tar without recordings")


def _sample(name: str) -> str:
    """What the members of a WebDataset sample have in common: the name up to the first dot."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".", 1)[0]))


def _items_of_parquet(file: Found, audio_column: str) -> Iterator[Item]:
    """The rows of a Parquet file. Where no column tells the seconds, all audio is read once."""
    require_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(file.path) as content, pq.ParquetFile(content) as table:
            columns = table.schema_arrow.names
            if audio_column not in columns:
                there = ", ".join(columns)
                raise SourceError(
                    f"{file.path}: no column {audio_column!r}; accepted of --audio-column: {there}"
                )
            above = 0
            for group in range(table.num_row_groups):
                rows = _rows(table, group, [name for name in columns if name != audio_column])
                missing = not any(_known_seconds(row) is not None for row in rows)
                headers = _audio_headers(file.path, table, group, audio_column)
                for number, row in enumerate(rows):
                    header = next(headers) if missing else (_known_seconds(row) or 0.0, 1)
                    own = row.pop("key", None)
                    key = f"{_key(file.name)}/{above + number:08d}" if own is None else str(own)
                    yield Item(key, file.path, (group, number), *header, row)
                above += len(rows)
    except SourceError:
        raise
    # ValueError, OverflowError: text that is not UTF-8, a time beyond those of Python.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        yield Item(file.name, file.path, problem=f"a damaged Parquet file ({_line(error)})")


def _rows(table: "pq.ParquetFile", group: int, columns: list[str]) -> list[Metadata]:
    """A row group's rows as JSON objects, without nulls and without what JSON cannot hold."""
    if not columns:
        return [{} for _ in range(table.metadata.row_group(group).num_rows)]
    rows = table.read_row_group(group, columns).to_pylist()
    return [
        {name: _plain(value) for name, value in row.items() if _plain(value) is not None}
        for row in rows
    ]


def _plain(value: Any) -> Any:
    """A value as JSON has it; None where JSON has nothing like it."""
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return None


def _audio_headers(
    path: str, table: "pq.ParquetFile", group: int, column: str
) -> Iterator[tuple[float, int]]:
    for batch in table.iter_batches(ROWS, [group], [column]):
        for value in batch.column(0).to_pylist():
            audio = _audio_of(value, path)
            if isinstance(audio, str):
                yield _header_of_file(audio)
            else:
                yield _header(io.BytesIO(audio or b""))


def _audio_of(value: Any, path: str) -> bytes | str | None:
    """What a value of a Parquet file's audio column holds, or the path of what it names."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str) or value.startswith("/") or "://" in value:
        return value if isinstance(value, bytes | str) else None
    return f"{path.rpartition('/')[0]}/{value}"


def _bytes_of(item: Item, audio_column: str) -> Iterator[bytes]:
    """The recording's file, piece by piece."""
    suffix = PurePosixPath(item.path).suffix.lower()
    if item.place is not None and suffix == ".parquet":
        yield from _bytes_of_row(item.path, *item.place, audio_column)
        return
    filesystem, path = _located(item.path)
    offset, size = item.place or (0, filesystem.size(path))
    for start in range(offset, offset + size, COPY_BYTES):
        end = min(start + COPY_BYTES, offset + size)
        piece = filesystem.cat_file(path, start=start, end=end)
        if len(piece) < end - start:
            there = start + len(piece) - offset
            raise AudioError(f"cut short: {there} of {size} bytes are there")
        yield piece


def _bytes_of_row(path: str, group: int, row: int, column: str) -> Iterator[bytes]:
    audio = _audio_of(_audio_of_group(path, group, column)[row].as_py(), path)
    if audio is None:
        raise AudioError("the audio is null, or neither bytes nor a path")
    if isinstance(audio, bytes):
        yield audio
    else:
        yield from _bytes_of(Item("", audio), column)


# The audio of the row group that a thread read last: its rows are taken one after the other.
_last = threading.local()


def _audio_of_group(path: str, group: int, column: str) -> "pa.ChunkedArray":
    import pyarrow as pa
    import pyarrow.parquet as pq

    if getattr(_last, "place", None) != (path, group, column):
        try:
            with _open(path) as content, pq.ParquetFile(content) as table:
                _last.audio = table.read_row_group(group, [column]).column(0)
        except pa.ArrowException as error:
            raise AudioError(f"a damaged Parquet file ({_line(error)})") from error
        _last.place = (path, group, column)
    audio: pa.ChunkedArray = _last.audio
    return audio


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def absolute(source: str) -> str:
    """A source as it is named from any working folder."""
    return source if "://" in source else str(Path(source).absolute())

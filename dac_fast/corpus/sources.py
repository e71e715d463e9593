"""Recordings to tokenize: in folders, JSONL manifests, WebDataset tars and Parquet files.

A source is a path or an address of a filesystem that fsspec knows (s3://, gs://, hf://, …), with or
without wildcards. `files_of` lists what the sources name; `items_of` looks into one such file and
gives its recordings with their lengths, reading headers only; `opened` makes a recording readable.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import fsspec

from dac_fast.audio.reading import AUDIO_SUFFIXES, AudioError
from dac_fast.audio.sources import MANIFEST, UNFIT
from dac_fast.corpus.items import (
    SECONDS,
    Item,
    Metadata,
    SourceError,
    encodable,
    header_of_file,
    key_of,
    known_seconds,
    located,
    parsed,
)
from dac_fast.corpus.parquet import audio_of_row, items_of_parquet
from dac_fast.corpus.tars import items_of_tar
from dac_fast.files import files_below

KINDS = (".tar", ".parquet", *AUDIO_SUFFIXES)
COPY_BYTES = 8 << 20


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


def _items_of(file: Found, audio_column: str) -> Iterable[Item]:
    if file.suffix == ".tar":
        return items_of_tar(file.path, file.name)
    if file.suffix == ".parquet":
        return items_of_parquet(file.path, file.name, audio_column)
    entry = dict(file.entry)
    key = str(entry.pop("key", "")) or key_of(file.name)
    seconds, channels = known_seconds(entry), 1
    # A manifest tells them for the plan; a record has its own.
    for name in (*SECONDS, "rate"):
        entry.pop(name, None)
    if seconds is None:
        seconds, channels = header_of_file(file.path)
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


def _files_of(source: str) -> list[Found]:
    filesystem, path = located(source)

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
            entry = parsed(line)
            name = entry.pop("file")
            outside = name.startswith("/") or "://" in name
            parts = PurePosixPath(name.split("://")[-1]).parts
            inside = "/".join(part for part in parts if part not in ("/", ".."))
            key_of(inside)
        except UNFIT as error:
            accepted = 'a JSON object with at least "file"'
            raise SourceError(
                f"{source}: line {number} is {line.strip()[:80]!r}; accepted: {accepted}"
            ) from error
        yield Found(name if outside else f"{folder}/{name}", inside, entry)


def _bytes_of(item: Item, audio_column: str) -> Iterator[bytes]:
    """The recording's file, piece by piece."""
    suffix = PurePosixPath(item.path).suffix.lower()
    if item.place is not None and suffix == ".parquet":
        audio = audio_of_row(item.path, *item.place, audio_column)
        if isinstance(audio, bytes):
            yield audio
            return
        item = Item("", audio)
    filesystem, path = located(item.path)
    offset, size = item.place or (0, filesystem.size(path))
    for start in range(offset, offset + size, COPY_BYTES):
        end = min(start + COPY_BYTES, offset + size)
        piece = filesystem.cat_file(path, start=start, end=end)
        if len(piece) < end - start:
            there = start + len(piece) - offset
            raise AudioError(f"cut short: {there} of {size} bytes are there")
        yield piece


def absolute(source: str) -> str:
    """A source as it is named from any working folder."""
    return source if "://" in source else str(Path(source).absolute())

"""A recording of a source: what is known of it before it is decoded."""

import io
import json
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, TypeAlias, TypeVar

import fsspec

from dac_fast.audio.reading import UNKNOWN_FRAMES

# Values of a JSON object.
Metadata: TypeAlias = dict[str, Any]
Value = TypeVar("Value", str, list[str], Metadata)

# Columns and manifest entries that say how long a recording is, in seconds.
SECONDS = ("seconds", "duration")
# Three decades: what is longer is no length.
MOST_SECONDS = 1e9
# Levels of lists and objects in what sources say.
MOST_LEVELS = 100
# Bytes of a file's name that are not UTF-8 come as such, and JSON may have them in any text.
_SURROGATE = re.compile("[\ud800-\udfff]")


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


def encodable(value: Value) -> Value:
    r"""A JSON value with `\udce9` spelled out for each lone surrogate, which UTF-8 has not."""
    text = json.dumps(value, ensure_ascii=False)
    found: Value = json.loads(_SURROGATE.sub(lambda match: rf"\\u{ord(match[0]):x}", text))
    return found


def parsed(text: str) -> Any:
    """JSON; raises one of `UNFIT` where it is none, or too deep to be copied and written again."""
    value = json.loads(text)
    if _levels(value) > MOST_LEVELS:
        raise ValueError
    return value


def _levels(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_levels, parts), default=0)


def key_of(name: str) -> str:
    """A file's name within its source, without its suffix; raises ValueError where it has none."""
    return str(PurePosixPath(name).with_suffix(""))


def known_seconds(metadata: Metadata) -> float | None:
    """The length that the source itself tells; None where it does not."""
    for name in SECONDS:
        value = metadata.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if 0 <= value <= MOST_SECONDS:
            return float(value)
    return None


def header_of_file(path: str) -> tuple[float, int]:
    """`header_of` the file at a path or address."""
    try:
        with open_file(path) as file:
            return header_of(file)
    # ValueError: a name with a null byte, or a protocol that there is not.
    except (OSError, ValueError):
        return 0.0, 1


def header_of(file: IO[bytes] | io.RawIOBase) -> tuple[float, int]:
    """A recording's seconds and channels; (0, 1) where encoding is going to say what is wrong."""
    import soundfile

    try:
        with soundfile.SoundFile(file) as audio:
            frames = 0 if audio.frames == UNKNOWN_FRAMES else audio.frames
            return float(frames / audio.samplerate), int(audio.channels)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError):
        return 0.0, 1


def located(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path or address, and the path in it."""
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise SourceError(f"{source}: {error}") from error
    return filesystem, path


def open_file(path: str) -> IO[bytes]:
    """The file at a path or address, to be read."""
    filesystem, inside = located(path)
    file: IO[bytes] = filesystem.open(inside, "rb")
    return file


def line_of(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())

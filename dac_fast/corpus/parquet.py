"""Recordings in a Parquet file: a column has their audio or names it, the others describe it."""

import datetime
import decimal
import io
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dac_fast.audio.reading import AudioError
from dac_fast.corpus.items import (
    Item,
    Metadata,
    SourceError,
    header_of,
    header_of_file,
    key_of,
    known_seconds,
    line_of,
    open_file,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# Rows whose audio is held at once to look at its headers.
ROWS = 16


def require_pyarrow() -> None:
    """Raises ValueError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"Parquet needs pyarrow ({error}); accepted: pip install 'dac-fast[corpus]'"
        ) from error


def items_of_parquet(path: str, file_name: str, audio_column: str) -> Iterator[Item]:
    """The rows of a Parquet file. Where no column tells the seconds, all audio is read once."""
    require_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(path) as content, pq.ParquetFile(content) as table:
            columns = table.schema_arrow.names
            if audio_column not in columns:
                there = ", ".join(columns)
                raise SourceError(
                    f"{path}: no column {audio_column!r}; accepted of --audio-column: {there}"
                )
            above = 0
            for group in range(table.num_row_groups):
                rows = _rows(table, group, [name for name in columns if name != audio_column])
                missing = not any(known_seconds(row) is not None for row in rows)
                headers = _audio_headers(path, table, group, audio_column)
                for number, row in enumerate(rows):
                    header = next(headers) if missing else (known_seconds(row) or 0.0, 1)
                    own = row.pop("key", None)
                    key = f"{key_of(file_name)}/{above + number:08d}" if own is None else str(own)
                    yield Item(key, path, (group, number), *header, row)
                above += len(rows)
    except SourceError:
        raise
    # ValueError, OverflowError: text that is not UTF-8, a time beyond those of Python.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        yield Item(file_name, path, problem=f"a damaged Parquet file ({line_of(error)})")


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
                yield header_of_file(audio)
            else:
                yield header_of(io.BytesIO(audio or b""))


def _audio_of(value: Any, path: str) -> bytes | str | None:
    """What a value of a Parquet file's audio column holds, or the path of what it names."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str) or value.startswith("/") or "://" in value:
        return value if isinstance(value, bytes | str) else None
    return f"{path.rpartition('/')[0]}/{value}"


def audio_of_row(path: str, group: int, row: int, column: str) -> bytes | str:
    """The audio of a row, or the path of the file that it names.

    Raises:
        AudioError: there is none, or the file is damaged.
    """
    audio = _audio_of(_audio_of_group(path, group, column)[row].as_py(), path)
    if audio is None:
        raise AudioError("the audio is null, or neither bytes nor a path")
    return audio


# The audio of the row group that a thread read last: its rows are taken one after the other.
_last = threading.local()


def _audio_of_group(path: str, group: int, column: str) -> "pa.ChunkedArray":
    import pyarrow as pa
    import pyarrow.parquet as pq

    if getattr(_last, "place", None) != (path, group, column):
        try:
            with open_file(path) as content, pq.ParquetFile(content) as table:
                _last.audio = table.read_row_group(group, [column]).column(0)
        except pa.ArrowException as error:
            raise AudioError(f"a damaged Parquet file ({line_of(error)})") from error
        _last.place = (path, group, column)
    audio: pa.ChunkedArray = _last.audio
    return audio

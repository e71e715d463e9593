"""Shards: records in a file of one of three formats, whose bytes follow from the records alone.

- webdataset: a tar with `<key>.npy` (uint16 [C, N, F]) or `<key>.dac`, and `<key>.json`. In names
  of members, dots of a key's last part stand as `%2E`, since WebDataset ends the key there, and
  percent signs as `%25`.
- parquet: a row per recording, codes as nested lists [C][N][F] of uint16.
- npy: codes of all recordings below each other, uint16 [rows, N], to be mapped into memory; beside
  it `<shard>.jsonl` says of each recording at which row its codes start. Those of its channels
  follow each other, `frames` rows each.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dac_fast.corpus.items import Metadata
from dac_fast.files import OutputError, atomic_path, write_bytes
from dac_fast.storage.dac2 import DACFile

if TYPE_CHECKING:
    import pyarrow as pa

Codes: TypeAlias = NDArray[np.uint16]

SUFFIXES = {"webdataset": ".tar", "parquet": ".parquet", "npy": ".npy"}
# What the metadata of every record has, and its type in Parquet.
FIELDS = {
    "frames": "int64",
    "channels": "int64",
    "rate": "int64",
    "samples": "int64",
    "duration": "double",
    "loudness": "double",
    "gains": "list<float>",
    "model": "string",
}
# A row group of a Parquet file, which readers take at once, ends with the row that reaches that.
ROW_GROUP_CODES = 4 << 20


class Record(NamedTuple):
    """A recording's codes.

    Attributes:
        key: its name.
        codes: uint16 [C, N, F], channels, codebooks, frames.
        metadata: frames; channels; rate (of the recording, Hz); samples (per channel, at that
            rate); loudness (LUFS) before encoding; gains (of each channel) for encoding; duration
            (s); model; and what the source said.
    """

    key: str
    codes: Codes
    metadata: Metadata


@dataclass(frozen=True)
class Layout:
    """What the records of a dataset have in common.

    Attributes:
        format: of the shards.
        codes: "npy" or "dac", the form of the codes in a tar.
        codebooks: N.
        codebook_size, sample_rate (Hz), hop_length (samples per frame): of the model.
        fields: what sources say of recordings, and its type: "bool", "int64", "double", "string",
            or "json" where it is of several.
    """

    format: str
    codes: str
    codebooks: int
    codebook_size: int
    sample_rate: int
    hop_length: int
    fields: dict[str, str]

    @property
    def suffix(self) -> str:
        """The suffix of a shard's file."""
        return SUFFIXES[self.format]


def write(path: Path, records: Sequence[Record], layout: Layout) -> None:
    """Writes a shard, complete or not at all.

    Args:
        path: of the shard, with the layout's suffix.
        records: in order.
        layout: of the dataset.
    Raises:
        OutputError: it cannot be written, or the disk is full.
    """
    by_format = {"webdataset": _write_tar, "parquet": _write_parquet, "npy": _write_npy}
    with atomic_path(path) as temporary:
        try:
            by_format[layout.format](temporary, records, layout)
        except OSError as error:
            raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error
        if layout.format == "npy":
            # The index of new codes never lies beside old ones: killed here, there is no shard.
            path.unlink(missing_ok=True)
            write_bytes(path.with_suffix(".jsonl"), _index(records))


def read(path: Path, layout: Layout) -> Iterator[Record]:
    """The records of a shard, in order."""
    by_format = {"webdataset": _read_tar, "parquet": _read_parquet, "npy": _read_npy}
    return by_format[layout.format](path, layout)


def field_type(kinds: set[str]) -> str:
    """The type of a field that has values of these kinds, see `kind_of`."""
    if kinds == {"int", "double"}:
        return "double"
    if kinds <= {"int", "int64"}:
        return "int64"
    return kinds.pop() if len(kinds) == 1 else "json"


def kind_of(value: object) -> str:
    """The type that a value, not None, has by itself, see `Layout.fields`.

    "int" is an int64 that a double can hold, too.
    """
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if abs(value) <= 2**53:
            return "int"
        return "int64" if -(2**63) <= value < 2**63 else "json"
    return {float: "double", str: "string"}.get(type(value), "json")


def _write_tar(path: Path, records: Sequence[Record], layout: Layout) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for record in records:
            name = _member(record.key)
            if layout.codes == "dac":
                _add(tar, f"{name}.dac", dac_file(record, layout).to_bytes())
            else:
                _add(tar, f"{name}.npy", _npy(record.codes))
            content = {"key": record.key, **record.metadata}
            _add(tar, f"{name}.json", json.dumps(content, ensure_ascii=False).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # Owner, mode and time of a new TarInfo are constants.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _member(key: str) -> str:
    """A key as the path of a member, which lies below the folder that it is unpacked in."""
    *folders, name = key.replace("%", "%25").split("/")
    names = {"": "%2F", ".": "%2E", "..": "%2E%2E"}
    return "/".join([*(names.get(part, part) for part in folders), name.replace(".", "%2E")])


def _npy(codes: Codes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(codes, "<u2"))
    return buffer.getvalue()


def dac_file(record: Record, layout: Layout) -> DACFile:
    """A record as the file of its own that it is in a tar with codes "dac"."""
    metadata = record.metadata
    return DACFile(
        codes=torch.from_numpy(record.codes.astype(np.int64)),
        chunk_length=metadata["frames"],
        original_length=metadata["samples"],
        input_db=metadata["loudness"],
        channels=metadata["channels"],
        sample_rate=metadata["rate"],
        gains=np.array(metadata["gains"], np.float32),
        codebook_size=layout.codebook_size,
        model_sample_rate=layout.sample_rate,
        hop_length=layout.hop_length,
        model=metadata["model"],
    )


def _read_tar(path: Path, layout: Layout) -> Iterator[Record]:
    with tarfile.open(path, "r:") as tar:
        codes = np.empty(0, np.uint16)
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            if member.name.endswith(".json"):
                metadata = json.loads(file.read())
                yield Record(metadata.pop("key"), codes, metadata)
            elif member.name.endswith(".dac"):
                codes = DACFile.from_bytes(file.read()).codes.numpy().astype(np.uint16)
            else:
                codes = np.load(io.BytesIO(file.read()))


def _schema(layout: Layout) -> "pa.Schema":
    import pyarrow as pa

    types = {"json": pa.string(), "list<float>": pa.list_(pa.float32())}
    codes = pa.list_(pa.list_(pa.list_(pa.uint16())))
    columns = [("key", pa.string()), ("codes", codes)]
    for name, kind in {**FIELDS, **layout.fields}.items():
        columns.append((name, types.get(kind) or pa.type_for_alias(kind)))
    return pa.schema(columns)


def _write_parquet(path: Path, records: Sequence[Record], layout: Layout) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(layout)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for some in _row_groups(records):
            columns = [pa.array([record.key for record in some]), _nested(some)]
            for name, kind in {**FIELDS, **layout.fields}.items():
                values = [record.metadata.get(name) for record in some]
                if kind == "json":
                    values = [value if value is None else json.dumps(value) for value in values]
                columns.append(pa.array(values, schema.field(name).type))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _row_groups(records: Sequence[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    for record in records:
        group.append(record)
        if sum(inside.codes.size for inside in group) >= ROW_GROUP_CODES:
            yield group
            group = []
    if group:
        yield group


def _nested(records: Sequence[Record]) -> "pa.ListArray":
    """Codes as a column of lists [C][N][F], made without a Python object per code."""
    import pyarrow as pa

    shapes = [record.codes.shape for record in records]
    flat = np.concatenate([record.codes.reshape(-1) for record in records])
    frames = np.repeat([f for _, _, f in shapes], [c * n for c, n, _ in shapes])
    codebooks = np.repeat([n for _, n, _ in shapes], [c for c, _, _ in shapes])
    nested = pa.array(flat, pa.uint16())
    for lengths in (frames, codebooks, [c for c, _, _ in shapes]):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        nested = pa.ListArray.from_arrays(pa.array(offsets), nested)
    return nested


def _read_parquet(path: Path, layout: Layout) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group)
            codes = rows.column("codes").combine_chunks()
            flat = codes.flatten().flatten().flatten().to_numpy()
            start = 0
            for row in rows.drop_columns(["codes"]).to_pylist():
                shape = (row["channels"], layout.codebooks, row["frames"])
                end = start + int(np.prod(shape))
                key = row.pop("key")
                yield Record(key, flat[start:end].reshape(shape), _metadata(row, layout))
                start = end


def _metadata(row: Metadata, layout: Layout) -> Metadata:
    """The metadata that a row was made of."""
    parsed = {name for name, kind in layout.fields.items() if kind == "json"}
    return {
        name: json.loads(value) if name in parsed else value
        for name, value in row.items()
        if value is not None
    }


def _write_npy(path: Path, records: Sequence[Record], layout: Layout) -> None:
    rows = [record.codes.transpose(0, 2, 1).reshape(-1, layout.codebooks) for record in records]
    empty = np.empty((0, layout.codebooks), "<u2")
    # Not `np.save` into the file, which says nothing of what a full disk did not take.
    path.write_bytes(_npy(np.concatenate([empty, *rows])))


def _index(records: Sequence[Record]) -> bytes:
    lines, start = [], 0
    for record in records:
        lines.append(json.dumps({"key": record.key, "start": start, **record.metadata}))
        start += record.metadata["channels"] * record.metadata["frames"]
    return "".join(line + "\n" for line in lines).encode()


def _read_npy(path: Path, layout: Layout) -> Iterator[Record]:
    codes = np.load(path, mmap_mode="r")
    for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
        metadata = json.loads(line)
        key, start = metadata.pop("key"), metadata.pop("start")
        channels, frames = metadata["channels"], metadata["frames"]
        part = codes[start : start + channels * frames].reshape(channels, frames, layout.codebooks)
        yield Record(key, part.transpose(0, 2, 1), metadata)

"""What `torch.save` writes: a zip archive of a pickle and the bytes of the tensors that it names.

`torch.load` would run the pickle, with few functions allowed; `dac_fast.storage.pickled` runs none.
"""

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dac_fast.storage.pickled import Machine, Name, RefusedError, dimensions

NAMES = {
    "collections OrderedDict": "OrderedDict",
    "torch._utils _rebuild_tensor_v2": "tensor",
    "torch._utils _rebuild_parameter": "parameter",
    "torch FloatStorage": "FloatStorage",
    "torch DoubleStorage": "DoubleStorage",
    "torch HalfStorage": "HalfStorage",
    "torch BFloat16Storage": "BFloat16Storage",
}
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}
ENCRYPTED = 1


@dataclass(frozen=True)
class _Storage:
    """A tensor's numbers in the archive: their type, and the name of the record."""

    kind: str
    record: str


@dataclass(frozen=True)
class _Stored:
    """A tensor that has not been read."""

    storage: _Storage
    offset: int
    sizes: list[int]
    strides: list[int]


def load(path: Path, wanted: Callable[[str], bool]) -> object:
    """The dicts, lists, plain values and tensors of floats in the archive, on the CPU.

    Args:
        path: of the archive.
        wanted: says by its key in a dict whether a tensor is read; else the dict lacks it.
    Raises:
        ValueError: it is no such archive, or holds anything else; `zipfile` raises others, too.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        # As torch.save writes them, and so that none can become larger than the file.
        for record in records:
            stored = record.compress_type == zipfile.ZIP_STORED
            plain = stored and record.compress_size == record.file_size
            if not plain or record.flag_bits & ENCRYPTED:
                raise ValueError(f"its record {record.filename[:80]!r} is compressed or encrypted")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records claim more bytes than the file has")
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if any(name.endswith("/.data/extern_modules") for name in archive.namelist()):
            weights = "the weights.pth that the published package saves with package=False"
            raise ValueError(f"a torch.package, which is a program; accepted: {weights}")
        if len(pickles) != 1:
            raise ValueError("no archive of torch.save: it has no data.pkl")
        machine = _Machine(archive, pickles[0].removesuffix("data.pkl"), wanted)
        return machine.run(archive.read(pickles[0]))


class _Machine(Machine):
    """The stack machine, with torch's names, and the archive that storages lie in."""

    def __init__(
        self, archive: zipfile.ZipFile, folder: str, wanted: Callable[[str], bool]
    ) -> None:
        super().__init__(NAMES)
        self.archive, self.folder, self.wanted = archive, folder, wanted
        self.storages: dict[str, Tensor] = {}

    def made(self, name: object, arguments: object) -> object:
        match name, arguments:
            case Name("OrderedDict"), ():
                return {}
            case Name("tensor"), (_Storage() as storage, int(offset), sizes, strides, *_):
                return _Stored(storage, offset, dimensions(sizes), dimensions(strides))
            case Name("parameter"), (_Stored() as tensor, *_):
                return tensor
        return super().made(name, arguments)

    def filled(self, target: object, state: object) -> None:
        # The versions of modules that a state dict has as an attribute.
        if not isinstance(target, dict):
            super().filled(target, state)

    def persistent(self, identifier: object) -> object:
        match identifier:
            case ("storage", Name(kind), str(key), *_) if kind in DTYPES:
                return _Storage(kind, f"{self.folder}data/{key}")
        return super().persistent(identifier)

    def update(self, values: list[object]) -> None:
        read: list[object] = []
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(value, _Stored):
                if isinstance(key, str) and not self.wanted(key):
                    continue
                value = self.tensor(value)
            read += [key, value]
        super().update(read)

    def tensor(self, stored: _Stored) -> Tensor:
        """The tensor, a view of its storage, which is read once."""
        kind, record = stored.storage.kind, stored.storage.record
        if record not in self.storages:
            # zipfile checks the CRC-32 of what it reads.
            data = bytearray(self.archive.read(record))
            flat = torch.frombuffer(data, dtype=DTYPES[kind]) if data else torch.empty(0)
            self.storages[record] = flat
        return _view(self.storages[record], stored.offset, stored.sizes, stored.strides)


def _view(storage: Tensor, offset: int, sizes: list[int], strides: list[int]) -> Tensor:
    """The tensor of those sizes and strides that begins at an element of a storage."""
    elements = math.prod(sizes)
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    # A stride of 0 would let one number claim any size.
    if not (0 < elements <= len(storage) and offset >= 0 and last < len(storage)):
        raise RefusedError(f"a tensor of {elements} elements in a storage of {len(storage)}")
    return storage.as_strided(sizes, strides, offset)

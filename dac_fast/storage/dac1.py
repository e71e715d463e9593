"""The published package's `.dac` files (descript-audio-codec, dac_version 1.0.0).

Each is a `.npy` file with a pickled dict inside, read by `dac_fast.storage.pickled`:

    {"codes": uint16 [C, N, F],
     "metadata": {"input_db": float32 [1], "original_length": int, "sample_rate": int,
                  "chunk_length": int, "channels": int, "padding": bool, "dac_version": "1.0.0"}}

numpy's names (`ndarray`, `dtype`, `_reconstruct`, `scalar`) stand for `Array` and `DType` here.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dac_fast.storage.pickled import Machine, Name, dimensions

MAGIC = b"\x93NUMPY"
DAC_VERSION = "1.0.0"
NPY_HEADER = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
METADATA = {"input_db", "original_length", "sample_rate", "chunk_length", "channels", "padding"}

# By their full names, of numpy 1 and 2.
NAMES = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    **{
        f"numpy.{core}.multiarray {name}": name
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
}


def dumps(codes: np.ndarray, **metadata: object) -> bytes:
    """The file, byte for byte as `np.save` in the published package writes it.

    Args:
        codes: integers [C, N, F], 0 to 65535.
        metadata: see the module; all but "dac_version".
    """
    artifacts = np.empty((), object)
    artifacts[()] = {
        "codes": codes.astype(np.uint16),
        "metadata": {**metadata, "dac_version": DAC_VERSION},
    }
    file = io.BytesIO()
    np.save(file, artifacts, allow_pickle=True)
    return file.getvalue()


def loads(data: bytes) -> dict[str, Any]:
    """The arguments of the `DACFile` in a file's bytes, which checks their ranges.

    Raises:
        ValueError: damaged, of another version, or holding anything but arrays and plain values.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    if data[6:8] != b"\x01\x00" or data[10:start].rstrip() != NPY_HEADER:
        raise ValueError("a .npy file, but not a .dac file")
    match _Machine(NAMES).run(data[start:]):
        case _Array(data=[{"codes": codes, "metadata": dict(metadata)}, *_]):
            pass
        case _:
            raise ValueError(
                "a pickled .npy file, but not a .dac file: no dict of codes and metadata"
            )
    version = metadata.pop("dac_version", None)
    if version != DAC_VERSION:
        shown = repr(version[:20]) if isinstance(version, str) else "missing"
        raise ValueError(f"dac_version is {shown}; accepted: {DAC_VERSION!r}")
    if set(metadata) != METADATA:
        raise ValueError(
            f"its metadata are not those of a .dac file: {', '.join(sorted(METADATA))}"
        )
    if not isinstance(codes, _Array):
        raise ValueError(f"codes are {type(codes).__name__}; accepted: an array")
    numbers = {name: _plain(name, value) for name, value in metadata.items()}
    return {"codes": codes.to_numpy(), **numbers}


def _plain(name: str, value: object) -> int | float | bool:
    """A metadata value as a Python number; numpy's arrays and scalars have to hold a single one."""
    if isinstance(value, _Array):
        array = value.to_numpy()
        value = array.item() if array.size == 1 else None
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name} is no single number")
    return value


@dataclass
class _DType:
    """What numpy pickles of a dtype: "u2" and the byte order "<"."""

    code: str
    order: str = "<"


@dataclass
class _Array:
    """What numpy pickles of an array or scalar: `data` is bytes, or a list where objects are."""

    shape: Sequence[int] = ()
    dtype: _DType | None = None
    fortran: bool = False
    data: bytes | list[object] = b""

    def to_numpy(self) -> np.ndarray:
        """The array, of integers or floats."""
        numeric = self.dtype is not None and re.fullmatch("[iu][1248]|f[248]", self.dtype.code)
        if self.dtype is None or not numeric:
            raise ValueError("an array's dtype is not one of integers or floats")
        dtype = np.dtype((">" if self.dtype.order == ">" else "<") + self.dtype.code)
        size = math.prod(self.shape) * dtype.itemsize
        if not isinstance(self.data, bytes) or len(self.data) != size:
            raise ValueError("an array has another number of bytes than its shape says")
        flat = np.frombuffer(self.data, dtype).astype(dtype.newbyteorder("="))
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


class _Machine(Machine):
    """The stack machine, with numpy's names."""

    def made(self, name: object, arguments: object) -> object:
        match name, arguments:
            case Name("dtype"), (str(code), *_):
                return _DType(code)
            case Name("_reconstruct"), tuple():
                return _Array()
            case Name("scalar"), (_DType() as dtype, bytes(data)):
                return _Array(dtype=dtype, data=data)
        return super().made(name, arguments)

    def filled(self, target: object, state: object) -> None:
        match target, state:
            case _DType(), (_, "<" | ">" | "|" | "=" as order, *_):
                target.order = order
            case (
                _Array(),
                (_, shape, _DType() as dtype, bool(fortran), bytes() | list() as data),
            ):
                target.shape, target.dtype = dimensions(shape), dtype
                target.fortran, target.data = fortran, data
            case _:
                super().filled(target, state)

"""The published package's `.dac` files (descript-audio-codec, dac_version 1.0.0): a pickled dict inside a .npy file.

    {"codes": uint16 [C, N, F],
     "metadata": {"input_db": float32 [1], "original_length": int, "sample_rate": int, "chunk_length": int,
                  "channels": int, "padding": bool, "dac_version": "1.0.0"}}

A pickle is a program for a stack machine, and Python's `pickle` would run whatever it says. Here that machine is
written out with the few operations that arrays and plain values need. It calls nothing: the names that numpy writes
(`ndarray`, `dtype`, `_reconstruct`, `scalar`) stand for data, every other name is refused.
"""

import io
import math
import pickletools
import re
from dataclasses import dataclass

import numpy as np

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
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}


def dumps(codes: np.ndarray, **metadata) -> bytes:
    """The file, byte for byte as `np.save` in the published package writes it.

    Args:
        codes: integers [C, N, F], 0 to 65535.
        metadata: see the module; all but "dac_version".
    """
    artifacts = {
        "codes": codes.astype(np.uint16),
        "metadata": {**metadata, "dac_version": DAC_VERSION},
    }
    file = io.BytesIO()
    np.save(file, artifacts, allow_pickle=True)
    return file.getvalue()


def loads(data: bytes) -> dict:
    """The codes and the metadata, "dac_version" apart, in one dict.

    Raises:
        ValueError: damaged, of another version, or holding anything but arrays and plain values.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    if data[6:8] != b"\x01\x00" or data[10:start].rstrip() != NPY_HEADER:
        raise ValueError("a .npy file, but not a .dac file")
    outer = unpickled(data[start:])
    artifacts = (
        outer.data[0]
        if isinstance(outer, _Array) and isinstance(outer.data, list) and outer.data
        else None
    )
    if not isinstance(artifacts, dict) or not isinstance(artifacts.get("metadata"), dict):
        raise ValueError("a pickled .npy file, but not a .dac file: no dict of codes and metadata")
    codes, metadata = artifacts.get("codes"), artifacts["metadata"]
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
    return {
        "codes": codes.to_numpy(),
        **{name: _plain(name, value) for name, value in metadata.items()},
    }


def _plain(name: str, value) -> int | float | bool:
    """A metadata value as Python's own number; numpy's arrays and scalars have to hold a single one."""
    if isinstance(value, _Array):
        array = value.to_numpy()
        if array.size == 1:
            return array.item()
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name} is no single number")
    return value


@dataclass
class _Name:
    """A name that the pickle mentions, not what it stands for in Python."""

    name: str


@dataclass
class _DType:
    """What numpy pickles of a dtype: "u2" and the byte order "<"."""

    code: str
    order: str = "<"


@dataclass
class _Array:
    """What numpy pickles of an array or scalar: `data` is bytes, or a list where the dtype is object."""

    shape: tuple[int, ...] = ()
    dtype: _DType | None = None
    fortran: bool = False
    data: bytes | list = b""

    def to_numpy(self) -> np.ndarray:
        """The array, of integers or floats."""
        if (
            self.dtype is None
            or not re.fullmatch("[iuf][1248]", self.dtype.code)
            or self.dtype.code == "f1"
        ):
            raise ValueError("an array's dtype is not one of integers or floats")
        dtype = np.dtype((">" if self.dtype.order == ">" else "<") + self.dtype.code)
        if (
            not isinstance(self.data, bytes)
            or len(self.data) != math.prod(self.shape) * dtype.itemsize
        ):
            raise ValueError("an array has another number of bytes than its shape says")
        array = np.frombuffer(self.data, dtype).reshape(
            self.shape, order="F" if self.fortran else "C"
        )
        return array.astype(dtype.newbyteorder("="))


def unpickled(data: bytes):
    """What the pickle `data` builds, of dicts, lists, tuples, plain values and `_Array`s.

    Raises:
        ValueError: it is damaged, or uses anything else.
    """
    machine = _Machine()
    try:
        for operation, argument, position in pickletools.genops(data):
            end = position + 1
            if operation.name != "STOP":
                machine.step(operation.name, argument)
        _require(end == len(data) and len(machine.stack) == 1, "more than one value")
        return machine.stack[0]
    except _RefusedError:
        raise
    # What a program that ends early, or takes what it has not put there, comes to in these few operations.
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise ValueError("damaged or cut short: its pickle cannot be read") from error


class _RefusedError(ValueError):
    """The pickle holds what no `.dac` file does."""


def _require(holds: bool, what: str):
    if not holds:
        raise _RefusedError(f"its pickle holds {what}; accepted: arrays and plain values")


class _Machine:
    """The stack machine that pickles are programs for, as far as arrays and plain values need it."""

    def __init__(self):
        self.stack, self.marks, self.memo = [], [], {}

    def step(self, operation: str, argument):
        """Carries out one operation, under its name in `pickletools`."""
        stack = self.stack
        match operation:
            case "PROTO" | "FRAME":
                pass
            case _ if operation in LITERALS:
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append(
                    {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[operation]()
                )
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop(int(operation[-1]))))
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS":
                self.extend(self.since_mark())
            case "SETITEM":
                self.update(self.pop(2))
            case "SETITEMS":
                self.update(self.since_mark())
            case "GLOBAL":
                stack.append(self.named(argument))
            case "STACK_GLOBAL":
                stack.append(self.named(" ".join(self.pop(2))))
            case "REDUCE":
                stack.append(self.made(*self.pop(2)))
            case "BUILD":
                self.fill(*self.pop(1))
            case _:
                _require(False, f"the operation {operation}")

    def pop(self, count: int) -> list:
        """The last `count` values, taken off the stack."""
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def since_mark(self) -> list:
        """The values since the last mark, taken off the stack."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def extend(self, values: list):
        """Appends to the list on the stack."""
        _require(type(self.stack[-1]) is list, "something appended to no list")
        self.stack[-1].extend(values)

    def update(self, values: list):
        """Enters keys and values, in turns, into the dict on the stack."""
        keys = values[::2]
        # Text only: the hash of a tuple within tuples can take forever.
        _require(
            type(self.stack[-1]) is dict and all(type(key) is str for key in keys),
            "a key that is no text",
        )
        self.stack[-1].update(zip(keys, values[1::2], strict=True))

    def named(self, name: str) -> _Name:
        """A module's name and a name in it, if it is one of `NAMES`."""
        _require(name in NAMES, f"the name {name[:80]!r}")
        return _Name(NAMES[name])

    def made(self, name, arguments: tuple):
        """Stands for a call; but nothing is called."""
        match name, arguments:
            case _Name("dtype"), (str(code), *_):
                return _DType(code)
            case _Name("_reconstruct"), _:
                return _Array()
            case _Name("scalar"), (_DType() as dtype, bytes(data)):
                return _Array(dtype=dtype, data=data)
        _require(False, "a call")

    def fill(self, state):
        """Gives the array or dtype on the stack what numpy's pickles say of it."""
        match self.stack[-1], state:
            case _DType() as dtype, (_, str(order), *_):
                dtype.order = order
            case _Array() as array, (
                _,
                tuple(shape),
                _DType() as dtype,
                bool(fortran),
                bytes() | list() as data,
            ):
                _require(all(type(n) is int and n >= 0 for n in shape), "an array of no shape")
                array.shape, array.dtype, array.fortran, array.data = shape, dtype, fortran, data
            case _:
                _require(False, "an object with a state")

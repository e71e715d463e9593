"""Pickles with operations changed, and a reader of them that is not ours."""

import io
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from faults.trials import NUMBERS

# What a mutation puts between the operations of a good pickle.
OPERATIONS = (
    *(b"(", b")", b"]", b"}", b"t", b"a", b"e", b"s", b"u", b"R", b"b", b"N", b"\x88", b"\x89"),
    *(b"\x85", b"\x86", b"\x87", b"\x94", b"0", b"1", b"2", b"Q", b".", b"\x93", b"\x81", b"\x8f"),
    *(
        b"h\x00",
        b"h\x01",
        b"q\x00",
        b"K\x07",
        b"X\x01\x00\x00\x00a",
        b"C\x02ab",
        b"I7\n",
        b"S'a'\n",
    ),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"\x8e" + b"\xff" * 8, b"\x8a\xff" + b"\x7f" * 255),
)


def operations(pickled: bytes) -> list[bytes]:
    """A pickle's operations, each with its argument."""
    starts = [position or 0 for _, _, position in pickletools.genops(pickled)]
    return [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]


def reprogrammed(random: Random, pickled: bytes) -> bytes:
    """A pickle with a few of its operations dropped, doubled, exchanged, or with other numbers."""
    parts = operations(pickled)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(parts))
        match random.randrange(6):
            case 0:
                del parts[at]
            case 1:
                parts.insert(at, random.choice(OPERATIONS))
            case 2:
                parts.insert(at, random.choice(parts))
            case 3:
                parts[at] = random.choice(parts)
            case 4:
                parts[at] = random.choice(OPERATIONS)
            case 5:
                parts[at] = pickle.dumps(random.choice(NUMBERS), 2)[2:-1]
        if not parts:
            return b""
    return b"".join(parts)


@dataclass
class Array:
    """What a pickled array or scalar says, read by the standard library's machine."""

    state: tuple = ()

    def __setstate__(self, state):
        self.state = state

    def value(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        order = "F" if fortran else "C"
        return np.frombuffer(data, dtype.value()).reshape(shape, order=order)


@dataclass
class DType:
    """What a pickled dtype says."""

    code: str
    order: str = "|"

    def __setstate__(self, state):
        self.order = state[1]

    def value(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


class Reference(pickle._Unpickler):
    """Python's unpickler with numpy's names for the two classes above, and no other name.

    The one written in Python: that in C makes room for every memo entry up to the highest.
    """

    def find_class(self, module, name):
        if re.fullmatch(r"numpy(\._?core\.multiarray)?", module):
            return {
                "ndarray": Array,
                "dtype": lambda code, *_: DType(code),
                "_reconstruct": lambda *_: Array(),
                "scalar": lambda dtype, data: Array((1, (), dtype, False, data)),
            }[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    @classmethod
    def read(cls, data: bytes) -> object:
        """What the pickle holds, arrays as `Array`s; without frames, which are for buffering."""
        frameless = b"".join(part for part in operations(data) if part[:1] != pickle.FRAME)
        return cls(io.BytesIO(frameless)).load()


class TorchReference(pickle._Unpickler):
    """Python's unpickler with the names of `torch.save`, and no other; storages from records."""

    def __init__(self, archive: zipfile.ZipFile, program: str) -> None:
        super().__init__(io.BytesIO(archive.read(program)))
        self.archive, self.folder = archive, program.removesuffix("data.pkl")

    def find_class(self, module, name):
        names = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
            ("torch", "FloatStorage"): torch.float32,
            ("torch", "DoubleStorage"): torch.float64,
            ("torch", "HalfStorage"): torch.float16,
            ("torch", "BFloat16Storage"): torch.bfloat16,
        }
        return names[module, name]

    def persistent_load(self, identifier):
        _, dtype, key, *_ = identifier
        data = self.archive.read(f"{self.folder}data/{key}")
        storage = torch.frombuffer(bytearray(data), dtype=dtype).untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

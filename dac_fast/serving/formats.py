"""Bodies of requests and answers: audio files and codes, as bytes.

Nothing here opens a path or runs what a body says: `.dac` files are read by `dac_fast.storage`,
which calls nothing, and `.npy` arrays by their header and the numbers after it.
"""

import io
import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dac_fast.codec import DAC
from dac_fast.storage.dac2 import DACFile, DACFileError

# Of codes; the names that `POST /v1/encode` takes, and what its answers are.
CODE_TYPES = {
    "dac2": "application/octet-stream",
    "dac1": "application/octet-stream",
    "npy": "application/x-npy",
    "json": "application/json",
}
# Of audio, likewise for `POST /v1/decode`.
AUDIO_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg"}

_NPY_MAGIC = b"\x93NUMPY"
_OBJECTS = b"'descr': '|O'"
_NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[<>|][iu][1248])', 'fortran_order': (?P<columns>True|False), "
    rb"'shape': \((?P<shape>\d{1,18}, \d{1,18}, \d{1,18})\), \} *\n"
)


def codes_to_bytes(file: DACFile, format: str) -> bytes:
    """Codes as a body: a `.dac` file, the bare codes uint16 [C, N, F] as `.npy`, or JSON.

    JSON is an object with the attributes of `DACFile`, which `codes_from_bytes` reads back.
    """
    if format == "npy":
        body = io.BytesIO()
        np.save(body, file.codes.numpy().astype(np.uint16), allow_pickle=False)
        return body.getvalue()
    if format == "json":
        values = {entry.name: getattr(file, entry.name) for entry in fields(file)}
        values["codes"] = file.codes.tolist()
        values["gains"] = None if file.gains is None else file.gains.tolist()
        return json.dumps(values).encode()
    return file.to_bytes(format)


def codes_from_bytes(body: bytes, codec: DAC) -> DACFile:
    """A body with codes: a `.dac` file of either format, `.npy` or JSON, told by its content.

    Bare codes [C, N, F] are taken as the codec's own, at its rate and level.

    Raises:
        DACFileError: the body is none of these, or damaged.
    """
    if body.lstrip()[:1] in (b"{", b"["):
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise DACFileError(f"not JSON: {error}") from error
        if isinstance(values, dict) and set(values) != {"codes"}:
            return _described(values)
        return _bare(_integers(values["codes"] if isinstance(values, dict) else values), codec)
    if body.startswith(_NPY_MAGIC) and _OBJECTS not in body[:128]:
        return _bare(_integers(_array(body)), codec)
    return DACFile.from_bytes(body)


def _described(values: dict[str, Any]) -> DACFile:
    """The file whose attributes these are."""
    known = {entry.name for entry in fields(DACFile)}
    if unknown := sorted(values.keys() - known):
        raise DACFileError(f"unknown key {unknown[0]!r:.80}; accepted: {', '.join(sorted(known))}")
    codes = _integers(values.get("codes"))
    try:
        return DACFile(**(values | {"codes": codes}))
    except DACFileError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise DACFileError(f"not the attributes of a .dac file: {error}") from error


def _bare(codes: NDArray[np.int64], codec: DAC) -> DACFile:
    items, _, frames = codes.shape
    channels = items * codec.config.channels
    return DACFile(
        codes=torch.from_numpy(codes),
        chunk_length=frames,
        original_length=frames * codec.hop_length,
        input_db=0.0,
        channels=channels,
        sample_rate=codec.sample_rate,
        gains=np.ones(channels, np.float32),
        codebook_size=codec.config.codebook_size,
        model_sample_rate=codec.sample_rate,
        hop_length=codec.hop_length,
        model=codec.name,
        stereo=codec.config.channels > 1,
    )


def _integers(codes: Any) -> NDArray[np.int64]:
    """Codes [C, N, F] that are whole numbers.

    Raises:
        DACFileError: they are not.
    """
    try:
        array = np.asarray(codes)
    except (ValueError, OverflowError) as error:
        raise DACFileError("codes are no array; accepted: integers [C, N, F]") from error
    if array.dtype.kind not in "iu" or array.ndim != 3 or array.size == 0:
        found = f"{array.dtype} {list(array.shape)}"
        raise DACFileError(f"codes are {found}; accepted: integers [C, N, F], none of them 0")
    return array.astype(np.int64)


def _array(body: bytes) -> NDArray[Any]:
    """The array of a `.npy` file as `np.save` writes it; nothing is allocated for its header.

    Raises:
        DACFileError: the file is another, or damaged.
    """
    start = 10 + int.from_bytes(body[8:10], "little")
    header = _NPY_HEADER.fullmatch(body[10:start])
    if body[6:8] != b"\x01\x00" or not header:
        raise DACFileError("damaged .npy file, or none of integers [C, N, F]")
    dtype = np.dtype(header["dtype"].decode())
    shape = tuple(int(size) for size in header["shape"].split(b", "))
    if math.prod(shape) * dtype.itemsize != len(body) - start:
        raise DACFileError(f".npy file of {len(body)} bytes; its header says {list(shape)}")
    flat: NDArray[Any] = np.frombuffer(body, dtype, offset=start)
    return flat.reshape(shape, order="F") if header["columns"] == b"True" else flat.reshape(shape)


def audio_to_bytes(
    blocks: Iterator[NDArray[np.float32]], format: str, rate: int, channels: int, frames: int
) -> Iterator[bytes]:
    """An audio file, piece by piece as its audio is made: one piece a block, and what is left over.

    Args:
        blocks: float32 [C, n], `frames` samples in all; clipped to [-1, 1].
        format: one of `AUDIO_TYPES`; 16 bit where it is a matter of bits.
        rate: in Hz.
    """
    if format != "wav":
        yield from _by_libsndfile(blocks, format, rate, channels, frames)
        return
    header = _wav_header(rate, channels, frames)
    for block in blocks:
        yield header + np.ascontiguousarray(to_int16(block).T).tobytes()
        header = b""


def wav_size(channels: int, frames: int) -> int:
    """Bytes of a wav file of `audio_to_bytes`."""
    return 44 + 2 * channels * frames


def _wav_header(rate: int, channels: int, frames: int) -> bytes:
    data, frame = 2 * channels * frames, 2 * channels
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + data, b"WAVE", b"fmt ", 16, 1, channels, rate, rate * frame, frame, 16),
        *(b"data", data),
    )


def to_int16(block: NDArray[np.float32]) -> NDArray[np.int16]:
    """Samples as libsndfile makes them 16 bit, clipped."""
    samples: NDArray[np.int16] = np.clip((block * 32768).round(), -32768, 32767).astype("<i2")
    return samples


class _Pipe:
    """A file that libsndfile writes to and that is taken away while it does."""

    def __init__(self) -> None:
        self._position = self._end = 0
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        # At the end the header is written again, with the length and a checksum: it has left.
        if self._position == self._end:
            self._parts.append(bytes(data))
            self._end += len(data)
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._end}
        self._position = bases[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def take(self) -> bytes:
        """What was written since the last time."""
        taken, self._parts = b"".join(self._parts), []
        return taken


def _by_libsndfile(
    blocks: Iterator[NDArray[np.float32]], format: str, rate: int, channels: int, frames: int
) -> Iterator[bytes]:
    import soundfile

    pipe, begun = _Pipe(), False
    subtype = {"flac": "PCM_16", "ogg": "VORBIS"}[format]
    try:
        file = soundfile.SoundFile(pipe, "w", rate, channels, subtype, format=format.upper())
    except soundfile.SoundFileError as error:
        what = f"{channels} channels at {rate} Hz"
        raise ValueError(f"{what} cannot be written as {format}; accepted: wav") from error
    with file:
        for block in blocks:
            # Pieces: libsndfile's Vorbis encoder keeps a whole write on the stack.
            for start in range(0, block.shape[1], 65536):
                part = np.clip(block[:, start : start + 65536], -1, 1)
                file.write(np.ascontiguousarray(part.T, np.float32))
            data = pipe.take()
            if data and format == "flac" and not begun:
                data = _with_length(data, frames)
            begun = begun or bool(data)
            yield data
    yield pipe.take()


def _with_length(flac: bytes, frames: int) -> bytes:
    """The beginning of a FLAC stream, its STREAMINFO block saying how many samples there will be.

    The count is the low 36 bits of the 8 bytes at 18 (RFC 9639, section 8.2).
    """
    (packed,) = struct.unpack_from(">Q", flac, 18)
    packed = packed >> 36 << 36 | frames & (1 << 36) - 1
    return flac[:18] + struct.pack(">Q", packed) + flac[26:]

"""`.dac` files: the codes of a recording, and what it takes to turn them back into audio.

Two formats are read and written. "dac1" is the published package's: a pickled dict inside a .npy file; `dac_fast.dac1`
reads it without unpickling. "dac2" is ours, little-endian throughout, with C channels, N codebooks and F frames:

    offset  size  type    content
    0       8     bytes   magic: 89 44 41 43 0D 0A 1A 0A ("\\x89DAC\\r\\n\\x1a\\n")
    8       2     uint16  version: 2
    10      2     uint16  flags: bit 0, padding (see `DACFile`); bit 1, gains follow; the others 0
    12      4     uint32  S, the codebook size, 1 to 65536
    16      4     uint32  the model's sample rate, Hz
    20      4     uint32  the model's hop length, samples per frame
    24      4     uint32  the recording's sample rate, Hz
    28      2     uint16  C
    30      2     uint16  N
    32      8     uint64  F
    40      8     uint64  chunk length, frames
    48      8     uint64  original length, samples per channel at the recording's sample rate
    56      4     float32 input loudness, LUFS
    60      1     uint8   L, the length of the model's name
    61      L     UTF-8   the model's name
            4*C   float32 gains, one per channel, where flag bit 1 is set
            P     bits    codes, in the order [channel][codebook][frame] (frames vary fastest), each of
                          b = max(1, ceil(log2 S)) bits, most significant first, without gaps; the last byte is
                          filled with zeros: P = ceil(C * N * F * b / 8)
            4     uint32  CRC-32 (that of zlib and PNG) of all bytes before it
"""

import os
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from dac_fast.files import write_bytes
from dac_fast.storage import dac1

MAGIC = b"\x89DAC\r\n\x1a\n"
VERSION = 2
HEADER = struct.Struct("<8sHHIIIIHHQQQfB")
FORMATS = ("dac2", "dac1")


class DACFileError(ValueError):
    """A `.dac` file that cannot be read or written; one line that says what is wrong with it."""


@dataclass(frozen=True, eq=False)
class DACFile:
    """The codes of a recording and what belongs to them; checked when it is made.

    Attributes:
        codes: int64 [C, N, F], channels, codebooks, frames; any integer tensor or array is taken.
        chunk_length: frames that were encoded at once; F for a whole recording.
        original_length: samples per channel of the recording, at `sample_rate`.
        input_db: its loudness before encoding, LUFS.
        channels: C.
        sample_rate: of the recording, Hz.
        padding: False: encoded in the published package's chunk mode, without the padding of the convolutions.
        gains: float32 [C], what each channel was multiplied by before encoding; None in dac1 files.
        codebook_size, model_sample_rate (Hz), hop_length (samples per frame): of the model; None in dac1 files.
        model: the model's name, "" where it has none.

    Raises:
        DACFileError: a value of another type, shape or range.
    """

    codes: torch.Tensor
    chunk_length: int
    original_length: int
    input_db: float
    channels: int
    sample_rate: int
    padding: bool = True
    gains: np.ndarray | None = None
    codebook_size: int | None = None
    model_sample_rate: int | None = None
    hop_length: int | None = None
    model: str = ""

    def __post_init__(self):
        try:
            codes = torch.as_tensor(self.codes)
        except (TypeError, ValueError) as error:
            raise DACFileError(
                f"codes are {type(self.codes).__name__}; accepted: a tensor or array"
            ) from error
        _require(
            codes.ndim == 3 and codes.numel() > 0,
            "the shape of codes",
            list(codes.shape),
            "[C, N, F], none of 0",
        )
        integer = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
        _require(integer, "the dtype of codes", codes.dtype, "integers")
        codes = codes.detach().to("cpu", torch.int64)
        n_channels, n_codebooks, n_frames = codes.shape
        _require(n_codebooks < 2**16, "the number of codebooks", n_codebooks, "up to 65535")
        object.__setattr__(self, "codes", codes)

        self._number("channels", n_channels, n_channels)
        _require(n_channels <= 1024, "channels", n_channels, "up to 1024")
        self._number("chunk_length", 1, n_frames)
        self._number("original_length", 1, 2**48)
        self._number("sample_rate", 1, 1_000_000)
        _require(isinstance(self.padding, bool), "padding", self.padding, "True or False")
        try:
            object.__setattr__(self, "input_db", float(self.input_db))
        except (TypeError, ValueError) as error:
            raise DACFileError(f"input_db is {self.input_db!r}; accepted: a number") from error
        _require(abs(self.input_db) <= 200, "input_db", self.input_db, "a loudness in LUFS")
        if self.gains is not None:
            gains = np.asarray(self.gains, np.float32)
            positive = (
                gains.shape == (n_channels,) and np.isfinite(gains).all() and (gains > 0).all()
            )
            _require(
                positive, "gains", gains.tolist(), f"{n_channels} positive numbers, one per channel"
            )
            object.__setattr__(self, "gains", gains)

        for name, highest in (
            ("codebook_size", 65536),
            ("model_sample_rate", 1_000_000),
            ("hop_length", 2**31),
        ):
            if getattr(self, name) is not None:
                self._number(name, 1, highest)
        size = self.codebook_size or 65536
        low, high = int(codes.min()), int(codes.max())
        _require(low >= 0 and high < size, "a code", low if low < 0 else high, f"0 to {size - 1}")
        if self.model_sample_rate and self.hop_length:
            # One frame more than needed: encoders differ in how they round.
            longest = (
                n_frames + 1
            ) * self.hop_length * self.sample_rate // self.model_sample_rate + 1
            self._number("original_length", 1, longest)
        valid = isinstance(self.model, str) and len(self.model.encode("utf-8", "replace")) <= 255
        _require(valid, "model", self.model, "a name of up to 255 bytes")

    def _number(self, name: str, low: int, high: int):
        value = getattr(self, name)
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        accepted = f"{low}" if low == high else f"a whole number from {low} to {high}"
        _require(whole and low <= value <= high, name, value, accepted)
        object.__setattr__(self, name, int(value))

    @property
    def n_codebooks(self) -> int:
        """Codebooks in use, N."""
        return self.codes.shape[1]

    @property
    def n_frames(self) -> int:
        """Latent frames, F."""
        return self.codes.shape[2]

    @property
    def duration(self) -> float:
        """Of the recording, in seconds."""
        return self.original_length / self.sample_rate

    @property
    def bits_per_code(self) -> int | None:
        """Bits of a code in a dac2 file; None where the codebook size is unknown (dac1 files)."""
        return None if self.codebook_size is None else _bits(self.codebook_size)

    @property
    def bitrate(self) -> float | None:
        """Bits of all codes per second of the recording, all channels together; None as for `bits_per_code`."""
        return (
            None
            if self.codebook_size is None
            else self.codes.numel() * self.bits_per_code / self.duration
        )

    def save(self, path: str | os.PathLike, format: str = "dac2"):
        """Writes the file; complete or not at all.

        Args:
            path: written as it is; the published package expects the suffix .dac.
            format: "dac2" (ours) or "dac1" (the published package's, which has no room for the gains, the codebook
                size and the model's name and rates).
        Raises:
            DACFileError: the format lacks what this file has, or needs what it lacks.
            OutputError: the file cannot be written there.
        """
        write_bytes(path, self.to_bytes(format))

    def to_bytes(self, format: str = "dac2") -> bytes:
        """What `save` writes; raises DACFileError as it does."""
        if format not in FORMATS:
            raise DACFileError(f"format is {format!r}; accepted: {', '.join(FORMATS)}")
        return self._to_dac1() if format == "dac1" else self._to_dac2()

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DACFile":
        """Reads a file of either format; nothing in it is ever executed.

        Raises:
            DACFileError: no such file, not a .dac file, damaged, or of a version that is not known here.
        """
        if not os.path.isfile(path):
            raise DACFileError(
                f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}"
            )
        with open(path, "rb") as file:
            data = file.read()
        try:
            return cls.from_bytes(data)
        except ValueError as error:
            raise DACFileError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> "DACFile":
        """Reads what `to_bytes` gives, of either format; nothing in it is ever executed.

        Raises:
            DACFileError: not a .dac file, damaged, or of a version that is not known here.
        """
        if data.startswith(MAGIC):
            return cls(**_from_dac2(data))
        if not data.startswith(dac1.MAGIC):
            raise DACFileError("not a .dac file: it starts with neither format's magic bytes")
        try:
            values = dac1.loads(data)
        except ValueError as error:
            raise DACFileError(str(error)) from error
        return cls(**values)

    def _to_dac1(self) -> bytes:
        return dac1.dumps(
            self.codes.numpy(),
            input_db=np.array([self.input_db], np.float32),
            original_length=self.original_length,
            sample_rate=self.sample_rate,
            chunk_length=self.chunk_length,
            channels=self.channels,
            padding=self.padding,
        )

    def _to_dac2(self) -> bytes:
        for name in ("codebook_size", "model_sample_rate", "hop_length"):
            if getattr(self, name) is None:
                raise DACFileError(
                    f"{name} is None; format 'dac2' needs it (dac1 files do not say it)"
                )
        name = self.model.encode("utf-8", "replace")
        head = HEADER.pack(
            MAGIC,
            VERSION,
            self.padding | (self.gains is not None) << 1,
            self.codebook_size,
            self.model_sample_rate,
            self.hop_length,
            self.sample_rate,
            *self.codes.shape,
            self.chunk_length,
            self.original_length,
            self.input_db,
            len(name),
        )
        gains = b"" if self.gains is None else self.gains.astype("<f4").tobytes()
        body = head + name + gains + pack(self.codes.numpy(), _bits(self.codebook_size))
        return body + struct.pack("<I", zlib.crc32(body))


def _from_dac2(data: bytes) -> dict:
    """The arguments of the `DACFile` in a dac2 file's bytes."""
    if len(data) < HEADER.size:
        raise DACFileError(f"cut short: {len(data)} bytes, less than a header")
    _, version, flags, size, model_rate, hop, rate, c, n, f, chunk, length, db, name_length = (
        HEADER.unpack_from(data)
    )
    if version > VERSION:
        raise DACFileError(
            f"written by a newer dac_fast: version is {version}; accepted: {VERSION}"
        )
    if version != VERSION:
        raise DACFileError(f"version is {version}; accepted: {VERSION}")
    if not 1 <= size <= 65536:
        raise DACFileError(f"codebook_size is {size}; accepted: 1 to 65536")
    # Before anything is allocated: what the header promises is what is there. Python's integers do not overflow.
    gains_start = HEADER.size + name_length
    codes_start = gains_start + (4 * c if flags & 2 else 0)
    end = codes_start + (c * n * f * _bits(size) + 7) // 8
    if len(data) != end + 4:
        raise DACFileError(
            f"{'cut short' if len(data) < end + 4 else 'too long'}: {len(data)} bytes, not {end + 4}"
        )
    if zlib.crc32(memoryview(data)[:end]) != struct.unpack_from("<I", data, end)[0]:
        raise DACFileError("damaged: the checksum does not match")
    if flags & ~3:
        raise DACFileError(f"flags are {flags:#x}; accepted: bits 0 and 1")
    return {
        "codes": unpack(data[codes_start:end], _bits(size), (c, n, f)),
        "chunk_length": chunk,
        "original_length": length,
        "input_db": db,
        "channels": c,
        "sample_rate": rate,
        "padding": bool(flags & 1),
        "gains": np.frombuffer(data, "<f4", c, gains_start).copy() if flags & 2 else None,
        "codebook_size": size,
        "model_sample_rate": model_rate,
        "hop_length": hop,
        "model": data[HEADER.size : gains_start].decode("utf-8", "replace"),
    }


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Integers of `bits` bits (up to 16) each, most significant bit first; the last byte filled with zeros."""
    parts = []
    flat = codes.reshape(-1)
    # In pieces, as a bit takes a byte on the way; each but the last is a whole number of bytes.
    for start in range(0, flat.size, 1 << 16):
        wide = flat[start : start + (1 << 16)].astype(">u2").view(np.uint8).reshape(-1, 2)
        parts.append(np.packbits(np.unpackbits(wide, axis=1)[:, 16 - bits :]).tobytes())
    return b"".join(parts)


def unpack(data: bytes, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack`: int64 of that shape."""
    flat = np.empty(shape, np.int64).reshape(-1)
    packed = np.frombuffer(data, np.uint8)
    for start in range(0, flat.size, 1 << 16):
        n = min(1 << 16, flat.size - start)
        first = start * bits // 8
        narrow = np.unpackbits(packed[first : first + (n * bits + 7) // 8], count=n * bits).reshape(
            n, bits
        )
        wide = np.pad(narrow, ((0, 0), (16 - bits, 0)))
        flat[start : start + n] = np.packbits(wide, axis=1).view(">u2").reshape(-1)
    return flat.reshape(shape)


def _bits(codebook_size: int) -> int:
    return max(1, (codebook_size - 1).bit_length())


def _require(holds: bool, name: str, value, accepted: str):
    if not holds:
        raise DACFileError(f"{name} is {value!r:.80}; accepted: {accepted}")

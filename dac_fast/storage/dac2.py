"""`.dac` files: the codes of a recording, and what it takes to turn them back into audio.

Two formats are read and written. "dac1" is the published package's, see `dac_fast.storage.dac1`.
"dac2" is ours, little-endian throughout, with C channels, N codebooks and F frames:

    offset  size  type    content
    0       8     bytes   magic: 89 44 41 43 0D 0A 1A 0A ("\\x89DAC\\r\\n\\x1a\\n")
    8       2     uint16  version: 2
    10      2     uint16  flags: bit 0, padding; bit 1, gains follow; bit 2, stereo; the others 0
                          (see `DACFile`)
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
            P     bits    codes, in the order [item][codebook][frame] (frames vary fastest), each of
                          b = max(1, ceil(log2 S)) bits, most significant first, without gaps; the
                          last byte is filled with zeros: P = ceil(I * N * F * b / 8). There are
                          I = C items or, where flag bit 2 is set, I = ceil(C / 2)
            4     uint32  CRC-32 (that of zlib and PNG) of all bytes before it

A dac2 file has one form: a name that is not UTF-8, or a last byte that is filled with anything but
zeros, is refused, so that files of equal content are equal. (A dac1 file has many: its pickle
depends on the versions of numpy and Python, and each of them is read.)
"""

import io
import math
import os
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from dac_fast.files import write_bytes
from dac_fast.storage import dac1

MAGIC = b"\x89DAC\r\n\x1a\n"
VERSION = 2
PADDING = 1 << 0  # flags
GAINS = 1 << 1
STEREO = 1 << 2
HEADER = struct.Struct("<8sHHIIIIHHQQQfB")
FORMATS = ("dac2", "dac1")
MOST_CODES = 2**30  # five days of audio at 24 kHz and 32 codebooks; 8 GB in memory
# What a dac2 file says of its model, and the highest values.
MODEL_NUMBERS = {"codebook_size": 65536, "model_sample_rate": 1_000_000, "hop_length": 2**31}


class DACFileError(ValueError):
    """A `.dac` file that cannot be read or written; one line that says what is wrong with it."""


@dataclass(frozen=True, eq=False)
class DACFile:
    """The codes of a recording and what belongs to them; checked when it is made.

    Attributes:
        codes: int64 [I, N, F], items, codebooks, frames; any integer tensor or array is taken. An
            item is a channel, or two of a stereo model's.
        chunk_length: frames that were encoded at once; F for a whole recording.
        original_length: samples per channel of the recording, at `sample_rate`.
        input_db: its loudness before encoding, LUFS.
        channels: C of the recording.
        sample_rate: of the recording, Hz.
        padding: False: encoded in the published package's chunk mode, by unpadded convolutions.
        gains: float32 [C], what each channel was multiplied by before encoding; None in dac1 files.
        codebook_size: of the model; None in dac1 files.
        model_sample_rate: of the model, Hz; None in dac1 files.
        hop_length: of the model, samples per frame; None in dac1 files.
        model: the model's name, "" where it has none.
        stereo: whether an item is two channels; the last of an odd number is then there twice.

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
    stereo: bool = False

    def __post_init__(self) -> None:
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
        _require_few(codes.numel())
        integer = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
        _require(integer, "the dtype of codes", codes.dtype, "integers")
        codes = codes.detach().to("cpu", torch.int64)
        n_items, n_codebooks, n_frames = codes.shape
        _require(n_codebooks < 2**16, "the number of codebooks", n_codebooks, "up to 65535")
        object.__setattr__(self, "codes", codes)

        _require(isinstance(self.stereo, bool), "stereo", self.stereo, "True or False")
        most = 2 * n_items if self.stereo else n_items
        self._number("channels", most - self.stereo, most)
        _require(self.channels <= 1024, "channels", self.channels, "up to 1024")
        self._number("chunk_length", 1, n_frames)
        self._number("original_length", 1, 2**48)
        self._number("sample_rate", 1, 1_000_000)
        _require(isinstance(self.padding, bool), "padding", self.padding, "True or False")
        try:
            object.__setattr__(self, "input_db", float(self.input_db))
        except (TypeError, ValueError, OverflowError) as error:
            raise DACFileError(f"input_db is {self.input_db!r:.80}; accepted: a number") from error
        _require(abs(self.input_db) <= 200, "input_db", self.input_db, "a loudness in LUFS")
        if self.gains is not None:
            gains = np.array(self.gains, np.float32)
            # Audio is divided by them: infinite samples would come of those beyond.
            fits = gains.shape == (self.channels,) and ((gains >= 1e-20) & (gains <= 1e20)).all()
            accepted = f"{self.channels} positive numbers, one per channel, from 1e-20 to 1e20"
            _require(bool(fits), "gains", gains.tolist(), accepted)
            object.__setattr__(self, "gains", gains)

        for name, highest in MODEL_NUMBERS.items():
            if getattr(self, name) is not None:
                self._number(name, 1, highest)
        size = self.codebook_size or 65536
        low, high = int(codes.min()), int(codes.max())
        _require(low >= 0 and high < size, "a code", low if low < 0 else high, f"0 to {size - 1}")
        if self.model_sample_rate and self.hop_length:
            # One frame more than needed: encoders differ in how they round.
            samples = (n_frames + 1) * self.hop_length
            longest = samples * self.sample_rate // self.model_sample_rate + 1
            self._number("original_length", 1, longest)
        valid = isinstance(self.model, str) and len(self.model.encode("utf-8", "replace")) <= 255
        _require(valid, "model", self.model, "a name of up to 255 bytes")

    def _number(self, name: str, low: int, high: int) -> None:
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
        """Bits of all channels' codes per second of the recording; None as for `bits_per_code`."""
        bits = self.bits_per_code
        return None if bits is None else self.codes.numel() * bits / self.duration

    def save(
        self, path: str | os.PathLike[str], format: str = "dac2", replace: bool = True
    ) -> None:
        """Writes the file, complete or not at all.

        Args:
            path: written as it is; the published package expects the suffix .dac.
            format: "dac2" (ours) or "dac1" (the published package's, which has no room for the
                gains, the codebook size and the model's name and rates).
            replace: as of `dac_fast.files.atomic_path`.
        Raises:
            DACFileError: the format lacks what this file has, or needs what it lacks.
            OutputError: the file cannot be written there.
        """
        write_bytes(path, self.to_bytes(format), replace)

    def to_bytes(self, format: str = "dac2") -> bytes:
        """What `save` writes; raises DACFileError as it does."""
        if format not in FORMATS:
            raise DACFileError(f"format is {format!r}; accepted: {', '.join(FORMATS)}")
        return self._to_dac1() if format == "dac1" else self._to_dac2()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DACFile":
        """Reads a file of either format; nothing in it is ever executed.

        Raises:
            DACFileError: no such file, not a .dac file, damaged, or of an unknown version.
        """
        if not os.path.isfile(path):
            raise DACFileError(
                f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}"
            )
        try:
            with open(path, "rb") as file:
                return cls._read(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise DACFileError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> "DACFile":
        """Reads what `to_bytes` gives, of either format; nothing in it is ever executed.

        Raises:
            DACFileError: not a .dac file, damaged, or of a version that is not known here.
        """
        try:
            return cls._read(io.BytesIO(data), len(data))
        except ValueError as error:
            raise DACFileError(str(error)) from error

    @classmethod
    def _read(cls, file: BinaryIO, size: int) -> "DACFile":
        """Reads a file of that many bytes; its content only if a file of that size can be one."""
        head = file.read(HEADER.size)
        if head.startswith(MAGIC):
            header = _Header.of(head, size)
            return _from_dac2(header, head + file.read())
        if not head.startswith(dac1.MAGIC):
            raise DACFileError("not a .dac file: it starts with neither format's magic bytes")
        if size > 2 * MOST_CODES:
            raise DACFileError(f"{size} bytes; accepted: up to {2 * MOST_CODES}")
        return cls(**dac1.loads(head + file.read()))

    def _to_dac1(self) -> bytes:
        if self.stereo:
            raise DACFileError("format 'dac1' has no stereo models; accepted: 'dac2'")
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
        size = self.codebook_size
        model_rate = self.model_sample_rate
        hop = self.hop_length
        if size is None or model_rate is None or hop is None:
            missing = next(name for name in MODEL_NUMBERS if getattr(self, name) is None)
            raise DACFileError(
                f"{missing} is None; format 'dac2' needs it (dac1 files do not say it)"
            )
        name = self.model.encode("utf-8", "replace")
        head = HEADER.pack(
            MAGIC,
            VERSION,
            PADDING * self.padding | GAINS * (self.gains is not None) | STEREO * self.stereo,
            size,
            model_rate,
            hop,
            self.sample_rate,
            self.channels,
            self.n_codebooks,
            self.n_frames,
            self.chunk_length,
            self.original_length,
            self.input_db,
            len(name),
        )
        gains = b"" if self.gains is None else self.gains.astype("<f4").tobytes()
        body = head + name + gains + pack(self.codes.numpy(), _bits(size))
        return body + struct.pack("<I", zlib.crc32(body))


class _Header(NamedTuple):
    """The numbers at the head of a dac2 file, in the order of `HEADER`."""

    magic: bytes
    version: int
    flags: int
    codebook_size: int
    model_sample_rate: int
    hop_length: int
    sample_rate: int
    channels: int
    n_codebooks: int
    n_frames: int
    chunk_length: int
    original_length: int
    input_db: float
    name_length: int

    @classmethod
    def of(cls, data: bytes, size: int) -> "_Header":
        """The header that the first bytes are of a file of that size.

        Raises:
            DACFileError: cut short, too long, or of another version.
        """
        if len(data) < HEADER.size:
            raise DACFileError(f"cut short: {len(data)} bytes, less than a header")
        head = cls(*HEADER.unpack_from(data))
        if head.version != VERSION:
            newer = "written by a newer dac_fast: " if head.version > VERSION else ""
            raise DACFileError(f"{newer}version is {head.version}; accepted: {VERSION}")
        if not 1 <= head.codebook_size <= 65536:
            raise DACFileError(f"codebook_size is {head.codebook_size}; accepted: 1 to 65536")
        if size != head.size:
            wrong = "cut short" if size < head.size else "too long"
            raise DACFileError(f"{wrong}: {size} bytes, not {head.size}")
        _require_few(math.prod(head.shape))
        return head

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return _bits(self.codebook_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the codes, [I, N, F]."""
        items = -(-self.channels // 2) if self.flags & STEREO else self.channels
        return items, self.n_codebooks, self.n_frames

    @property
    def codes_start(self) -> int:
        """Where the codes begin in the file, in bytes."""
        gains = 4 * self.channels if self.flags & GAINS else 0
        return HEADER.size + self.name_length + gains

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return self.codes_start + -(-math.prod(self.shape) * self.bits // 8) + 4


def _from_dac2(head: _Header, data: bytes) -> DACFile:
    """The file in a dac2 file's bytes, which begin with that header."""
    end = head.size - 4
    if zlib.crc32(memoryview(data)[:end]) != int.from_bytes(data[end:], "little"):
        raise DACFileError("damaged: the checksum does not match")
    if head.flags & ~(PADDING | GAINS | STEREO):
        raise DACFileError(f"flags are {head.flags:#x}; accepted: bits 0, 1 and 2")
    filler = -math.prod(head.shape) * head.bits % 8
    if data[end - 1] & (1 << filler) - 1:
        raise DACFileError("the bits after the last code are not zeros")
    name = data[HEADER.size : HEADER.size + head.name_length]
    gains = np.frombuffer(data[HEADER.size + head.name_length : head.codes_start], "<f4")
    try:
        model = name.decode()
    except UnicodeDecodeError as error:
        raise DACFileError(f"model is {name!r:.80}; accepted: UTF-8") from error
    codes = unpack(data[head.codes_start : end], head.bits, head.shape)
    return DACFile(
        codes=torch.from_numpy(codes),
        chunk_length=head.chunk_length,
        original_length=head.original_length,
        input_db=head.input_db,
        channels=head.channels,
        sample_rate=head.sample_rate,
        padding=bool(head.flags & PADDING),
        gains=gains if head.flags & GAINS else None,
        codebook_size=head.codebook_size,
        model_sample_rate=head.model_sample_rate,
        hop_length=head.hop_length,
        model=model,
        stereo=bool(head.flags & STEREO),
    )


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Integers of `bits` bits (up to 16), most significant first; zeros fill the last byte."""
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
        piece = packed[first : first + (n * bits + 7) // 8]
        narrow = np.unpackbits(piece, count=n * bits).reshape(n, bits)
        wide = np.pad(narrow, ((0, 0), (16 - bits, 0)))
        flat[start : start + n] = np.packbits(wide, axis=1).view(">u2").reshape(-1)
    return flat.reshape(shape)


def _bits(codebook_size: int) -> int:
    return max(1, (codebook_size - 1).bit_length())


def _require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise DACFileError(f"{name} is {value!r:.80}; accepted: {accepted}")


def _require_few(codes: int) -> None:
    _require(codes <= MOST_CODES, "the number of codes", codes, f"up to {MOST_CODES}")

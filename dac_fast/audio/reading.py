"""Audio files and arrays, read block by block: memory does not grow with the recording.

soundfile, which reads most files, is imported where it is used; `ffmpeg` reads the others.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dac_fast.audio import ffmpeg
from dac_fast.audio.resample import Samples, resampled

if TYPE_CHECKING:
    import soundfile

# In Hz. Below, the high-pass of loudness measurement at 38 Hz has no room.
SAMPLE_RATES = range(100, 1_000_001)
# As many as libsndfile reads.
MAX_CHANNELS = 1024
# What libsndfile counts where a file does not say, as FLAC that was written into a pipe.
UNKNOWN_FRAMES = 2**63 - 1
# Samples of a block, of all channels.
BLOCK_SAMPLES = 1 << 20

# Of what libsndfile reads. A file that is named itself may have any suffix.
AUDIO_SUFFIXES = (
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".opus",
    ".mp3",
    ".aif",
    ".aiff",
    ".au",
    ".caf",
    ".w64",
)
KNOWN_SUFFIXES = (*AUDIO_SUFFIXES, *ffmpeg.SUFFIXES)

# A file's path, or an array [C, T] or [T] of floats and its sample rate in Hz.
Source: TypeAlias = str | os.PathLike[str] | tuple[NDArray[np.floating[Any]], int]


class AudioError(ValueError):
    """Audio that cannot be read or written; one line that names it and says why."""


def readable_suffixes() -> tuple[str, ...]:
    """The suffixes that a folder is searched for: ffmpeg's too, where it is installed."""
    return KNOWN_SUFFIXES if ffmpeg.installed() else AUDIO_SUFFIXES


class Recording:
    """Audio from a file (of any format that libsndfile or ffmpeg reads) or from memory.

    Args:
        source: a path, or (array [C, T] or [T] of floats, sample rate).

    Attributes:
        name: the path as given, or "array".
        channels, sample_rate: as the source has them.
        frames: samples per channel, as the file declares them; an estimate for some MP3 files and
            for those that ffmpeg reads; 0 where a FLAC file does not say.

    Raises:
        AudioError: no such file, not audio, cut short, no samples, or a rate or shape out of range.
    """

    channels: int
    sample_rate: int
    frames: int

    def __init__(self, source: Source):
        self._array: NDArray[np.floating[Any]] | None = None
        if isinstance(source, (str, os.PathLike)):
            self.name = os.fspath(source)
            _require_file(self.name)
            self._identity = _identity(self.name)
            self.channels, self.sample_rate, self.frames = _header(self.name)
        else:
            self.name = "array"
            self._array, self.sample_rate = _checked_array(source)
            self.channels, self.frames = self._array.shape
        if self.sample_rate not in SAMPLE_RATES:
            accepted = f"{SAMPLE_RATES.start} to {SAMPLE_RATES.stop - 1} Hz"
            raise AudioError(
                f"{self.name}: sample rate is {self.sample_rate}; accepted: {accepted}"
            )
        if self.frames == 0:
            raise AudioError(f"{self.name}: holds no samples")
        if self.frames == UNKNOWN_FRAMES:
            self.frames = 0

    def blocks(self, sample_rate: int | None = None, seconds: float = 5.0) -> Iterator[Samples]:
        """The audio from its beginning, in blocks [C, n] of at most `seconds`, n at least 1.

        At another `sample_rate` the blocks are cut from one resampled stream of
        max(1, floor(T * sample_rate / self.sample_rate)) samples, whose values do not depend on
        where blocks end. Once the stream has been read to its end, `frames` is exact.

        Raises:
            AudioError: the file is damaged or cut short, it has changed, or a sample is not finite.
            ValueError: the rates are too far apart, see `resampled`.
        """
        size = min(int(seconds * self.sample_rate), BLOCK_SAMPLES // self.channels)
        pieces = self._pieces(max(1, size))
        return resampled(pieces, self.sample_rate, sample_rate or self.sample_rate)

    def _pieces(self, size: int) -> Iterator[Samples]:
        """Blocks of `size` samples at the source's own rate, checked."""
        start = 0
        for piece in self._pieces_unchecked(size):
            finite = np.isfinite(piece).all(axis=0)
            if not finite.all():
                second = (start + int(finite.argmin())) / self.sample_rate
                raise AudioError(f"{self.name}: a sample is not finite, at {second:.3f} s")
            start += piece.shape[1]
            yield piece

    def _pieces_unchecked(self, size: int) -> Iterator[Samples]:
        if self._array is not None:
            return _cut(self._array, size)
        return self._by_ffmpeg(size) if ffmpeg.reads(self.name) else self._by_libsndfile(size)

    def _by_ffmpeg(self, size: int) -> Iterator[Samples]:
        read = 0
        try:
            for piece in ffmpeg.blocks(self.name, size, self.channels, self.sample_rate):
                read += len(piece)
                self._require_unchanged()
                yield np.ascontiguousarray(piece.T)
        except ffmpeg.FfmpegError as error:
            raise self._damaged(read, error) from error
        if read == 0:
            raise AudioError(f"{self.name}: holds no samples")
        self.frames = read

    def _by_libsndfile(self, size: int) -> Iterator[Samples]:
        import soundfile

        with _open(self.name) as file:
            if file.frames == UNKNOWN_FRAMES:
                # soundfile seeks after each read of a seekable file, and libsndfile cannot here.
                file.seekable = lambda: False
            read = 0
            while True:
                try:
                    piece = file.read(size, dtype="float32", always_2d=True)
                except soundfile.SoundFileError as error:
                    raise self._damaged(read, error) from error
                if not len(piece):
                    break
                read += len(piece)
                self._require_unchanged()
                yield np.ascontiguousarray(piece.T)
            if read == 0 or (read < self.frames and file.format != "MP3"):
                raise AudioError(
                    f"{self.name}: cut short: {read} of {self.frames} samples are there"
                )
            self.frames = read

    def _damaged(self, read: int, error: Exception) -> AudioError:
        second = read / self.sample_rate
        return AudioError(f"{self.name}: damaged or cut short beyond {second:.3f} s ({error})")

    def _require_unchanged(self) -> None:
        """Raises where the file is no longer the one that was opened first."""
        if _identity(self.name) != self._identity:
            raise AudioError(f"{self.name}: it was changed while it was read")


def _identity(path: str) -> tuple[int, int, int, int]:
    """Changes when the file's content does."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _cut(array: NDArray[np.floating[Any]], size: int) -> Iterator[Samples]:
    for start in range(0, array.shape[1], size):
        # Where float32 has no room for a value, the infinity that comes of it is reported.
        with np.errstate(over="ignore"):
            block = array[:, start : start + size].astype(np.float32)
        yield block


def _require_file(path: str) -> None:
    if not os.path.exists(path):
        raise AudioError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise AudioError(f"{path}: not a file")
    if os.path.getsize(path) == 0:
        raise AudioError(f"{path}: the file is empty")


def _header(path: str) -> tuple[int, int, int]:
    """Channels, sample rate and samples per channel, as the file declares them."""
    if ffmpeg.reads(path):
        try:
            return ffmpeg.probe(path)
        except ffmpeg.FfmpegError as error:
            raise AudioError(f"{path}: not an audio file that can be read ({error})") from error
    with _open(path) as file:
        header = file.channels, file.samplerate, file.frames
    _require_whole_wav(path)
    return header


def _open(path: str) -> "soundfile.SoundFile":
    import soundfile

    # Of a name that is not UTF-8, soundfile takes the bytes alone.
    name = os.fsencode(path)
    try:
        file = soundfile.SoundFile(name)
    # TypeError: soundfile takes a ".raw" suffix for headerless samples, whatever the file holds.
    except (soundfile.SoundFileError, TypeError) as error:
        reason = str(error).removeprefix(f"Error opening {name!r}: ").rstrip(".")
        raise AudioError(f"{path}: not an audio file that can be read ({reason})") from error
    # By some suffixes (.au, .vox) libsndfile takes any bytes for samples without a header.
    if file.format == "RAW":
        file.close()
        raise AudioError(f"{path}: not an audio file that can be read (no known header)")
    return file


def _require_whole_wav(path: str) -> None:
    """Raises where a WAV file ends before its samples do: libsndfile would read a shorter one."""
    with open(path, "rb") as file:
        riff = file.read(4)
        file.read(4)
        wave = file.read(4)
        if (riff, wave) != (b"RIFF", b"WAVE"):
            return
        size = os.path.getsize(path)
        while len(header := file.read(8)) == 8:
            length = int.from_bytes(header[4:], "little")
            if header[:4] == b"data":
                there = size - file.tell()
                # Writers into a pipe cannot know the length: they leave about the largest signed
                # or unsigned number there.
                unknown = 0x7FFF0000 <= length <= 0x80000000 or length >= 0xFFFF0000
                if there < length and not unknown:
                    raise AudioError(
                        f"{path}: cut short: {there} of {length} bytes of audio are there"
                    )
                return
            file.seek(length + length % 2, os.SEEK_CUR)


def _checked_array(
    source: tuple[NDArray[np.floating[Any]], int],
) -> tuple[NDArray[np.floating[Any]], int]:
    try:
        array, rate = source
        array = np.asarray(array)
    except (TypeError, ValueError) as error:
        raise AudioError(
            f"audio is {type(source).__name__}; accepted: a path, or (array, sample rate)"
        ) from error
    if not np.issubdtype(array.dtype, np.floating):
        raise AudioError(
            f"array: dtype is {array.dtype}; accepted: floating point, full scale at 1"
        )
    if array.ndim not in (1, 2) or not 1 <= np.atleast_2d(array).shape[0] <= MAX_CHANNELS:
        accepted = f"[T], or [C, T] with C up to {MAX_CHANNELS}"
        raise AudioError(f"array: shape is {list(array.shape)}; accepted: {accepted}")
    if isinstance(rate, bool) or rate != int(rate):
        raise AudioError(f"array: sample rate is {rate!r}; accepted: a whole number of Hz")
    return np.atleast_2d(array), int(rate)


def read(path: str | os.PathLike[str]) -> tuple[Samples, int]:
    """The audio of a file, float32 [C, T], and its sample rate. Raises as `Recording` does."""
    recording = Recording(path)
    return np.concatenate(list(recording.blocks()), axis=1), recording.sample_rate


def resample(array: NDArray[np.floating[Any]], from_rate: int, to_rate: int) -> Samples:
    """`array`, [C, T] or [T], at another rate.

    Returns:
        float32 [C, max(1, floor(T * to_rate / from_rate))].
    """
    return np.concatenate(list(Recording((array, from_rate)).blocks(to_rate)), axis=1)

"""Audio files written block by block; a file appears whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dac_fast.audio.reading import AudioError
from dac_fast.files import OutputError, atomic_path

if TYPE_CHECKING:
    import soundfile

# By suffix: libsndfile's format, and the sample types it can hold, the default first.
WRITABLE = {
    ".wav": ("WAV", ("PCM_16", "PCM_24", "FLOAT")),
    ".flac": ("FLAC", ("PCM_16", "PCM_24")),
    ".ogg": ("OGG", ("VORBIS",)),
    ".mp3": ("MP3", ("MPEG_LAYER_III",)),
}

SAMPLE_BYTES = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}


class AudioWriter:
    """Writes a wav, flac, ogg or mp3 file; it appears, complete, when the `with` block ends well.

    Args:
        path: its suffix says the format.
        sample_rate: in Hz.
        channels: number of channels.
        subtype: the sample type: PCM_16 (default), PCM_24 or FLOAT for wav, the first two for flac;
            None: the default.
        replace: as of `atomic_path`.

    Raises:
        AudioError: a format, rate or number of channels that cannot be written.
        OutputError: the file cannot be written there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sample_rate: int,
        channels: int,
        subtype: str | None = None,
        replace: bool = True,
    ):
        self.path = os.fspath(path)
        self.sample_rate = sample_rate
        self.channels = channels
        suffix = Path(path).suffix.lower()
        if suffix not in WRITABLE:
            raise AudioError(f"{self.path}: suffix is {suffix!r}; accepted: {', '.join(WRITABLE)}")
        self._format, subtypes = WRITABLE[suffix]
        self._subtype = subtype or subtypes[0]
        if self._subtype not in subtypes:
            raise AudioError(
                f"{self.path}: subtype is {subtype!r}; accepted for {suffix}: {', '.join(subtypes)}"
            )
        self._replace = replace
        self._bytes = 0

    def __enter__(self) -> "AudioWriter":
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path, self._replace))
            self._disk = _Disk(stack.enter_context(open(temporary, "wb", buffering=0)))
            self._file = self._open()
            stack.callback(self._close)
            self._stack = stack.pop_all()
        return self

    def _open(self) -> "soundfile.SoundFile":
        import soundfile

        try:
            return soundfile.SoundFile(
                self._disk,
                "w",
                self.sample_rate,
                self.channels,
                self._subtype,
                format=self._format,
            )
        except (soundfile.SoundFileError, ValueError, TypeError) as error:
            self._disk.check()
            what = f"{self.channels} channels at {self.sample_rate} Hz"
            raise AudioError(
                f"{self.path}: cannot write {what} as {self._format} {self._subtype}: "
                "the format does not take them"
            ) from error

    def write(self, block: NDArray[np.floating]) -> None:
        """Appends samples, [C, n]; all but FLOAT files clip them to [-1, 1].

        Raises:
            AudioError: another number of channels, samples that are not finite, or more than the
                4 GiB that a wav file holds.
            OSError: the disk does not take them; an OutputError where the `with` block ends.
        """
        if block.ndim != 2 or block.shape[0] != self.channels:
            raise AudioError(
                f"{self.path}: block is {list(block.shape)}; accepted: [{self.channels}, n]"
            )
        if not np.isfinite(block).all():
            raise AudioError(f"{self.path}: the audio to write has samples that are not finite")
        self._bytes += block.size * SAMPLE_BYTES.get(self._subtype, 0)
        if self._format == "WAV" and self._bytes > 0xFFFF0000:
            raise AudioError(
                f"{self.path}: more than 4 GiB of audio, the most a wav file holds; accepted: .flac"
            )
        if self._subtype != "FLOAT":
            block = np.clip(block, -1, 1)
        with self._faults_of_disk():
            # libsndfile's Vorbis encoder keeps a whole write on the stack, and crashes on minutes
            # of audio.
            for start in range(0, block.shape[1], 65536):
                piece = block[:, start : start + 65536].T
                self._file.write(np.ascontiguousarray(piece, np.float32))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file and puts it in its place; removes it where the block raised."""
        self._stack.__exit__(kind, error, traceback)

    def _close(self) -> None:
        with self._faults_of_disk():
            self._file.close()

    @contextmanager
    def _faults_of_disk(self) -> Iterator[None]:
        """Raises what went wrong on the disk, of which libsndfile says little or nothing."""
        import soundfile

        try:
            yield
        except (soundfile.SoundFileError, AssertionError) as error:
            self._disk.check()
            raise OutputError(f"{self.path}: cannot write ({error})") from error
        self._disk.check()


class _Disk:
    """The file that libsndfile writes to.

    An exception cannot pass through libsndfile, which says nothing of what fails while it closes a
    file. The exception is kept, and raised by `check`.
    """

    def __init__(self, file: FileIO):
        self._file = file
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raises the first exception of writing."""
        if self._error is not None:
            raise self._error

    def write(self, data: bytes) -> int:
        """Writes all of it; 0 where that fails."""
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            return len(data)
        # An interrupt too would be lost in libsndfile.
        except BaseException as error:
            self._error = self._error or error
            return 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def write(
    path: str | os.PathLike[str],
    array: NDArray[np.floating],
    sample_rate: int,
    subtype: str | None = None,
    replace: bool = True,
) -> None:
    """Writes `array`, [C, T] or [T], as `AudioWriter` does."""
    array = np.atleast_2d(np.asarray(array))
    with AudioWriter(path, sample_rate, array.shape[0], subtype, replace) as writer:
        writer.write(array)

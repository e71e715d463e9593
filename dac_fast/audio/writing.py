"""Audio files written block by block; a file appears whole or not at all."""

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dac_fast.audio.reading import AudioError
from dac_fast.files import OutputError, atomic_path

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
    ):
        self.path, self.sample_rate, self.channels = os.fspath(path), sample_rate, channels
        suffix = Path(path).suffix.lower()
        if suffix not in WRITABLE:
            raise AudioError(f"{self.path}: suffix is {suffix!r}; accepted: {', '.join(WRITABLE)}")
        self._format, subtypes = WRITABLE[suffix]
        self._subtype = subtype or subtypes[0]
        if self._subtype not in subtypes:
            raise AudioError(
                f"{self.path}: subtype is {subtype!r}; accepted for {suffix}: {', '.join(subtypes)}"
            )
        self._bytes = 0

    def __enter__(self) -> "AudioWriter":
        import soundfile

        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            try:
                self._file = soundfile.SoundFile(
                    temporary,
                    "w",
                    self.sample_rate,
                    self.channels,
                    self._subtype,
                    format=self._format,
                )
            except (soundfile.SoundFileError, ValueError, TypeError) as error:
                what = f"{self.channels} channels at {self.sample_rate} Hz"
                raise AudioError(
                    f"{self.path}: cannot write {what} as {self._format} {self._subtype}: "
                    "the format does not take them"
                ) from error
            stack.enter_context(self._file)
            self._stack = stack.pop_all()
        return self

    def write(self, block: NDArray[np.floating]) -> None:
        """Appends samples, [C, n]; all but FLOAT files clip them to [-1, 1].

        Raises:
            AudioError: another number of channels, samples that are not finite, or more than the
                4 GiB that a wav file holds.
            OutputError: the disk does not take them.
        """
        import soundfile

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
        try:
            # libsndfile's Vorbis encoder keeps a whole write on the stack, and crashes on minutes
            # of audio.
            for start in range(0, block.shape[1], 65536):
                piece = block[:, start : start + 65536].T
                self._file.write(np.ascontiguousarray(piece, np.float32))
        except (soundfile.SoundFileError, AssertionError) as error:
            raise OutputError(f"{self.path}: cannot write ({error})") from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file, then puts it in its place; removes it where the block raised."""
        self._stack.__exit__(kind, error, traceback)


def write(
    path: str | os.PathLike[str],
    array: NDArray[np.floating],
    sample_rate: int,
    subtype: str | None = None,
) -> None:
    """Writes `array`, [C, T] or [T], to a file of the suffix's format.

    Raises as `AudioWriter` does.
    """
    array = np.atleast_2d(np.asarray(array))
    with AudioWriter(path, sample_rate, array.shape[0], subtype) as writer:
        writer.write(array)

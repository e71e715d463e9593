"""Audio in and out: reading and resampling as a stream, loudness (ITU-R BS.1770-4), writing.

Everything works block by block, so memory does not grow with the recording. Arrays are float32, [C, T], with full
scale at 1. The libraries behind it (soundfile, pyloudnorm, scipy) are imported where they are used.
"""

import copy
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dac_fast.audio.resample import resampled
from dac_fast.files import OutputError, atomic_path

SAMPLE_RATES = range(100, 1_000_001)  # Hz; below, K-weighting's 38 Hz high-pass has no room
MAX_CHANNELS = 1024  # libsndfile's limit

# What a folder is searched for; single files may have any name.
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")

# By suffix: libsndfile's format, and the sample types it can hold, the default first.
WRITABLE = {
    ".wav": ("WAV", ("PCM_16", "PCM_24", "FLOAT")),
    ".flac": ("FLAC", ("PCM_16", "PCM_24")),
    ".ogg": ("OGG", ("VORBIS",)),
    ".mp3": ("MP3", ("MPEG_LAYER_III",)),
}
SAMPLE_BYTES = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}


class AudioError(ValueError):
    """Audio that cannot be read or written; one line that names it and says why."""


class Recording:
    """Audio from a file (wav, flac, ogg, mp3 and what else libsndfile reads) or from memory.

    Args:
        source: a path, or (array [C, T] or [T] of floats, sample rate).

    Attributes:
        name: the path as given, or "array".
        channels, sample_rate: as the source has them.
        frames: samples per channel, as the file declares them; of an MP3 file that may be an estimate.

    Raises:
        AudioError: no such file, not audio, cut short, no samples, or a rate or shape out of range.
    """

    def __init__(self, source):
        if isinstance(source, (str, os.PathLike)):
            self.name, self._array = os.fspath(source), None
            with _open(self.name) as file:
                self.channels, self.sample_rate, self.frames = file.channels, file.samplerate, file.frames
            _require_whole_wav(self.name)
        else:
            self.name = "array"
            self._array, self.sample_rate = _checked_array(source)
            self.channels, self.frames = self._array.shape
        if self.sample_rate not in SAMPLE_RATES:
            accepted = f"{SAMPLE_RATES.start} to {SAMPLE_RATES.stop - 1} Hz"
            raise AudioError(f"{self.name}: sample rate is {self.sample_rate}; accepted: {accepted}")
        if self.frames == 0:
            raise AudioError(f"{self.name}: holds no samples")

    def blocks(self, sample_rate: int | None = None, seconds: float = 5.0) -> Iterator[np.ndarray]:
        """Yields the audio from its beginning, in blocks of about `seconds`: float32 [C, n], n at least 1.

        At another `sample_rate` the blocks are cut from one resampled stream of max(1, floor(T * sample_rate /
        self.sample_rate)) samples; where a block ends makes no difference to them. Read to the end, `frames` is exact.

        Raises:
            AudioError: the file is damaged or cut short, or a sample is not finite.
        """
        pieces = self._pieces(max(1, int(seconds * self.sample_rate)))
        return resampled(pieces, self.sample_rate, sample_rate or self.sample_rate)

    def _pieces(self, size: int) -> Iterator[np.ndarray]:
        """Blocks of `size` samples at the source's own rate, checked."""
        start = 0
        for piece in self._from_file(size) if self._array is None else self._from_array(size):
            finite = np.isfinite(piece).all(axis=0)
            if not finite.all():
                second = (start + int(finite.argmin())) / self.sample_rate
                raise AudioError(f"{self.name}: a sample is not finite, at {second:.3f} s")
            start += piece.shape[1]
            yield piece

    def _from_array(self, size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.frames, size):
            with np.errstate(over="ignore"):
                piece = self._array[:, start : start + size].astype(np.float32)
            yield piece

    def _from_file(self, size: int) -> Iterator[np.ndarray]:
        import soundfile

        with _open(self.name) as file:
            read = 0
            while True:
                try:
                    piece = file.read(size, dtype="float32", always_2d=True)
                except soundfile.SoundFileError as error:
                    second = read / self.sample_rate
                    raise AudioError(f"{self.name}: damaged or cut short beyond {second:.3f} s ({error})") from error
                if not len(piece):
                    break
                read += len(piece)
                yield np.ascontiguousarray(piece.T)
            if read == 0 or (read < self.frames and file.format != "MP3"):
                raise AudioError(f"{self.name}: cut short: {read} of {self.frames} samples are there")
            self.frames = read


def _open(path: str):
    """The file, opened by soundfile."""
    import soundfile

    if not os.path.exists(path):
        raise AudioError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise AudioError(f"{path}: not a file")
    if os.path.getsize(path) == 0:
        raise AudioError(f"{path}: the file is empty")
    try:
        return soundfile.SoundFile(path)
    # TypeError: soundfile takes a ".raw" suffix for headerless samples, whatever the file holds.
    except (soundfile.SoundFileError, TypeError) as error:
        reason = str(error).removeprefix(f"Error opening {path!r}: ").rstrip(".")
        raise AudioError(f"{path}: not an audio file that can be read ({reason})") from error


def _require_whole_wav(path: str):
    """Raises where a WAV file ends before its samples do: libsndfile reads it as a shorter one."""
    with open(path, "rb") as file:
        riff, _, wave = file.read(4), file.read(4), file.read(4)
        if (riff, wave) != (b"RIFF", b"WAVE"):
            return
        size = os.path.getsize(path)
        while len(header := file.read(8)) == 8:
            length = int.from_bytes(header[4:], "little")
            if header[:4] == b"data":
                # Writers into a pipe cannot know the length and leave all ones there (or nearly).
                if length < 0x7FFF0000 and file.tell() + length > size:
                    raise AudioError(f"{path}: cut short: {size - file.tell()} of {length} bytes of audio are there")
                return
            file.seek(length + length % 2, os.SEEK_CUR)


def _checked_array(source) -> tuple[np.ndarray, int]:
    try:
        array, rate = source
        array = np.asarray(array)
    except (TypeError, ValueError) as error:
        raise AudioError(f"audio is {type(source).__name__}; accepted: a path, or (array, sample rate)") from error
    if not np.issubdtype(array.dtype, np.floating):
        raise AudioError(f"array: dtype is {array.dtype}; accepted: floating point, full scale at 1")
    if array.ndim not in (1, 2) or not 1 <= np.atleast_2d(array).shape[0] <= MAX_CHANNELS:
        raise AudioError(f"array: shape is {list(array.shape)}; accepted: [T], or [C, T] with C up to {MAX_CHANNELS}")
    if isinstance(rate, bool) or rate != int(rate):
        raise AudioError(f"array: sample rate is {rate!r}; accepted: a whole number of Hz")
    return np.atleast_2d(array), int(rate)


class LoudnessMeter:
    """Integrated loudness by ITU-R BS.1770-4 (K-weighting, gates at -70 LUFS and -10 LU), block by block.

    As the published codec measures it, whose gain goes into the codes: less than 0.5 s is padded with zeros to 0.5 s;
    gating blocks of 0.4 s start every 0.1 s, the last one padded with zeros; channels weigh 1, 1, 1, 1.41, 1.41 (any
    further one: 1); the result is at least -70. It keeps one energy per 0.1 s and channel, nothing else.

    Attributes:
        peaks: [C], float32, the largest magnitude in each channel so far.
    """

    def __init__(self, sample_rate: int, channels: int):
        from pyloudnorm import IIRfilter

        if sample_rate not in SAMPLE_RATES:
            raise AudioError(f"sample rate is {sample_rate}; accepted: {SAMPLE_RATES.start} Hz or more")
        self.sample_rate, self.channels = sample_rate, channels
        self.peaks = np.zeros(channels, np.float32)
        filters = [IIRfilter(0.0, 0.5, 38.0, sample_rate, "high_pass")]
        # The shelf is unstable where its 1500 Hz do not lie below half the sample rate; nor is there much to raise.
        if sample_rate > 3000:
            filters.insert(0, IIRfilter(4.0, 1 / math.sqrt(2), 1500.0, sample_rate, "high_shelf"))
        # The published meter holds the coefficients in float32: so rounded, this one is within 2e-5 dB of it on a 30 Hz
        # tone at 24 kHz, else 3e-4 dB off.
        self._sections = np.array([np.concatenate([f.b, f.a]) for f in filters], np.float32).astype(np.float64)
        self._state = np.zeros((len(filters), channels, 2))
        # A gating block is four steps, and where these round down, the first few samples of the next step.
        self._step = int(0.1 * sample_rate)
        self._rest = int(0.4 * sample_rate) - 4 * self._step
        self._samples = 0
        self._pending = np.zeros((channels, 0))  # squares of the step in progress
        self._energies = [np.zeros((2, channels, 0))]  # of whole steps, and of their first `_rest` samples

    def update(self, block: np.ndarray):
        """Takes the next samples, [C, n]."""
        from scipy.signal import sosfilt

        self._samples += block.shape[1]
        self.peaks = np.maximum(self.peaks, np.abs(block).max(axis=1, initial=0)).astype(np.float32)
        weighted, self._state = sosfilt(self._sections, block.astype(np.float64), axis=1, zi=self._state)
        squares = np.concatenate([self._pending, np.square(weighted)], axis=1)
        whole = squares.shape[1] // self._step * self._step
        self._energies.append(self._energies_of(squares[:, :whole]))
        self._pending = squares[:, whole:].copy()

    def _energies_of(self, squares: np.ndarray) -> np.ndarray:
        steps = squares.reshape(self.channels, -1, self._step)
        return np.stack([steps.sum(axis=2), steps[:, :, : self._rest].sum(axis=2)])

    def integrated(self) -> float:
        """The loudness of all samples so far, in LUFS; -70 for silence."""
        shortfall = int(0.5 * self.sample_rate) - self._samples
        if shortfall > 0:
            padded = copy.deepcopy(self)
            padded.update(np.zeros((self.channels, shortfall), np.float32))
            return padded.integrated()
        size = 4 * self._step + self._rest
        n_blocks = max(0, math.ceil((self._samples - size) / self._step)) + 1
        last = np.pad(self._pending, ((0, 0), (0, self._step - self._pending.shape[1])))
        steps, rests = np.concatenate([*self._energies, self._energies_of(last)], axis=2)
        steps, rests = (np.pad(e, ((0, 0), (0, max(0, n_blocks + 4 - e.shape[1])))) for e in (steps, rests))
        blocks = sum(steps[:, i : i + n_blocks] for i in range(4)) + rests[:, 4 : 4 + n_blocks]

        weights = np.array([1.41 if channel in (3, 4) else 1.0 for channel in range(self.channels)])
        powers = weights @ blocks / (0.4 * self.sample_rate)
        loud = powers[_lufs(powers) > -70]
        loud = loud[_lufs(loud) > _lufs(loud.mean()) - 10] if loud.size else loud
        return max(-70.0, float(_lufs(loud.mean()))) if loud.size else -70.0


def _lufs(power):
    with np.errstate(divide="ignore"):
        return -0.691 + 10 * np.log10(power)


def normalization_gains(loudness: float, peaks: np.ndarray, target_db: float | None) -> np.ndarray:
    """The factor for each channel, float32 [C], that brings a recording to a loudness without clipping.

    The published order: all channels to `target_db` (None: as they are), then any channel whose peak comes to lie
    above 1, to 1.

    Args:
        loudness: integrated, in LUFS.
        peaks: [C], the largest magnitude in each channel.
        target_db: in LUFS.
    """
    gain = np.float32(1 if target_db is None else 10 ** ((target_db - loudness) / 20))
    return (gain / np.maximum(1, peaks * gain)).astype(np.float32)


class AudioWriter:
    """Writes a wav, flac, ogg or mp3 file block by block; it appears, complete, when the `with` block ends well.

    Args:
        path: its suffix says the format.
        sample_rate: in Hz.
        channels: number of channels.
        subtype: the sample type: PCM_16 (default), PCM_24 or FLOAT for wav, the first two for flac; None: the default.

    Raises:
        AudioError: a format, rate or number of channels that cannot be written.
        OutputError: the file cannot be written there.
    """

    def __init__(self, path: str | os.PathLike, sample_rate: int, channels: int, subtype: str | None = None):
        self.path, self.sample_rate, self.channels = os.fspath(path), sample_rate, channels
        suffix = Path(path).suffix.lower()
        if suffix not in WRITABLE:
            raise AudioError(f"{self.path}: suffix is {suffix!r}; accepted: {', '.join(WRITABLE)}")
        self._format, subtypes = WRITABLE[suffix]
        self._subtype = subtype or subtypes[0]
        if self._subtype not in subtypes:
            raise AudioError(f"{self.path}: subtype is {subtype!r}; accepted for {suffix}: {', '.join(subtypes)}")
        self._bytes = 0

    def __enter__(self) -> "AudioWriter":
        import soundfile

        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            try:
                self._file = stack.enter_context(
                    soundfile.SoundFile(
                        temporary, "w", self.sample_rate, self.channels, self._subtype, format=self._format
                    )
                )
            except (soundfile.SoundFileError, ValueError, TypeError) as error:
                what = f"{self.channels} channels at {self.sample_rate} Hz as {self._format} {self._subtype}"
                raise AudioError(f"{self.path}: cannot write {what}: the format does not take them") from error
            self._stack = stack.pop_all()
        return self

    def write(self, block: np.ndarray):
        """Appends samples, [C, n]; all but FLOAT files clip them to [-1, 1].

        Raises:
            AudioError: another number of channels, samples that are not finite, or a wav file beyond its 4 GiB.
            OutputError: the disk does not take them.
        """
        import soundfile

        if block.ndim != 2 or block.shape[0] != self.channels:
            raise AudioError(f"{self.path}: block is {list(block.shape)}; accepted: [{self.channels}, n]")
        if not np.isfinite(block).all():
            raise AudioError(f"{self.path}: the audio to write has samples that are not finite")
        self._bytes += block.size * SAMPLE_BYTES.get(self._subtype, 0)
        if self._format == "WAV" and self._bytes > 0xFFFF0000:
            raise AudioError(f"{self.path}: more than 4 GiB of audio, the most a wav file holds; accepted: .flac")
        if self._subtype != "FLOAT":
            block = np.clip(block, -1, 1)
        try:
            # Pieces: libsndfile's Vorbis encoder keeps a whole write on the stack, and crashes on minutes of audio.
            for start in range(0, block.shape[1], 65536):
                self._file.write(np.ascontiguousarray(block[:, start : start + 65536].T, np.float32))
        except (soundfile.SoundFileError, AssertionError) as error:
            raise OutputError(f"{self.path}: cannot write ({error})") from error

    def __exit__(self, *raised):
        # Closes the file, then puts it in its place, or removes it.
        return self._stack.__exit__(*raised)


def read(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """The audio of a file, float32 [C, T], and its sample rate. Raises as `Recording` does."""
    recording = Recording(path)
    return np.concatenate(list(recording.blocks()), axis=1), recording.sample_rate


def write(path: str | os.PathLike, array: np.ndarray, sample_rate: int, subtype: str | None = None):
    """Writes `array`, [C, T] or [T], to a file of the suffix's format. Raises as `AudioWriter` does."""
    array = np.atleast_2d(np.asarray(array))
    with AudioWriter(path, sample_rate, array.shape[0], subtype) as writer:
        writer.write(array)


def resample(array: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """`array`, [C, T] or [T], at another rate: float32 [C, max(1, floor(T * to_rate / from_rate))]."""
    return np.concatenate(list(Recording((array, from_rate)).blocks(to_rate)), axis=1)

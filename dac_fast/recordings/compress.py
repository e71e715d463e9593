"""Recordings to `DACFile`s and back, in constant memory, as `DAC.compress` and `DAC.decompress` do.

A recording is read block by block, twice: once for its loudness, once to be encoded. It is
resampled to the codec's rate and brought to a loudness (channels whose peak would then pass 1 are
scaled down to it), and its channels are encoded each by itself. The gains stand in the file, and
decoding takes them back.

A stereo codec encodes channels in pairs, all at one gain. The last of an odd number, as of a mono
recording, is paired with itself, and decoding gives the mean of what the two have become.

Files of the published package hold the recording's loudness instead of the gains: decoding brings
each channel to that loudness, as the published package does.
"""

import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dac_fast.audio.loudness import LoudnessMeter, normalization_gains
from dac_fast.audio.reading import Recording, Source
from dac_fast.audio.resample import Samples, resampled
from dac_fast.model.halves import Direction
from dac_fast.model.interface import Codec
from dac_fast.processors import processors
from dac_fast.recordings import windows
from dac_fast.recordings.checks import check_fits, check_options
from dac_fast.recordings.pipeline import results
from dac_fast.recordings.windows import Window
from dac_fast.storage.dac2 import DACFile

DEFAULT_CHUNK_SECONDS = 10.0
# Samples of a chunk, of all channels: from 38 channels on, chunks of 44.1 kHz get shorter.
CHUNK_SAMPLES = 1 << 24

# Is called with the seconds of audio done since its last call.
Progress = Callable[[float], None]
Named = TypeVar("Named")


@dataclass(frozen=True)
class Batching:
    """How much audio is computed at once, and how many threads read ahead of it.

    Attributes:
        seconds: audio of a batch, all channels added; 0: each channel of a chunk by itself.
        threads: that read ahead.
    """

    seconds: float
    threads: int

    @classmethod
    def on(cls, device: torch.device, seconds: float | None = None) -> "Batching":
        """What suits a device: by default 60 s on a GPU, and no batches on a CPU, for speed."""
        on_gpu = device.type == "cuda"
        if seconds is None:
            seconds = 60.0 if on_gpu else 0.0
        return cls(seconds, threads=min(4, processors()) if on_gpu else 1)


def _batch_seconds(codec: Codec) -> float:
    return Batching.on(next(codec.parameters()).device).seconds


class Optimizable(Codec, Protocol):
    """A codec that can have an engine."""

    def optimize(
        self,
        precision: Mapping[str, str | None],
        shapes: Mapping[str, Sequence[tuple[int, int]]],
        memory: int,
    ) -> object:
        """See `dac_fast.codec.DAC.optimize`."""


def use_engine(
    codec: Optimizable, direction: Direction, precision: str | None, tuned_seconds: float
) -> None:
    """Has an engine run one direction, if there can be one.

    Where a precision is asked for and there cannot, the error says why.

    Args:
        codec: that is to run.
        direction: the one that the engine is for.
        precision: of `DAC.optimize`; None: its default for the direction.
        tuned_seconds: audio of the batches that the ways to run each layer are timed on first; 0:
            they are not timed.
    """
    if precision is None and codec.config.activation != "snake":
        return
    frame = codec.hop_length / codec.sample_rate
    frames = round(DEFAULT_CHUNK_SECONDS / frame) + 2 * windows.reach(codec.decoder)
    shapes = [(max(int(tuned_seconds / frame / frames), 1), frames)] if tuned_seconds else []
    # Batches are too long for graphs to be of use.
    codec.optimize({direction: precision}, {direction: shapes}, memory=0)


def compress(
    codec: Codec,
    source: Source,
    chunk_seconds: float | None = None,
    n_quantizers: int | None = None,
    normalize_db: float | None = -16.0,
    padding: bool = True,
    progress: Progress = lambda seconds: None,
) -> DACFile:
    """A recording to codes.

    Args:
        codec: that encodes.
        source: path of an audio file of any rate and channel count, or (array [C, T] or [T], rate
            in Hz).
        chunk_seconds: what is encoded at once; None: 10 s. The codes do not depend on it (float
            rounding aside).
        n_quantizers: use the first that many codebooks; None: all.
        normalize_db: loudness to bring the recording to, in LUFS (the published models' training
            data: -16); None: as it is.
        padding: False encodes as the published package's chunk mode does, chunk by chunk without
            padding, and then chunk_seconds matters: for its files (format "dac1"), when they are to
            be equal to its own.
        progress: called with the seconds that were just encoded.
    Raises:
        AudioError: the recording cannot be read, is empty, or holds NaN or infinity.
        ValueError: chunk_seconds or n_quantizers is out of range.
    """
    [(_, result)] = compress_all(
        codec,
        [source],
        chunk_seconds,
        n_quantizers,
        normalize_db,
        padding,
        batch_seconds=_batch_seconds(codec),
        progress=progress,
    )
    if isinstance(result, Exception):
        raise result
    return result


def compress_all(
    codec: Codec,
    sources: Sequence[Source],
    chunk_seconds: float | None = None,
    n_quantizers: int | None = None,
    normalize_db: float | None = -16.0,
    padding: bool = True,
    *,
    batch_seconds: float = 0.0,
    threads: int = 0,
    progress: Progress = lambda seconds: None,
) -> Iterator[tuple[int, DACFile | Exception]]:
    """Recordings to codes: windows of all of them in common batches, while threads read ahead.

    Args:
        sources: see `compress`; fast where neighbours are about as long as each other.
        codec, chunk_seconds, n_quantizers, normalize_db, padding, progress: those of `compress`.
        batch_seconds: audio that is encoded at once, all channels added; 0: each channel of a chunk
            by itself.
        threads: that read and resample ahead of time; 0: none.
    Yields:
        the number of each source, in order, and its file, or the ValueError or OSError that it
        caused.
    Raises:
        ValueError: chunk_seconds, n_quantizers or normalize_db is out of range.
    """
    check_options(codec, chunk_seconds, n_quantizers, normalize_db)
    chunk_seconds = DEFAULT_CHUNK_SECONDS if chunk_seconds is None else chunk_seconds
    n_quantizers = codec.config.n_codebooks if n_quantizers is None else n_quantizers
    jobs = [
        Encoding(codec, source, chunk_seconds, normalize_db, padding, progress)
        for source in sources
    ]
    run = functools.partial(windows.encode_batch, n_quantizers=n_quantizers)
    yield from enumerate(results(jobs, run, batch_seconds, threads))


@dataclass(eq=False)
class Encoding:
    """A recording on its way to codes. Reading it a first time tells what has no default here.

    Attributes:
        samples: per channel, at the codec's rate.
        loudness: in LUFS.
        gains: the factor of each channel, float32 [C].
        padded: whether convolutions are padded.
        chunk_length: frames of each chunk.
        step: samples by which chunks follow each other.
    """

    codec: Codec
    source: Source
    chunk_seconds: float
    normalize_db: float | None
    padding: bool
    progress: Progress
    recording: Recording = field(init=False)
    samples: int = field(init=False)
    loudness: float = field(init=False)
    gains: NDArray[np.float32] = field(init=False)
    padded: bool = field(init=False)
    chunk_length: int = field(init=False)
    step: int = field(init=False)

    def windows(self) -> Iterator[Window]:
        """Reads the recording twice: first measures it, then cuts it."""
        self.recording = Recording(self.source)
        self._measure()
        blocks = (torch.from_numpy(block * self.gains[:, None]) for block in self._blocks())
        codec, hop = self.codec, self.codec.hop_length
        chunk_samples = self.chunk_seconds * codec.sample_rate
        self.padded = self.padding or self.samples <= chunk_samples
        if self.padded:
            frames = chunk_frames(codec, self.chunk_seconds, self.recording.channels)
            self.chunk_length, self.step = -(-max(self.samples, 1) // hop), frames * hop
            yield from windows.sample_windows(codec, blocks, frames)
        else:
            size = -(-int(chunk_samples) // hop) * hop
            self.chunk_length = int(codec.encoder.output_length(size, padded=False))
            # Of a chunk without padding, only the middle is new.
            self.step = windows.output_samples(codec, size)
            yield from windows.unpadded_sample_windows(codec, blocks, size)

    def _blocks(self) -> Iterator[Samples]:
        return self.recording.blocks(self.codec.sample_rate)

    def _measure(self) -> None:
        meter = LoudnessMeter(self.codec.sample_rate, self.recording.channels)
        self.samples = 0
        for block in self._blocks():
            meter.update(block)
            self.samples += block.shape[1]
        self.loudness = meter.integrated()
        stereo = self.codec.config.channels > 1
        self.gains = normalization_gains(self.loudness, meter.peaks, self.normalize_db, stereo)

    def joined(self, outputs: Iterator[Tensor]) -> Tensor:
        """The codes of all windows as those of the recording, [items, N, F]."""
        chunks = []
        left = self.samples
        items = windows.item_count(self.codec, self.recording.channels)
        for chunk in of_all_items(outputs, items):
            chunks.append(chunk)
            done = min(self.step, left)
            left -= done
            self.progress(done / self.codec.sample_rate)
        return torch.cat(chunks, dim=-1)

    def result(self, outputs: Iterator[Tensor]) -> DACFile:
        """The file, of the codes of all windows."""
        return DACFile(
            codes=self.joined(outputs),
            chunk_length=self.chunk_length,
            original_length=self.recording.frames,
            input_db=self.loudness,
            channels=self.recording.channels,
            sample_rate=self.recording.sample_rate,
            padding=self.padded,
            gains=self.gains,
            codebook_size=self.codec.config.codebook_size,
            model_sample_rate=self.codec.sample_rate,
            hop_length=self.codec.hop_length,
            model=self.codec.name,
            stereo=self.codec.config.channels > 1,
        )


def chunk_frames(codec: Codec, seconds: float, channels: int) -> int:
    """Frames of a chunk of so many seconds, fewer where there are many channels."""
    samples = min(seconds * codec.sample_rate, CHUNK_SAMPLES / channels)
    return max(round(samples / codec.hop_length), 1)


def of_all_items(outputs: Iterator[Tensor], items: int) -> Iterator[Tensor]:
    """The outputs of a chunk's items as one tensor [C, …], chunk by chunk."""
    while together := list(islice(outputs, items)):
        yield torch.cat(together)


def decompress(codec: Codec, file: DACFile | str | os.PathLike[str]) -> tuple[Samples, int]:
    """A `DACFile`, or the path of one, to audio of the original length.

    Returns:
        float32 array [C, T], and its rate in Hz.
    Raises:
        DACFileError: the file is damaged.
        ValueError: the file is another codec's.
    """
    file = file if isinstance(file, DACFile) else DACFile.load(file)
    return np.concatenate(list(decompressed_blocks(codec, file)), axis=1), file.sample_rate


def decompressed_blocks(
    codec: Codec, file: DACFile, chunk_seconds: float | None = None
) -> Iterator[Samples]:
    """What `decompress` returns whole, block by block; chunk_seconds as of `decompress_all`."""
    batch_seconds = _batch_seconds(codec)
    for _, result in decompress_all(
        lambda file: (codec, file), [file], chunk_seconds, batch_seconds=batch_seconds
    ):
        if isinstance(result, Exception):
            raise result
        yield from result[1]


def decompress_all(
    load: Callable[[Named], tuple[Codec, DACFile]],
    sources: Sequence[Named],
    chunk_seconds: float | None = None,
    *,
    batch_seconds: float = 0.0,
    threads: int = 0,
) -> Iterator[tuple[int, tuple[DACFile, Iterator[Samples]] | Exception]]:
    """Files to recordings: windows of all of them in common batches, while threads load ahead.

    Args:
        load: gives the codec and the file of a source. Called by the threads.
        sources: anything that `load` knows; fast where neighbours are about as long as each other.
        chunk_seconds: what is decoded at once of a padded file; None: 10 s.
        batch_seconds: audio that is decoded at once, all channels added; 0: each channel of a chunk
            by itself.
        threads: that load ahead of time; 0: none.
    Yields:
        the number of each source, in order, and its file with the blocks of its audio, float32
        [C, n], to be taken before the next source (and raising what went wrong with them); or the
        ValueError or OSError that it caused.
    """
    chunk_seconds = DEFAULT_CHUNK_SECONDS if chunk_seconds is None else chunk_seconds
    jobs = [_Decoding(load, source, chunk_seconds) for source in sources]
    yield from enumerate(results(jobs, windows.decode_batch, batch_seconds, threads))


@dataclass(eq=False)
class _Decoding(Generic[Named]):
    """A file on its way to audio; loading it gives what has no default here."""

    load: Callable[[Named], tuple[Codec, DACFile]]
    source: Named
    chunk_seconds: float
    codec: Codec = field(init=False)
    file: DACFile = field(init=False)

    def windows(self) -> Iterator[Window]:
        """Loads the file and cuts its codes."""
        self.codec, self.file = codec, file = self.load(self.source)
        check_fits(codec, file)
        frames = chunk_frames(codec, self.chunk_seconds, file.channels)
        if file.padding:
            yield from windows.code_windows(codec, file.codes, frames)
        else:
            chunk = file.chunk_length
            yield from windows.unpadded_code_windows(codec, file.codes, chunk, frames)

    def result(self, outputs: Iterator[Tensor]) -> tuple[DACFile, Iterator[Samples]]:
        """The file, and the blocks of its audio."""
        file = self.file
        chunks = of_all_items(outputs, len(file.codes))
        blocks = (windows.channels_of(chunk, file.channels) for chunk in chunks)
        return file, _restored(self.codec, file, (block.float().numpy() for block in blocks))


def _restored(codec: Codec, file: DACFile, blocks: Iterable[Samples]) -> Iterator[Samples]:
    """The blocks that the codec gave, at the recording's level, rate and length."""
    if file.gains is None:
        blocks = _at_loudness(blocks, codec.sample_rate, file.input_db)
    else:
        gains = np.asarray(file.gains, np.float32)[:, None]
        blocks = (block / gains for block in blocks)
    return of_length(resampled(blocks, codec.sample_rate, file.sample_rate), file.original_length)


def _at_loudness(blocks: Iterable[Samples], rate: int, target_db: float) -> Iterator[Samples]:
    """Every channel brought to that loudness by itself.

    A channel's own loudness is known at its end only; until then the audio is kept on disk.
    """
    with tempfile.TemporaryFile() as spool:
        meters: list[LoudnessMeter] = []
        shapes = []
        for block in blocks:
            meters = meters or [LoudnessMeter(rate, 1) for _ in block]
            for meter, channel in zip(meters, block, strict=True):
                meter.update(channel[None])
            spool.write(np.ascontiguousarray(block, np.float32).tobytes())
            shapes.append(block.shape)
        gains = np.array(
            [10 ** ((target_db - meter.integrated()) / 20) for meter in meters], np.float32
        )
        spool.seek(0)
        for shape in shapes:
            block = np.frombuffer(spool.read(4 * math.prod(shape)), np.float32).reshape(shape)
            yield block * gains[:, None]


def of_length(blocks: Iterable[Samples], length: int) -> Iterator[Samples]:
    """Exactly that many samples: cut, or filled up with zeros."""
    left = length
    for block in blocks:
        yield block[:, :left]
        left -= min(left, block.shape[1])
    while left:
        zeros = np.zeros_like(block[:, :left])
        yield zeros
        left -= zeros.shape[1]

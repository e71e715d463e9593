"""Recordings to `DACFile`s and back, in constant memory, as `DAC.compress` and `DAC.decompress` do it.

A recording is read block by block, twice: once for its loudness, once to be encoded. It is resampled to the codec's
rate, brought to a loudness (channels whose peak would then pass 1 are scaled down to it), its channels encoded as
items of a batch. The gains stand in the file, and decoding takes them back.

Files of the published package hold the recording's loudness instead of the gains: decoding brings each channel to
that loudness, as the published package does.
"""

import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dac_fast.audio.loudness import LoudnessMeter, normalization_gains
from dac_fast.audio.reading import Recording
from dac_fast.audio.resample import resampled
from dac_fast.recordings import windows
from dac_fast.recordings.pipeline import in_batches, read_ahead
from dac_fast.storage.dac2 import DACFile

DEFAULT_CHUNK_SECONDS = 10.0


def compress(
    codec,
    source,
    chunk_seconds: float | None = None,
    n_quantizers: int | None = None,
    normalize_db: float | None = -16.0,
    padding: bool = True,
    progress: Callable[[float], None] = lambda seconds: None,
) -> DACFile:
    """A recording to codes.

    Args:
        codec: the `DAC`.
        source: path of an audio file of any rate and channel count, or (array [C, T] or [T], rate in Hz).
        chunk_seconds: what is encoded at once; None: 10 s. The codes do not depend on it (float rounding aside).
        n_quantizers: use the first that many codebooks; None: all.
        normalize_db: loudness to bring the recording to, in LUFS (the published models' training data: -16); None:
            as it is.
        padding: False encodes as the published package's chunk mode does, chunk by chunk without padding, and then
            chunk_seconds matters: for its files (format "dac1"), when they are to be equal to its own.
        progress: called with the seconds that were just encoded.
    Raises:
        AudioError: the recording cannot be read, is empty, or holds NaN or infinity.
        ValueError: chunk_seconds or n_quantizers is out of range.
    """
    options = chunk_seconds, n_quantizers, normalize_db, padding
    for _, result in compress_all(codec, [source], *options, progress=progress):
        if isinstance(result, Exception):
            raise result
    return result


def compress_all(
    codec,
    sources: Sequence,
    chunk_seconds: float | None = None,
    n_quantizers: int | None = None,
    normalize_db: float | None = -16.0,
    padding: bool = True,
    *,
    batch_seconds: float = 0.0,
    threads: int = 0,
    progress: Callable[[float], None] = lambda seconds: None,
) -> Iterator[tuple[int, DACFile | Exception]]:
    """Recordings to codes: chunks of all of them in common batches, while threads read what comes next.

    Args:
        sources: see `compress`; fast where neighbours are about as long as each other.
        codec, chunk_seconds, n_quantizers, normalize_db, padding, progress: those of `compress`.
        batch_seconds: audio that is encoded at once, all channels added; 0: chunk by chunk.
        threads: that read and resample ahead of time; 0: none.
    Yields:
        the number of each source, in order, and its file, or the ValueError or OSError that it caused.
    Raises:
        ValueError: chunk_seconds, n_quantizers or normalize_db is out of range.
    """
    check_options(codec, chunk_seconds, n_quantizers, normalize_db)
    chunk_seconds = DEFAULT_CHUNK_SECONDS if chunk_seconds is None else chunk_seconds
    n_quantizers = codec.config.n_codebooks if n_quantizers is None else n_quantizers
    readers = [
        functools.partial(_read, codec, source, chunk_seconds, normalize_db, padding)
        for source in sources
    ]
    results = in_batches(
        read_ahead(readers, threads),
        functools.partial(windows.encode_batch, n_quantizers=n_quantizers),
        batch_seconds,
    )
    for number, group in itertools.groupby(results, key=lambda result: result[0]):
        yield number, _assembled(codec, (part for _, part in group), progress)


@dataclass
class _Levels:
    """What reading a recording for the first time tells.

    Attributes:
        samples: at the codec's rate.
        loudness: in LUFS.
        gains: the factor of each channel, float32 [C].
        chunk_length: frames of each chunk; step: samples by which chunks follow each other, None where that is all
            their frames; padding: whether convolutions are padded.
    """

    recording: Recording
    samples: int
    loudness: float
    gains: np.ndarray
    chunk_length: int
    step: int | None
    padding: bool


def _read(
    codec, source, chunk_seconds: float, normalize_db: float | None, padding: bool
) -> Iterator:
    """Reads a recording twice: first its `_Levels`, then all of its windows."""
    recording = Recording(source)
    meter = LoudnessMeter(codec.sample_rate, recording.channels)
    samples = 0
    for block in recording.blocks(codec.sample_rate):
        meter.update(block)
        samples += block.shape[1]
    loudness = meter.integrated()
    gains = normalization_gains(loudness, meter.peaks, normalize_db)
    blocks = (
        torch.from_numpy(block * gains[:, None]) for block in recording.blocks(codec.sample_rate)
    )

    hop = codec.hop_length
    chunk_samples = chunk_seconds * codec.sample_rate
    if padding or samples <= chunk_samples:
        yield _Levels(recording, samples, loudness, gains, -(-max(samples, 1) // hop), None, True)
        yield from windows.sample_windows(codec, blocks, max(round(chunk_samples / hop), 1))
    else:
        size = -(-int(chunk_samples) // hop) * hop
        frames = codec.encoder.output_length(size, padded=False)
        # of a chunk without padding, only its middle is new
        step = windows.output_samples(codec, size)
        yield _Levels(recording, samples, loudness, gains, frames, step, False)
        yield from windows.unpadded_sample_windows(codec, blocks, size)


def _assembled(codec, parts: Iterable, progress: Callable[[float], None]) -> DACFile | Exception:
    """The file of a recording's `_Levels` and the codes of its windows, or what went wrong with it."""
    codes = []
    for part in parts:
        if isinstance(part, Exception):
            return part
        if isinstance(part, _Levels):
            levels, left = part, part.samples
            continue
        codes.append(part)
        advance = min(levels.step or part.shape[-1] * codec.hop_length, left)
        left -= advance
        progress(advance / codec.sample_rate)
    return DACFile(
        codes=torch.cat(codes, dim=-1),
        chunk_length=levels.chunk_length,
        original_length=levels.recording.frames,
        input_db=levels.loudness,
        channels=levels.recording.channels,
        sample_rate=levels.recording.sample_rate,
        padding=levels.padding,
        gains=levels.gains,
        codebook_size=codec.config.codebook_size,
        model_sample_rate=codec.sample_rate,
        hop_length=codec.hop_length,
        model=codec.name,
    )


def check_options(codec, chunk_seconds=None, n_quantizers=None, normalize_db=None):
    """Raises ValueError where an option of `compress` is out of range."""
    available = codec.config.n_codebooks
    if chunk_seconds is not None and not 0 < chunk_seconds < math.inf:
        raise ValueError(f"chunk_seconds is {chunk_seconds}; accepted: above 0")
    if n_quantizers is not None and n_quantizers not in range(1, available + 1):
        raise ValueError(f"{n_quantizers} codebooks; accepted: 1 to {available}")
    if normalize_db is not None and not -100 <= normalize_db <= 20:
        raise ValueError(f"normalize_db is {normalize_db}; accepted: -100 to 20 LUFS, or None")


def decompress(codec, file) -> tuple[np.ndarray, int]:
    """A `DACFile`, or the path of one, to (float32 array [C, T], rate in Hz), of the original length.

    Raises:
        DACFileError: the file is damaged.
        ValueError: the file is another codec's.
    """
    file = file if isinstance(file, DACFile) else DACFile.load(file)
    return np.concatenate(list(decompressed_blocks(codec, file)), axis=1), file.sample_rate


def decompressed_blocks(
    codec, file: DACFile, chunk_seconds: float | None = None
) -> Iterator[np.ndarray]:
    """The blocks, float32 [C, n], of what `decompress` returns whole; chunk_seconds as of `compress`."""
    for _, result in decompress_all(lambda file: (codec, file), [file], chunk_seconds):
        if isinstance(result, Exception):
            raise result
        yield from result[1]


def decompress_all(
    load: Callable[[object], tuple[object, DACFile]],
    sources: Sequence,
    chunk_seconds: float | None = None,
    *,
    batch_seconds: float = 0.0,
    threads: int = 0,
) -> Iterator[tuple[int, tuple[DACFile, Iterator[np.ndarray]] | Exception]]:
    """Files to recordings: chunks of all of them in common batches, while threads load what comes next.

    Args:
        load: gives the codec and the file of a source. Called by the threads.
        sources: anything that `load` knows; fast where neighbours are about as long as each other.
        chunk_seconds: as of `compress`.
        batch_seconds: audio that is decoded at once, all channels added; 0: chunk by chunk.
        threads: that load ahead of time; 0: none.
    Yields:
        the number of each source, in order, and its file with the blocks of its audio, float32 [C, n], to be taken
        before the next source (and raising what went wrong with them); or the ValueError or OSError that it caused.
    """
    readers = [functools.partial(_load, load, source, chunk_seconds) for source in sources]
    results = in_batches(read_ahead(readers, threads), windows.decode_batch, batch_seconds)
    for number, group in itertools.groupby(results, key=lambda result: result[0]):
        parts = (part for _, part in group)
        first = next(parts)
        if isinstance(first, Exception):
            yield number, first
        else:
            codec, file = first
            yield number, (file, _restored(codec, file, _arrays(parts)))


def _load(load: Callable, source, chunk_seconds: float | None) -> Iterator:
    """The codec and the file, then all of its windows."""
    chunk_seconds = DEFAULT_CHUNK_SECONDS if chunk_seconds is None else chunk_seconds
    codec, file = load(source)
    _check_fits(codec, file)
    yield codec, file
    if file.padding:
        chunk_frames = max(round(chunk_seconds * codec.sample_rate / codec.hop_length), 1)
        yield from windows.code_windows(codec, file.codes, chunk_frames)
    else:
        yield from windows.unpadded_code_windows(codec, file.codes, file.chunk_length)


def _arrays(parts: Iterable[torch.Tensor | Exception]) -> Iterator[np.ndarray]:
    for part in parts:
        if isinstance(part, Exception):
            raise part
        yield part.float().numpy()


def _restored(codec, file: DACFile, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks that the codec gave, at the recording's level, rate and length."""
    if file.gains is None:
        blocks = _at_loudness(blocks, codec.sample_rate, file.input_db)
    else:
        blocks = (block / np.asarray(file.gains, np.float32)[:, None] for block in blocks)
    return _of_length(resampled(blocks, codec.sample_rate, file.sample_rate), file.original_length)


def _at_loudness(blocks: Iterable[np.ndarray], rate: int, target_db: float) -> Iterator[np.ndarray]:
    """Every channel brought to that loudness by itself, which is known at the end only: kept on disk until then."""
    with tempfile.TemporaryFile() as spool:
        meters, shapes = [], []
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
            block = np.frombuffer(spool.read(4 * shape[0] * shape[1]), np.float32).reshape(shape)
            yield block * gains[:, None]


def _of_length(blocks: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Exactly that many samples: cut, or filled up with zeros."""
    left, channels = length, 1
    for block in blocks:
        channels = block.shape[0]
        yield block[:, :left]
        left -= min(left, block.shape[1])
    if left:
        yield np.zeros((channels, left), np.float32)


def _check_fits(codec, file: DACFile):
    """Fail early where the codes are evidently another codec's."""
    c = codec.config
    stages, highest = file.codes.shape[1], int(file.codes.max())
    if stages > c.n_codebooks or highest >= c.codebook_size:
        raise ValueError(
            f"the file has {stages} codebooks and codes up to {highest}; "
            f"this codec takes {c.n_codebooks} codebooks of {c.codebook_size}"
        )
    if file.model_sample_rate and (file.model_sample_rate, file.hop_length) != (
        c.sample_rate,
        c.hop_length,
    ):
        raise ValueError(
            f"the file is of a codec at {file.model_sample_rate} Hz with {file.hop_length} samples per frame; "
            f"this one is at {c.sample_rate} Hz with {c.hop_length}"
        )
    shortest = file.n_frames % file.chunk_length or file.chunk_length
    if not file.padding and not windows.survives_unpadded(codec.decoder, shortest):
        raise ValueError(
            f"the file has a chunk of {shortest} frames, too few to decode without padding"
        )
    longest = (file.n_frames + 1) * c.hop_length * file.sample_rate // c.sample_rate + 1
    if file.original_length > longest:
        raise ValueError(
            f"the file claims {file.original_length} samples; its codes hold up to {longest}"
        )

"""Recordings to latents of a continuous codec and back, chunk by chunk in constant memory.

What `dac_fast.recordings.compress` says of rate, loudness, channels and chunks holds here too.
"""

import os

import numpy as np
import torch

from dac_fast.audio.reading import Source
from dac_fast.audio.resample import Samples, resampled
from dac_fast.model.interface import Codec
from dac_fast.recordings import windows
from dac_fast.recordings.checks import check_ranges
from dac_fast.recordings.compress import (
    DEFAULT_CHUNK_SECONDS,
    Encoding,
    chunk_frames,
    of_all_items,
    of_length,
)
from dac_fast.storage.latents import LatentFile


def encode(
    codec: Codec,
    source: Source,
    chunk_seconds: float = DEFAULT_CHUNK_SECONDS,
    normalize_db: float | None = -16.0,
) -> LatentFile:
    """A recording to the means of its latents.

    Args:
        codec: that encodes.
        source, chunk_seconds, normalize_db: those of `dac_fast.recordings.compress.compress`.
    Raises:
        AudioError: the recording cannot be read, is empty, or holds NaN or infinity.
        ValueError: an option is out of range, or the codec has codes.
    """
    _require_latents(codec)
    check_ranges(chunk_seconds, normalize_db)
    recording = Encoding(codec, source, chunk_seconds, normalize_db, True, lambda seconds: None)
    outputs = [windows.encode_batch([window])()[0] for window in recording.windows()]
    return LatentFile(
        latents=recording.joined(iter(outputs)).float(),
        gains=torch.from_numpy(recording.gains),
        original_length=recording.recording.frames,
        sample_rate=recording.recording.sample_rate,
        model_sample_rate=codec.sample_rate,
        hop_length=codec.hop_length,
        model=codec.name,
    )


def decode(codec: Codec, file: LatentFile | str | os.PathLike[str]) -> tuple[Samples, int]:
    """Latents, or the path of a `.latents` file, to audio of the original length.

    Returns:
        float32 array [C, T], and its rate in Hz.
    Raises:
        LatentFileError: the file is damaged.
        ValueError: the file is another codec's, or the codec has codes.
    """
    _require_latents(codec)
    file = file if isinstance(file, LatentFile) else LatentFile.load(file)
    _check_fits(codec, file)
    channels = len(file.gains)
    frames = chunk_frames(codec, DEFAULT_CHUNK_SECONDS, channels)
    cut = windows.code_windows(codec, file.latents, frames)
    outputs = (windows.decode_batch([window])()[0] for window in cut)
    chunks = of_all_items(outputs, len(file.latents))
    signals = (windows.channels_of(chunk, channels) / file.gains[:, None] for chunk in chunks)
    blocks = (signal.float().numpy() for signal in signals)
    restored = resampled(blocks, codec.sample_rate, file.sample_rate)
    return np.concatenate(list(of_length(restored, file.original_length)), axis=1), file.sample_rate


def _require_latents(codec: Codec) -> None:
    if not codec.config.continuous:
        raise ValueError("the codec has codes, no continuous latents; accepted: compress")


def _check_fits(codec: Codec, file: LatentFile) -> None:
    items, rows, _ = file.latents.shape
    found = rows, file.model_sample_rate, file.hop_length, items
    expected_items = windows.item_count(codec, len(file.gains))
    expected = codec.quantizer.rows(), codec.sample_rate, codec.hop_length, expected_items
    if found != expected:
        names = "latent channels, sample rate, samples per frame and items"
        raise ValueError(f"the file has {names} {found}; accepted of this codec: {expected}")

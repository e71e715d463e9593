"""Checks of what recordings are encoded and decoded with, before anything is computed."""

import math

from dac_fast.config import codebook_count
from dac_fast.model.interface import Codec
from dac_fast.recordings import windows
from dac_fast.storage.dac2 import DACFile


def check_options(
    codec: Codec,
    chunk_seconds: float | None = None,
    n_quantizers: int | None = None,
    normalize_db: float | None = None,
) -> None:
    """Raises ValueError where an option of `compress` is out of range, or there are no codes."""
    _require_codes(codec)
    codebook_count(n_quantizers, codec.config.n_codebooks)
    check_ranges(chunk_seconds, normalize_db)


def check_ranges(chunk_seconds: float | None, normalize_db: float | None) -> None:
    """Raises ValueError where an option of any codec is out of range."""
    if chunk_seconds is not None and not 0 < chunk_seconds < math.inf:
        raise ValueError(f"chunk_seconds is {chunk_seconds}; accepted: above 0")
    if normalize_db is not None and not -100 <= normalize_db <= 20:
        raise ValueError(f"normalize_db is {normalize_db}; accepted: -100 to 20 LUFS, or None")


def _require_codes(codec: Codec) -> None:
    if codec.config.continuous:
        raise ValueError(
            "the codec is continuous: it has no .dac files; "
            "accepted: dac_fast.recordings.latents in Python"
        )


def check_fits(codec: Codec, file: DACFile) -> None:
    """Fails early where the codes are evidently another codec's."""
    _require_codes(codec)
    c = codec.config
    stages, highest = file.codes.shape[1], int(file.codes.max())
    if stages > c.n_codebooks or highest >= c.codebook_size:
        raise ValueError(
            f"the file has {stages} codebooks and codes up to {highest}; "
            f"this codec takes {c.n_codebooks} codebooks of {c.codebook_size}"
        )
    if file.stereo != (c.channels > 1):
        raise ValueError(
            f"the file is of a {'stereo' if file.stereo else 'mono'} codec; "
            f"this one has {c.channels} channel{'s' if c.channels > 1 else ''}"
        )
    rates = file.model_sample_rate, file.hop_length
    if file.model_sample_rate and rates != (c.sample_rate, c.hop_length):
        raise ValueError(
            f"the file is of a codec at {file.model_sample_rate} Hz with {file.hop_length} samples "
            f"per frame; this one is at {c.sample_rate} Hz with {c.hop_length}"
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

"""Audio files and signals: reading, writing, loudness, resampling, and the search of folders."""

from dac_fast.audio.loudness import LoudnessMeter, normalization_gains
from dac_fast.audio.reading import (
    AUDIO_SUFFIXES,
    SAMPLE_RATES,
    AudioError,
    Recording,
    read,
    resample,
)
from dac_fast.audio.writing import AudioWriter, write

__all__ = [
    "AUDIO_SUFFIXES",
    "SAMPLE_RATES",
    "AudioError",
    "AudioWriter",
    "LoudnessMeter",
    "Recording",
    "normalization_gains",
    "read",
    "resample",
    "write",
]

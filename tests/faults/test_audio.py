"""Audio files in every format that is read: changed headers and bytes."""

from pathlib import Path
from random import Random

import numpy as np
import soundfile

from dac_fast.audio.reading import read
from faults import trials
from faults.trials import mutated

# Suffix, and the subtypes that are tried.
FORMATS = (
    *(("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("wav", "ULAW"), ("wav", "MS_ADPCM")),
    *(("flac", "PCM_16"), ("ogg", "VORBIS"), ("opus", "OPUS"), ("mp3", "MPEG_LAYER_III")),
    *(
        ("aiff", "PCM_16"),
        ("au", "FLOAT"),
        ("caf", "PCM_16"),
        ("caf", "ALAC_16"),
        ("w64", "PCM_24"),
    ),
)


def audio(folder: Path) -> trials.Trial:
    """Files of all formats; an accepted one gives the samples that soundfile gives."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (3000, 2))
    good = []
    for suffix, subtype in FORMATS:
        path = folder / f"good.{suffix}"
        container = "OGG" if suffix == "opus" else None
        soundfile.write(path, noise, 48000, subtype=subtype, format=container)
        good.append((folder / f"a.{suffix}", path.read_bytes()))

    def trial(random: Random) -> None:
        path, data = random.choice(good)
        # Most of what can be wrong stands in the first bytes.
        data = mutated(random, data[:200]) + data[200:] if random.random() < 0.5 else data
        path.write_bytes(mutated(random, data) if random.random() < 0.7 else data)
        samples, rate = read(path)
        blocks = []
        with soundfile.SoundFile(path) as file:
            while len(block := file.read(100_000, dtype="float32", always_2d=True)):
                blocks.append(block)
        assert rate == file.samplerate
        assert np.array_equal(samples, np.concatenate(blocks).T), path.suffix

    return trial


def test_audio(tmp_path: Path) -> None:
    trials.run(audio, tmp_path, 1500)

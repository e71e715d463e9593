"""A page to hear a codec by, as one file: clips of recordings at each number of codebooks."""

import base64
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from dac_fast import page
from dac_fast.audio.reading import Recording
from dac_fast.audio.sources import AudioFile, audio_files
from dac_fast.codec import DAC
from dac_fast.files import write_bytes
from dac_fast.metrics import mel_distance, si_sdr

# Fewer samples have no mel distance.
SHORTEST = 1025


def write_page(
    path: str | os.PathLike[str],
    codec: DAC,
    data: str | os.PathLike[str],
    codebooks: Sequence[int],
    *,
    seconds: float = 10.0,
    clips: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the page of `dac-fast serve` as a file that needs no server.

    Args:
        path: of the page; replaced where it is there.
        codec: the `DAC`.
        data: a folder or manifest of recordings, see `dac_fast.audio.sources`.
        codebooks: numbers of codebooks to hear.
        seconds: of each clip, from the recording's beginning.
        clips: how many there are at most, of as many domains as possible.
        progress: called with the clips done and their total.
    Raises:
        ValueError: there are no recordings, or none that can be read.
        OSError: the page cannot be written.
    """
    described: list[dict[str, object]] = []
    for source in _in_turns(audio_files(data)):
        if len(described) == clips:
            break
        try:
            described.append(_clip(codec, source, sorted(set(codebooks)), seconds))
        # The fault of one recording, which an evaluation reports.
        except (ValueError, OSError):
            continue
        progress(len(described), clips)
    if not described:
        raise ValueError(f"{data}: no recording that can be read")
    model = {"name": codec.name or "custom", "sample_rate": codec.sample_rate}
    html = page.listening({"model": model, "clips": described})
    write_bytes(path, html.encode())


def _in_turns(sources: Sequence[AudioFile]) -> Iterator[AudioFile]:
    """The first recording of every domain, then the second of each, and so on."""
    domains: dict[str, list[AudioFile]] = {}
    for source in sources:
        domains.setdefault(source.domain, []).append(source)
    for turn in itertools.zip_longest(*domains.values()):
        yield from (source for source in turn if source)


def _clip(
    codec: DAC, source: AudioFile, codebooks: Sequence[int], seconds: float
) -> dict[str, object]:
    rate = codec.sample_rate
    blocks = Recording(source.path).blocks(rate, seconds)
    audio = next(iter(blocks))
    file = codec.compress((audio, rate), n_quantizers=codebooks[-1])
    versions = []
    for count in codebooks:
        # The codes of few codebooks are the first ones of many.
        part = replace(file, codes=file.codes[:, :count])
        restored, _ = codec.decompress(part)
        bitrate = part.bitrate or math.nan
        values = {
            "kbps": bitrate / 1000,
            "ratio": 16 * rate * part.channels / bitrate,
            **_distances(audio, restored, rate),
        }
        numbers = {key: value if math.isfinite(value) else None for key, value in values.items()}
        versions.append({"codebooks": count, "audio": _url(restored, rate), **numbers})
    return {"name": source.name, "original": _url(audio, rate), "versions": versions}


def _distances(x: NDArray[np.float32], y: NDArray[np.float32], rate: int) -> dict[str, float]:
    original, restored = (torch.from_numpy(audio)[None].double() for audio in (x, y))
    far = mel_distance(original, restored, rate).item() if x.shape[1] >= SHORTEST else math.nan
    return {"si_sdr": si_sdr(original, restored).item(), "mel_distance": far}


def _url(audio: NDArray[np.float32], rate: int) -> str:
    """Audio as a data URL, in FLAC of 16 bit."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, audio.clip(-1, 1).T, rate, "PCM_16", format="FLAC")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()

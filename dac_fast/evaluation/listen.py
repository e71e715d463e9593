"""Recordings after the codec at several numbers of codebooks, and a page to hear them by."""

import base64
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dac_fast import page
from dac_fast.audio.reading import Recording
from dac_fast.audio.sources import AudioFile, audio_files
from dac_fast.codec import DAC
from dac_fast.files import write_bytes
from dac_fast.metrics import Quality, quality


@dataclass(frozen=True)
class Version:
    """A recording after the codec.

    Attributes:
        codebooks: how many were used.
        audio: float32 [C, T] at the recording's rate.
        quality: what the codes cost, and how near they come.
        seconds: that encoding and decoding took.
    """

    codebooks: int
    audio: NDArray[np.float32]
    quality: Quality
    seconds: float


@dataclass(frozen=True)
class Clip:
    """A recording, and what the codec makes of it.

    Attributes:
        name: to be shown.
        audio: float32 [C, T], the original.
        sample_rate: in Hz.
        versions: fewest codebooks first.
    """

    name: str
    audio: NDArray[np.float32]
    sample_rate: int
    versions: list[Version]


def compared(
    codec: DAC,
    name: str,
    audio: NDArray[np.float32],
    sample_rate: int,
    codebooks: Sequence[int],
) -> Clip:
    """The recording after the codec at each number of codebooks.

    Args:
        codec: the `DAC`.
        name: of the clip.
        audio: float32 [C, T].
        sample_rate: in Hz.
        codebooks: numbers of codebooks, each from 1 to all of the codec's.
    """
    start = time.perf_counter()
    file = codec.compress((audio, sample_rate), n_quantizers=max(codebooks))
    encoding = time.perf_counter() - start
    versions = []
    for count in sorted(set(codebooks)):
        # The codes of few codebooks are the first ones of many.
        part = replace(file, codes=file.codes[:, :count])
        start = time.perf_counter()
        restored, _ = codec.decompress(part)
        decoding = time.perf_counter() - start
        versions.append(
            Version(count, restored, quality(part, audio, restored), encoding + decoding)
        )
    return Clip(name, audio, sample_rate, versions)


def write_page(path: str | os.PathLike[str], codec: DAC, clips: Sequence[Clip]) -> None:
    """Writes the page of `dac-fast serve` as a file that needs no server.

    Args:
        path: of the page; replaced where it is there.
        codec: the `DAC`.
        clips: to be heard on it.
    Raises:
        OSError: the page cannot be written.
    """
    model = {"name": codec.name or "custom", "sample_rate": codec.sample_rate}
    report = {"model": model, "clips": [_described(clip) for clip in clips]}
    write_bytes(path, page.listening(report).encode())


def clips_of(
    codec: DAC,
    data: str | os.PathLike[str],
    codebooks: Sequence[int],
    *,
    seconds: float = 10.0,
    most: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Clip]:
    """Clips of a folder's recordings, of as many domains as possible.

    Args:
        codec: the `DAC`.
        data: a folder or manifest of recordings, see `dac_fast.audio.sources`.
        codebooks: numbers of codebooks to hear.
        seconds: of each clip, from the recording's beginning.
        most: clips at most.
        progress: called with the clips done and their total.
    Raises:
        ValueError: there are no recordings, or none that can be read.
    """
    rate = codec.sample_rate
    clips: list[Clip] = []
    for source in _in_turns(audio_files(data)):
        if len(clips) == most:
            break
        try:
            audio = next(iter(Recording(source.path).blocks(rate, seconds)))
            clips.append(compared(codec, source.name, audio, rate, codebooks))
        # The fault of one recording, which an evaluation reports.
        except (ValueError, OSError):
            continue
        progress(len(clips), most)
    if not clips:
        raise ValueError(f"{data}: no recording that can be read")
    return clips


def _in_turns(sources: Sequence[AudioFile]) -> Iterator[AudioFile]:
    """The first recording of every domain, then the second of each, and so on."""
    domains: dict[str, list[AudioFile]] = {}
    for source in sources:
        domains.setdefault(source.domain, []).append(source)
    for turn in itertools.zip_longest(*domains.values()):
        yield from (source for source in turn if source)


def _described(clip: Clip) -> dict[str, object]:
    """What the page is told of a clip."""
    versions = [
        {
            "codebooks": version.codebooks,
            "audio": _url(version.audio, clip.sample_rate),
            **asdict(version.quality),
        }
        for version in clip.versions
    ]
    original = _url(clip.audio, clip.sample_rate)
    return {"name": clip.name, "original": original, "versions": versions}


def _url(audio: NDArray[np.float32], rate: int) -> str:
    """Audio as a data URL, in FLAC of 16 bit."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, audio.clip(-1, 1).T, rate, "PCM_16", format="FLAC")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()

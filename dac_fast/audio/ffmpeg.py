"""Audio that libsndfile does not read, through the programs of ffmpeg where they are installed."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of audio, and of video with audio.
SUFFIXES = (
    ".aac",
    ".ac3",
    ".amr",
    ".ape",
    ".dsf",
    ".m4a",
    ".m4b",
    ".mka",
    ".mp4",
    ".webm",
    ".wma",
    ".wv",
)
# Whatever a file's name says, it is of one of these. Playlists, which have ffmpeg read other files
# and addresses, are not.
FORMATS = "aac,ac3,amr,ape,asf,dsf,matroska,mov,wv"
ONLY = ("-v", "error", "-protocol_whitelist", "file,pipe", "-format_whitelist", FORMATS)
SAMPLE_BYTES = 4


class FfmpegError(ValueError):
    """What ffmpeg says of a file that it cannot read, in a line."""


def installed() -> bool:
    """Whether ffmpeg and ffprobe are."""
    return all(shutil.which(program) for program in ("ffmpeg", "ffprobe"))


def reads(path: str) -> bool:
    """Whether the file, by its suffix, is one for ffmpeg."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def probe(path: str) -> tuple[int, int, int]:
    """Channels, sample rate in Hz and samples per channel, an estimate, of the first audio stream.

    Raises:
        FfmpegError: ffmpeg is not installed, or cannot read the file.
    """
    if not installed():
        raise FfmpegError("ffmpeg reads it, and is not installed")
    wanted = "stream=channels,sample_rate,duration:format=duration"
    command = ("ffprobe", *ONLY, "-select_streams", "a:0", "-show_entries", wanted)
    done = subprocess.run(
        [*command, "-of", "json", f"file:{path}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise FfmpegError(_last_line(done.stderr))
    found = json.loads(done.stdout)
    stream: dict[str, Any] = next(iter(found["streams"]), {})
    channels, rate = int(stream.get("channels", 0)), int(stream.get("sample_rate", 0))
    if not channels or not rate:
        raise FfmpegError("no audio in it")
    seconds = stream.get("duration") or found["format"].get("duration") or 0
    return channels, rate, max(round(float(seconds) * rate), 1)


def blocks(
    path: str, size: int, channels: int, sample_rate: int, start_seconds: float = 0.0
) -> Iterator[NDArray[np.float32]]:
    """The samples of the first audio stream, in blocks [n, C] of n = `size`, the last one shorter.

    Raises:
        FfmpegError: the file is damaged or cut short; what could be read has been yielded.
    """
    place = ("-ss", str(start_seconds)) if start_seconds else ()
    given = ("ffmpeg", "-nostdin", "-xerror", *ONLY, *place, "-i", f"file:{path}")
    form = ("-map", "0:a:0", "-ar", str(sample_rate), "-ac", str(channels), "-f", "f32le", "pipe:1")
    # Not a pipe, which would fill up and hold ffmpeg.
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*given, *form],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            # Ctrl-C is for this process, which ends ffmpeg when it is done with it.
            start_new_session=True,
        )
        with process:
            assert process.stdout is not None
            try:
                while data := process.stdout.read(size * channels * SAMPLE_BYTES):
                    whole = len(data) // (channels * SAMPLE_BYTES)
                    samples = np.frombuffer(data, "<f4", whole * channels)
                    yield samples.reshape(whole, channels)
                failed = process.wait() != 0
            finally:
                process.kill()
        if failed:
            said.seek(0)
            raise FfmpegError(_last_line(said.read()))


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines() or ["for no reason that it gives"]
    return lines[-1]

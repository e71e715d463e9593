"""What there is to train on: the readable files of every source, and the part of them that is held out."""

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from dac_fast.audio.reading import AudioError, Recording
from dac_fast.audio.sources import AudioFile, SourceError, audio_files


class DataError(ValueError):
    """Nothing to train on; one line that says where."""


def find_files(
    sources, sample_rate: int, full_band: Sequence[str] | None = None, key: str = "data.train"
) -> tuple[list[AudioFile], dict[str, str]]:
    """All readable audio files of the sources, in an order that depends on nothing but their names.

    Where a manifest gives "seconds" and "rate", the file is not opened before it is drawn.

    Args:
        sources: see `DataConfig.train`.
        sample_rate: of the model, in Hz.
        full_band: see `DataConfig.full_band`.
        key: of the recipe, for messages.
    Returns:
        the files, and why each unreadable one is not among them.
    Raises:
        DataError: a source is missing, a manifest is damaged, or no file is left.
    """
    try:
        files = [
            file for domain, path in _listed(sources, key) for file in audio_files(path, domain)
        ]
    except SourceError as error:
        raise DataError(f"{key}: {error}") from error
    with ThreadPoolExecutor(8) as pool:
        probed = list(pool.map(_probed, files))
    unreadable = {
        file.path: result
        for file, result in zip(files, probed, strict=True)
        if isinstance(result, str)
    }
    readable = [result for result in probed if not isinstance(result, str)]
    if not readable:
        path, reason = next(iter(unreadable.items()))
        raise DataError(
            f"{key}: none of {len(files)} files can be read, for example {path}: {reason}"
        )
    return [_with_band(file, sample_rate, full_band) for file in readable], unreadable


def hold_out(files: list[AudioFile], share: float) -> tuple[list[AudioFile], list[AudioFile]]:
    """Splits files into training and validation, by whole packages, the same way every time.

    Of each domain the smallest packages are held out, until they make up `share` of its seconds; its last one is
    always left for training.
    """
    sizes = defaultdict(lambda: defaultdict(float))
    for file in files:
        sizes[file.domain][file.package] += file.seconds
    held = set()
    for domain, packages in sizes.items():
        missing = share * sum(packages.values())
        for package in sorted(packages, key=lambda p: (packages[p], p))[:-1]:
            if missing <= 0:
                break
            held.add((domain, package))
            missing -= packages[package]
    training = [file for file in files if (file.domain, file.package) not in held]
    return training, [file for file in files if (file.domain, file.package) in held]


def _listed(sources, key: str) -> list[tuple[str, str]]:
    """(domain or "", path) of every source."""
    if isinstance(sources, (str, os.PathLike)):
        return [("", os.fspath(sources))]
    if isinstance(sources, (list, tuple)):
        return [pair for source in sources for pair in _listed(source, key)]
    if isinstance(sources, dict):
        return [
            (str(domain), path)
            for domain, value in sources.items()
            for _, path in _listed(value, key)
        ]
    raise DataError(
        f"{key} is {sources!r}; accepted: a folder or manifest, a list of these, or domains and these"
    )


def _probed(file: AudioFile) -> AudioFile | str:
    """The file with its length and rate, or why it cannot be read."""
    if file.seconds and file.rate:
        return file if os.path.isfile(file.path) else "no such file"
    try:
        recording = Recording(file.path)
    except (AudioError, OSError) as error:
        return str(error).removeprefix(f"{file.path}: ")
    return replace(
        file, seconds=recording.frames / recording.sample_rate, rate=recording.sample_rate
    )


def _with_band(file: AudioFile, sample_rate: int, full_band: Sequence[str] | None) -> AudioFile:
    if file.full_band is not None:
        return file
    return replace(
        file, full_band=file.rate >= sample_rate if full_band is None else file.domain in full_band
    )

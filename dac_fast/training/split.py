"""What there is to train on: readable files of every source, and those held out for validation."""

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from dac_fast.audio.reading import AudioError, Recording, readable_suffixes
from dac_fast.audio.sources import AudioFile, SourceError, audio_files, left_out
from dac_fast.training.recipe import DataConfig, Sources


class DataError(ValueError):
    """There is nothing to train on; one line that says where."""


@dataclass(frozen=True)
class Split:
    """The files of a run.

    Attributes:
        training, validation: the files to train and validate on.
        unreadable: why the others cannot be read, by their paths.
        notes: lines on audio that is left out.
    """

    training: list[AudioFile]
    validation: list[AudioFile]
    unreadable: dict[str, str]
    notes: list[str]


def split_files(data: DataConfig, sample_rate: int) -> Split:
    """The files of a recipe's data, for a model of that sample rate in Hz.

    Raises:
        DataError: a source is missing, a manifest is damaged, or no file is left to train on.
    """
    assert data.train is not None
    files, unreadable = find_files(data.train, sample_rate, data.full_band)
    lines = (left_out(path, readable_suffixes()) for _, path in _listed(data.train))
    notes = [line for line in lines if line]
    if data.validation is None:
        return Split(files, [], unreadable, notes)
    if isinstance(data.validation, float):
        return Split(*hold_out(files, data.validation), unreadable, notes)
    held, more = find_files(data.validation, sample_rate, data.full_band, "data.validation")
    paths = {os.path.realpath(file.path) for file in held}
    files = [file for file in files if os.path.realpath(file.path) not in paths]
    if not files:
        raise DataError("data.train: all of its files are those of data.validation")
    return Split(files, held, unreadable | more, notes)


def find_files(
    sources: Sources | os.PathLike[str],
    sample_rate: int,
    full_band: Sequence[str] | None = None,
    key: str = "data.train",
) -> tuple[list[AudioFile], dict[str, str]]:
    """All readable audio files of the sources, in an order that depends on their names alone.

    Where a manifest gives "seconds" and "rate", the file is not opened before it is drawn.

    Args:
        sources: see `DataConfig.train`.
        sample_rate: of the model, in Hz.
        full_band: see `DataConfig.full_band`.
        key: of the recipe, for messages.
    Returns:
        the files, and why the other ones cannot be read, by their paths.
    Raises:
        DataError: a source is missing, a manifest is damaged, or no file is left.
    """
    try:
        files = [file for domain, path in _listed(sources) for file in audio_files(path, domain)]
    except SourceError as error:
        raise DataError(f"{key}: {error}") from error
    with ThreadPoolExecutor(8) as pool:
        probed = list(pool.map(_probed, files))
    readable = [_with_band(file, sample_rate, full_band) for file, reason in probed if not reason]
    unreadable = {file.path: reason for file, reason in probed if reason}
    if not readable:
        path, reason = next(iter(unreadable.items()))
        raise DataError(
            f"{key}: none of {len(files)} files can be read, for example {path}: {reason}"
        )
    return readable, unreadable


def hold_out(files: list[AudioFile], share: float) -> tuple[list[AudioFile], list[AudioFile]]:
    """Splits files into training and validation, by whole packages, the same way every time.

    Of each domain the smallest packages are held out until they make up `share` of its seconds. Its
    last package is always left for training.
    """
    domains: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for file in files:
        domains[file.domain][file.package] += file.seconds
    held = set()
    for domain, seconds in domains.items():
        missing = share * sum(seconds.values())
        for package in sorted(seconds, key=lambda p: (seconds[p], p))[:-1]:
            if missing <= 0:
                break
            held.add((domain, package))
            missing -= seconds[package]
    training = [file for file in files if (file.domain, file.package) not in held]
    return training, [file for file in files if (file.domain, file.package) in held]


def _listed(sources: Sources | os.PathLike[str], domain: str = "") -> list[tuple[str, str]]:
    """(domain or "", path) of every source."""
    if isinstance(sources, dict):
        return [pair for name, value in sources.items() for pair in _listed(value, name)]
    if isinstance(sources, list):
        return [(domain, source) for source in sources]
    return [(domain, os.fspath(sources))]


def _probed(file: AudioFile) -> tuple[AudioFile, str]:
    """The file with its length and rate, and why it cannot be read, or ""."""
    if file.seconds and file.rate:
        return file, "" if os.path.isfile(file.path) else "no such file"
    try:
        recording = Recording(file.path)
    except (AudioError, OSError) as error:
        return file, str(error).removeprefix(f"{file.path}: ")
    rate = recording.sample_rate
    return replace(file, seconds=recording.frames / rate, rate=rate), ""


def _with_band(file: AudioFile, sample_rate: int, full_band: Sequence[str] | None) -> AudioFile:
    """The file with `full_band` known; see `DataConfig.full_band`."""
    if file.full_band is not None:
        return file
    known = file.rate >= sample_rate if full_band is None else file.domain in full_band
    return replace(file, full_band=known)

"""What there is to train on: readable files of every source, and those held out for validation."""

import os
from collections import defaultdict
from collections.abc import Collection, Sequence
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


def split_files(data: DataConfig, sample_rate: int, held: Collection[str] = ()) -> Split:
    """The files of a recipe's data.

    Args:
        data: of the recipe.
        sample_rate: of the model, in Hz.
        held: packages that the run has held out so far, which stay held out.
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
        return Split(*hold_out(files, data.validation, held), unreadable, notes)
    validation, more = find_files(data.validation, sample_rate, data.full_band, "data.validation")
    paths = {os.path.realpath(file.path) for file in validation}
    files = [file for file in files if os.path.realpath(file.path) not in paths]
    if not files:
        raise DataError("data.train: all of its files are those of data.validation")
    return Split(files, validation, unreadable | more, notes)


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


def hold_out(
    files: list[AudioFile], share: float, held: Collection[str] = ()
) -> tuple[list[AudioFile], list[AudioFile]]:
    """Splits files into training and validation, by whole packages, the same way every time.

    Of each domain the smallest packages are held out until they make up `share` of its seconds, but
    none that would leave a domain nothing to train on. Where any package of `held` is there, these
    are held out and no others.
    """
    # Seconds by domain and package.
    domains: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for file in files:
        domains[file.domain][file.package] += file.seconds
    places = defaultdict(list)
    for domain, seconds in domains.items():
        for package in seconds:
            places[package].append(domain)
    missing = {domain: share * sum(seconds.values()) for domain, seconds in domains.items()}
    left = {domain: len(seconds) for domain, seconds in domains.items()}
    chosen = places.keys() & set(held)
    for domain, seconds in () if chosen else sorted(domains.items()):
        for package in sorted(seconds, key=lambda p: (seconds[p], p))[:-1]:
            if missing[domain] <= 0:
                break
            if package in chosen or any(left[place] == 1 for place in places[package]):
                continue
            chosen.add(package)
            for place in places[package]:
                missing[place] -= domains[place][package]
                left[place] -= 1
    training = [file for file in files if file.package not in chosen]
    return training, [file for file in files if file.package in chosen]


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
    if not recording.frames:
        return file, "its header does not say how long it is"
    rate = recording.sample_rate
    return replace(file, seconds=recording.frames / rate, rate=rate), ""


def _with_band(file: AudioFile, sample_rate: int, full_band: Sequence[str] | None) -> AudioFile:
    """The file with `full_band` known; see `DataConfig.full_band`."""
    if file.full_band is not None:
        return file
    known = file.rate >= sample_rate if full_band is None else file.domain in full_band
    return replace(file, full_band=known)

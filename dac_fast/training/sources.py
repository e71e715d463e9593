"""What there is to train on: audio files from folders and manifests, their domains, and the part held out.

A manifest is a JSONL file (in a folder: `manifest.jsonl`), one object a line: "file" (relative to the manifest), and
optionally "domain", "full_band" (true or false), "package" (the source it is from; what is held out is whole sources),
"seconds" and "rate" (where both are given, the file is not opened before it is drawn).
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from dac_fast.audio import AUDIO_SUFFIXES, AudioError, Recording

MANIFEST = "manifest.jsonl"


class DataError(ValueError):
    """Nothing to train on, or a manifest that cannot be read; one line that says where."""


@dataclass(frozen=True)
class AudioFile:
    """A file to draw excerpts from. seconds and rate (in Hz) are 0, and full_band is None, until they are known."""

    path: str
    domain: str
    package: str
    full_band: bool | None = None
    seconds: float = 0.0
    rate: int = 0


def find_files(
    sources, sample_rate: int, full_band: Sequence[str] | None = None, key: str = "data.train"
) -> tuple[list[AudioFile], dict[str, str]]:
    """All readable audio files of the sources, in an order that depends on nothing but their names.

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
    files = [file for domain, path in _listed(sources, key) for file in _files_of(Path(path), domain, key)]
    if not files:
        raise DataError(f"{key}: no audio in {_names(sources)}; accepted: {' '.join(AUDIO_SUFFIXES)}")
    with ThreadPoolExecutor(8) as pool:
        probed = list(pool.map(_probed, files))
    unreadable = {file.path: result for file, result in zip(files, probed, strict=True) if isinstance(result, str)}
    readable = [result for result in probed if not isinstance(result, str)]
    if not readable:
        path, reason = next(iter(unreadable.items()))
        raise DataError(f"{key}: none of {len(files)} files can be read, for example {path}: {reason}")
    return [_with_band(file, sample_rate, full_band) for file in readable], unreadable


def hold_out(files: list[AudioFile], share: float) -> tuple[list[AudioFile], list[AudioFile]]:
    """Splits files into training and validation, by whole sources ("package"), the same way every time.

    Of each domain the smallest sources are held out, until they make up `share` of its seconds; its last source is
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
        return [(str(domain), path) for domain, value in sources.items() for _, path in _listed(value, key)]
    raise DataError(f"{key} is {sources!r}; accepted: a folder or manifest, a list of these, or domains and these")


def _names(sources) -> str:
    return ", ".join(path for _, path in _listed(sources, ""))


def _files_of(path: Path, domain: str, key: str) -> list[AudioFile]:
    if path.is_dir() and (path / MANIFEST).is_file():
        path = path / MANIFEST
    if path.suffix == ".jsonl" and path.is_file():
        return _from_manifest(path, domain)
    if not path.is_dir():
        raise DataError(f"{key}: {path}: no such folder or .jsonl manifest")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and not p.name.startswith("."))
    files = []
    for p in found:
        # Without a given domain, a file's domain is the subfolder of the source that it lies in.
        inside = p.relative_to(path).parts
        files.append(AudioFile(str(p), domain or (inside[0] if len(inside) > 1 else path.name), package=str(p)))
    return files


def _from_manifest(path: Path, domain: str) -> list[AudioFile]:
    files = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file = str(path.parent / entry["file"])
            files.append(
                AudioFile(
                    path=file,
                    domain=domain or str(entry.get("domain", path.parent.name)),
                    package=str(entry.get("package", file)),
                    full_band=entry.get("full_band"),
                    seconds=float(entry.get("seconds", 0.0)),
                    rate=int(entry.get("rate", 0)),
                )
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f'{path}: line {number}: accepted: a JSON object with at least "file"') from error
    return files


def _probed(file: AudioFile) -> AudioFile | str:
    """The file with its length and rate, or why it cannot be read."""
    if file.seconds and file.rate:
        return file if os.path.isfile(file.path) else "no such file"
    try:
        recording = Recording(file.path)
    except (AudioError, OSError) as error:
        return str(error).removeprefix(f"{file.path}: ")
    return replace(file, seconds=recording.frames / recording.sample_rate, rate=recording.sample_rate)


def _with_band(file: AudioFile, sample_rate: int, full_band: Sequence[str] | None) -> AudioFile:
    if file.full_band is not None:
        return file
    return replace(file, full_band=file.rate >= sample_rate if full_band is None else file.domain in full_band)

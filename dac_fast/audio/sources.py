"""Audio files by folder or manifest, and what is known of them before they are opened.

A manifest is a JSONL file (in a folder: `manifest.jsonl`), one object a line: "file" (relative to
the manifest), and optionally "domain", "full_band" (true or false), "package" (the source it is
from), "seconds" and "rate".
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dac_fast import files
from dac_fast.audio import ffmpeg
from dac_fast.audio.reading import readable_suffixes

MANIFEST = "manifest.jsonl"


# What values of other types, without an end or too deep for the parser come to.
UNFIT = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


class SourceError(ValueError):
    """A folder or manifest that is missing, damaged, unreadable or without audio; one line."""


@dataclass(frozen=True)
class AudioFile:
    """An audio file.

    Attributes:
        path: where it lies.
        name: its path within its folder or manifest, the parts joined by "/".
        domain: speech, music, …: as the manifest says, else the first-level folder it lies in, else
            the name of the folder that was given.
        package: the source it is from; its path, where no manifest says.
        full_band: whether it has energy up to half the sample rate; None: not known.
        seconds, rate: its length, and its sample rate in Hz; 0: not known.
    """

    path: str
    name: str
    domain: str
    package: str
    full_band: bool | None = None
    seconds: float = 0.0
    rate: int = 0


def audio_files(source: str | os.PathLike[str], domain: str = "") -> list[AudioFile]:
    """The audio files of a folder or manifest, in the order of their names.

    Args:
        source: a manifest, or a folder: what its manifest lists, where it has one.
        domain: of all of them; "": as each one's says.
    Raises:
        SourceError: there are none, a line of the manifest does not describe one, or a subfolder
            cannot be read.
    """
    source = Path(source)
    manifest = source / MANIFEST if source.is_dir() else source
    found = _of_manifest(manifest, domain) if manifest.is_file() else files_below(source, domain)
    if not found:
        raise SourceError(f"no audio in {source}; accepted: {' '.join(readable_suffixes())}")
    return sorted(found, key=lambda file: file.name)


def files_below(folder: str | os.PathLike[str], domain: str = "") -> list[AudioFile]:
    """The audio files in a folder and its subfolders, whatever a manifest says.

    What is hidden is passed over, see `dac_fast.files.files_below`.

    Raises:
        SourceError: there is no such folder, or one in it cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise SourceError(str(error))

    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder or .jsonl manifest")
    paths = files.files_below(folder, readable_suffixes(), refuse)
    return [_audio_file(folder, str(path.relative_to(folder)), domain) for path in paths]


def left_out(folder: str | os.PathLike[str], suffixes: Sequence[str]) -> str:
    """A line on a folder's files that only ffmpeg reads, unless `suffixes` has theirs.

    "": there are none.
    """
    unread = tuple(suffix for suffix in ffmpeg.SUFFIXES if suffix not in suffixes)
    found = files.files_below(Path(folder), unread, lambda error: None)
    if not found:
        return ""
    names = ", ".join(file.name for file in found[:3]) + (", …" if len(found) > 3 else "")
    why = "are not read" if ffmpeg.installed() else "only ffmpeg reads, which is not installed"
    return f"left out {len(found)} files, whose formats {why}: {names}"


def _of_manifest(manifest: Path, domain: str) -> list[AudioFile]:
    text = manifest.read_text(encoding="utf-8", errors="replace")
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(_of_entry(manifest.parent, json.loads(line), domain))
        except UNFIT as error:
            accepted = 'a JSON object with at least "file"'
            raise SourceError(
                f"{manifest}: line {number} is {line.strip()[:80]!r}; accepted: {accepted}"
            ) from error
    return found


def _of_entry(folder: Path, entry: dict[str, Any], domain: str) -> AudioFile:
    """The file that a line of a manifest describes; raises where a value is of another type."""
    if entry.get("full_band") not in (None, True, False) or not Path(entry["file"]).name:
        raise ValueError
    types = {"package": str, "full_band": bool, "seconds": float, "rate": int}
    known = {key: type_(entry[key]) for key, type_ in types.items() if entry.get(key) is not None}
    return _audio_file(folder, entry["file"], domain or entry.get("domain"), **known)


def _audio_file(folder: Path, inside: str, domain: str | None, **known: Any) -> AudioFile:
    path, parts = str(folder / inside), Path(inside).parts
    if not domain:
        outside = len(parts) == 1 or Path(inside).is_absolute()
        domain = folder.resolve().name if outside else parts[0]
    return AudioFile(path, Path(inside).as_posix(), str(domain), **{"package": path} | known)

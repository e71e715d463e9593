"""Audio files by folder or manifest, and what is known of them before they are opened.

A manifest is a JSONL file (in a folder: `manifest.jsonl`), one object a line: "file" (relative to the manifest), and
optionally "domain", "full_band" (true or false), "package" (the source it is from), "seconds" and "rate".
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from dac_fast.audio.reading import AUDIO_SUFFIXES

MANIFEST = "manifest.jsonl"


class SourceError(ValueError):
    """A folder or manifest that is missing, damaged or without audio; one line that says where."""


@dataclass(frozen=True)
class AudioFile:
    """An audio file.

    Attributes:
        path: where it lies.
        name: its path within its folder or manifest, the parts joined by "/".
        domain: speech, music, …: as the manifest says, else the first-level folder it lies in, else the name of the
            folder that was given.
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


def audio_files(source: str | os.PathLike, domain: str = "") -> list[AudioFile]:
    """The audio files of a folder (of its manifest, where there is one) or of a manifest, in the order of their names.

    Args:
        source: the folder or manifest.
        domain: of all of them; "": as each one's says.
    Raises:
        SourceError: there are none, or a line of the manifest does not describe one.
    """
    source = Path(source)
    manifest = source / MANIFEST if source.is_dir() else source
    files = _of_manifest(manifest, domain) if manifest.is_file() else files_below(source, domain)
    if not files:
        raise SourceError(f"no audio in {source}; accepted: {' '.join(AUDIO_SUFFIXES)}")
    return sorted(files, key=lambda file: file.name)


def files_below(folder: str | os.PathLike, domain: str = "") -> list[AudioFile]:
    """The audio files in a folder and its subfolders, hidden ones left out, whatever a manifest says.

    Raises:
        SourceError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder or .jsonl manifest")
    paths = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in AUDIO_SUFFIXES and path.name[0] != "."
    )
    return [_audio_file(folder, str(path.relative_to(folder)), domain) for path in paths]


def _of_manifest(manifest: Path, domain: str) -> list[AudioFile]:
    files = []
    for number, line in enumerate(
        manifest.read_text(encoding="utf-8", errors="replace").splitlines(), start=1
    ):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if entry.get("full_band") not in (None, True, False):
                raise ValueError
            known = {
                key: convert(entry[key])
                for key, convert in {
                    "package": str,
                    "full_band": bool,
                    "seconds": float,
                    "rate": int,
                }.items()
                if entry.get(key) is not None
            }
            files.append(
                _audio_file(manifest.parent, entry["file"], domain or entry.get("domain"), **known)
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            accepted = 'a JSON object with at least "file"'
            raise SourceError(
                f"{manifest}: line {number} is {line.strip()[:80]!r}; accepted: {accepted}"
            ) from error
    return files


def _audio_file(folder: Path, inside: str, domain: str | None, **known) -> AudioFile:
    path, parts = str(folder / inside), Path(inside).parts
    if not domain:
        domain = (
            parts[0] if len(parts) > 1 and not Path(inside).is_absolute() else folder.resolve().name
        )
    return AudioFile(path, Path(inside).as_posix(), str(domain), **{"package": path} | known)

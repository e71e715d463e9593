"""Weights of the presets: the bundled one, and the published ones in a cache folder, downloaded when first needed.

DAC_FAST_CACHE names the cache folder (else `dac_fast` in the user's cache). DAC_FAST_MIRROR names another source of
the same files, an address or a folder, laid out as the published releases are: `<tag>/<file>`.
"""

import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from dac_fast.config import PRESETS
from dac_fast.storage import checkpoint
from dac_fast.storage.checkpoint import CheckpointError

RELEASES = "https://github.com/descriptinc/descript-audio-codec/releases/download"
PUBLISHED = {
    "44khz": "0.0.1/weights.pth",
    "44khz_16kbps": "1.0.0/weights_44khz_16kbps.pth",
    "24khz": "0.0.4/weights_24khz.pth",
    "16khz": "0.0.5/weights_16khz.pth",
}
ASSETS = Path(__file__).parents[1] / "assets"
TIMEOUT_SECONDS = 30


class DownloadError(OSError):
    """Weights that cannot be had, with the reason in one line."""


def cache_folder() -> Path:
    """Where downloaded weights are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dac_fast"
    return Path(os.environ.get("DAC_FAST_CACHE", default))


def cached(name: str) -> Path:
    """Where a preset's weights are, or will be once they are downloaded.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(
            f"unknown model {name!r}; accepted: {', '.join(PRESETS)}, or the path of a checkpoint"
        )
    return cache_folder() / f"{name}.pth" if name in PUBLISHED else ASSETS / f"{name}.safetensors"


def download(
    name: str,
    mirror: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
):
    """Fetch a preset's weights into the cache, unless they are there. A download that broke off is continued.

    Args:
        name: preset.
        mirror: another source, see the module; None: DAC_FAST_MIRROR, else the published releases.
        progress: called with the bytes there are and the bytes there will be.
    Returns:
        the path of the weights.
    Raises:
        DownloadError: they cannot be had, or are damaged or of another model.
    """
    target = cached(name)
    if target.exists():
        return target
    source = (
        f"{(mirror or os.environ.get('DAC_FAST_MIRROR') or RELEASES).rstrip('/')}/{PUBLISHED[name]}"
    )
    partial = target.with_name(target.name + ".part")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if "://" in source:
            _fetch(source, partial, progress)
        else:
            shutil.copyfile(source, partial)
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(f"cannot get {name} from {source}: {reason}") from error
    try:
        _verify(name, partial)
    except CheckpointError as error:
        partial.unlink()
        raise DownloadError(f"what {source} sent is damaged and was removed: {error}") from error
    os.replace(partial, target)
    return target


def _fetch(source: str, partial: Path, progress: Callable[[int, int], None]):
    """Append to the partial file what it still lacks."""
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(source, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        # 416, range not satisfiable: the partial file is whole already
        if done and error.code == 416:
            return
        raise
    with response:
        if response.status != 206:
            done = 0
        total = done + int(response.headers.get("Content-Length", 0))
        with open(partial, "ab" if done else "wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
                done += len(block)
                progress(done, total)
    if done < total:
        raise ConnectionError(
            f"it broke off after {done} of {total} bytes; call again to go on from there"
        )


def _verify(name: str, path: Path):
    """Check every record's CRC-32 (a .pth file is a zip archive), and that the configuration is the preset's."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except zipfile.BadZipFile as error:
        raise CheckpointError(str(error)) from error
    if broken:
        raise CheckpointError(f"{broken} has a wrong checksum")
    found, expected = checkpoint.read(path)[0].to_dict(), PRESETS[name].to_dict()
    for key in expected:
        if key != "quantizer_dropout" and found[key] != expected[key]:
            raise CheckpointError(f"{key} is {found[key]}, that of {name} is {expected[key]}")

"""Weights of the presets: the bundled one, and the published ones, downloaded when first needed.

DAC_FAST_CACHE names the cache folder (else `dac_fast` in the user's cache). DAC_FAST_MIRROR names
another source of the same files, an address or a folder, laid out as the published releases are:
`<tag>/<file>`. A mirror may have a `<file>.sha256` beside a file, as `sha256sum` writes it: what
comes is then checked against that. The cache has one beside each file for whoever wants to compare;
loading does not read it, which would take longer than reading the weights.

By hand, because no library does it: pooch begins anew what broke off, huggingface_hub goes on, but
from its own hub only, and both follow a source for as long as it sends a byte now and then.
"""

import contextlib
import hashlib
import http.client
import os
import queue
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from dac_fast.config import PRESETS, UNTRAINED
from dac_fast.files import write_bytes
from dac_fast.storage import checkpoint
from dac_fast.storage.checkpoint import CheckpointError, printable

RELEASES = "https://github.com/descriptinc/descript-audio-codec/releases/download"
PUBLISHED = {
    "44khz": "0.0.1/weights.pth",
    "44khz_16kbps": "1.0.0/weights_44khz_16kbps.pth",
    "24khz": "0.0.4/weights_24khz.pth",
    "16khz": "0.0.5/weights_16khz.pth",
}
ASSETS = Path(__file__).parents[1] / "assets"
TIMEOUT_SECONDS = 30.0
SLOWEST = 1000  # bytes per second, on average over TIMEOUT_SECONDS
MOST_BYTES = 4 << 30


class DownloadError(OSError):
    """Weights that cannot be had, with the reason in one line."""


def cache_folder() -> Path:
    """Where downloaded weights are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dac_fast"
    return Path(os.environ.get("DAC_FAST_CACHE", default))


def cached(name: str) -> Path:
    """Where a preset's weights are, or will be once they are downloaded.

    Raises:
        ValueError: no such preset, or one without published weights.
    """
    if name in UNTRAINED:
        raise ValueError(
            f"{name} has no published weights; accepted: the path of a checkpoint, "
            f"which dac-fast train {name} makes"
        )
    if name not in PRESETS:
        raise ValueError(
            f"unknown model {name!r}; accepted: {', '.join(PRESETS)}, or the path of a checkpoint"
        )
    return cache_folder() / f"{name}.pth" if name in PUBLISHED else ASSETS / f"{name}.safetensors"


def download(
    name: str,
    mirror: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Fetch a preset's weights into the cache, unless they are there; returns their path.

    A download that broke off is continued. Several processes may ask for the same weights at once:
    one of them fetches, the others wait for it.

    Args:
        name: preset.
        mirror: another source, see the module; None: DAC_FAST_MIRROR, else the published releases.
        progress: called with the bytes there are and the bytes there will be.
    Raises:
        DownloadError: they cannot be had, or are damaged or of another model.
    """
    target = cached(name)
    if target.exists():
        return target
    root = mirror or os.environ.get("DAC_FAST_MIRROR") or RELEASES
    source = f"{root.rstrip('/')}/{PUBLISHED[name]}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not target.exists():
                partial = target.with_name(f"{target.name}.part")
                digest = _fill(name, source, partial, progress)
                write_bytes(f"{target}.sha256", f"{digest}  {target.name}\n".encode())
                os.replace(partial, target)
    except CheckpointError as error:
        raise DownloadError(f"what {source} sent is damaged and was removed: {error}") from error
    # ValueError: an address that is none.
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", None) or error
        reason = printable(str(getattr(cause, "strerror", None) or cause or type(error).__name__))
        accepted = (
            "the path of a checkpoint (--model PATH), or a mirror that has "
            f"{PUBLISHED[name]} (DAC_FAST_MIRROR, or dac-fast download --mirror)"
        )
        raise DownloadError(
            f"cannot get {name} from {source}: {reason}; accepted without it: {accepted}"
        ) from error
    return target


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keeps other processes and threads from fetching the same file meanwhile."""
    lock = target.with_name(f"{target.name}.lock")
    with FileLock(lock):
        try:
            yield
        finally:
            # Those that wait for it will find the weights, or lock a new file.
            with contextlib.suppress(PermissionError):  # Windows keeps what is open
                lock.unlink(missing_ok=True)


def _fill(name: str, source: str, partial: Path, progress: Callable[[int, int], None]) -> str:
    """Complete the partial file and return its SHA-256; remove it where it is damaged.

    Raises:
        CheckpointError: it is, even where all of it came from `source` now.
    """
    continued = partial.exists() and "://" in source
    if "://" in source:
        _fetch(source, partial, progress)
    else:
        shutil.copyfile(source, partial)
    try:
        return _verified(name, source, partial)
    except CheckpointError:
        partial.unlink()
        if not continued:
            raise
    # What was there before may have been of another file.
    return _fill(name, source, partial, progress)


def _fetch(source: str, partial: Path, progress: Callable[[int, int], None]) -> None:
    """Append to the partial file what it still lacks."""
    done = partial.stat().st_size if partial.exists() else 0
    try:
        response = _opened(source, {"Range": f"bytes={done}-"} if done else {})
    except urllib.error.HTTPError as error:
        # 416, range not satisfiable: the partial file is whole already.
        if done and error.code == 416:
            return
        raise
    with response:
        if response.status != 206:
            done = 0
        total = done + int(response.headers.get("Content-Length", 0))
        with open(partial, "ab" if done else "wb") as file:
            for block in _blocks(response):
                file.write(block)
                done += len(block)
                if max(done, total) > MOST_BYTES:
                    raise ConnectionError(f"it is larger than {MOST_BYTES} bytes")
                progress(done, total)
            os.fsync(file.fileno())
    if done < total:
        raise ConnectionError(
            f"it broke off after {done} of {total} bytes; call again to go on from there"
        )


def _opened(source: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """The source's answer, in a given time.

    `urlopen` has no limit for the whole of name lookup, connection and headers, hence the thread.
    """
    answers: queue.Queue[http.client.HTTPResponse | Exception] = queue.Queue()

    def ask() -> None:
        request = urllib.request.Request(source, headers=headers)
        try:
            answers.put(urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS))
        except Exception as error:  # raised by the thread that waits for it
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=2 * TIMEOUT_SECONDS)
    except queue.Empty as error:
        raise TimeoutError(f"no answer within {2 * TIMEOUT_SECONDS:g} s") from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """What an answer holds, for as long as it comes at SLOWEST or quicker."""
    since, received = time.monotonic(), 0
    # `read` would wait for a whole block, however slowly it comes.
    while block := response.read1(1 << 20):
        yield block
        received += len(block)
        if time.monotonic() - since > TIMEOUT_SECONDS:
            if received < SLOWEST * TIMEOUT_SECONDS:
                raise TimeoutError(f"it sends less than {SLOWEST} bytes a second")
            since, received = time.monotonic(), 0


def _verified(name: str, source: str, path: Path) -> str:
    """The file's SHA-256, if it is whole, of the preset, and what the source's `.sha256` says.

    Raises:
        CheckpointError: it is not.
    """
    found, expected = checkpoint.read(path)[0].to_dict(), PRESETS[name].to_dict()
    for key in expected:
        if key != "quantizer_dropout" and found[key] != expected[key]:
            raise CheckpointError(f"{key} is {found[key]}, that of {name} is {expected[key]}")
    with open(path, "rb") as file:
        digest = _sha256(file)
    published = _published_sha256(source)
    if published not in (None, digest):
        raise CheckpointError(f"its SHA-256 is {digest}, that of {source}.sha256 is {published}")
    return digest


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _published_sha256(source: str) -> str | None:
    """What `source`.sha256 says; None where there is none."""
    beside = f"{source}.sha256"
    try:
        if "://" in source:
            with _opened(beside, {}) as response:
                text = next(_blocks(response), b"")
        else:
            text = Path(beside).read_bytes()
    except (OSError, http.client.HTTPException):
        return None
    found = re.match(rb"[0-9a-f]{64}\b", text)
    return found[0].decode() if found else None

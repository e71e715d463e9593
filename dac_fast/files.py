"""Writing a file whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(OSError):
    """A file cannot be written; one line that names it and says why."""


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new, empty file's path to write to; it takes `path`'s place when the block ends well.

    The temporary file lies beside `path` (hidden, with the same suffix). It is flushed to the disk before it is
    renamed, and removed when the block raises. Killed at any moment, the process leaves `path` as it was, or complete.

    Raises:
        OutputError: the folder is missing or cannot be written, or `path` is something other than a file.
    """
    # A symbolic link stays one: what it points to is replaced.
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OutputError(f"{path}: cannot write: it exists and is not a regular file")
    if not target.parent.is_dir():
        raise OutputError(f"{path}: cannot write: there is no folder {target.parent}")
    temporary = target.with_name(f".{target.stem[:64]}.{secrets.token_hex(4)}{target.suffix}")
    try:
        # Not `tempfile`: its files are private to the user, whatever the umask says.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror}") from error
    try:
        yield temporary
        try:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise OutputError(f"{path}: cannot write: {error.strerror}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(path: str | os.PathLike):
    """Makes a folder and those above it, where they are missing.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OutputError(f"{path}: cannot write there: it is a file, not a folder") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot make this folder: {error.strerror}") from error


def write_bytes(path: str | os.PathLike, data: bytes):
    """Makes `data` the content of the file; raises as `atomic_path` does, or where the disk is full."""
    with atomic_path(path) as temporary:
        try:
            temporary.write_bytes(data)
        except OSError as error:
            raise OutputError(f"{path}: cannot write: {error.strerror}") from error

"""Files are found by one search of folders, and written whole or not at all."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(OSError):
    """A file cannot be written; one line that names it and says why."""


def files_below(
    folder: Path, suffixes: tuple[str, ...], unreadable: Callable[[OSError], None]
) -> list[Path]:
    """The files of a folder and its subfolders that end in one of the suffixes, sorted.

    What is hidden (a name that begins with ".", macOS's `._x.wav` included) is passed over, folder
    or file; the folder given may be hidden itself. Links to folders are followed, unless they lead
    back to a folder that they lie in.

    Args:
        folder: where to search.
        suffixes: in lower case; those of the files may be in any.
        unreadable: called with the error of every subfolder that cannot be read; `str` names it.
    """
    found = []
    # Folders to go through, each with the device and inode numbers of those that it lies in.
    todo: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while todo:
        place, above = todo.pop()
        try:
            status = place.stat()
            identity = (status.st_dev, status.st_ino)
            entries = [] if identity in above else list(os.scandir(place))
        except OSError as error:
            unreadable(OSError(f"{place}: cannot read this folder: {error.strerror}"))
            continue
        for entry in entries:
            path = place / entry.name
            if entry.name.startswith("."):
                continue
            if os.path.isdir(path):
                todo.append((path, above | {identity}))
            elif path.suffix.lower() in suffixes:
                found.append(path)
    return sorted(found)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of a new, empty file, which replaces `path` when the block ends well.

    The temporary file lies beside `path` (hidden, with the same suffix). It is flushed to the disk
    before it is renamed, and removed when the block raises. Killed at any moment, the process
    leaves `path` as it was, or complete. Written by hand, because no library does all of this.

    Raises:
        OutputError: the folder is missing or cannot be written, or `path` is no regular file.
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


def make_folder(path: str | os.PathLike[str]) -> None:
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


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Makes `data` the content of the file.

    Raises:
        OutputError: as `atomic_path`, or the disk is full.
    """
    with atomic_path(path) as temporary:
        try:
            temporary.write_bytes(data)
        except OSError as error:
            raise OutputError(f"{path}: cannot write: {error.strerror}") from error

"""Files are found by one search of folders, and written whole or not at all."""

import fcntl
import functools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
def atomic_path(path: str | os.PathLike[str], replace: bool = True) -> Iterator[Path]:
    """Yields the path of a new, empty file, which takes the place of `path` when the block ends.

    The new file lies beside `path` (hidden, with the same suffix). It is flushed to the disk before
    it is renamed, and removed when the block raises. Killed at any moment, the process leaves
    `path` as it was, or complete; what a killed process leaves beside it is removed by the next one
    that writes into the folder. Written by hand, because no library does all of this.

    Args:
        path: to write. What a symbolic link points to is written; the link stays.
        replace: False: to raise where `path` is there when the block ends, even if another process
            has made it meanwhile.
    Raises:
        OutputError: the folder is missing or cannot be written, `path` is no regular file, or the
            disk is full.
        FileExistsError: `path` is there and not to be replaced.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OutputError(f"{path}: cannot write: it exists and is not a regular file")
    if not target.parent.is_dir():
        raise OutputError(f"{path}: cannot write: there is no folder {target.parent}")
    _sweep_once(target.parent)
    try:
        temporary, lock = _new_temporary(target)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror}") from error
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, target)
        else:
            _move_to_free(temporary, target)
    except OSError as error:
        # What is a sentence already, or about another file, is left as it is.
        if error.errno is None or error.filename not in (None, os.fspath(temporary)):
            raise
        raise OutputError(f"{path}: cannot write: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


# The names of temporary files, and of temporary folders, which have no suffix.
_TEMPORARY = re.compile(r"\..*\.dac_fast-[0-9a-f]{8}(?P<suffix>\..*)?", re.DOTALL)


def _new_temporary(target: Path, folder: bool = False) -> tuple[Path, int]:
    """A new file or folder beside `target`, and its descriptor, which locks it against `sweep`."""
    while True:
        # A name has room for 255 bytes.
        start, end = f".{target.stem[:32]}.dac_fast-", "" if folder else target.suffix[:16]
        path = target.with_name(start + secrets.token_hex(4) + end)
        # Not `tempfile`: its files are private to the user, whatever the umask says.
        if folder:
            path.mkdir()
            descriptor = os.open(path, os.O_RDONLY)
        else:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        # Where the file system has no locks, `sweep` removes nothing.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The file may have been swept before it was locked.
        if path.exists():
            return path, descriptor
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Removes the temporary files and folders that killed processes have left in a folder."""
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if match := _TEMPORARY.fullmatch(entry.name):
                is_folder = entry.is_dir(follow_symlinks=False)
                if entry.is_file(follow_symlinks=False) or (is_folder and not match["suffix"]):
                    _remove_unless_locked(entry.path, is_folder)


_sweep_once = functools.cache(sweep)


def _remove_unless_locked(path: str, is_folder: bool) -> None:
    with suppress(OSError):
        descriptor = os.open(path, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_folder:
                shutil.rmtree(path)
            else:
                os.unlink(path)
        finally:
            os.close(descriptor)


def _move_to_free(temporary: Path, target: Path) -> None:
    """Renames a file, unless there is one of the new name."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if target.exists():
            raise FileExistsError(f"{target}: another process wrote it meanwhile") from error
        # The file system has no links: another process can come between this and the last step.
        os.replace(temporary, target)


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


def write_bytes(path: str | os.PathLike[str], data: bytes, replace: bool = True) -> None:
    """Makes `data` the content of the file; raises as `atomic_path`."""
    with atomic_path(path, replace) as temporary:
        temporary.write_bytes(data)


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Writes files into a folder, by their names; what else the folder holds stays there.

    A new folder appears with all of them or not at all. In one that is there, none is replaced
    before all are on the disk; a process that is killed while it renames them leaves some replaced.

    Raises:
        OutputError: they cannot be written.
    """
    target = Path(path)
    make_folder(target.parent)
    _sweep_once(target.parent)
    try:
        temporary, lock = _new_temporary(target, folder=True)
        try:
            for name, data in files.items():
                write_bytes(temporary / name, data)
            if target.is_dir():
                for name in files:
                    os.replace(temporary / name, target / name)
            else:
                os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error

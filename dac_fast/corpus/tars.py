"""Recordings in a WebDataset tar: its audio members, and what others of the same name say."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from dac_fast.audio.reading import AUDIO_SUFFIXES
from dac_fast.audio.sources import UNFIT
from dac_fast.corpus.items import Item, Metadata, header_of, key_of, open_file, parsed


class _Part(io.RawIOBase):
    """A part of a seekable file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, size: int):
        self.file = file
        self.offset = offset
        self.size = size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = start + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        data = self.file.read(max(min(len(buffer), self.size - self.position), 0))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def items_of_tar(path: str, file_name: str) -> Iterator[Item]:
    """The audio members of a tar; `.json` and `.txt` members of the same name are metadata."""
    members: list[tuple[str, tuple[int, int], tuple[float, int]]] = []
    metadata: dict[str, Metadata] = {}
    problems: dict[str, str] = {}
    broken = ""
    try:
        with open_file(path) as content, tarfile.open(fileobj=content, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                # Hidden members, as macOS's `._x.wav`, are passed over as in folders.
                hidden = any(part.startswith(".") and part != ".." for part in name.parts)
                if hidden or not member.isfile():
                    continue
                if name.suffix.lower() in AUDIO_SUFFIXES:
                    place = (member.offset_data, member.size)
                    members.append((member.name, place, header_of(_Part(content, *place))))
                elif name.suffix in (".json", ".txt"):
                    data = _Part(content, member.offset_data, member.size).read()
                    try:
                        text = data.decode()
                        found = parsed(text) if name.suffix == ".json" else {"text": text}
                        metadata.setdefault(_sample(member.name), {}).update(found)
                    except UNFIT:
                        problems[_sample(member.name)] = f"its {name.suffix} is damaged"
            # A damaged or missing header ends the loop like the two blocks of zeros at the end do.
            content.seek(tar.offset)
            if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a member nor the end at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        broken = f"a damaged tar; what it holds beyond {len(members)} recordings is lost ({error})"
    for audio, place, header in members:
        own = metadata.get(_sample(audio), {})
        problem = problems.get(_sample(audio), "")
        yield Item(key_of(audio), path, place, *header, own, problem)
    if broken or not members:
        yield Item(file_name, path, problem=broken or "a tar without recordings")


def _sample(name: str) -> str:
    """What the members of a WebDataset sample have in common: the name up to the first dot."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".", 1)[0]))

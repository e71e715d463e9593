"""The plan: which recording goes into which shard. It is made before anything is encoded.

The plan follows from the sources, the length of a shard and the seed alone, so every run on every
machine makes the same shards. It is a file with a line of JSON per shard, of which one is held at a
time: memory does not grow with the corpus once the plan is made.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from dac_fast.corpus.items import Item, SourceError
from dac_fast.corpus.sources import Found, items_of
from dac_fast.files import write_bytes

# Files whose headers are read at once while a plan is made; most of the time goes into waiting.
THREADS = 8
# Where lengths are not known, a shard still ends somewhere.
MOST_ITEMS = 100_000


@dataclass(frozen=True)
class Shard:
    """Recordings that are written together.

    Attributes:
        number: counted from 0.
        seconds: of audio, as the headers say.
        items: in the order in which they are written.
    """

    number: int
    seconds: float
    items: list[Item]

    @property
    def name(self) -> str:
        """The shard's file, without its suffix."""
        return f"shard-{self.number:06d}"


def make(
    files: Sequence[Found], audio_column: str, shard_seconds: float, seed: int | None
) -> Iterator[Shard]:
    """All shards, in order.

    Args:
        files: of the sources.
        audio_column: of Parquet files.
        shard_seconds: a shard ends with the item that reaches that length.
        seed: the order of items is shuffled by it; None: they are in the order of their keys.
    Raises:
        SourceError: two items have one key, or a source cannot be understood.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        groups = pool.map(partial(items_of, audio_column=audio_column), files)
        items = sorted((item for group in groups for item in group), key=lambda item: item.key)
    for one, other in pairwise(items):
        if one.key == other.key:
            raise SourceError(
                f"two recordings have the key {one.key!r}: {one.path} and {other.path}; "
                "rename one, or tokenize them apart"
            )
    if seed is not None:
        items = [items[i] for i in np.random.default_rng(seed).permutation(len(items))]
    return _shards(items, shard_seconds)


def _shards(items: Iterable[Item], shard_seconds: float) -> Iterator[Shard]:
    number, seconds = 0, 0.0
    inside: list[Item] = []
    for item in items:
        inside.append(item)
        seconds += item.seconds
        if seconds >= shard_seconds or len(inside) == MOST_ITEMS:
            yield Shard(number, seconds, inside)
            number += 1
            seconds = 0.0
            inside = []
    if inside:
        yield Shard(number, seconds, inside)


def save(path: Path, shards: Iterable[Shard]) -> None:
    """Writes a plan. Raises OutputError as `write_bytes` does."""
    # In ASCII, since paths may have bytes that are not UTF-8.
    lines = (json.dumps(asdict(shard)) + "\n" for shard in shards)
    write_bytes(path, "".join(lines).encode())


class Plan:
    """A plan's file.

    Attributes:
        seconds: of audio in each shard, as the headers say.
        counts: items in each shard.
    """

    def __init__(self, path: Path):
        self.path = path
        self.seconds: list[float] = []
        self.counts: list[int] = []
        self._offsets = [0]
        with open(path, "rb") as file:
            for line in file:
                shard = json.loads(line)
                self.seconds.append(shard["seconds"])
                self.counts.append(len(shard["items"]))
                self._offsets.append(self._offsets[-1] + len(line))

    def __len__(self) -> int:
        return len(self.seconds)

    def shard(self, number: int) -> Shard:
        """A shard with its items."""
        with open(self.path, "rb") as file:
            file.seek(self._offsets[number])
            values = json.loads(file.readline())
        items = [
            Item(**{**item, "place": item["place"] and tuple(item["place"])})
            for item in values["items"]
        ]
        return Shard(values["number"], values["seconds"], items)

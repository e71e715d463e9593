"""Datasets of codes read back."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from dac_fast.corpus import shards
from dac_fast.corpus.folder import read_card, report_path
from dac_fast.corpus.shards import Record


class CodesDataset(IterableDataset[Record]):
    """The records of a dataset: (key, codes uint16 [C, N, F], metadata).

    Shards are dealt out to the processes of `torch.distributed` and the workers of a `DataLoader`,
    so a record comes once in all of them together. For all to have work, there should be as many
    shards as there are workers in all processes.

    The state says which record is next in this worker. A `StatefulDataLoader` (of torchdata) keeps
    it for all workers, and so it goes on at the same record.

    Args:
        folder: the dataset's. It may be incomplete; shards that are there now are read.
        seed: shards, and the records in each, come in an order shuffled by it and the epoch; None:
            in the dataset's own order.

    Raises:
        DatasetError: the folder is no dataset.
    """

    def __init__(self, folder: str | os.PathLike[str], seed: int | None = None):
        self.card = read_card(Path(folder))
        found = sorted(Path(folder).glob(f"shard-*{self.card.layout.suffix}"))
        self.shards = [path for path in found if report_path(path).exists()]
        self.seed = seed
        self.epoch = 0
        self._shard = self._record = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of another epoch, from its beginning."""
        self.epoch = epoch
        self._shard = 0
        self._record = 0

    def state_dict(self) -> dict[str, int]:
        """Which record is next."""
        return {"epoch": self.epoch, "shard": self._shard, "record": self._record}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on with the record that was next."""
        self.epoch = state["epoch"]
        self._shard = state["shard"]
        self._record = state["record"]

    def __iter__(self) -> Iterator[Record]:
        mine = self._mine()
        while self._shard < len(mine):
            path = mine[self._shard]
            records = shards.read(path, self.card.layout)
            if self.seed is not None:
                records = iter(self._shuffled(list(records), path.name))
            for number, record in enumerate(records):
                if number < self._record:
                    continue
                self._record = number + 1
                yield record
            self._shard, self._record = self._shard + 1, 0
        self._shard = 0

    def _mine(self) -> list[Path]:
        """The shards of this process and worker, in the order of this epoch."""
        rank, ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        ordered = self.shards if self.seed is None else self._shuffled(self.shards, "")
        return ordered[rank * workers + number :: ranks * workers]

    def _shuffled(self, things: list[Any], name: str) -> list[Any]:
        ordered = list(things)
        random.Random(f"{self.seed} {self.epoch} {name}").shuffle(ordered)
        return ordered


def read(folder: str | os.PathLike[str], seed: int | None = None) -> CodesDataset:
    """The records of a dataset, see `CodesDataset`."""
    return CodesDataset(folder, seed)

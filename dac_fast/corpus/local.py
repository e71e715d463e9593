"""Shards made in this process: a thread per worker, each with a thread that reads ahead."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

from dac_kernels import native
from torch import Tensor

from dac_fast.corpus.encoding import BATCH_SECONDS, Encoder, Reading, record_of
from dac_fast.corpus.folder import Card, Failure, Folder, Work, write_shard
from dac_fast.corpus.meter import Meter
from dac_fast.corpus.plan import Shard
from dac_fast.corpus.shards import Record
from dac_fast.recordings.pipeline import assembled, in_batches, read_ahead
from dac_fast.recordings.windows import Window


def run(
    folder: Folder,
    work: Work,
    encoders: Sequence[Encoder],
    batch_seconds: float | None,
    meter: Meter,
) -> None:
    """Makes all shards that there are to make.

    Args:
        folder: of the dataset.
        work: its shards.
        encoders: one for each worker.
        batch_seconds: audio that a worker may hold to encode it in common launches; None: see
            `BATCH_SECONDS`.
        meter: told of everything.
    Raises:
        OutputError: a shard cannot be written.
        EncodingError: the model cannot encode.
    """
    meter.capacity = dict.fromkeys(meter.capacity, len(encoders))
    if batch_seconds is None:
        batch_seconds = BATCH_SECONDS[encoders[0].device.type]
    workers = [_Worker(folder, work, encoder, batch_seconds, meter) for encoder in encoders]
    with ThreadPoolExecutor(len(workers)) as pool:
        futures = [pool.submit(worker.run) for worker in workers]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for worker in workers:
                worker.stopped.set()
        for future in futures:
            future.result()


class _Worker:
    """Makes shard after shard.

    Attributes:
        stopped: set to have it end with the recording that it is at.
    """

    def __init__(
        self, folder: Folder, work: Work, encoder: Encoder, batch_seconds: float, meter: Meter
    ):
        self.folder = folder
        self.work = work
        self.meter = meter
        self.encoder, self.batch_seconds = encoder, batch_seconds
        self.stopped = threading.Event()

    # Sums over a window would depend on how many threads share it.
    @native.torch_on_one_thread(1)
    def run(self) -> None:
        while not self.stopped.is_set() and (claimed := self.work.claim(stopped=self.stopped)):
            [shard] = claimed
            outcomes = []
            for outcome in self._outcomes(shard):
                if self.stopped.is_set():
                    return
                outcomes.append(outcome)
            keys = [item.key for item in self.folder.plan.shard(shard.number).items]
            with self.meter.during("writing"):
                path = self.folder.shard_path(shard.number)
                write_shard(path, self.folder.card.layout, keys, outcomes)
            self.work.written(shard)
            failures = sum(isinstance(outcome, Failure) for outcome in outcomes)
            self.meter.shard(shard.seconds, len(outcomes) - failures, failures)

    def _outcomes(self, shard: Shard) -> Iterator[Record | Failure]:
        """What becomes of each recording of a shard, in order."""
        card = self.folder.card
        settings = card.settings
        readings = [
            Reading(self.encoder.codec, item, settings.normalize_db, settings.audio_column)
            for item in shard.items
        ]
        jobs = [_Job(reading, self.meter, card) for reading in readings]
        ahead = self.meter.taking("waiting", read_ahead(jobs, threads=1))
        computed = in_batches(ahead, self._begin, self.batch_seconds)
        for job, outcome in zip(jobs, assembled(computed), strict=True):
            if isinstance(outcome, Exception):
                yield Failure(job.reading.item.key, job.reading.reason(outcome))
            else:
                yield outcome

    def _begin(self, windows: Sequence[Window]) -> Callable[[], list[Tensor]]:
        with self.meter.during("encoding"):
            collect = self.encoder.begin(windows)

        def timed() -> list[Tensor]:
            with self.meter.during("encoding"):
                return collect()

        return timed


@dataclass(eq=False)
class _Job:
    """A recording of a shard on its way to its record."""

    reading: Reading
    meter: Meter
    card: Card

    def windows(self) -> Iterator[Window]:
        return self.meter.taking("reading", self.reading.windows())

    def result(self, outputs: Iterator[Tensor]) -> Record:
        codes = [output[0].numpy().astype("uint16") for output in outputs]
        # Reading has ended with the last window.
        assert self.reading.facts is not None
        name, layout = self.card.model.name, self.card.layout
        return record_of(self.reading.item, self.reading.facts, codes, name, layout)

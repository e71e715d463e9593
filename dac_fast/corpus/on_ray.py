"""Shards made by Ray Data: tasks read, a pool of actors encodes, tasks write.

Rows of the stream are windows. A recording's last row has no window, but what was found about the
recording. Ray holds the rows in its object store and stops tasks whose output nobody takes, so
memory does not grow with the corpus. Rows come in any order, and again where a worker died;
`_Assembly` puts them together by their numbers.

A Ray that is started here is of this machine alone, has no dashboard, and ends with the run. One
stream makes as many shards as `STREAM_PIECES` allows, then the next begins.
"""

import functools
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dac_fast.codec import DAC
from dac_fast.config import Config
from dac_fast.corpus.encoding import BATCH_SECONDS, Facts, Reading, load_encoder, record_of
from dac_fast.corpus.folder import Card, Failure, Folder, Work, write_shard
from dac_fast.corpus.items import Item
from dac_fast.corpus.meter import Meter
from dac_fast.corpus.plan import Shard
from dac_fast.corpus.shards import Codes, Layout, Record
from dac_fast.processors import processors
from dac_fast.recordings.compress import DEFAULT_CHUNK_SECONDS
from dac_fast.recordings.windows import Window
from dac_fast.storage.dac2 import DACFileError

if TYPE_CHECKING:
    import pyarrow as pa

# Audio that a task reads, in seconds: neighbours of one shard.
PIECE_SECONDS = 600.0
# Pieces of a stream: each is a task, which Ray keeps in mind until the stream ends.
STREAM_PIECES = 2000
# Pieces that a process reads before another takes its place.
READER_CALLS = 1000
# Bytes of windows that Ray moves at once.
BLOCK_BYTES = 32 << 20
# Shards that are written at once.
WRITERS = 4
# Memory of this machine's own Ray for each reader and worker. What does not fit goes to the disk.
STORE_BYTES = 256 << 20


@dataclass(frozen=True)
class Spec:
    """What tasks and actors have to know.

    Attributes:
        model: a preset, or the path of a checkpoint on every machine.
        config: of the model.
        card: of the dataset.
        precision: of the encoder.
    """

    model: str
    config: Config
    card: Card
    precision: str


@dataclass(frozen=True)
class Wanted:
    """What was asked for; None: what fits the machines.

    Attributes:
        device: "cpu", "cuda", or "auto": GPUs where there are some.
        workers: actors that encode, or the least and the most of them.
        readers: tasks that read at once.
        batch_seconds: audio that an actor takes at once.
    """

    device: str = "auto"
    workers: int | tuple[int, int] | None = None
    readers: int | None = None
    batch_seconds: float | None = None


@dataclass(frozen=True)
class Pools:
    """What machines with so many CPUs and GPUs are going to run."""

    device: str
    least: int
    most: int
    readers: int
    batch_seconds: float

    @classmethod
    def of(cls, wanted: Wanted, cpus: int, gpus: int) -> "Pools":
        """The pools that were asked for, or that fit."""
        device = wanted.device
        if device == "auto":
            device = "cuda" if gpus else "cpu"
        workers = wanted.workers or (gpus if device == "cuda" else cpus) or 1
        least, most = (workers, workers) if isinstance(workers, int) else workers
        seconds = wanted.batch_seconds
        seconds = BATCH_SECONDS[device] if seconds is None else seconds
        return cls(device, least, most, wanted.readers or cpus, seconds)


class RayFailedError(OSError):
    """Ray, or a worker beyond what Ray makes up for; the shards that are written stay."""


def require() -> None:
    """Raises ValueError where Ray is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"Ray is not installed ({error}); accepted: pip install 'dac-fast[corpus]', or --local"
        ) from error


def run(
    folder: Folder, work: Work, spec: Spec, wanted: Wanted, address: str | None, meter: Meter
) -> None:
    """Makes all shards that there are to make.

    Args:
        folder: of the dataset.
        work: its shards.
        spec: for tasks and actors.
        wanted: how many of these.
        address: of a Ray cluster; None: a Ray is started here.
        meter: told of everything.
    Raises:
        OutputError: a shard cannot be written.
        RayFailedError: Ray gave up; its message ends with what the last worker said.
    """
    import ray

    try:
        _run(folder, work, spec, wanted, address, meter)
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()[-1]
        raise RayFailedError(
            f"Ray gave up ({said}); the same command goes on with the shards that are missing"
        ) from error


def _run(
    folder: Folder, work: Work, spec: Spec, wanted: Wanted, address: str | None, meter: Meter
) -> None:
    with _connected(address, wanted) as pools:
        meter.capacity = {
            "reading": pools.readers,
            "waiting": pools.most,
            "encoding": pools.most,
            "writing": WRITERS,
        }
        metrics = _Metrics()
        shard_seconds = max(spec.card.settings.shard_hours * 3600, PIECE_SECONDS)
        while claimed := work.claim(max(int(STREAM_PIECES * PIECE_SECONDS / shard_seconds), 1)):
            rows = _stream(claimed, spec, pools)
            _write_all(folder, work, claimed, rows, spec, meter, metrics)


@contextmanager
def _connected(address: str | None, wanted: Wanted) -> Iterator[Pools]:
    """A connection to a Ray, and what is going to run there. A Ray started here ends with it."""
    import ray
    from ray.data import DataContext

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own remarks on actors that may start again would go to the terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is not None:
        ray.init(address, **quiet)
        there = ray.cluster_resources()
        pools = Pools.of(wanted, int(there.get("CPU", 1)), int(there.get("GPU", 0)))
    else:
        gpus = torch.cuda.device_count()
        pools = Pools.of(wanted, processors(), gpus)
        # Ray counts a CPU for every reader and worker, so that none waits for another's place.
        tasks = pools.readers + pools.most
        ray.init(
            "local", num_cpus=tasks, num_gpus=gpus, object_store_memory=STORE_BYTES * tasks,
            include_dashboard=False, **quiet,
        )  # fmt: skip
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    try:
        yield pools
    finally:
        ray.shutdown()


def _stream(claimed: Sequence[Shard], spec: Spec, pools: Pools) -> Iterator["pa.Table"]:
    """The encoded windows of shards, in any order."""
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    pieces = [{"piece": piece} for shard in claimed for piece in _pieces(shard)]
    on_gpu = pools.device == "cuda"
    read = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
        functools.partial(_read, spec=spec),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        compute=TaskPoolStrategy(size=pools.readers),
        # Ray fuses neighbours with the same arguments, and then nothing is read while encoding.
        max_calls=READER_CALLS,
    )
    encoded = read.map_batches(
        _Encode,
        batch_size=max(int(pools.batch_seconds / DEFAULT_CHUNK_SECONDS), 1),
        batch_format="pyarrow",
        fn_constructor_args=(spec, pools.device),
        num_gpus=1 if on_gpu else None,
        num_cpus=None if on_gpu else 1,
        compute=ActorPoolStrategy(min_size=pools.least, max_size=pools.most),
    )
    return iter(encoded.iter_batches(batch_size=None, batch_format="pyarrow"))


def _pieces(shard: Shard) -> Iterator[str]:
    """A shard's items as JSON, in parts of about `PIECE_SECONDS`."""
    first, seconds = 0, 0.0
    for number, item in enumerate(shard.items):
        seconds += item.seconds
        if seconds >= PIECE_SECONDS or number + 1 == len(shard.items):
            items = [asdict(item) for item in shard.items[first : number + 1]]
            yield json.dumps({"shard": shard.number, "first": first, "items": items})
            first, seconds = number + 1, 0.0


@functools.lru_cache(maxsize=1)
def _sizes(config: Config) -> DAC:
    """A codec without weights, which knows how long its windows are."""
    with torch.device("meta"):
        return DAC(**config.to_dict())


def _read(pieces: "pa.Table", spec: Spec) -> Iterator["pa.Table"]:
    """Rows of the windows of a piece's items."""
    settings = spec.card.settings
    for piece in map(json.loads, pieces["piece"].to_pylist()):
        for number, values in enumerate(piece["items"], start=piece["first"]):
            item = Item(**values)
            reading = Reading(
                _sizes(spec.config), item, settings.normalize_db, settings.audio_column
            )
            yield from _rows(reading, piece["shard"], number)


def _rows(reading: Reading, shard: int, number: int) -> Iterator["pa.Table"]:
    import pyarrow as pa

    def row(part: int, seconds: float, end: str, window: Window | None = None) -> pa.Table:
        signal = b"" if window is None else window.signal.numpy().tobytes()
        values = {
            "shard": shard,
            "item": number,
            "part": part,
            "reading": seconds,
            "end": end,
            "signal": signal,
            "first": 0 if window is None else window.keep.start,
            "last": 0 if window is None else window.keep.stop,
        }
        return pa.table({name: [value] for name, value in values.items()})

    end: dict[str, Any]
    part, begun = 0, time.perf_counter()
    try:
        for window in reading.windows():
            yield row(part, time.perf_counter() - begun, "", window)
            part, begun = part + 1, time.perf_counter()
        assert reading.facts is not None
        end = {"facts": asdict(reading.facts)}
    except (ValueError, OSError) as error:
        end = {"failure": reading.reason(error)}
    yield row(part, time.perf_counter() - begun, json.dumps(end))


class _Encode:
    """An actor: rows with windows to rows with codes."""

    def __init__(self, spec: Spec, device: str):
        if device == "cpu":
            # Sums over a window would depend on how many threads share it.
            torch.set_num_threads(1)
        codebooks = spec.card.settings.codebooks
        self.encoder = load_encoder(spec.model, device, spec.precision, codebooks)
        self.idle_since = time.perf_counter()

    def __call__(self, rows: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        begun = time.perf_counter()
        waited = begun - self.idle_since
        there = [
            (number, Window(self.encoder.codec, _signal(signal), slice(first, last)))
            for number, (signal, first, last) in enumerate(
                zip(*(rows[name].to_pylist() for name in ("signal", "first", "last")), strict=True)
            )
            if signal
        ]
        encoded = self.encoder.begin([window for _, window in there])()
        codes = [b""] * rows.num_rows
        for (number, _), part in zip(there, encoded, strict=True):
            codes[number] = part[0].numpy().astype(np.uint16).tobytes()
        self.idle_since = time.perf_counter()
        rest = [0.0] * (rows.num_rows - 1)
        rows = rows.drop_columns(["signal", "first", "last"])
        rows = rows.append_column("codes", pa.array(codes, pa.binary()))
        rows = rows.append_column("waiting", pa.array([waited, *rest]))
        return rows.append_column("encoding", pa.array([self.idle_since - begun, *rest]))


def _signal(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.float32).copy())[None]


def _write_all(
    folder: Folder,
    work: Work,
    claimed: Sequence[Shard],
    rows: Iterator["pa.Table"],
    spec: Spec,
    meter: Meter,
    metrics: "_Metrics",
) -> None:
    """Puts shards together as their rows come, and has tasks write them."""
    import ray

    write = ray.remote(num_cpus=0)(_write)
    open_shards = {shard.number: _Assembly(shard, spec.card) for shard in claimed}
    writing: dict[Any, _Assembly] = {}

    def collect(most: int) -> None:
        """Waits until no more than so many shards are being written."""
        while len(writing) > most:
            [done], _ = ray.wait(list(writing), num_returns=1)
            assembly = writing.pop(done)
            try:
                meter.add("writing", ray.get(done))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            work.written(assembly.shard)
            meter.shard(assembly.shard.seconds, *assembly.counts())
            metrics.audio(assembly.shard.seconds)

    for table in rows:
        for phase in ("reading", "waiting", "encoding"):
            seconds = sum(table[phase].to_pylist())
            meter.add(phase, seconds)
            metrics.phase(phase, seconds)
        names = ("shard", "item", "part", "end", "codes")
        for number, *row in zip(*(table[name].to_pylist() for name in names), strict=True):
            assembly = open_shards.get(number)
            if assembly is not None and assembly.add(*row):
                collect(WRITERS - 1)
                del open_shards[number]
                keys = [item.key for item in folder.plan.shard(number).items]
                outcomes = list(assembly.outcomes.values())
                path = folder.shard_path(number)
                writing[write.remote(path, spec.card.layout, keys, outcomes)] = assembly
    collect(0)


def _write(path: Path, layout: Layout, keys: list[str], outcomes: list[Record | Failure]) -> float:
    begun = time.perf_counter()
    write_shard(path, layout, keys, outcomes)
    return time.perf_counter() - begun


class _Assembly:
    """A shard whose rows are coming.

    Attributes:
        outcomes: of the recordings that are complete, by their number.
    """

    def __init__(self, shard: Shard, card: Card):
        self.shard, self.card = shard, card
        self.outcomes: dict[int, Record | Failure] = {}
        self._parts: dict[int, dict[int, Codes]] = {}
        self._ends: dict[int, tuple[int, Facts | str]] = {}

    def add(self, item: int, part: int, end: str, codes: bytes) -> bool:
        """Takes a row; says whether the shard is complete."""
        if item in self.outcomes:
            return False
        parts = self._parts.setdefault(item, {})
        if end:
            found = json.loads(end)
            facts = Facts(**found["facts"]) if "facts" in found else found["failure"]
            self._ends[item] = (part, facts)
        else:
            codebooks = self.card.settings.codebooks
            parts[part] = np.frombuffer(codes, np.uint16).reshape(codebooks, -1)
        if item in self._ends and len(parts) == self._ends[item][0]:
            self.outcomes[item] = self._outcome(item)
            del self._parts[item], self._ends[item]
        return len(self.outcomes) == len(self.shard.items)

    def _outcome(self, number: int) -> Record | Failure:
        item, (count, facts) = self.shard.items[number], self._ends[number]
        if isinstance(facts, str):
            return Failure(item.key, facts)
        parts = [self._parts[number][part] for part in range(count)]
        try:
            return record_of(item, facts, parts, self.card.model.name, self.card.layout)
        except DACFileError as error:
            return Failure(item.key, str(error))

    def counts(self) -> tuple[int, int]:
        """Records and failures."""
        failures = sum(isinstance(outcome, Failure) for outcome in self.outcomes.values())
        return len(self.outcomes) - failures, failures


class _Metrics:
    """What Ray's Prometheus endpoint tells of a run."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        self._audio = Counter("dac_fast_audio_seconds", "Audio in shards that are written.")
        self._busy = Counter("dac_fast_busy_seconds", "Time in a phase.", tag_keys=("phase",))

    def audio(self, seconds: float) -> None:
        """Counts a shard that is written."""
        if seconds > 0:
            self._audio.inc(seconds)

    def phase(self, name: str, seconds: float) -> None:
        """Counts a phase's time."""
        if seconds > 0:
            self._busy.inc(seconds, {"phase": name})

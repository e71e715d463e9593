"""A corpus to a folder of codes."""

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dac_fast.codec import load
from dac_fast.config import PRESETS
from dac_fast.corpus import local, on_ray, plan
from dac_fast.corpus.encoding import load_encoder, weights_sha256
from dac_fast.corpus.folder import Card, Folder, Model, Settings, Sources, Work
from dac_fast.corpus.items import encodable
from dac_fast.corpus.meter import Meter
from dac_fast.corpus.parquet import require_pyarrow
from dac_fast.corpus.plan import Shard
from dac_fast.corpus.shards import SUFFIXES
from dac_fast.corpus.sources import Found, absolute, digest, files_of
from dac_fast.files import OutputError
from dac_fast.processors import processors
from dac_fast.recordings.checks import check_options

CODES = ("npy", "dac")


@dataclass(frozen=True)
class Options:
    """How a corpus is tokenized.

    Attributes:
        model: a preset, or the path of a checkpoint.
        format: of the shards, see `dac_fast.corpus.shards`.
        codes: "npy" or "dac", the form of the codes in a tar.
        shard_hours: a shard ends with the recording that reaches that length.
        shuffle: seed of the order of recordings; None: they are in the order of their keys.
        n_quantizers: use the first that many codebooks; None: all.
        normalize_db: loudness to bring recordings to, in LUFS; None: as they are.
        precision: of the encoder: fp32, tf32x3, tf32, fp16 or bf16.
        audio_column: of Parquet files.
        device: "cpu", "cuda" (of several GPUs, each worker has one), "cuda:N", or "auto": a GPU
            where there is one.
        workers: that encode; (least, most) for a pool that grows and shrinks on a cluster; None:
            one per GPU, or without GPUs per core.
        readers: tasks that read at once; None: on this machine one per core, on a cluster as many
            as there is room for.
        batch_seconds: audio that a worker holds to encode it in common launches; None: 240 on a
            GPU, 0 on a CPU, where windows are computed one by one. Codes do not depend on it.
        local: in this process, without Ray.
        address: of a Ray cluster; None: a Ray of this machine's own, which ends with the run.
        share: (I, N), every Nth shard only, counted from 0 or 1, for machines that know nothing of
            each other.
        budget_hours: no shard is begun after so many hours of audio.
        retry_failures: only the recordings that failed before, in shards that are there.
    """

    model: str = "tiny"
    format: str = "webdataset"
    codes: str = "npy"
    shard_hours: float = 1.0
    shuffle: int | None = None
    n_quantizers: int | None = None
    normalize_db: float | None = -16.0
    precision: str = "fp32"
    audio_column: str = "audio"
    device: str = "auto"
    workers: int | tuple[int, int] | None = None
    readers: int | None = None
    batch_seconds: float | None = None
    local: bool = False
    address: str | None = None
    share: tuple[int, int] = (0, 1)
    budget_hours: float = math.inf
    retry_failures: bool = False

    def __post_init__(self) -> None:
        _require(self.format in SUFFIXES, "format", self.format, ", ".join(SUFFIXES))
        forms = CODES if self.format == "webdataset" else CODES[:1]
        accepted = f"{', '.join(forms)} with format {self.format}"
        _require(self.codes in forms, "codes", self.codes, accepted)
        _require(0 < self.shard_hours < math.inf, "shard_hours", self.shard_hours, "above 0")
        _require(self.budget_hours > 0, "budget_hours", self.budget_hours, "above 0")
        least, most = self.workers if isinstance(self.workers, tuple) else (self.workers or 1,) * 2
        _require(1 <= least <= most, "workers", self.workers, "1 or more, or LEAST:MOST")
        _require(self.readers is None or self.readers > 0, "readers", self.readers, "1 or more")
        number, of = self.share
        accepted = "I/N with N from 1 and I from 0 to N"
        _require(of >= 1 and 0 <= number <= of, "share", f"{number}/{of}", accepted)
        fits = 0 <= (self.batch_seconds or 0) < math.inf
        _require(fits, "batch_seconds", self.batch_seconds, "0 or above")


def _require(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; accepted: {accepted}")


@dataclass(frozen=True)
class Forecast:
    """What a run would do.

    Attributes:
        files: that the sources name.
        items: recordings in them.
        problems: recordings of which it is known already that they cannot be read.
        shards: that would be made.
        hours: of audio.
        gigabytes: that the shards need, about.
    """

    files: int
    items: int
    problems: int
    shards: int
    hours: float
    gigabytes: float


def forecast(sources: Sequence[str], options: Options) -> Forecast:
    """What `tokenize` would do. Nothing is written.

    Raises:
        ValueError, OSError: as `tokenize`.
    """
    files = files_of([absolute(source) for source in sources])
    model, settings = _identity(options)
    shards = list(_planned(files, options))
    return Forecast(
        files=len(files),
        items=sum(len(shard.items) for shard in shards),
        problems=sum(bool(item.problem) for shard in shards for item in shard.items),
        shards=len(shards),
        hours=sum(shard.seconds for shard in shards) / 3600,
        gigabytes=_bytes(shards, model, settings) / 1e9,
    )


def tokenize(
    sources: Sequence[str], output: str | os.PathLike[str], options: Options, meter: Meter
) -> Card:
    """Makes the shards that the folder lacks.

    Args:
        sources: see `dac_fast.corpus.sources`.
        output: the dataset's folder; it is made where it is missing.
        options: how.
        meter: told of everything.
    Returns:
        the dataset's card, which says whether it is complete.
    Raises:
        ValueError: an option or a source is not to be used, or the folder is of another dataset.
        OSError: the folder cannot be written, or the disk is full.
        EncodingError: the model cannot encode.
    """
    if not options.local:
        on_ray.require()
    if options.format == "parquet":
        require_pyarrow()
    named = [absolute(source) for source in sources]
    files = files_of(named)
    model, settings = _identity(options)
    folder = Folder.create(
        Path(output).absolute(),
        model,
        settings,
        Sources(encodable(named), len(files), digest(files)),
        lambda: _planned(files, options),
    )
    work = Work(folder, options.share, options.budget_hours * 3600, options.retry_failures)
    _require_room(folder, work)
    meter.total = work.seconds
    meter.start()
    if len(work):
        if options.local:
            _run_local(folder, work, options, meter)
        else:
            _run_on_ray(folder, work, options, meter)
    return folder.finish()


def _identity(options: Options) -> tuple[Model, Settings]:
    """The model and the settings that decide the bytes of the shards.

    Raises:
        ValueError: there is no such model, or it has no such setting.
    """
    codec = load(options.model)
    check_options(codec, None, options.n_quantizers, options.normalize_db)
    if codec.config.channels > 1:
        raise ValueError(f"model {options.model} is stereo; accepted: mono models")
    model = Model(
        codec.name or options.model,
        weights_sha256(codec),
        codec.sample_rate,
        codec.hop_length,
        codec.config.codebook_size,
    )
    settings = Settings(
        options.format,
        options.codes,
        options.n_quantizers or codec.config.n_codebooks,
        options.shard_hours,
        options.shuffle,
        options.normalize_db,
        options.precision,
        options.audio_column,
    )
    return model, settings


def _planned(files: Sequence[Found], options: Options) -> Iterable[Shard]:
    shard_seconds = options.shard_hours * 3600
    return plan.make(files, options.audio_column, shard_seconds, options.shuffle)


def _bytes(shards: Iterable[Shard], model: Model, settings: Settings) -> int:
    """Bytes that shards come to at least, their metadata aside."""
    packed = settings.format == "parquet" or settings.codes == "dac"
    bits = (model.codebook_size - 1).bit_length() if packed else 16
    rate = model.sample_rate / model.hop_length * settings.codebooks * bits / 8
    return int(sum(item.seconds * item.channels * rate for s in shards for item in s.items))


def _require_room(folder: Folder, work: Work) -> None:
    """Raises OutputError where the disk is too small for the shards that are to be made."""
    card, free = folder.card, shutil.disk_usage(folder.path).free
    needed = _bytes(work.shards(), card.model, card.settings)
    if needed > free:
        raise OutputError(
            f"{folder.path}: the shards need {needed / 1e9:.1f} GB, and the disk has "
            f"{free / 1e9:.1f} GB; accepted: a disk with room, or fewer --budget-hours"
        )


def _run_local(folder: Folder, work: Work, options: Options, meter: Meter) -> None:
    gpus, device = torch.cuda.device_count(), options.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    least_most = options.workers or (gpus if device == "cuda" else processors())
    workers = least_most if isinstance(least_most, int) else least_most[1]
    encoders = [
        load_encoder(
            options.model,
            f"cuda:{number % gpus}" if device == "cuda" else device,
            options.precision,
            options.n_quantizers,
        )
        for number in range(workers)
    ]
    local.run(folder, work, encoders, options.batch_seconds, meter)


def _run_on_ray(folder: Folder, work: Work, options: Options, meter: Meter) -> None:
    # Actors do not have this process's working folder.
    model = options.model if options.model in PRESETS else str(Path(options.model).absolute())
    config = load(model, parts="encoder").config
    spec = on_ray.Spec(model, config, folder.card, options.precision)
    device = options.device.partition(":")[0]
    wanted = on_ray.Wanted(device, options.workers, options.readers, options.batch_seconds)
    on_ray.run(folder, work, spec, wanted, options.address, meter)

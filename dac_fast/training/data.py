"""Excerpts of audio files in batches: balanced over domains and reproducible.

The seed and the number i of an item alone decide its file, its place in the file and how it is
augmented. A run that goes on at step s goes on with item s * batch_size, and the processes of a run
take consecutive parts of each batch. The number of workers changes nothing.
"""

import functools
import math
import os
import signal
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypedDict, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dac_fast.audio import ffmpeg
from dac_fast.audio.loudness import LoudnessMeter, normalization_gains
from dac_fast.audio.resample import resampled
from dac_fast.audio.sources import AudioFile
from dac_fast.ops.upload import upload
from dac_fast.training.recipe import DataConfig
from dac_fast.training.split import DataError

# As published.
SALIENT_TRIES = 8
FILE_TRIES = 20


class UnreadableError(ValueError):
    """An excerpt that cannot be read from its file."""


@final
class Batch(TypedDict):
    """One excerpt, or a batch of them.

    Keys:
        audio: float32 [C, T]; of a batch [B, C, T].
        unreadable: why files that were drawn before could not be read, by their paths.
    """

    audio: Tensor
    unreadable: dict[str, str]


@final
class Failure(TypedDict):
    """An excerpt that could not be had, and why.

    This is a value, since an exception would come out of a worker with its traceback.
    """

    error: str


class Excerpts(Dataset[Batch | Failure]):
    """Excerpts by their number.

    Within a domain, every file is drawn once before any is drawn again. A batch that has no
    full-band file by that is given one, in a random place of a domain that has such files.

    Args:
        files: to draw from.
        config: how to draw and augment.
        sample_rate: of the excerpts, in Hz; files of other rates are resampled.
        batch_size: items per step over all processes; it decides where the full-band items come.
        seed: of everything random.
        seconds: length of an excerpt; None: the configuration's.
        phase_shift: False: never shift phases, whatever the configuration says.
        channels: of the excerpts. A file of another number is averaged, and that is every channel.
    """

    def __init__(
        self,
        files: list[AudioFile],
        config: DataConfig,
        sample_rate: int,
        batch_size: int,
        seed: int,
        seconds: float | None = None,
        phase_shift: bool = True,
        channels: int = 1,
    ) -> None:
        self.config = config
        self.channels = channels
        self.sample_rate = sample_rate
        self.batch_size = batch_size
        self.seed = seed
        self.samples = int((seconds or config.seconds) * sample_rate)
        self.phase_shift = phase_shift and config.phase_shift
        domains: defaultdict[str, list[AudioFile]] = defaultdict(list)
        for file in files:
            domains[file.domain if config.balanced else ""].append(file)
        self.domains = [domains[name] for name in sorted(domains)]
        self.full_band = [
            [file for file in pool if file.full_band and config.balanced] for pool in self.domains
        ]

    def __getitem__(self, i: int) -> Batch | Failure:
        unreadable: dict[str, str] = {}
        for attempt in range(FILE_TRIES):
            random = np.random.default_rng([self.seed, i, attempt])
            pool, file = self._choose(i)
            if attempt:
                file = pool[random.integers(len(pool))]
            try:
                audio = self._excerpt(file, random)
                return {"audio": torch.from_numpy(audio), "unreadable": unreadable}
            except UnreadableError as error:
                unreadable[file.path] = str(error)
        path, reason = next(iter(unreadable.items()))
        return {
            "error": f"{FILE_TRIES} draws in a row cannot be read, for example {path}: {reason}"
        }

    def _choose(self, i: int) -> tuple[list[AudioFile], AudioFile]:
        """The files that item i is drawn from, and the one that is drawn."""
        domain, step = i % len(self.domains), i // self.batch_size
        if i != self._given_full_band(step):
            return self.domains[domain], self._in_turn(i)
        pool = self.full_band[domain] or [file for pool in self.full_band for file in pool]
        return pool, self._drawn(pool, step, stream=len(self.domains) + domain)

    def _given_full_band(self, step: int) -> int | None:
        """The item of a batch that a full-band file is drawn for.

        None: there is one among the others, or there are none at all.
        """
        items = range(step * self.batch_size, (step + 1) * self.batch_size)
        if not any(self.full_band) or any(self._in_turn(i).full_band for i in items):
            return None
        places = [i for i in items if self.full_band[i % len(self.domains)]] or items
        return int(np.random.default_rng([self.seed, step]).choice(places))

    def _in_turn(self, i: int) -> AudioFile:
        """The file of item i's domain whose turn it is."""
        domain = i % len(self.domains)
        return self._drawn(self.domains[domain], i // len(self.domains), stream=domain)

    def _drawn(self, pool: list[AudioFile], number: int, stream: int) -> AudioFile:
        """The `number`th draw from a pool, which is shuffled anew each time it is used up."""
        epoch, place = divmod(number, len(pool))
        return pool[int(_shuffled(self.seed, stream, epoch, len(pool))[place])]

    def _excerpt(self, file: AudioFile, random: np.random.Generator) -> np.ndarray:
        """A random excerpt, augmented: float32 [C, T]."""
        config = self.config
        for _ in range(SALIENT_TRIES):
            audio = read_excerpt(file.path, self.samples, self.sample_rate, random, self.channels)
            if config.loudness is None and config.loudness_cutoff is None:
                break
            meter = LoudnessMeter(self.sample_rate, self.channels)
            meter.update(audio)
            loudness = meter.integrated()
            if config.loudness_cutoff is None or loudness > config.loudness_cutoff:
                break
        if config.loudness is not None:
            gains = normalization_gains(loudness, meter.peaks, config.loudness, alike=True)
            audio = audio * gains[:, None]
        if self.phase_shift:
            audio = shift_phase(audio, random.uniform(-math.pi, math.pi))
        return audio


@functools.lru_cache(maxsize=64)
def _shuffled(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch, size]).permutation(size)


def read_excerpt(
    path: str, samples: int, sample_rate: int, random: np.random.Generator, channels: int = 1
) -> np.ndarray:
    """An excerpt from a random place of a file: float32 [channels, samples].

    It is zero-padded at its end. Where the file has another number of channels, every channel of
    the excerpt is their mean.

    Raises:
        UnreadableError: the file cannot be opened or read, or has samples that are not finite.
    """
    # Where training's other parts are tested, soundfile may be missing.
    import soundfile

    def wanted(rate: int) -> int:
        return math.ceil(samples * rate / sample_rate) + 1

    def start(frames: int, rate: int) -> int:
        return int(random.integers(max(frames - wanted(rate), 0) + 1))

    try:
        if ffmpeg.reads(path):
            width, rate, frames = ffmpeg.probe(path)
            second = start(frames, rate) / rate
            block = next(ffmpeg.blocks(path, wanted(rate), width, rate, second), np.empty(0))
        else:
            with soundfile.SoundFile(os.fsencode(path)) as file:
                rate = file.samplerate
                file.seek(start(file.frames, rate))
                block = file.read(wanted(rate), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        raise UnreadableError(" ".join(str(error).split())) from error
    if not len(block):
        raise UnreadableError("no samples where the file should have some")
    if not np.isfinite(block).all():
        raise UnreadableError("samples that are not finite")
    mixed = block if block.shape[1] == channels else block.mean(axis=1, keepdims=True)
    audio = np.concatenate(list(resampled([mixed.T], rate, sample_rate)), axis=1)[:, :samples]
    audio = np.broadcast_to(audio, (channels, audio.shape[1]))
    return np.pad(audio, ((0, 0), (0, samples - audio.shape[1])))


def shift_phase(audio: np.ndarray, angle: float) -> np.ndarray:
    """Audio, float32 [..., T], with the phase of every frequency turned by `angle`, in radians."""
    spectrum = np.fft.rfft(audio)
    # The constant and the Nyquist frequency are real: they have no phase to turn.
    samples = audio.shape[-1]
    spectrum[..., 1 : (samples + 1) // 2] *= np.exp(1j * angle)
    return np.fft.irfft(spectrum, samples).astype(np.float32)


class Batches:
    """The item numbers of one process's part of every batch.

    Args:
        steps: the batches, one per step.
        batch_size: items of all processes.
        rank: number of this process, from 0.
        processes: how many there are.
    """

    def __init__(self, steps: range, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self.steps = steps
        self.batch_size = batch_size
        self.rank = rank
        self.part = batch_size // processes

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.batch_size + self.rank * self.part
            yield list(range(first, first + self.part))


def loader(
    excerpts: Excerpts, batches: Iterable[list[int]], workers: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """Yields batches in order.

    Args:
        excerpts: the items.
        batches: the item numbers of each batch.
        workers: processes that read; 0: this process reads.
        pin_memory: put audio where a GPU can copy it from without anybody waiting.
    Raises:
        DataError: too many files in a row cannot be read.
    """
    loaded = DataLoader(
        excerpts,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_prepare_worker,
    )
    for batch in loaded:
        if "error" in batch:
            raise DataError(batch["error"])
        yield batch


def moved(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with their audio on the device; a GPU copies it while it still runs a step."""
    for batch in batches:
        yield {"audio": upload(batch["audio"], device), "unreadable": batch["unreadable"]}


def _collated(items: list[Batch | Failure]) -> Batch | Failure:
    audio: list[Tensor] = []
    unreadable: dict[str, str] = {}
    for item in items:
        if "error" in item:
            return item
        audio.append(item["audio"])
        unreadable |= item["unreadable"]
    return {"audio": torch.stack(audio), "unreadable": unreadable}


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
    # These signals reach all processes of a run, but are meant for the one that trains: it still
    # needs its workers to finish the step.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

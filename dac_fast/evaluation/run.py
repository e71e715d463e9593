"""How near restored audio comes to the original, over a set of files: `dac-fast evaluate`.

Either a codec is measured, at several numbers of codebooks (`evaluate_codec`), or a folder of reconstructions against
its references (`evaluate_folders`). Per file, per domain and overall:

    mel_distance, stft_distance, si_sdr   as in `dac_fast.metrics`
    visqol              MOS-LQO from 1 to 5, higher is better (ViSQOL's audio mode; package visqol-python); channels
                        are mixed to one and resampled to 48 kHz
    bitrate_efficiency  entropy of the codes over the bits spent on them (paper, section 4.3); counted over all files
                        of a row together, because one file's codes are too few to tell

Means are over files, every file alike. A value that a file has not got (SI-SDR of silence or of equal signals, ViSQOL
of less than a second or so) is None and left out of the mean.
"""

import importlib.util
import math
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dac_fast import ops
from dac_fast.audio.reading import SAMPLE_RATES, AudioError, Recording, resample
from dac_fast.audio.resample import resampled
from dac_fast.audio.sources import AudioFile, audio_files, files_below
from dac_fast.evaluation.outcome import OVERALL, Evaluation, Measured, summarize
from dac_fast.metrics import codebook_counts, mel_distance, si_sdr, stft_distance

SHORTEST = 1025  # samples; the longest window of the distances is reflected at the edges
LENGTH_TOLERANCE = 0.1  # seconds; decoders of other formats add or drop some 10 ms
VISQOL_RATE = 48000


@dataclass(frozen=True)
class Pair(AudioFile):
    """A reference, and the path of its reconstruction (None: there is none)."""

    restored: str | None = None


def evaluate_codec(
    codec,
    data: str | os.PathLike,
    codebooks: Sequence[int] | None = None,
    *,
    sample_rate: int | None = None,
    seconds: float | None = None,
    visqol: bool | None = None,
    jobs: int | None = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Encode and decode every file, and compare.

    Args:
        codec: the `DAC`, on the device it is to run on.
        data: a folder, whose first-level folders are the domains, or a manifest; see `dac_fast.sources`.
        codebooks: how many codebooks to use, one evaluation each; None: all, and half as many, down to one.
        sample_rate: at which files are read, compressed and compared, in Hz; None: the codec's.
        seconds: use only the beginning of each file; None: all of it.
        visqol: measure it (2 s per second of audio and codebook count, say); None: where visqol-python is installed.
        jobs: worker processes, among which the cores are divided; None: one per core, or one on a GPU. More than one
            starts new interpreters, so a script needs its `if __name__ == "__main__":`.
        progress: called with the files done and their total.
    Raises:
        ValueError: no files there, a damaged manifest, or an argument out of range.
        OSError: a worker process died.
    """
    c = codec.config
    if codebooks is None:
        codebooks = [c.n_codebooks >> halvings for halvings in range(c.n_codebooks.bit_length())]
    for count in codebooks:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= c.n_codebooks:
            raise ValueError(
                f"codebooks has {count!r}; accepted: whole numbers from 1 to {c.n_codebooks}"
            )
    codebooks = sorted(set(codebooks))
    if not codebooks:
        raise ValueError(f"codebooks is empty; accepted: whole numbers from 1 to {c.n_codebooks}")
    if jobs is None and next(codec.parameters()).is_cuda:
        jobs = 1
    sample_rate = codec.sample_rate if sample_rate is None else sample_rate
    _check_excerpt(sample_rate, seconds)
    sources = _references(data)
    visqol, notes = _visqol_choice(visqol)
    task = _CodecTask(sample_rate, seconds, visqol, codec, codebooks)
    measured = _run(task, sources, jobs, progress)
    settings = {
        "model": codec.name,
        "config": c.to_dict(),
        "measured_at": sample_rate,
        "seconds": seconds,
    }
    return summarize(measured, settings, notes, c)


def evaluate_folders(
    reference: str | os.PathLike,
    restored: str | os.PathLike,
    *,
    sample_rate: int | None = None,
    seconds: float | None = None,
    visqol: bool | None = None,
    jobs: int | None = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Compare every file of a folder with its namesake, whatever its suffix, in a folder of reconstructions.

    Lengths may differ by 0.1 s, and the shorter one counts. References without a reconstruction are failures;
    reconstructions without a reference are listed.

    Args:
        reference: a folder or a manifest, as of `evaluate_codec`.
        restored: a folder.
        sample_rate: at which they are compared, in Hz; None: each reference's own. Distances of different rates do
            not compare.
        seconds, visqol, jobs, progress: as of `evaluate_codec`.
    Raises:
        ValueError: no files there, or a damaged manifest.
    """
    _check_excerpt(sample_rate, seconds)
    sources, strangers = _paired(_references(reference), files_below(restored))
    visqol, notes = _visqol_choice(visqol)
    task = _PairTask(sample_rate, seconds, visqol)
    measured = _run(task, sources, jobs, progress)
    settings = {"measured_at": sample_rate, "seconds": seconds}
    return summarize(measured, settings, notes, without_reference=strangers)


def _references(data: str | os.PathLike) -> list[AudioFile]:
    files = audio_files(data)
    for file in files:
        if file.domain == OVERALL:
            raise ValueError(
                f"{data}: {file.name} is of domain {OVERALL!r}, which is the name of all together"
            )
    return files


def _paired(references: list[AudioFile], others: list[AudioFile]) -> tuple[list[Pair], list[str]]:
    """References with their reconstructions, and the names of reconstructions that belong to none."""
    by_stem = {}
    for other in sorted(others, key=lambda other: other.name):
        by_stem.setdefault(Path(other.name).with_suffix(""), []).append(other)
    pairs, used = [], set()
    for file in references:
        candidates = by_stem.get(Path(file.name).with_suffix(""), [])
        partner = next(
            (c for c in candidates if c.name == file.name), candidates[0] if candidates else None
        )
        pairs.append(Pair(**vars(file), restored=partner and partner.path))
        used.add(partner and partner.name)
    return pairs, sorted(other.name for other in others if other.name not in used)


@dataclass
class _Task:
    """Measures one file; picklable, for worker processes."""

    sample_rate: int | None
    seconds: float | None
    visqol: bool

    def __call__(self, source: AudioFile) -> Measured:
        try:
            return self.measure(source)
        # The faults of one file; anything else is a bug and stops the run.
        except (ValueError, OSError) as error:
            return Measured(
                [], problem=" ".join(str(error).split()).removeprefix(f"{source.path}: ")
            )

    def read(self, path: Path, sample_rate: int | None) -> tuple[np.ndarray, int]:
        """The audio [C, T], as much of it as is wanted, at that rate (None: its own), and the rate."""
        recording = Recording(path)
        rate = sample_rate or recording.sample_rate
        left = math.inf if self.seconds is None else round(self.seconds * rate)
        pieces = []
        for block in resampled(recording.blocks(), recording.sample_rate, rate):
            pieces.append(block[:, : min(left, block.shape[1])])
            left -= block.shape[1]
            if left <= 0:
                break
        audio = np.concatenate(pieces, axis=1)
        if audio.shape[1] < SHORTEST:
            raise AudioError(
                f"{audio.shape[1]} samples at {rate} Hz are too few to compare; accepted: from {SHORTEST}"
            )
        return audio, rate

    def compare(self, x: np.ndarray, y: np.ndarray, rate: int) -> dict:
        """The metrics of restored audio y against x, both [C, T]."""
        # float64: in float32, SI-SDR at -50 dB, of a codec before training, has three good digits.
        original, restored = (torch.from_numpy(audio)[None].double() for audio in (x, y))
        defined = np.ptp(x) > 0 and not np.array_equal(x, y)
        values = {
            "mel_distance": mel_distance(original, restored, rate).item(),
            "stft_distance": stft_distance(original, restored).item(),
            "si_sdr": si_sdr(original, restored).item() if defined else math.nan,
        }
        if self.visqol:
            values["visqol"] = _visqol(x, y, rate)
        # JSON has neither NaN nor infinity; digits beyond these differ between machines.
        return {
            name: round(value, 6) if math.isfinite(value) else None
            for name, value in values.items()
        }


@dataclass
class _CodecTask(_Task):
    codec: torch.nn.Module
    codebooks: list[int]

    def measure(self, source: AudioFile) -> Measured:
        audio, rate = self.read(source.path, self.sample_rate)
        # The codes of few codebooks are the first ones of many: encoded once, decoded for each count.
        file = self.codec.compress((audio, rate), n_quantizers=self.codebooks[-1])
        rows = []
        for count in self.codebooks:
            restored, _ = self.codec.decompress(replace(file, codes=file.codes[:, :count]))
            if not np.isfinite(restored).all():
                raise AudioError(f"what the codec gives is not finite ({count} codebooks)")
            kbps = round(
                self.codec.config.bitrate * count / self.codec.config.n_codebooks / 1000, 6
            )
            row = _row(source, audio, rate) | {"codebooks": count, "kbps": kbps}
            rows.append(row | self.compare(audio, restored, rate))
        return Measured(rows, codebook_counts(file.codes, self.codec.config.codebook_size))


@dataclass
class _PairTask(_Task):
    def measure(self, source: Pair) -> Measured:
        if source.restored is None:
            raise AudioError("there is no reconstruction of it")
        x, rate = self.read(source.path, self.sample_rate)
        try:
            y, _ = self.read(source.restored, rate)
        except AudioError as error:
            raise AudioError(
                f"the reconstruction: {str(error).removeprefix(f'{source.restored}: ')}"
            ) from error
        if len(x) != len(y):
            raise AudioError(
                f"the reconstruction has {len(y)} channels; accepted: {len(x)}, as the reference"
            )
        lengths = x.shape[1], y.shape[1]
        if max(lengths) - min(lengths) > LENGTH_TOLERANCE * rate:
            lasting = [length / rate for length in lengths]
            raise AudioError(
                f"the reconstruction lasts {lasting[1]:.3f} s; accepted: {lasting[0]:.3f} s within 0.1 s"
            )
        x, y = (audio[:, : min(lengths)] for audio in (x, y))
        return Measured([_row(source, x, rate) | self.compare(x, y, rate)])


def _row(source: AudioFile, audio: np.ndarray, rate: int) -> dict:
    seconds = round(audio.shape[1] / rate, 6)
    return {"file": source.name, "domain": source.domain, "seconds": seconds, "sample_rate": rate}


def _check_excerpt(sample_rate: int | None, seconds: float | None):
    if sample_rate is not None and sample_rate not in SAMPLE_RATES:
        accepted = f"{SAMPLE_RATES.start} to {SAMPLE_RATES.stop - 1}"
        raise ValueError(f"sample_rate is {sample_rate}; accepted: {accepted} Hz")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}; accepted: above 0")


def _visqol_choice(wanted: bool | None) -> tuple[bool, list[str]]:
    """Whether to measure ViSQOL, and a note if it is missed."""
    installed = importlib.util.find_spec("visqol") is not None
    missing = "visqol-python is not installed (pip install 'dac-fast[metrics]')"
    if wanted and not installed:
        raise ValueError(f"ViSQOL cannot be measured: {missing}")
    return installed and wanted is not False, [] if installed or wanted is False else [
        f"no ViSQOL: {missing}"
    ]


def _visqol(x: np.ndarray, y: np.ndarray, rate: int) -> float:
    """MOS-LQO of y against x, both [C, T]; not a number where ViSQOL finds nothing to compare."""
    from visqol import VisqolApi

    api = VisqolApi()
    api.create(mode="audio")
    x, y = (
        resample(audio.mean(axis=0), rate, VISQOL_RATE)[0].astype(np.float64) for audio in (x, y)
    )
    try:
        return float(api.measure_from_arrays(x, y, VISQOL_RATE).moslqo)
    # Less audio than its patches take.
    except ValueError:
        return math.nan


def _run(
    task: _Task, sources: list[AudioFile], jobs: int | None, progress
) -> list[tuple[AudioFile, Measured]]:
    """The task on every source, in their order."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    jobs = min(cores if jobs is None else jobs, len(sources))
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; accepted: 1 or more")
    measured = {}
    if jobs == 1:
        for index, source in enumerate(sources):
            measured[index] = task(source)
            progress(len(measured), len(sources))
    else:
        # Not forked: threads and CUDA do not survive it.
        context = multiprocessing.get_context("spawn")
        start = (pickle.dumps(task), max(1, cores // jobs), ops.backend())
        with ProcessPoolExecutor(jobs, context, _start_worker, start) as pool:
            futures = {pool.submit(_work, source): index for index, source in enumerate(sources)}
            try:
                for future in as_completed(futures):
                    measured[futures[future]] = future.result()
                    progress(len(measured), len(sources))
            except BrokenProcessPool as error:
                raise OSError(
                    "a worker process died (out of memory?); fewer jobs take less"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [(source, measured[index]) for index, source in enumerate(sources)]


_task = None  # a worker process's own


def _start_worker(task: bytes, threads: int, backend: str):
    global _task
    # Ctrl-C reaches every process of the terminal: this one ends at once, without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)
    ops.use_backend(backend)
    _task = pickle.loads(task)


def _work(source: AudioFile) -> Measured:
    return _task(source)

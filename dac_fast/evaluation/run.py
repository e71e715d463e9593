"""How near restored audio comes to the original, over a set of files: `dac-fast evaluate`.

Either a codec is measured, at several numbers of codebooks (`evaluate_codec`), or a folder of
reconstructions against its references (`evaluate_folders`). Per file, per domain and overall:

    mel_distance, stft_distance, si_sdr   as in `dac_fast.metrics`
    visqol              MOS-LQO from 1 to 5, higher is better (ViSQOL's audio mode; package
                        visqol-python); channels are mixed to one and resampled to 48 kHz
    bitrate_efficiency  entropy of the codes over the bits spent on them (paper, section 4.3);
                        counted over all files of a row together, because one file's codes are too
                        few to tell

Means are over files, every file alike. A value that a file has not got (SI-SDR of silence or of
equal signals, ViSQOL of less than a second or so) is None and left out of the mean.
"""

import math
import multiprocessing
import os
import pickle
import signal
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeAlias

import torch

from dac_fast import ops
from dac_fast.audio.reading import SAMPLE_RATES
from dac_fast.audio.sources import AudioFile, audio_files, files_below
from dac_fast.codec import DAC
from dac_fast.evaluation.measure import CodecTask, Pair, PairTask, Source, Task, visqol_choice
from dac_fast.evaluation.outcome import OVERALL, Evaluation, Measured, summarize
from dac_fast.processors import processors
from dac_fast.recordings.checks import check_options

# Is called with the files done and their total.
Progress: TypeAlias = Callable[[int, int], None]


def evaluate_codec(
    codec: DAC,
    data: str | os.PathLike[str],
    codebooks: Sequence[int] | None = None,
    *,
    sample_rate: int | None = None,
    seconds: float | None = None,
    visqol: bool | None = None,
    jobs: int | None = 1,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Encodes and decodes every file, and compares.

    Args:
        codec: on the device it is to run on.
        data: a folder, whose first-level folders are the domains, or a manifest; see
            `dac_fast.audio.sources`.
        codebooks: how many codebooks to use, one evaluation each; None: all, and half as many, down
            to one.
        sample_rate: at which files are read, compressed and compared, in Hz; None: the codec's.
        seconds: use only the beginning of each file; None: all of it.
        visqol: measure it (2 s per second of audio and codebook count, say); None: where
            visqol-python is installed.
        jobs: worker processes, among which the cores are divided; None: one per core, or one on a
            GPU. More than one starts new interpreters, so a script needs its
            `if __name__ == "__main__":`.
        progress: called with the files done and their total.
    Raises:
        ValueError: no files there, a damaged manifest, or an argument out of range.
        OSError: a worker process died.
    """
    check_options(codec)
    counts = _checked_counts(codebooks, codec.config.n_codebooks)
    if jobs is None and next(codec.parameters()).is_cuda:
        jobs = 1
    sample_rate = codec.sample_rate if sample_rate is None else sample_rate
    _check_excerpt(sample_rate, seconds)
    sources = _references(data)
    with_visqol, notes = visqol_choice(visqol)
    task = CodecTask(sample_rate, seconds, with_visqol, codec, counts)
    measured = _measured(task, sources, jobs, progress)
    settings = {
        "model": codec.name,
        "config": codec.config.to_dict(),
        "measured_at": sample_rate,
        "seconds": seconds,
    }
    return summarize(measured, settings, notes)


def evaluate_folders(
    reference: str | os.PathLike[str],
    restored: str | os.PathLike[str],
    *,
    sample_rate: int | None = None,
    seconds: float | None = None,
    visqol: bool | None = None,
    jobs: int | None = 1,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Compares every file of a folder with its namesake in a folder of reconstructions.

    Namesakes may differ in their suffix. Lengths may differ by 0.1 s, and the shorter one counts.
    References without a reconstruction are failures; reconstructions without a reference are
    listed.

    Args:
        reference: a folder or a manifest, as of `evaluate_codec`.
        restored: a folder.
        sample_rate: at which they are compared, in Hz; None: each reference's own. Distances of
            different rates do not compare.
        seconds, visqol, jobs, progress: as of `evaluate_codec`.
    Raises:
        ValueError: no files there, or a damaged manifest.
    """
    _check_excerpt(sample_rate, seconds)
    sources, strangers = _paired(_references(reference), files_below(restored))
    with_visqol, notes = visqol_choice(visqol)
    task = PairTask(sample_rate, seconds, with_visqol)
    measured = _measured(task, sources, jobs, progress)
    settings = {"measured_at": sample_rate, "seconds": seconds}
    return summarize(measured, settings, notes, strangers)


def _checked_counts(codebooks: Sequence[int] | None, available: int) -> list[int]:
    """The numbers of codebooks to measure, in rising order."""
    if codebooks is None:
        codebooks = [available >> halvings for halvings in range(available.bit_length())]
    accepted = f"whole numbers from 1 to {available}"
    for count in codebooks:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= available:
            raise ValueError(f"codebooks has {count!r}; accepted: {accepted}")
    if not codebooks:
        raise ValueError(f"codebooks is empty; accepted: {accepted}")
    return sorted(set(codebooks))


def _check_excerpt(sample_rate: int | None, seconds: float | None) -> None:
    if sample_rate is not None and sample_rate not in SAMPLE_RATES:
        accepted = f"{SAMPLE_RATES.start} to {SAMPLE_RATES.stop - 1}"
        raise ValueError(f"sample_rate is {sample_rate}; accepted: {accepted} Hz")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}; accepted: above 0")


def _references(data: str | os.PathLike[str]) -> list[AudioFile]:
    files = audio_files(data)
    for file in files:
        if file.domain == OVERALL:
            raise ValueError(
                f"{data}: {file.name} is of domain {OVERALL!r}, which is the name of all together"
            )
    return files


def _paired(references: list[AudioFile], others: list[AudioFile]) -> tuple[list[Pair], list[str]]:
    """References with their reconstructions, and the names of reconstructions of none."""
    by_stem: dict[Path, dict[str, str]] = defaultdict(dict)
    for other in others:
        by_stem[Path(other.name).with_suffix("")][other.name] = other.path
    strangers = {other.name for other in others}
    pairs = []
    for file in references:
        namesakes = by_stem[Path(file.name).with_suffix("")]
        # The one with the same suffix, if there are several.
        name = file.name if file.name in namesakes else min(namesakes, default="")
        pairs.append(Pair(**vars(file), restored=namesakes.get(name, "")))
        strangers.discard(name)
    return pairs, sorted(strangers)


def _measured(
    task: Task[Source], sources: Sequence[Source], jobs: int | None, progress: Progress
) -> list[Measured]:
    """What the task finds about every source, in their order."""
    cores = processors()
    jobs = min(cores if jobs is None else jobs, len(sources))
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; accepted: 1 or more")
    measured: dict[int, Measured] = {}

    def keep(index: int, found: Measured) -> None:
        measured[index] = found
        progress(len(measured), len(sources))

    if jobs == 1:
        for index, source in enumerate(sources):
            keep(index, task(source))
    else:
        _by_processes(task, sources, jobs, max(1, cores // jobs), keep)
    return [measured[index] for index in range(len(sources))]


def _by_processes(
    task: Task[Source],
    sources: Sequence[Source],
    jobs: int,
    threads: int,
    keep: Callable[[int, Measured], None],
) -> None:
    """Has `jobs` processes of so many threads do the task; `keep` gets each source's number."""
    # Not forked: threads and CUDA do not survive it.
    context = multiprocessing.get_context("spawn")
    start = (pickle.dumps(task), threads, ops.backend())
    with ProcessPoolExecutor(jobs, context, _start_worker, start) as pool:
        # Ctrl-C reaches every process of the terminal, a worker that still imports modules too. It
        # waits for `_start_worker`, since the mask is inherited.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = {pool.submit(_work, source): index for index, source in enumerate(sources)}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for future in as_completed(futures):
                keep(futures[future], future.result())
        except BrokenProcessPool as error:
            raise OSError("a worker process died (out of memory?); fewer jobs take less") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# A worker process's own.
_task: Task[Any]


def _start_worker(task: bytes, threads: int, backend: str) -> None:
    global _task
    # A worker that Ctrl-C reaches ends at once, without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(threads)
    ops.use_backend(backend)
    _task = pickle.loads(task)


def _work(source: AudioFile) -> Measured:
    return _task(source)

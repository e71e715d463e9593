"""Measuring one file: against what a codec makes of it, or against its reconstruction."""

import importlib.util
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch

from dac_fast.audio.reading import AudioError, Recording, resample
from dac_fast.audio.resample import Samples, resampled
from dac_fast.audio.sources import AudioFile
from dac_fast.codec import DAC
from dac_fast.evaluation.outcome import Comparison, Measured
from dac_fast.metrics import codebook_counts, mel_distance, si_sdr, stft_distance

# In samples: the longest window of the distances is reflected at the edges.
SHORTEST = 1025
# In seconds: decoders of other formats add or drop some 10 ms.
LENGTH_TOLERANCE = 0.1
VISQOL_RATE = 48000


@dataclass(frozen=True)
class Pair(AudioFile):
    """A reference, and the path of its reconstruction; "": there is none."""

    restored: str = ""


Source = TypeVar("Source", bound=AudioFile)


@dataclass(frozen=True)
class Task(ABC, Generic[Source]):
    """Measures one file at a time; goes to worker processes by pickle.

    Attributes:
        sample_rate: at which files are compared, in Hz; None: each one's own.
        seconds: of each file's beginning that are compared; None: all of it.
        visqol: whether ViSQOL is measured.
    """

    sample_rate: int | None
    seconds: float | None
    visqol: bool

    def __call__(self, source: Source) -> Measured:
        """What is found about a file. A fault of the file is its `problem`; a bug is raised."""
        measured = Measured(source.name, source.domain)
        try:
            return self.measured(source, measured)
        except (ValueError, OSError) as error:
            problem = " ".join(str(error).split()).removeprefix(f"{source.path}: ")
            return replace(measured, problem=problem)

    @abstractmethod
    def measured(self, source: Source, measured: Measured) -> Measured:
        """`measured` with what is found; raises ValueError or OSError where that is a problem."""

    def read(self, path: str, sample_rate: int | None) -> tuple[Samples, int]:
        """As much as is wanted of the audio [C, T], at that rate (None: its own), and the rate."""
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
                f"{audio.shape[1]} samples at {rate} Hz are too few to compare; "
                f"accepted: from {SHORTEST}"
            )
        return audio, rate

    def compare(self, x: Samples, y: Samples, rate: int) -> Comparison:
        """How near restored audio y comes to x, both [C, T]."""
        # In float32, the -50 dB of SI-SDR that a codec has before training have three good digits.
        original, restored = (torch.from_numpy(audio)[None].double() for audio in (x, y))
        same = np.array_equal(x, y)
        values = {
            "mel_distance": mel_distance(original, restored, rate).item(),
            "stft_distance": stft_distance(original, restored).item(),
            "si_sdr": math.inf if same else si_sdr(original, restored).item(),
        }
        if self.visqol:
            values["visqol"] = _visqol(x, y, rate)
        # JSON has neither NaN nor infinity. Digits beyond these differ between machines.
        metrics = {
            name: round(value, 6) if math.isfinite(value) else None
            for name, value in values.items()
        }
        return Comparison(round(x.shape[1] / rate, 6), rate, metrics)


@dataclass(frozen=True)
class CodecTask(Task[AudioFile]):
    """Measures what a codec makes of a file, at several numbers of codebooks, in rising order."""

    codec: DAC
    codebooks: list[int]

    def measured(self, source: AudioFile, measured: Measured) -> Measured:
        """One comparison per number of codebooks."""
        audio, rate = self.read(source.path, self.sample_rate)
        config = self.codec.config
        # The codes of few codebooks are the first ones of many: encoded once, decoded for each.
        file = self.codec.compress((audio, rate), n_quantizers=self.codebooks[-1])
        comparisons = []
        for count in self.codebooks:
            restored, _ = self.codec.decompress(replace(file, codes=file.codes[:, :count]))
            if not np.isfinite(restored).all():
                raise AudioError(f"what the codec gives is not finite ({count} codebooks)")
            kbps = round(config.bitrate * count / config.n_codebooks / config.channels / 1000, 6)
            comparison = self.compare(audio, restored, rate)
            comparisons.append(replace(comparison, codebooks=count, kbps=kbps))
        counts = codebook_counts(file.codes, config.codebook_size)
        return replace(measured, comparisons=comparisons, counts=counts)


@dataclass(frozen=True)
class PairTask(Task[Pair]):
    """Measures a file against its reconstruction."""

    def measured(self, source: Pair, measured: Measured) -> Measured:
        """One comparison, over the length of the shorter one."""
        if not source.restored:
            raise AudioError("there is no reconstruction of it")
        x, rate = self.read(source.path, self.sample_rate)
        try:
            y, _ = self.read(source.restored, rate)
        except AudioError as error:
            reason = str(error).removeprefix(f"{source.restored}: ")
            raise AudioError(f"the reconstruction: {reason}") from error
        if len(x) != len(y):
            raise AudioError(
                f"the reconstruction has {len(y)} channels; accepted: {len(x)}, as the reference"
            )
        length = min(x.shape[1], y.shape[1])
        if max(x.shape[1], y.shape[1]) - length > LENGTH_TOLERANCE * rate:
            raise AudioError(
                f"the reconstruction lasts {y.shape[1] / rate:.3f} s; "
                f"accepted: {x.shape[1] / rate:.3f} s within {LENGTH_TOLERANCE} s"
            )
        return replace(measured, comparisons=[self.compare(x[:, :length], y[:, :length], rate)])


def visqol_choice(wanted: bool | None) -> tuple[bool, list[str]]:
    """Whether to measure ViSQOL, and a note if it is missed.

    Args:
        wanted: None: where it is installed.
    Raises:
        ValueError: it is wanted, and not installed.
    """
    installed = importlib.util.find_spec("visqol") is not None
    missing = "visqol-python is not installed (pip install 'dac-fast[metrics]')"
    if wanted and not installed:
        raise ValueError(f"ViSQOL cannot be measured: {missing}")
    notes = [] if installed or wanted is False else [f"no ViSQOL: {missing}"]
    return installed and wanted is not False, notes


def _visqol(x: Samples, y: Samples, rate: int) -> float:
    """MOS-LQO of y against x, both [C, T]; not a number where ViSQOL finds nothing to compare."""
    from visqol import VisqolApi

    api = VisqolApi()
    api.create(mode="audio")
    original, restored = (
        resample(audio.mean(axis=0), rate, VISQOL_RATE)[0].astype(np.float64) for audio in (x, y)
    )
    try:
        return float(api.measure_from_arrays(original, restored, VISQOL_RATE).moslqo)
    # Raised for less audio than its patches take.
    except ValueError:
        return math.nan

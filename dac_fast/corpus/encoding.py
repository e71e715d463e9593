"""A recording to a record: read, cut into windows, encoded, put together.

An item's codes depend on the item alone. Float sums change with the shape of what is computed at
once and with the number of threads that share it, so a window's shape is decided by the window:

- on a CPU, each window is computed by itself and on one thread;
- on a GPU, windows are computed in launches of listed shapes. The window's own length chooses the
  shape, and silence fills up what is missing.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from dac_fast.audio.loudness import LoudnessMeter, normalization_gains
from dac_fast.audio.reading import Recording
from dac_fast.codec import DAC, load
from dac_fast.corpus.items import Item, Metadata, encodable
from dac_fast.corpus.shards import Codes, Layout, Record, dac_file
from dac_fast.corpus.sources import opened
from dac_fast.recordings.compress import DEFAULT_CHUNK_SECONDS
from dac_fast.recordings.windows import Window, reach, sample_windows

# Windows of full length in a launch on a GPU: about 80 s of audio.
LAUNCH = 8
# Audio held for common launches, in seconds. On a CPU windows are computed one by one.
BATCH_SECONDS = {"cuda": 240.0, "cpu": 0.0}
# The shortest length that launches are made for, in frames; each further one is twice as long.
SHORTEST = 64


class EncodingError(RuntimeError):
    """The model cannot encode, whatever the recording: it is not the precision for its weights."""


@dataclass(frozen=True)
class Facts:
    """What is known of a recording when it has been read; see `Record`."""

    channels: int
    rate: int
    samples: int
    loudness: float
    gains: list[float]


@dataclass
class Reading:
    """A recording on its way to codes.

    Attributes:
        codec: that it is for. Only its sizes count, so its weights need not be there.
        item: the recording.
        normalize_db: loudness to bring it to, in LUFS; None: as it is.
        audio_column: of Parquet files.
        facts: set when all windows have been taken.
    """

    codec: DAC
    item: Item
    normalize_db: float | None
    audio_column: str
    facts: Facts | None = None

    def __post_init__(self) -> None:
        # The name that errors give the recording, once it is open.
        self._path = self.item.path

    def windows(self, frames: int | None = None) -> Iterator[Window]:
        """The recording's windows, one channel each: of every chunk those of all its channels.

        Args:
            frames: that come out of a window; None: `chunk_frames`.
        Raises:
            ValueError, OSError: the recording cannot be read.
        """
        with opened(self.item, self.audio_column) as path:
            self._path = path
            recording = Recording(path)
            meter = LoudnessMeter(self.codec.sample_rate, recording.channels)
            for block in recording.blocks(self.codec.sample_rate):
                meter.update(block)
            loudness = meter.integrated()
            gains = normalization_gains(loudness, meter.peaks, self.normalize_db)
            blocks = (
                torch.from_numpy(block * gains[:, None])
                for block in recording.blocks(self.codec.sample_rate)
            )
            frames = frames or chunk_frames(self.codec)
            yield from sample_windows(self.codec, blocks, frames)
            self.facts = Facts(
                recording.channels,
                recording.sample_rate,
                recording.frames,
                loudness,
                [float(gain) for gain in gains],
            )

    def reason(self, error: Exception) -> str:
        """Why the recording has no record, in a line that names no place of this machine."""
        line = " ".join(str(error).split()) or type(error).__name__
        return encodable(line.removeprefix(f"{self._path}: ").replace(self._path, self.item.key))


def chunk_frames(codec: DAC) -> int:
    """Frames that come out of a window. It is no option, since codes would depend on it."""
    return max(round(DEFAULT_CHUNK_SECONDS * codec.sample_rate / codec.hop_length), 1)


def record_of(
    item: Item, facts: Facts, parts: Sequence[Codes], model: str, layout: Layout
) -> Record:
    """The record of a recording.

    Args:
        item: the recording.
        facts: of it.
        parts: codes [N, f] of all its windows, in order.
        model: the model's name.
        layout: of the dataset.
    Raises:
        DACFileError: it is to be a `.dac` file, which has no room for a value of it.
    """
    channels = [np.concatenate(parts[c :: facts.channels], axis=1) for c in range(facts.channels)]
    codes = np.stack(channels)
    metadata: Metadata = {
        "frames": codes.shape[2],
        **asdict(facts),
        "duration": facts.samples / facts.rate,
        "model": model,
    }
    said = named_fields(item.metadata)
    metadata |= {name: said[name] for name in layout.fields if said.get(name) is not None}
    record = Record(item.key, codes, metadata)
    if layout.codes == "dac":
        dac_file(record, layout)
    return record


def named_fields(metadata: Metadata) -> Metadata:
    """What a source says, under names that a record does not use itself."""
    own = ("key", "codes", "start", "frames", "duration", "model", *Facts.__dataclass_fields__)
    return {f"source_{name}" if name in own else name: value for name, value in metadata.items()}


def load_encoder(model: str, device: str, precision: str, n_quantizers: int | None) -> "Encoder":
    """An encoder of that model on that device.

    Raises:
        ValueError: there is no such model, or its encoder does not run in that precision.
    """
    codec = load(model, device=device, parts="encoder").fold_weight_norm()
    if precision != "fp32" or codec.config.activation == "snake":
        codec.optimize({"encode": precision}, memory=0)
    return Encoder(codec, n_quantizers)


def weights_sha256(codec: DAC) -> str:
    """A hash of a codec's weights, whatever file they are from; before they are folded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Encoder:
    """Windows to codes, each as if it were alone.

    Args:
        codec: folded, on its device, with an engine where that is wanted.
        n_quantizers: use the first that many codebooks; None: all.
    """

    def __init__(self, codec: DAC, n_quantizers: int | None = None):
        self.codec, self.n_quantizers = codec, n_quantizers
        self.device = next(codec.parameters()).device
        context = -(-reach(codec.encoder) // codec.hop_length)
        self.longest = chunk_frames(codec) + 2 * context

    @torch.inference_mode()
    def begin(self, windows: Sequence[Window]) -> Callable[[], list[Tensor]]:
        """Begins to encode windows, of one channel each.

        Returns:
            a function that waits for the codes, and returns those [1, N, f] of each window.
        Raises:
            EncodingError: the model cannot encode; no recording is to blame.
        """
        try:
            if self.device.type == "cpu":
                codes = [self._alone(window) for window in windows]
            else:
                codes = self._launched(windows)
        except ValueError as error:
            raise EncodingError(str(error)) from error
        return lambda: [
            part[..., window.keep].cpu() for part, window in zip(codes, windows, strict=True)
        ]

    def _alone(self, window: Window) -> Tensor:
        return self.codec.encode(window.signal[None], None, self.n_quantizers).codes

    def _launched(self, windows: Sequence[Window]) -> list[Tensor]:
        by_length: dict[int, list[int]] = {}
        for number, window in enumerate(windows):
            by_length.setdefault(self._launch_frames(window), []).append(number)
        codes: dict[int, Tensor] = {}
        for frames, numbers in by_length.items():
            size = max(LAUNCH * self.longest // frames, 1)
            for start in range(0, len(numbers), size):
                some = numbers[start : start + size]
                launched = self._launch([windows[number].signal for number in some], size, frames)
                codes.update(zip(some, torch.split(launched, 1), strict=False))
        return [codes[number] for number in range(len(windows))]

    def _launch_frames(self, window: Window) -> int:
        """The length of the launches that a window goes into."""
        frames = SHORTEST
        while frames * self.codec.hop_length < window.signal.shape[1]:
            frames *= 2
        return min(frames, self.longest)

    def _launch(self, signals: Sequence[Tensor], size: int, frames: int) -> Tensor:
        """Codes [size, N, frames] of signals [1, n], of which there are `size` at most."""
        pinned = self.device.type == "cuda"
        batch = torch.zeros(size, 1, frames * self.codec.hop_length, pin_memory=pinned)
        lengths = torch.ones(size, dtype=torch.int64)
        for number, signal in enumerate(signals):
            batch[number, :, : signal.shape[1]] = signal
            lengths[number] = signal.shape[1]
        batch = batch.to(self.device, non_blocking=True)
        return self.codec.encode(batch, lengths, self.n_quantizers).codes

"""`python -m bench soak`: minutes of streams and requests at random, each checked when it ends.

One codec with its engine does, in one process, what a service does for weeks: encoder and decoder
streams join, pause, end and are dropped in slots of their own, and ragged batches of requests come
between. Whatever ends is held against the same signal alone, computed beforehand. Memory, open
files and threads are sampled meanwhile: none of them may grow.

The result file is one JSON document: `environment`, `soak` (what was asked), and `samples`, one per
moment: what there was, and how much had been done by then. The last one tells the whole.
"""

import gc
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.document import SCHEMA, Json, environment, facts, table_head, table_row, title, write
from bench.plots import COLORS
from dac_fast.codec import load
from dac_fast.streaming import DecoderStreams, EncoderStreams

SIGNALS = 24  # different ones
MOST_FRAMES = 120  # of a signal
MOST_PUSHED = 4  # frames of a push
MOST_ITEMS = 6  # of a request
JOIN, DROP, PAUSE = 0.3, 0.002, 0.2  # shares: of free slots, of streams, of active ones, at a push
TOLERANCE = 1e-4  # of audio, in single precision
# Batches round differently, and now and then that decides a search.
TIED_SHARE = 0.01

SAMPLES = 120  # of what is held; at most one a second

# What is held, what is counted, and what both are called in the page.
HELD = {"mib": "resident memory, MiB", "files": "open files", "threads": "threads"}
COUNTED = {
    "pushes": "pushes of all slots",
    "streams": "streams that ended, and were compared",
    "dropped": "streams that were dropped",
    "requests": "items of requests, and compared",
    "frames": "frames compared",
    "tied": "frames whose codes differ by a tie",
    "wrong": "streams and items that were wrong",
}


@dataclass(frozen=True)
class SoakSettings:
    """What is done.

    Attributes:
        minutes: how long.
        model: a preset or the path of a checkpoint.
        slots: for streams, in each direction.
    """

    minutes: float
    model: str = "tiny"
    slots: int = 64


@dataclass(frozen=True)
class Signal:
    """Audio [T] of whole frames, its codes [N, F], and what these decode to, [T]."""

    audio: Tensor
    codes: Tensor
    restored: Tensor


@dataclass
class Stream:
    """A signal in a slot: the frames that were pushed, and what came out, [C, n] each."""

    signal: Signal
    pushed: int = 0
    outputs: list[Tensor] = field(default_factory=list)


class Slots:
    """Slots of one direction, and the streams that are in them at random.

    Args:
        streams: of the direction.
        signals: what streams are made of.
        random: decides who joins, pauses and is dropped.
    """

    def __init__(
        self,
        streams: DecoderStreams | EncoderStreams,
        hop: int,
        signals: Sequence[Signal],
        random: np.random.Generator,
    ):
        self.streams, self.signals, self.random = streams, signals, random
        self.decodes = isinstance(streams, DecoderStreams)
        # Positions of a frame, of what goes in and of what comes out; outputs that come too early.
        self.size_in, self.size_out = (1, hop) if self.decodes else (hop, 1)
        self.early = streams.look_ahead if self.decodes else streams.delay
        self.running: dict[int, Stream] = {}
        self.dropped = 0

    def push(self) -> list[tuple[Tensor, Signal]]:
        """One push; what came of the streams that ended with it, [C, n], and their signals."""
        self._join_and_drop()
        frames = int(self.random.integers(1, MOST_PUSHED + 1))
        blocks = {
            slot: self._input(stream, frames)
            for slot, stream in self.running.items()
            # A push has as many frames of every slot: a signal's end waits for a short one.
            if self.random.random() > PAUSE and not 0 < self._left(stream) < frames
        }
        if not blocks:
            return []
        given = torch.stack(list(blocks.values()))
        block = given.new_zeros(self.streams.batch, *given.shape[1:])
        block[list(blocks)] = given
        output = self.streams.push(block, [slot in blocks for slot in range(self.streams.batch)])
        ended = []
        for slot in blocks:
            stream = self.running[slot]
            stream.pushed += frames
            stream.outputs.append(output[slot])
            if self._left(stream) == 0:
                self.streams.end([slot])
            end = self.early + stream.signal.codes.shape[1] * self.size_out
            if stream.pushed * self.size_out >= end:
                whole = torch.cat(stream.outputs, 1)[:, self.early : end]
                ended.append((whole, stream.signal))
                del self.running[slot]
        return ended

    def _join_and_drop(self) -> None:
        for slot in range(self.streams.batch):
            if slot in self.running and self.random.random() < DROP:
                del self.running[slot]
                self.dropped += 1
            elif slot not in self.running and self.random.random() < JOIN:
                self.streams.reset([slot])
                self.running[slot] = Stream(self.signals[self.random.integers(len(self.signals))])

    def _left(self, stream: Stream) -> int:
        """Frames that are still to be pushed; negative once others have been, after the end."""
        return stream.signal.codes.shape[1] - stream.pushed

    def _input(self, stream: Stream, frames: int) -> Tensor:
        """The next frames of a stream, [C, n]; zeros after its end."""
        whole = stream.signal.codes if self.decodes else stream.signal.audio[None]
        start = stream.pushed * self.size_in
        part = whole[:, start : start + frames * self.size_in]
        missing = frames * self.size_in - part.shape[1]
        return F.pad(part, (0, missing)) if missing else part


class Soak:
    """What runs, and what came of it."""

    def __init__(self, settings: SoakSettings):
        self.random = np.random.default_rng(0)
        self.codec = load(settings.model, engine=True)
        self.signals = [self._signal() for _ in range(SIGNALS)]
        hop = self.codec.hop_length
        decoder = DecoderStreams(self.codec, settings.slots)
        encoder = EncoderStreams(self.codec, settings.slots)
        self.decoding = Slots(decoder, hop, self.signals, self.random)
        self.encoding = Slots(encoder, hop, self.signals, self.random)
        self.counts = dict.fromkeys(COUNTED, 0)

    @torch.no_grad()
    def _signal(self) -> Signal:
        """Noise of a random length, whose loudness changes."""
        frames = int(self.random.integers(1, MOST_FRAMES))
        samples = frames * self.codec.hop_length
        knots = np.linspace(0, samples, 20)
        loudness = np.interp(np.arange(samples), knots, self.random.random(20))
        audio = torch.from_numpy(self.random.uniform(-1, 1, samples) * loudness).float()
        codes = self.codec.encode(audio[None, None]).codes
        return Signal(audio, codes[0], self.codec.decode_codes(codes)[0, 0])

    def step(self) -> None:
        """A push of decoder slots, of encoder slots, or a request."""
        match self.random.integers(5):
            case 0 | 1:
                ended = self.decoding.push()
                for audio, signal in ended:
                    self._compare_audio(audio[0], signal)
            case 2 | 3:
                ended = self.encoding.push()
                for codes, signal in ended:
                    self._compare_codes(codes, signal)
            case _:
                self._request()
                return
        self.counts["pushes"] += 1
        self.counts["streams"] += len(ended)
        self.counts["dropped"] = self.decoding.dropped + self.encoding.dropped

    @torch.no_grad()
    def _request(self) -> None:
        """A ragged batch, encoded and decoded."""
        numbers = self.random.integers(SIGNALS, size=self.random.integers(1, MOST_ITEMS + 1))
        batch = [self.signals[number] for number in numbers]
        audio = pad_sequence([signal.audio for signal in batch], batch_first=True)[:, None]
        samples = torch.tensor([len(signal.audio) for signal in batch])
        found = self.codec.encode(audio, samples)
        codes = pad_sequence([signal.codes.T for signal in batch], batch_first=True).mT
        restored = self.codec.decode_codes(codes, found.lengths)
        for i, signal in enumerate(batch):
            self._compare_codes(found.codes[i, :, : found.lengths[i]], signal)
            self._compare_audio(restored[i, 0, : samples[i]], signal)
        self.counts["requests"] += 2 * len(batch)

    def _compare_audio(self, found: Tensor, signal: Signal) -> None:
        """Counts restored audio [T], right or wrong."""
        self.counts["frames"] += signal.codes.shape[1]
        self.counts["wrong"] += not torch.allclose(found, signal.restored, atol=TOLERANCE)

    def _compare_codes(self, found: Tensor, signal: Signal) -> None:
        """Counts codes [N, F], right or wrong."""
        frames = signal.codes.shape[1]
        tied = int((found != signal.codes).any(0).sum())
        self.counts["frames"] += frames
        self.counts["tied"] += tied
        self.counts["wrong"] += tied > 1 + TIED_SHARE * frames


def run_soak(settings: SoakSettings, path: Path, commit: str | None = None) -> Json:
    """Runs for so long, and writes the document, again at each sample; returns it."""
    soak = Soak(settings)
    samples: list[Json] = []
    document = {
        "schema": SCHEMA,
        "environment": environment("cpu", commit),
        "soak": {"model": settings.model, "minutes": settings.minutes, "slots": settings.slots},
        "samples": samples,
    }
    begun, lasting = time.monotonic(), 60 * settings.minutes
    between = max(lasting / SAMPLES, 1)
    while (gone := time.monotonic() - begun) < lasting:
        if gone >= len(samples) * between:
            samples.append({"seconds": gone, **held(), **soak.counts})
            write(document, path)
        soak.step()
    samples.append({"seconds": gone, **held(), **soak.counts})
    write(document, path)
    return document


def held() -> Json:
    """What this process holds now: resident memory, open files, threads."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def markdown(document: Json) -> str:
    """The page of a result file."""
    asked, samples = document["soak"], document["samples"]
    last = samples[-1]
    lines = [
        f"# Soak: {title(document['environment'])}",
        "",
        f"Model {asked['model']}, {asked['minutes']:g} minutes, {asked['slots']} slots in each "
        f"direction. Codes count as wrong where more than one frame and {TIED_SHARE:.0%} of all "
        f"differ, audio where it differs by more than {TOLERANCE:g}.",
        "",
        *table_head(("what", "how many")),
        *(table_row((what, str(last[key]))) for key, what in COUNTED.items()),
        "",
        *table_head(("held", "after a tenth", "at most, since", "at the end")),
    ]
    settled = samples[len(samples) // 10 :]
    for key, what in HELD.items():
        values = [sample[key] for sample in settled]
        cells = (f"{value:.0f}" for value in (values[0], max(values), values[-1]))
        lines.append(table_row((what, *cells)))
    return "\n".join([*lines, "", *facts(document["environment"]), ""])


def figure(document: Json) -> Figure:
    """The picture: what was held over time, and what was done."""
    samples = document["samples"]
    minutes = [sample["seconds"] / 60 for sample in samples]
    picture = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    left.plot(minutes, [sample["mib"] for sample in samples], color=COLORS[0])
    left.set_ylabel("resident MiB", color=COLORS[0])
    left.set_ylim(bottom=0)
    handles = left.twinx()
    for key, color in (("files", COLORS[2]), ("threads", COLORS[4])):
        handles.plot(minutes, [sample[key] for sample in samples], color=color, label=HELD[key])
    handles.set_ylim(bottom=0)
    handles.legend(fontsize=8, loc="lower right")
    left.set_title("Held", fontsize=10)
    for key in ("streams", "requests", "wrong"):
        right.plot(minutes, [sample[key] for sample in samples], label=COUNTED[key])
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, loc="upper left")
    right.set_title("Done", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("minutes")
    picture.suptitle(title(document["environment"]), fontsize=10)
    return picture

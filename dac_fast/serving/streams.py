"""Live streams in slots: each step of the model is one batch of what has arrived for all of them.

A stream is fed pieces of any size and gives what the whole signal would, from its first position to
its last: the lead-in of its slot is cut off, and its end is pushed out once its client has
finished. `dac_fast.streaming.slots` has the exact streams behind it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dac_fast.codec import DAC
from dac_fast.model.halves import Direction
from dac_fast.serving.telemetry import Telemetry
from dac_fast.streaming import DecoderStreams, EncoderStreams

Array: TypeAlias = NDArray[Any]

# Frames of a step: few sizes, so that each can be prepared (a CUDA graph, a library's own plan).
SIZES = (1, 2, 4, 8)
MOST_FRAMES = max(SIZES)


class NoSlotError(Exception):
    """Every slot has a stream in it."""


@dataclass(eq=False)
class Stream:
    """One stream: what waits to be computed, and how far it has come.

    Attributes:
        slot: where it is computed.
        channels: N codebooks, or those of audio.
        unit: positions of a frame, 1 of codes or hop_length of audio.
        next_output: index of the next output in its signal, negative before the first.
        sink: is given `Output`s, by the thread that `Pool.step`'s caller chooses.
        pieces: arrays [channels, n] that wait, and when each arrived.
        served: the number of the step that it last took part in.
        positions: their n, added up.
        fed: frames that arrived, all in all.
        fresh: its slot has not been cleared for it yet.
        finished: its client sends no more; ended: its slot knows; closed: it has no slot any more.
    """

    slot: int
    channels: int
    unit: int
    next_output: int
    sink: Callable[["Output"], None]
    pieces: deque[tuple[float, Array]] = field(default_factory=deque)
    served: int = -1
    positions: int = 0
    fed: int = 0
    fresh: bool = True
    finished: bool = False
    ended: bool = False
    closed: bool = False

    @property
    def waiting(self) -> int:
        """Whole frames that wait."""
        return self.positions // self.unit

    @property
    def at_its_end(self) -> bool:
        """All that was fed is computed, and nothing more will come."""
        return self.finished and not self.ended and not self.waiting

    def add(self, piece: Array) -> None:
        """A piece [channels, n] has arrived."""
        if piece.shape[1]:
            self.pieces.append((time.monotonic(), piece))
            self.positions += piece.shape[1]

    def take(self, frames: int) -> tuple[float, Array]:
        """When the next frames arrived, and what they are: [channels, frames unit]."""
        since = self.pieces[0][0]
        taken = []
        missing = frames * self.unit
        self.positions -= missing
        while missing:
            arrived, piece = self.pieces.popleft()
            if piece.shape[1] > missing:
                self.pieces.appendleft((arrived, piece[:, missing:]))
                piece = piece[:, :missing]
            taken.append(piece)
            missing -= piece.shape[1]
        return since, np.concatenate(taken, axis=1)


class Output(NamedTuple):
    """What a stream gives.

    Attributes:
        stream: which.
        block: audio [1, n] or codes [N, f], possibly nothing; or the error that ended the stream.
        last: whether nothing more will come.
    """

    stream: Stream
    block: Array | Exception
    last: bool


class _Batch(NamedTuple):
    streams: list[Stream]
    since: list[float]
    block: Array


class Pool:
    """The streams of one direction. `warm_up` and `step` belong to the thread that owns the codec.

    Args:
        codec: the `DAC`.
        direction: of the streams.
        slots: how many there can be.
        step_frames: of all streams of a step, added up.
        wake: guards the streams' state, and is notified where there is something to do.
        telemetry: counts.
    Attributes:
        look_ahead: samples after a frame that what comes of it depends on.
    """

    def __init__(
        self,
        codec: DAC,
        direction: Direction,
        slots: int,
        step_frames: int,
        wake: threading.Condition,
        telemetry: Telemetry,
    ) -> None:
        self.direction, self.slots = direction, slots
        self._wake, self._telemetry = wake, telemetry
        self._channels = codec.config.n_codebooks
        if direction == "encode":
            self._channels = codec.config.channels
        self._on_gpu = next(codec.parameters()).is_cuda
        self._step_frames = step_frames
        self._steps = 0
        self._streams: DecoderStreams | EncoderStreams
        if direction == "decode":
            self._streams = DecoderStreams(codec, slots)
            self._unit, self._outputs_per_frame = 1, codec.hop_length
            self._lag = int(self._streams.look_ahead)
        else:
            self._streams = EncoderStreams(codec, slots)
            self._unit, self._outputs_per_frame = codec.hop_length, 1
            self._lag = self._streams.delay
        self.look_ahead = self._streams.look_ahead
        self._in_slots: list[Stream | None] = [None] * slots

    def open(self, channels: int, sink: Callable[[Output], None]) -> Stream:
        """A new stream.

        Args:
            channels: N codebooks of a stream to decode, 1 of one to encode.
            sink: is given what comes of it.
        Raises:
            NoSlotError: there is no slot for it.
        """
        with self._wake:
            if None not in self._in_slots:
                raise NoSlotError
            slot = self._in_slots.index(None)
            stream = Stream(slot, channels, self._unit, -self._lag, sink)
            self._in_slots[slot] = stream
        self._telemetry.streams.labels(self.direction).inc()
        return stream

    def feed(self, stream: Stream, piece: Array) -> None:
        """More of a stream: codes [N, f] of any f, or audio [1, n] of any n."""
        with self._wake:
            before = stream.waiting
            stream.add(piece)
            stream.fed += stream.waiting - before
            self._wake.notify()

    def finish(self, stream: Stream) -> None:
        """The stream ends with what was fed so far."""
        # As where a whole signal is encoded, zeros that fill the last frame belong to it.
        if missing := -stream.positions % self._unit:
            self.feed(stream, np.zeros((stream.channels, missing), np.float32))
        with self._wake:
            stream.finished = True
            self._wake.notify()

    def close(self, stream: Stream) -> None:
        """Free the stream's slot, however far the stream has come."""
        with self._wake:
            if stream.closed:
                return
            stream.closed, self._in_slots[stream.slot] = True, None
        self._telemetry.streams.labels(self.direction).dec()

    @property
    def active(self) -> list[Stream]:
        """The streams that there are now."""
        return [stream for stream in self._in_slots if stream]

    @property
    def ready(self) -> bool:
        """Whether a step has something to do."""
        return any(stream.waiting or stream.at_its_end for stream in self.active)

    def warm_up(self) -> None:
        """Take a step of every size, and on a GPU record it."""
        for frames in SIZES:
            if self._on_gpu:
                self._streams.capture(frames)
            self._push(self._empty_block(self._channels, frames), range(self.slots))
        self._streams.reset(range(self.slots))

    def step(self) -> list[Output]:
        """Compute some of what waits; streams that were not served for longest go first."""
        with self._wake:
            fresh = [stream for stream in self.active if stream.fresh]
            ending = [stream for stream in self.active if stream.at_its_end]
            for stream in fresh:
                stream.fresh = False
            for stream in ending:
                self._let_out(stream)
            batch = self._next_batch()
        self._streams.reset([stream.slot for stream in fresh])
        self._streams.end([stream.slot for stream in ending])
        outputs = [self._nothing_of(stream) for stream in ending if not stream.fed]
        return outputs + (self._computed(batch) if batch else [])

    def _let_out(self, stream: Stream) -> None:
        """Have what the slot still holds of a stream come out, by frames that nobody looks at."""
        stream.ended = True
        if stream.fed:
            positions = -(-self._lag // self._outputs_per_frame) * self._unit
            stream.add(np.zeros((stream.channels, positions), np.float32))

    def _next_batch(self) -> _Batch | None:
        """As many frames as the stream has whose turn it is, of all streams that have as many."""
        waiting = [stream for stream in self.active if stream.waiting]
        if not waiting:
            return None
        waiting.sort(key=lambda stream: (stream.served, stream.pieces[0][0]))
        frames = max(size for size in SIZES if size <= waiting[0].waiting)
        channels, self._steps = waiting[0].channels, self._steps + 1
        alike = [s for s in waiting if s.channels == channels and s.waiting >= frames]
        streams = alike[: max(self._step_frames // frames, 1)]
        block, since = self._empty_block(channels, frames), []
        for stream in streams:
            arrived, block[stream.slot] = stream.take(frames)
            since.append(arrived)
            stream.served = self._steps
        return _Batch(streams, since, block)

    def _empty_block(self, channels: int, frames: int) -> Array:
        dtype = np.int64 if self.direction == "decode" else np.float32
        return np.zeros((self.slots, channels, frames * self._unit), dtype)

    def _push(self, block: Array, slots: "list[int] | range") -> Array:
        active = [slot in slots for slot in range(self.slots)]
        result: Array = self._streams.push(torch.from_numpy(block), active).cpu().numpy()
        return result

    def _computed(self, batch: _Batch) -> list[Output]:
        """The outputs of a batch; where it fails, its streams end with the error."""
        begun = time.monotonic()
        try:
            result = self._push(batch.block, [stream.slot for stream in batch.streams])
        # Whatever it is, it ends these streams and no others.
        except Exception as error:
            return [Output(stream, error, last=True) for stream in batch.streams]
        now, direction = time.monotonic(), self.direction
        self._telemetry.step_seconds.labels(direction).observe(now - begun)
        self._telemetry.step_streams.labels(direction).observe(len(batch.streams))
        for since in batch.since:
            self._telemetry.stream_seconds.labels(direction).observe(now - since)
        return [self._output_of(stream, result[stream.slot]) for stream in batch.streams]

    def _output_of(self, stream: Stream, result: Array) -> Output:
        """The part of a slot's result that lies in the stream's signal."""
        first, total = stream.next_output, stream.fed * self._outputs_per_frame
        stream.next_output += result.shape[1]
        # Only what was let out at the end lies beyond the total, and nothing is fed after that.
        block = result[:, max(-first, 0) : max(total - first, 0)]
        return Output(stream, block, last=stream.ended and stream.next_output >= total)

    def _nothing_of(self, stream: Stream) -> Output:
        return Output(stream, np.zeros((stream.channels, 0), np.float32), last=True)

"""Requests in batches: calls of the model from many threads meet here and run together.

A request is worked on by a thread of its own, with the code that files are worked on with
(`dac_fast.recordings`), so a long one goes chunk by chunk in constant memory. That code is given a
`BatchedCodec` in place of the codec, and each of its calls becomes a `Call` to the thread that owns
the codec, which `gather`s those that fit together and computes them as one ragged batch.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar, cast

import anyio
import torch
from torch import Tensor

from dac_fast.codec import DAC
from dac_fast.model.halves import Direction
from dac_fast.model.interface import Codec

T = TypeVar("T")


@dataclass(eq=False)
class Call:
    """Something to encode or decode, and where the result goes.

    Attributes:
        direction: which of the two.
        signal: audio [C, 1, T], or codes [C, N, F], on the CPU.
        seconds: of audio, of each of the C rows.
        result: codes [C, N, F] of all codebooks, or audio [C, 1, F hop_length], on the CPU.
        since: when the call was made, by `time.monotonic`.
    """

    direction: Direction
    signal: Tensor
    seconds: float
    result: Future[Tensor] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> tuple[Direction, int]:
        """Calls of one kind can share a batch."""
        return self.direction, self.signal.shape[1]

    @property
    def rows(self) -> int:
        """C, the items that the call adds to a batch."""
        return self.signal.shape[0]


def gather(waiting: Sequence[Call], most_seconds: float) -> list[Call]:
    """The calls for the next batch: the oldest, then those whose lengths are nearest to its own.

    Args:
        waiting: the oldest first; at least one.
        most_seconds: audio of a batch, padding included. The oldest call is taken in any case.
    """
    oldest = waiting[0]
    batch = [oldest]
    rows = oldest.rows
    longest = oldest.seconds
    others = [call for call in waiting[1:] if call.kind == oldest.kind]
    for call in sorted(others, key=lambda call: abs(call.seconds - oldest.seconds)):
        if (rows + call.rows) * max(longest, call.seconds) <= most_seconds:
            batch.append(call)
            rows, longest = rows + call.rows, max(longest, call.seconds)
    return batch


@torch.inference_mode()
def compute(codec: DAC, batch: Sequence[Call]) -> list[Tensor]:
    """The results of calls of one kind, as one ragged batch."""
    signals = [call.signal for call in batch]
    lengths = torch.tensor([signal.shape[2] for signal in signals for _ in signal])
    together = signals[0].new_zeros(len(lengths), signals[0].shape[1], int(lengths.max()))
    rows = [call.rows for call in batch]
    for items, signal in zip(torch.split(together, rows), signals, strict=True):
        items[:, :, : signal.shape[2]] = signal
    ragged = lengths if int(lengths.min()) < together.shape[2] else None
    together = together.to(next(codec.parameters()).device)
    hop = codec.hop_length
    if batch[0].direction == "encode":
        outputs = codec.encode(together, ragged).codes.cpu()
        sizes = [-(-signal.shape[2] // hop) for signal in signals]
    else:
        outputs = codec.decode_codes(together, ragged).cpu()
        sizes = [signal.shape[2] * hop for signal in signals]
    parts = torch.split(outputs, rows)
    return [part[..., :size] for part, size in zip(parts, sizes, strict=True)]


class Gone(Exception):  # noqa: N818 (nothing went wrong here)
    """The client of a request has gone, or its time is over; its work ends."""


class Job:
    """A request's way to the thread that owns the codec.

    Args:
        submit: takes a call there. run: has a function called there.
        threads: bounds those that wait for it.
    """

    def __init__(
        self,
        submit: Callable[[Call], None],
        run: Callable[[Callable[[], Tensor]], Future[Tensor]],
        threads: anyio.CapacityLimiter,
    ) -> None:
        self._submit = submit
        self._run = run
        self._threads = threads
        self._lock = threading.Lock()
        self._ended = False
        self._waiting: Future[Tensor] | None = None

    async def in_thread(self, function: Callable[[], T]) -> T:
        """What a function returns that waits for the model, without the event loop's waiting.

        Where the request is cancelled, or the function raises, the job ends.
        """
        try:
            return await anyio.to_thread.run_sync(
                function, limiter=self._threads, abandon_on_cancel=True
            )
        except BaseException:
            self._end()
            raise

    def compute(self, call: Call) -> Tensor:
        """The call's result.

        Raises:
            Gone: the job has ended.
            ValueError: as the codec raises.
        """

        def begin() -> Future[Tensor]:
            self._submit(call)
            return call.result

        return self._wait(begin)

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """What the function returns, called in the thread that owns the codec; raises as above."""
        return self._wait(lambda: self._run(function))

    def _wait(self, begin: Callable[[], Future[Tensor]]) -> Tensor:
        with self._lock:
            if self._ended:
                raise Gone
            self._waiting = future = begin()
        try:
            return future.result()
        except CancelledError:
            raise Gone from None

    def _end(self) -> None:
        """Nobody waits any more: a call that has not begun leaves its batch."""
        with self._lock:
            self._ended = True
            if self._waiting is not None:
                self._waiting.cancel()


class _Codes(NamedTuple):
    codes: Tensor


class BatchedCodec:
    """The codec as `dac_fast.recordings` uses it, for one request: every call is one of a `Job`.

    Audio and codes are on the CPU, whatever device the codec is on.
    """

    def __init__(self, codec: DAC, job: Job) -> None:
        self._codec, self._job = codec, job
        self.config, self.name = codec.config, codec.name
        self.sample_rate, self.hop_length = codec.sample_rate, codec.hop_length
        # They are asked for their sizes only.
        self.encoder, self.decoder = codec.encoder, codec.decoder

    def parameters(self) -> Iterator[Tensor]:
        """One tensor, which says where audio and codes are, and of which dtype."""
        yield torch.empty(0)

    def encode(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        n_quantizers: int | None = None,
        padded: bool = True,
    ) -> _Codes:
        """As `DAC.encode`, for padded rows of one length; gives the codes alone."""
        assert lengths is None
        assert padded
        call = Call("encode", audio, audio.shape[2] / self.sample_rate)
        return _Codes(self._job.compute(call)[:, :n_quantizers])

    def decode_codes(
        self, codes: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor:
        """As `DAC.decode_codes`, for rows of one length."""
        assert lengths is None
        if not padded:
            # The published package's chunk mode: each chunk by itself.
            device = next(self._codec.parameters()).device
            return self._job.run(
                lambda: self._codec.decode_codes(codes.to(device), padded=False).cpu()
            )
        seconds = codes.shape[2] * self.hop_length / self.sample_rate
        return self._job.compute(Call("decode", codes, seconds))


def batched(codec: DAC, job: Job) -> Codec:
    """A codec whose calls are those of a request."""
    return cast(Codec, BatchedCodec(codec, job))

"""The one thread that owns the codec: it takes steps of streams and batches of calls in turn.

Nothing else computes with the codec, so the event loop never waits for the model, and neither
locks nor copies of the weights are needed.
"""

import asyncio
import functools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import anyio
import torch
from torch import Tensor

from dac_fast.codec import DAC
from dac_fast.model.halves import directions_of
from dac_fast.serving.batching import Call, Job, compute, gather
from dac_fast.serving.streams import Output, Pool
from dac_fast.serving.telemetry import Telemetry

# Streams go first, since they have deadlines; but what has waited for longer than that takes turns
# with their steps.
PATIENCE = 0.25


class Worker:
    """Owns the codec from `start` to `stop`.

    Args:
        codec: the `DAC`, in eval mode.
        slots: streams at once in each direction.
        step_frames: of all streams of a step, added up.
        max_requests: that wait at once.
        max_batch_seconds, max_wait_seconds: as of `Settings`.
        telemetry: counts.
    Attributes:
        pools: the streams, by direction; of half a codec, its own direction's alone.
        warm: done when everything was run for a first time.
    """

    def __init__(
        self,
        codec: DAC,
        slots: int,
        step_frames: int,
        max_requests: int,
        max_batch_seconds: float,
        max_wait_seconds: float,
        telemetry: Telemetry,
    ) -> None:
        self._codec, self._telemetry = codec, telemetry
        self._max_batch_seconds, self._max_wait_seconds = max_batch_seconds, max_wait_seconds
        self._wake = threading.Condition()
        self._calls: list[Call] = []
        # When each came, and where its result goes.
        self._functions: deque[tuple[float, Callable[[], Tensor], Future[Tensor]]] = deque()
        self._threads = anyio.CapacityLimiter(max_requests)
        self._stopping = self._stepped = False
        self.warm: Future[None] = Future()
        self.pools = {
            direction: Pool(codec, direction, slots, step_frames, self._wake, telemetry)
            for direction in directions_of(codec)
        }
        # A daemon: an interpreter that ends for another reason does not wait for it.
        self._thread = threading.Thread(target=self._work, name="dac-model", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; what comes of streams is given to their sinks in that event loop."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End, after everything that was accepted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return len(self._calls)

    def job(self) -> Job:
        """For a new request."""
        return Job(self._submit, self._run, self._threads)

    def _submit(self, call: Call) -> None:
        with self._wake:
            self._calls.append(call)
            self._wake.notify()

    def _run(self, function: Callable[[], Tensor]) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        with self._wake:
            self._functions.append((time.monotonic(), function, future))
            self._wake.notify()
        return future

    def _work(self) -> None:
        torch.set_grad_enabled(False)
        try:
            for pool in self.pools.values():
                pool.warm_up()
        except Exception as error:
            self.warm.set_exception(error)
            return
        self.warm.set_result(None)
        try:
            while task := self._next():
                task()
        finally:
            # Should this thread die of a mistake in it, nobody waits for it.
            with self._wake:
                for call in self._calls:
                    call.result.cancel()

    def _next(self) -> Callable[[], None] | None:
        """What to do now; waits until there is something. None: stop."""
        with self._wake:
            while True:
                now = time.monotonic()
                left = self._seconds_until_batch(now)
                called = self._calls[0].since if left is not None and left <= 0 else math.inf
                asked = self._functions[0][0] if self._functions else math.inf
                ready = any(pool.ready for pool in self.pools.values())
                overdue = now - min(called, asked) > PATIENCE
                # Where something is overdue, every other task is a step.
                self._stepped = ready and not (overdue and self._stepped)
                if self._stepped:
                    return self._step
                if asked < called:
                    _, function, future = self._functions.popleft()
                    return functools.partial(self._answer, function, future)
                if called < math.inf:
                    return functools.partial(self._compute, self._take_batch())
                if self._stopping and left is None:
                    return None
                self._wake.wait(left)

    def _seconds_until_batch(self, now: float) -> float | None:
        """Seconds until the next batch is to run; None: there is nothing to run."""
        # Those whose clients went are gone from the queue here.
        self._calls = [call for call in self._calls if not call.result.cancelled()]
        if not self._calls:
            return None
        seconds = sum(call.rows * call.seconds for call in self._calls)
        if seconds >= self._max_batch_seconds or self._stopping:
            return 0
        return self._calls[0].since + self._max_wait_seconds - now

    def _take_batch(self) -> list[Call]:
        chosen = gather(self._calls, self._max_batch_seconds)
        self._calls = [call for call in self._calls if call not in chosen]
        # From here on they cannot be cancelled.
        return [call for call in chosen if call.result.set_running_or_notify_cancel()]

    def _compute(self, batch: list[Call]) -> None:
        begun = time.monotonic()
        for call in batch:
            self._telemetry.phase_seconds.labels("wait").observe(begun - call.since)
        if batch:
            self._telemetry.batch_items.labels(batch[0].direction).observe(len(batch))
            self._finish(batch)
        self._telemetry.phase_seconds.labels("model").observe(time.monotonic() - begun)

    def _finish(self, batch: list[Call]) -> None:
        """Give the calls of a batch their results."""
        try:
            results = compute(self._codec, batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].result.set_exception(error)
                return
            # The fault of one is not to be that of all: each is computed by itself.
            for call in batch:
                self._finish([call])
            return
        for call, result in zip(batch, results, strict=True):
            self._telemetry.audio_seconds.labels(call.direction).inc(call.rows * call.seconds)
            call.result.set_result(result)

    def _answer(self, function: Callable[[], Tensor], future: Future[Tensor]) -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _step(self) -> None:
        outputs = [output for pool in self.pools.values() if pool.ready for output in pool.step()]
        self._loop.call_soon_threadsafe(_hand_over, outputs)


def _hand_over(outputs: Iterable[Output]) -> None:
    for output in outputs:
        output.stream.sink(output)

"""What the endpoints of a server share: the codec's thread, the settings, the counts."""

import asyncio
import hmac
import math
from collections.abc import Sequence

import anyio
import torch
from starlette.requests import HTTPConnection

from dac_fast.codec import DAC, load
from dac_fast.serving.settings import Settings
from dac_fast.serving.streams import MOST_FRAMES
from dac_fast.serving.telemetry import Telemetry
from dac_fast.serving.worker import Worker


def prepared(
    model: str,
    device: torch.device,
    precision: str | None = None,
    shapes: Sequence[tuple[int, int]] = (),
    parts: str | None = None,
) -> DAC:
    """A codec that is ready to be served.

    Args:
        model: a preset or the path of a checkpoint.
        device: to run on.
        precision, shapes: of `DAC.optimize`, which is called wherever an engine can run the codec.
        parts: of `dac_fast.load`; a server of one half answers what the other is needed for by 501.
    Raises:
        ValueError, OSError: as `dac_fast.load` and `DAC.optimize` say.
    """
    codec = load(model, device=device, parts=parts)
    if codec.config.continuous:
        raise ValueError(f"model {model} is continuous; accepted: models with codes")
    if precision is not None or shapes or codec.config.activation == "snake":
        return codec.optimize(precision, shapes)
    return codec.fold_weight_norm()


class Service:
    """A codec being served.

    Args:
        codec: the `DAC`, in eval mode; the service's own from now on.
        settings: limits; what depends on the device is filled in.
    Attributes:
        parsers: bodies with codes that are parsed at once; each takes several times its size.
        in_progress: requests accepted and not answered yet.
        draining: nothing new is accepted.
    """

    def __init__(self, codec: DAC, settings: Settings) -> None:
        on_gpu = next(codec.parameters()).is_cuda
        batch_seconds = settings.max_batch_seconds
        if batch_seconds is None:
            batch_seconds = 60.0 if on_gpu else 2.0
        # A frame of `tiny` takes 3.2 ms of a core alone, 0.44 ms among 8 streams of 4 frames,
        # 0.43 ms among 16 of them and 0.37 ms among 64.
        step_frames = settings.step_frames or (settings.slots * MOST_FRAMES if on_gpu else 64)
        self.codec, self.settings = codec, settings
        self.chunk_seconds = settings.chunk_seconds or (10.0 if on_gpu else 1.0)
        self.telemetry = Telemetry()
        self.worker = Worker(
            codec,
            settings.slots,
            step_frames,
            settings.max_requests,
            batch_seconds,
            settings.max_wait_ms / 1000,
            self.telemetry,
        )
        self.parsers = anyio.CapacityLimiter(4)
        self.in_progress, self.draining = 0, False
        self.telemetry.watch(
            "dac_requests_in_progress", "Requests being answered.", lambda: self.in_progress
        )
        self.telemetry.watch(
            "dac_calls_waiting", "Calls that wait for the model.", lambda: self.worker.waiting
        )
        if codec.engine is not None:
            engine = codec.engine
            self.telemetry.watch(
                "dac_graph_hits", "Calls that a CUDA graph served.", lambda: engine.hits
            )
            self.telemetry.watch(
                "dac_graph_misses", "Calls that no CUDA graph served.", lambda: engine.misses
            )

    async def start(self) -> None:
        """Begin to work, in the event loop that runs; returns when the model is warm."""
        self.worker.start(asyncio.get_running_loop())
        await asyncio.wrap_future(self.worker.warm)

    def most_bytes(self, path: str) -> int:
        """Accepted of a request's body at that path."""
        most = int(self.settings.max_body_mib * 2**20)
        if path == "/v1/decode":
            # Eight bytes a code, as JSON takes five, and an array of int64 eight.
            most = min(most, 65536 + 8 * self.most_codes)
        return most

    @property
    def most_codes(self) -> int:
        """Codes of the longest recording that is accepted."""
        config, settings = self.codec.config, self.settings
        frames = math.ceil(settings.max_seconds * config.sample_rate / config.hop_length) + 1
        return frames * config.n_codebooks * settings.max_channels

    @property
    def ready(self) -> bool:
        """Whether new work is welcome."""
        return self.worker.alive and not self.draining

    @property
    def idle(self) -> bool:
        """Whether nothing is being done for anybody."""
        return not self.in_progress and not any(pool.active for pool in self.worker.pools.values())

    def admits(self, authorization: str) -> bool:
        """Whether an Authorization header is right; compared in constant time."""
        token = self.settings.token
        return token is None or hmac.compare_digest(
            authorization.encode(), f"Bearer {token}".encode()
        )


def service_of(connection: HTTPConnection) -> Service:
    """The service of the application that a request or WebSocket came to."""
    service: Service = connection.app.state.service
    return service

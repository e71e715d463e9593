"""A process that serves: uvicorn, with what it leaves open closed, and a graceful end."""

import asyncio
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from dac_fast.serving.service import Service
from dac_fast.serving.settings import MOST_BYTES


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; returns when everything that was accepted is answered.

    Args:
        app: of `create_app`.
        listener: a bound socket.
    """
    Server(app).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to that address; port 0: any free one.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen at {host}:{port}: {error}") from error


class Server(uvicorn.Server):
    """uvicorn's server for one application, ending in two steps.

    The first SIGTERM or SIGINT has the application refuse new work and finish what it accepted, up
    to its `grace_seconds`; connections end after that. The second one ends them at once.
    """

    def __init__(self, app: FastAPI) -> None:
        self._service: Service = app.state.service
        self._drain_until: float | None = None
        super().__init__(
            uvicorn.Config(
                app,
                http=_HTTPConnection,
                ws=_WebSocketConnection,
                ws_max_size=MOST_BYTES,
                # Codes and noise do not get smaller.
                ws_per_message_deflate=False,
                limit_concurrency=self._service.settings.max_connections,
                # The application counts its own time; this is for connections that linger.
                timeout_graceful_shutdown=5,
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self._drain_until is None:
            self._service.draining = True
            self._drain_until = time.monotonic() + self._service.settings.grace_seconds
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: end, once it is asked for and nothing is left to do."""
        if self._drain_until is not None:
            late = time.monotonic() > self._drain_until
            self.should_exit = self.should_exit or self._service.idle or late
        return await super().on_tick(counter)


class _HTTPConnection(H11Protocol):
    """Ends where the head of a request does not come; and the application can abort it.

    It is h11's, which bounds the size of a head.
    """

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = self.app_state | {"abort": transport.abort}
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        upgraded = self.transport.get_protocol() is not self
        if upgraded or (self.cycle and not self.cycle.response_complete):
            self._stop_expecting()
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._head is None:
            seconds = self.config.app.state.service.settings.idle_seconds  # type: ignore[union-attr]
            self._head = self.loop.call_later(seconds, self.transport.abort)

    def _stop_expecting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class _WebSocketConnection(WebSocketsSansIOProtocol):
    """The application can abort it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.app_state = self.app_state | {"abort": self.transport.abort}

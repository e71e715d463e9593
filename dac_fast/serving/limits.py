"""The gate that every HTTP request passes: token, queue length, size, time-outs.

Answers of its own are JSON, {"detail": why}, as those of the endpoints are:

    401  the token is missing or wrong
    408  the client stopped sending in the middle of its body
    413  the body is larger than accepted
    429  as many requests are in progress as are accepted; Retry-After says when to try again
    503  the server ends
    504  the request took too long

A request is in progress once its body is there, so that who sends slowly holds up nobody. A client
that goes away ends its request, and so does one that takes nothing of its answer.
"""

import asyncio
import time
from collections.abc import Callable

import anyio
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dac_fast.serving.service import Service

RETRY = {"Retry-After": "1"}
# Paths that the token guards.
GUARDED = ("/v1/", "/metrics")


class Gate:
    """ASGI middleware; WebSockets pass it untouched."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one request or WebSocket."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, scope, self._service.settings.idle_seconds)
        begun = time.monotonic()
        try:
            if refusal := self._refusal(scope):
                await refusal(scope, receive, answer.send)
            elif _is_work(scope):
                await self._work(scope, receive, answer)
            else:
                await self._app(scope, receive, answer.send)
        except Exception:
            answer.status = answer.status or 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")
            telemetry = self._service.telemetry
            telemetry.requests.labels(route, answer.status or "gone").inc()
            telemetry.request_seconds.labels(route).observe(time.monotonic() - begun)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        """The answer to a request that is not let in."""
        service, path = self._service, scope["path"]
        headers = dict(scope["headers"])
        if path.startswith(GUARDED) and not service.admits(
            headers.get(b"authorization", b"").decode("latin-1")
        ):
            return _refused(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        if not _is_work(scope):
            return None
        declared, most = headers.get(b"content-length", b"0"), service.most_bytes(path)
        if declared.isdigit() and int(declared) > most:
            return _refused(413, _too_large(most))
        if refusal := self._no_room():
            return _refused(*refusal, RETRY)
        return None

    def _no_room(self) -> tuple[int, str] | None:
        """Why a request cannot be taken up now, as status and detail."""
        service, most = self._service, self._service.settings.max_requests
        if not service.ready:
            return 503, "the server is ending; try again"
        if service.in_progress >= most:
            return 429, f"{most} requests are in progress, as many as are accepted"
        return None

    def _take_up(self) -> None:
        """A request's body is there."""
        if refusal := self._no_room():
            raise HTTPException(*refusal, RETRY)
        self._service.in_progress += 1

    async def _work(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        service, settings = self._service, self._service.settings
        most_bytes = service.most_bytes(scope["path"])
        body = _Body(receive, most_bytes, settings.idle_seconds, self._take_up)
        begun = time.monotonic()
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + settings.total_seconds) as limit:
                answer.give_up = limit.cancel
                watcher = asyncio.create_task(body.watch(limit.cancel))
                try:
                    await self._app(scope, body.receive, answer.send)
                finally:
                    watcher.cancel()
            if limit.cancelled_caught and not body.client_gone:
                await answer.end_late(scope, receive, settings.total_seconds)
        finally:
            if body.arrived is not None:
                service.in_progress -= 1
                service.telemetry.phase_seconds.labels("receive").observe(body.arrived - begun)


class _Body:
    """What a client sends: no more than so much, and without long pauses.

    Args:
        receive: of ASGI.
        most_bytes, idle_seconds: limits.
        take_up: called when all of it is there; may raise.
    """

    def __init__(
        self,
        receive: Receive,
        most_bytes: int,
        idle_seconds: float,
        take_up: Callable[[], None],
    ) -> None:
        self._receive, self._take_up = receive, take_up
        self._most_bytes, self._idle_seconds = most_bytes, idle_seconds
        self._size = 0
        self._complete, self._gone = asyncio.Event(), asyncio.Event()
        self.arrived: float | None = None

    @property
    def client_gone(self) -> bool:
        return self._gone.is_set()

    async def receive(self) -> Message:
        if self._complete.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        try:
            with anyio.fail_after(self._idle_seconds):
                message = await self._receive()
        except TimeoutError:
            detail = f"nothing of the body came for {self._idle_seconds:g} s"
            raise HTTPException(408, detail, {"Connection": "close"}) from None
        if message["type"] == "http.disconnect":
            self._gone.set()
            return message
        self._size += len(message.get("body", b""))
        if self._size > self._most_bytes:
            raise HTTPException(413, _too_large(self._most_bytes), {"Connection": "close"})
        if not message.get("more_body", False):
            self._take_up()
            self.arrived = time.monotonic()
            self._complete.set()
        return message

    async def watch(self, cancel: Callable[[], None]) -> None:
        """Cancel the request's work when its client goes after having sent everything."""
        await self._complete.wait()
        while not self.client_gone:
            if (await self._receive())["type"] == "http.disconnect":
                self._gone.set()
        cancel()


class _Answer:
    """What a client is sent: it must not leave it lying for long."""

    def __init__(self, send: Send, scope: Scope, idle_seconds: float) -> None:
        self._send, self._idle_seconds = send, idle_seconds
        self._abort: Callable[[], None] | None = scope.get("state", {}).get("abort")
        self.give_up: Callable[[], None] = lambda: None
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        try:
            with anyio.fail_after(self._idle_seconds):
                await self._send(message)
        except TimeoutError:
            self._drop()
            self.give_up()
            await anyio.lowlevel.checkpoint()

    async def end_late(self, scope: Scope, receive: Receive, seconds: float) -> None:
        """Say that the time is over; where half of an answer is on its way, break it off."""
        if self.status:
            self._drop()
            return
        refusal = _refused(504, f"the request took longer than {seconds:g} s")
        await refusal(scope, receive, self.send)

    def _drop(self) -> None:
        if self._abort:
            self._abort()


def _is_work(scope: Scope) -> bool:
    """Whether a request is for the model."""
    return bool(scope["method"] == "POST" and scope["path"].startswith("/v1/"))


def _refused(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    # The connection goes with the answer, as what the client may still be sending is not read.
    return JSONResponse({"detail": detail}, status, {"Connection": "close"} | (headers or {}))


def _too_large(most_bytes: int) -> str:
    return f"the body is too large; accepted: up to {most_bytes} bytes"

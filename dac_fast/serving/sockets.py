"""The WebSocket endpoints: a stream of codes to audio, and one of audio to codes.

Both begin with a JSON object from the client, which may be empty, and one from the server:

    client  {"n_quantizers": 9, "format": "float32", "token": "…"}
    server  {"sample_rate": 44100, "hop_length": 512, "n_quantizers": 9, "format": "float32",
             "look_ahead": 4757}

Then binary messages go both ways, little-endian: codes as uint16, whole frames one after the other,
N to a frame; samples as float32 or int16, as "format" says. The text message {"end": true} from the
client ends its signal: the server sends the rest, in all what the whole signal would give, and
closes with 1000. The other codes that it closes with, each with a reason:

    1003  a message that is neither binary nor {"end": true}; or the server has the other half of
          the model alone
    1007  a header, a code or a length that is not accepted
    1008  the token is missing or wrong; or silence, slow reading or the whole stream took too long
    1009  a message that is too large
    1011  the model failed
    1012  the server ends
    1013  no slot is free, or the server ends; try again later
"""

import asyncio
import json
import logging
import time
from collections import deque
from typing import Annotated, Any, Literal, NamedTuple

import anyio
import numpy as np
from fastapi import APIRouter, Depends, WebSocket
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.websockets import WebSocketDisconnect

from dac_fast.model.halves import DIRECTIONS, Direction, MissingPartError, require
from dac_fast.serving.formats import to_int16
from dac_fast.serving.service import Service, service_of
from dac_fast.serving.settings import MOST_BYTES
from dac_fast.serving.streams import NoSlotError, Output, Stream

# Frames that wait in a stream before the next message is read.
MOST_WAITING = 256
# Bytes that a client has not taken; with more, its stream is dropped. 24 s of float32 at 44.1 kHz.
MOST_UNREAD = 1 << 22
# After a close, for the client to take what is on its way.
CLOSE_SECONDS = 10.0

logger = logging.getLogger(__name__)
router = APIRouter()
TheService = Annotated[Service, Depends(service_of)]


class Header(BaseModel):
    """What a client says first. A browser cannot send a token in any other way."""

    model_config = ConfigDict(extra="forbid")

    n_quantizers: Annotated[int | None, Field(ge=1)] = None
    format: Literal["float32", "int16"] = "float32"
    token: str | None = None


class End(NamedTuple):
    """How a stream ends: the code that it is closed with, and why."""

    code: int
    reason: str = ""
    by_client: bool = False


class _Refused(Exception):  # noqa: N818 (a way out)
    """Something that the client sent is not accepted."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.end = End(code, reason)


@router.websocket("/v1/decode/stream")
async def decode_stream(socket: WebSocket, service: TheService) -> None:
    """Frames of codes in, samples out."""
    await _Connection(socket, service, "decode").serve()


@router.websocket("/v1/encode/stream")
async def encode_stream(socket: WebSocket, service: TheService) -> None:
    """Samples in, frames of codes out."""
    await _Connection(socket, service, "encode").serve()


class _Connection:
    """The connection of one stream."""

    def __init__(self, socket: WebSocket, service: Service, direction: Direction) -> None:
        self._socket = socket
        self._service = service
        self._direction = direction
        self._codebooks = service.codec.config.n_codebooks
        self._as_int16 = False
        # Once it has a slot.
        self._stream: Stream | None = None
        # What came of the stream and is not sent yet, whether it is the last, and its bytes.
        self._outputs: deque[tuple[bytes, bool]] = deque()
        self._unread = 0
        self._has_outputs, self._has_room = asyncio.Event(), asyncio.Event()
        self._failure: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._alive_at = time.monotonic()

    async def serve(self) -> None:
        """From the handshake to the close."""
        await self._socket.accept()
        end = End(1006)
        try:
            end = await self._run(await self._open())
        except _Refused as refused:
            end = refused.end
        except WebSocketDisconnect as gone:
            end = End(gone.code, by_client=True)
        finally:
            if self._stream:
                self._pool.close(self._stream)
            self._service.telemetry.streams_ended.labels(self._direction, end.code).inc()
        if not end.by_client:
            await self._close(end)

    async def _open(self) -> Stream:
        """Exchange headers and take a slot."""
        service, authorization = self._service, self._socket.headers.get("authorization")
        with anyio.move_on_after(service.settings.idle_seconds):
            header = await self._header()
            token = f"Bearer {header.token}" if header.token else authorization
            if not service.admits(token or ""):
                raise _Refused(1008, "the token is missing or wrong")
            try:
                require(service.codec, DIRECTIONS[self._direction])
            except MissingPartError as error:
                raise _Refused(1003, str(error)) from None
            self._pool = service.worker.pools[self._direction]
            if header.n_quantizers and header.n_quantizers > self._codebooks:
                wanted = f"{header.n_quantizers} codebooks"
                raise _Refused(1007, f"{wanted}; accepted: 1 to {self._codebooks}")
            if service.codec.config.channels > 1:
                raise _Refused(1007, "the model is stereo; accepted in streams: mono models")
            if not service.ready:
                raise _Refused(1013, "the server is ending; try again later")
            self._codebooks = header.n_quantizers or self._codebooks
            self._as_int16 = header.format == "int16"
            channels = self._codebooks if self._direction == "decode" else 1
            try:
                self._stream = self._pool.open(channels, self._take)
            except NoSlotError:
                slots = f"all {self._pool.slots} slots are taken"
                raise _Refused(1013, f"{slots}; try again later") from None
            await self._socket.send_json(self._answer(header))
            return self._stream
        raise _Refused(1008, f"no header came for {service.settings.idle_seconds:g} s")

    async def _header(self) -> Header:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        try:
            return Header.model_validate_json(message.get("text") or "")
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"]) or "header"
            raise _Refused(1007, f"{where}: {fault['msg']}"[:120]) from error

    def _answer(self, header: Header) -> dict[str, Any]:
        codec = self._service.codec
        return {
            "sample_rate": codec.sample_rate,
            "hop_length": codec.hop_length,
            "n_quantizers": self._codebooks,
            "format": header.format,
            "look_ahead": self._pool.look_ahead,
        }

    async def _run(self, stream: Stream) -> End:
        """Read, write and keep time at once, until one of them has come to an end."""
        tasks = [
            asyncio.ensure_future(part)
            for part in (self._read(stream), self._write(), self._watch(), self._failure)
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, stream: Stream) -> End:
        while True:
            while stream.waiting > MOST_WAITING:
                self._has_room.clear()
                await self._has_room.wait()
            message = await self._socket.receive()
            self._alive_at = time.monotonic()
            if message["type"] == "websocket.disconnect":
                return End(message.get("code", 1006), by_client=True)
            data = message.get("bytes")
            if data is not None and not stream.finished:
                self._pool.feed(stream, self._piece(data))
            elif not stream.finished and _says_end(message.get("text", "")):
                self._pool.finish(stream)
            elif stream.finished:
                return End(1003, "a message after the end; accepted: none")
            else:
                return End(1003, 'a text that is not accepted; accepted: {"end": true}')

    def _piece(self, data: bytes) -> NDArray[Any]:
        """A message as a piece of the stream."""
        if len(data) > MOST_BYTES:
            raise _Refused(1009, f"{len(data)} bytes; accepted in a message: up to {MOST_BYTES}")
        if self._direction == "decode":
            return self._codes(data)
        dtype = np.dtype("<i2" if self._as_int16 else "<f4")
        if len(data) % dtype.itemsize:
            raise _Refused(1007, f"{len(data)} bytes; accepted: whole samples of {dtype.itemsize}")
        samples: NDArray[np.float32] = np.frombuffer(data, dtype)[None].astype(np.float32)
        if self._as_int16:
            samples /= 32768
        elif not np.isfinite(samples).all():
            raise _Refused(1007, "a sample is not finite")
        return samples

    def _codes(self, data: bytes) -> NDArray[Any]:
        if len(data) % (2 * self._codebooks):
            frame = 2 * self._codebooks
            raise _Refused(1007, f"{len(data)} bytes; accepted: whole frames of {frame}")
        codes: NDArray[Any] = np.frombuffer(data, "<u2").reshape(-1, self._codebooks).T
        size, highest = self._service.codec.config.codebook_size, int(codes.max(initial=0))
        if highest >= size:
            raise _Refused(1007, f"code {highest}; accepted: 0 to {size - 1}")
        return codes

    def _take(self, output: Output) -> None:
        """The pool's sink: to be sent when the client takes it."""
        if isinstance(output.block, Exception):
            logger.error("a stream failed", exc_info=output.block)
            self._fail(End(1011, "the model failed"))
            return
        data = self._message(output.block)
        self._unread += len(data)
        if self._unread > MOST_UNREAD:
            self._fail(End(1008, f"{self._unread} bytes are not read; accepted: {MOST_UNREAD}"))
            return
        self._outputs.append((data, output.last))
        self._has_outputs.set()
        self._has_room.set()

    def _message(self, block: NDArray[Any]) -> bytes:
        message: NDArray[Any]
        if self._direction == "encode":
            message = block[: self._codebooks].T.astype("<u2")
        else:
            message = to_int16(block) if self._as_int16 else block.astype("<f4")
        return message.tobytes()

    def _fail(self, end: End) -> None:
        if not self._failure.done():
            self._failure.set_result(end)

    async def _write(self) -> End:
        while True:
            while not self._outputs:
                self._has_outputs.clear()
                await self._has_outputs.wait()
            data, last = self._outputs.popleft()
            if data:
                await self._socket.send_bytes(data)
                self._alive_at = time.monotonic()
            self._unread -= len(data)
            if last:
                return End(1000)

    async def _watch(self) -> End:
        settings, begun = self._service.settings, time.monotonic()
        while True:
            now = time.monotonic()
            silent, lasting = now - self._alive_at, now - begun
            if silent >= settings.idle_seconds:
                return End(1008, f"nothing was sent or taken for {settings.idle_seconds:g} s")
            if lasting >= settings.stream_seconds:
                return End(1008, f"the stream lasted {settings.stream_seconds:g} s, the most")
            await asyncio.sleep(
                min(settings.idle_seconds - silent, settings.stream_seconds - lasting)
            )

    async def _close(self, end: End) -> None:
        # A client that reads nothing would keep its connection for ever.
        if abort := self._socket.scope.get("state", {}).get("abort"):
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, abort)
        with anyio.move_on_after(CLOSE_SECONDS):
            await self._socket.close(end.code, end.reason)


def _says_end(text: str) -> bool:
    try:
        said: object = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return said == {"end": True}

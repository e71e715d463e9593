"""Clients of `dac-fast serve`: `Client` for programs that wait, `AsyncClient` for asyncio."""

import contextlib
import io
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit, urlunsplit

import httpx
import numpy as np
import websockets.asyncio.client
import websockets.sync.client
from numpy.typing import ArrayLike, NDArray
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK

from dac_fast.model.halves import Direction
from dac_fast.serving.settings import MOST_BYTES
from dac_fast.storage.dac2 import DACFile

# The bytes of an audio file, its path, or (array [C, T] or [T], rate in Hz).
Audio: TypeAlias = bytes | str | os.PathLike[str] | tuple[ArrayLike, int]
# A .dac file, its bytes, or its path.
Codes: TypeAlias = DACFile | bytes | str | os.PathLike[str]

DEFAULT_URL = "http://127.0.0.1:8000"


class ServerError(Exception):
    """The server's refusal.

    Attributes:
        status: of the HTTP answer, or the code that a stream was closed with.
        detail: what the server says about it.
        retry_after: seconds after which it asks to be tried again; None: it does not ask.
    """

    def __init__(self, status: int, detail: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.retry_after = retry_after


class Reconstruction(NamedTuple):
    """What `reconstruct` gives.

    Attributes:
        audio: float32 [C, T].
        sample_rate: in Hz.
        report: "kbps", "ratio" (to 16-bit PCM), "si_sdr" (dB) and "mel_distance", or None.
    """

    audio: NDArray[np.float32]
    sample_rate: int
    report: dict[str, float | None]


class Client:
    """Calls a server and waits for it; threads may share it.

    Args:
        url: where the server is.
        token: that it asks for.
        timeout: seconds to wait for anything.
    Raises (every method):
        ServerError: the server refused.
        httpx.HTTPError, OSError: the server cannot be reached.
    """

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, timeout: float = 300.0
    ) -> None:
        self._url = url
        self._headers = _headers(token)
        self._timeout = timeout
        self._http = httpx.Client(base_url=url, headers=self._headers, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ready(self) -> bool:
        """Whether the server takes work."""
        return self._http.get("/readyz").status_code == 200

    def models(self) -> list[dict[str, Any]]:
        """What the server has: a dictionary per model."""
        models: list[dict[str, Any]] = _checked(self._http.get("/v1/models")).json()["models"]
        return models

    def encode(
        self, audio: Audio, n_quantizers: int | None = None, normalize_db: float | None = -16.0
    ) -> DACFile:
        """Audio to codes, as `DAC.compress`."""
        answer = self._http.post(
            "/v1/encode", content=_audio(audio), params=_encode(n_quantizers, normalize_db)
        )
        return DACFile.from_bytes(_checked(answer).content)

    def decode(
        self, file: Codes, n_quantizers: int | None = None
    ) -> tuple[NDArray[np.float32], int]:
        """Codes to (float32 [C, T], rate in Hz), as `DAC.decompress`, in 16 bit."""
        return _wav(b"".join(self.decode_pieces(file, n_quantizers)))

    def decode_pieces(
        self, file: Codes, n_quantizers: int | None = None, format: str = "wav"
    ) -> Iterator[bytes]:
        """An audio file of that format (wav, flac, ogg), piece by piece as it is made."""
        with self._http.stream(
            "POST", "/v1/decode", content=_codes(file), params=_decode(n_quantizers, format)
        ) as answer:
            if answer.is_error:
                answer.read()
            yield from _checked(answer).iter_bytes()

    def reconstruct(self, audio: Audio, n_quantizers: int | None = None) -> Reconstruction:
        """A clip through the codec and back, and how near it came."""
        answer = self._http.post(
            "/v1/reconstruct", content=_audio(audio), params=_count(n_quantizers)
        )
        return _reconstruction(_checked(answer))

    def decode_stream(self, n_quantizers: int | None = None, format: str = "float32") -> "Stream":
        """A new stream of codes [N, f] to samples [n]."""
        return Stream(self._url, self._headers, "decode", n_quantizers, format, self._timeout)

    def encode_stream(self, n_quantizers: int | None = None, format: str = "float32") -> "Stream":
        """A new stream of samples [n] to codes [N, f]."""
        return Stream(self._url, self._headers, "encode", n_quantizers, format, self._timeout)


class AsyncClient:
    """`Client` for asyncio: the same methods, to be awaited."""

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, timeout: float = 300.0
    ) -> None:
        self._url = url
        self._headers = _headers(token)
        self._timeout = timeout
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(
            base_url=url, headers=self._headers, timeout=timeout, limits=limits
        )

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ready(self) -> bool:
        """As `Client.ready`."""
        return (await self._http.get("/readyz")).status_code == 200

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        answer = _checked(await self._http.get("/v1/models"))
        models: list[dict[str, Any]] = answer.json()["models"]
        return models

    async def encode(
        self, audio: Audio, n_quantizers: int | None = None, normalize_db: float | None = -16.0
    ) -> DACFile:
        """As `Client.encode`."""
        answer = await self._http.post(
            "/v1/encode", content=_audio(audio), params=_encode(n_quantizers, normalize_db)
        )
        return DACFile.from_bytes(_checked(answer).content)

    async def decode(
        self, file: Codes, n_quantizers: int | None = None
    ) -> tuple[NDArray[np.float32], int]:
        """As `Client.decode`."""
        return _wav(b"".join([piece async for piece in self.decode_pieces(file, n_quantizers)]))

    async def decode_pieces(
        self, file: Codes, n_quantizers: int | None = None, format: str = "wav"
    ) -> AsyncIterator[bytes]:
        """As `Client.decode_pieces`."""
        async with self._http.stream(
            "POST", "/v1/decode", content=_codes(file), params=_decode(n_quantizers, format)
        ) as answer:
            if answer.is_error:
                await answer.aread()
            async for piece in _checked(answer).aiter_bytes():
                yield piece

    async def reconstruct(self, audio: Audio, n_quantizers: int | None = None) -> Reconstruction:
        """As `Client.reconstruct`."""
        answer = await self._http.post(
            "/v1/reconstruct", content=_audio(audio), params=_count(n_quantizers)
        )
        return _reconstruction(_checked(answer))

    def decode_stream(
        self, n_quantizers: int | None = None, format: str = "float32"
    ) -> "AsyncStream":
        """As `Client.decode_stream`."""
        return AsyncStream(self._url, self._headers, "decode", n_quantizers, format, self._timeout)

    def encode_stream(
        self, n_quantizers: int | None = None, format: str = "float32"
    ) -> "AsyncStream":
        """As `Client.encode_stream`."""
        return AsyncStream(self._url, self._headers, "encode", n_quantizers, format, self._timeout)


class _Pieces:
    """The messages of a stream, see `dac_fast.serving.sockets`.

    Attributes:
        header: what the server said first: "sample_rate", "hop_length", "n_quantizers", ….
    """

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        direction: Direction,
        n_quantizers: int | None,
        format: str,
        timeout: float,
    ) -> None:
        scheme, place, path, *_ = urlsplit(url)
        scheme = {"http": "ws", "https": "wss"}.get(scheme, scheme)
        path = f"{path.rstrip('/')}/v1/{direction}/stream"
        self._url = urlunsplit((scheme, place, path, "", ""))
        self._http_headers = headers
        self._direction = direction
        self._timeout = timeout
        self._first = json.dumps({"n_quantizers": n_quantizers, "format": format})
        self._samples = np.dtype("<i2" if format == "int16" else "<f4")
        self.header: dict[str, Any] = {}

    def _to_messages(self, piece: ArrayLike) -> list[bytes]:
        array: NDArray[Any] = np.asarray(piece)
        decoding = self._direction == "decode"
        data = (array.T.astype("<u2") if decoding else array.astype(self._samples)).tobytes()
        unit = 2 * self.header["n_quantizers"] if decoding else self._samples.itemsize
        most = MOST_BYTES // unit * unit
        return [data[first : first + most] for first in range(0, len(data), most)]

    def _from_message(self, message: bytes | str) -> NDArray[Any]:
        assert isinstance(message, bytes)
        if self._direction == "decode":
            return np.frombuffer(message, self._samples)
        codes: NDArray[Any] = np.frombuffer(message, "<u2").astype(np.int64)
        n_quantizers: int = self.header["n_quantizers"]
        frames: NDArray[Any] = codes.reshape(-1, n_quantizers).T
        return frames


_END = json.dumps({"end": True})


class Stream(_Pieces):
    """A stream, open as a context manager; one thread may send while another receives."""

    def __enter__(self) -> "Stream":
        with contextlib.ExitStack() as stack:
            self._socket = stack.enter_context(
                websockets.sync.client.connect(
                    self._url,
                    additional_headers=self._http_headers,
                    compression=None,
                    open_timeout=self._timeout,
                )
            )
            try:
                self._socket.send(self._first)
                self.header = json.loads(self._socket.recv(self._timeout))
            except ConnectionClosed as closed:
                raise _ended(closed) from closed
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def send(self, piece: ArrayLike) -> None:
        """More of the signal: codes [N, f] or samples [n], of any length."""
        try:
            for message in self._to_messages(piece):
                self._socket.send(message)
        except ConnectionClosed as closed:
            raise _ended(closed) from closed

    def finish(self) -> None:
        """The signal ends with what was sent."""
        try:
            self._socket.send(_END)
        except ConnectionClosed as closed:
            raise _ended(closed) from closed

    def receive(self) -> NDArray[Any] | None:
        """What comes next: samples [n] or codes int64 [N, f]; None: the signal's end."""
        try:
            return self._from_message(self._socket.recv(self._timeout))
        except ConnectionClosedOK:
            return None
        except ConnectionClosed as closed:
            raise _ended(closed) from closed

    def __iter__(self) -> Iterator[NDArray[Any]]:
        while (piece := self.receive()) is not None:
            yield piece


class AsyncStream(_Pieces):
    """`Stream` for asyncio."""

    async def __aenter__(self) -> "AsyncStream":
        async with contextlib.AsyncExitStack() as stack:
            self._socket = await stack.enter_async_context(
                websockets.asyncio.client.connect(
                    self._url,
                    additional_headers=self._http_headers,
                    compression=None,
                    open_timeout=self._timeout,
                )
            )
            try:
                await self._socket.send(self._first)
                self.header = json.loads(await self._socket.recv())
            except ConnectionClosed as closed:
                raise _ended(closed) from closed
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._stack.aclose()

    async def send(self, piece: ArrayLike) -> None:
        """As `Stream.send`."""
        try:
            for message in self._to_messages(piece):
                await self._socket.send(message)
        except ConnectionClosed as closed:
            raise _ended(closed) from closed

    async def finish(self) -> None:
        """As `Stream.finish`."""
        try:
            await self._socket.send(_END)
        except ConnectionClosed as closed:
            raise _ended(closed) from closed

    def abort(self) -> None:
        """Break the connection off, as a client that dies does."""
        self._socket.transport.abort()

    async def receive(self) -> NDArray[Any] | None:
        """As `Stream.receive`."""
        try:
            return self._from_message(await self._socket.recv())
        except ConnectionClosedOK:
            return None
        except ConnectionClosed as closed:
            raise _ended(closed) from closed

    async def __aiter__(self) -> AsyncIterator[NDArray[Any]]:
        while (piece := await self.receive()) is not None:
            yield piece


def _headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _ended(closed: ConnectionClosed) -> ServerError:
    received = closed.rcvd
    if received is None:
        return ServerError(1006, "the connection broke")
    return ServerError(received.code, received.reason)


def _checked(answer: httpx.Response) -> httpx.Response:
    """The answer, if it is none of refusal."""
    if not answer.is_error:
        return answer
    try:
        detail = str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = answer.text[:200] or answer.reason_phrase
    retry = answer.headers.get("Retry-After")
    raise ServerError(answer.status_code, detail, None if retry is None else float(retry))


def _count(n_quantizers: int | None) -> dict[str, str]:
    return {} if n_quantizers is None else {"n_quantizers": str(n_quantizers)}


def _encode(n_quantizers: int | None, normalize_db: float | None) -> dict[str, str]:
    level = "none" if normalize_db is None else str(normalize_db)
    return _count(n_quantizers) | {"normalize_db": level}


def _decode(n_quantizers: int | None, format: str) -> dict[str, str]:
    return _count(n_quantizers) | {"format": format}


def _audio(audio: Audio) -> bytes:
    if isinstance(audio, bytes):
        return audio
    if isinstance(audio, tuple):
        import soundfile

        samples, rate = audio
        file = io.BytesIO()
        array = np.atleast_2d(np.asarray(samples, np.float32))
        soundfile.write(file, array.T, rate, "FLOAT", format="WAV")
        return file.getvalue()
    return Path(audio).read_bytes()


def _codes(file: Codes) -> bytes:
    if isinstance(file, DACFile):
        return file.to_bytes("dac1" if file.codebook_size is None else "dac2")
    return file if isinstance(file, bytes) else Path(file).read_bytes()


def _wav(data: bytes) -> tuple[NDArray[np.float32], int]:
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return np.ascontiguousarray(samples.T), rate


def _reconstruction(answer: httpx.Response) -> Reconstruction:
    return Reconstruction(*_wav(answer.content), json.loads(answer.headers["X-Dac-Report"]))

"""The load: streams in real time, and requests at random times whether answers come or not."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from dac_fast.codec import DAC
from dac_fast.serving import AsyncClient

FRAMES = 4  # of a message
FIRST_FRAMES = 14  # of the first one: what the decoder looks ahead, and four
SIGNALS = 8  # different ones
REQUEST_SECONDS = (0.5, 3.0)


@dataclass(frozen=True)
class Signal:
    """Codes [N, F], and the samples [n] that they are."""

    codes: NDArray[np.int64]
    audio: NDArray[np.float32]


def some_signals(codec: DAC, seconds: float = 20.0) -> list[Signal]:
    frames = round(seconds * codec.sample_rate / codec.hop_length)
    rng, config = np.random.default_rng(0), codec.config
    signals = []
    for _ in range(SIGNALS):
        codes = rng.integers(config.codebook_size, size=(config.n_codebooks, frames))
        with torch.inference_mode():
            audio = codec.decode_codes(torch.from_numpy(codes)[None])[0, 0]
        signals.append(Signal(codes, audio.numpy()))
    return signals


@dataclass
class Heard:
    """What came of a stream.

    Attributes:
        first: seconds from its opening to its first audio.
        latencies: seconds from each message to the last sample that it determines.
    """

    first: float = float("nan")
    latencies: list[float] = field(default_factory=list)


async def one_stream(client: AsyncClient, signal: Signal, seconds: float) -> Heard:
    """A real-time stream for so long; its signal is repeated."""
    heard, began = Heard(), time.perf_counter()
    async with client.decode_stream() as stream:
        rate, hop = stream.header["sample_rate"], stream.header["hop_length"]
        ahead = stream.header["look_ahead"]
        # When each message was sent, and the samples that are determined with it.
        due: asyncio.Queue[tuple[float, int]] = asyncio.Queue()

        async def send() -> None:
            sent, size = 0, FIRST_FRAMES
            pause = FRAMES * hop / rate
            start = time.perf_counter()
            for number in range(max(int(seconds / pause), 1)):
                await asyncio.sleep(start + number * pause - time.perf_counter())
                places = np.arange(sent, sent + size) % signal.codes.shape[1]
                sent += size
                due.put_nowait((time.perf_counter(), sent * hop - ahead))
                await stream.send(signal.codes[:, places])
                size = FRAMES
            await stream.finish()

        sending = asyncio.ensure_future(send())
        try:
            received, waiting = 0, None
            async for piece in stream:
                now = time.perf_counter()
                if not received:
                    heard.first = now - began
                received += len(piece)
                while waiting or not due.empty():
                    waiting = waiting or due.get_nowait()
                    if received < waiting[1]:
                        break
                    heard.latencies.append(now - waiting[0])
                    waiting = None
            await sending
        finally:
            sending.cancel()
    return heard


async def streams(
    client: AsyncClient, signals: Sequence[Signal], count: int, seconds: float
) -> list[Heard]:
    """So many streams at once, each beginning at a random moment of a second."""
    rng = np.random.default_rng(count)

    async def one(number: int, wait: float) -> Heard:
        await asyncio.sleep(wait)
        return await one_stream(client, signals[number % len(signals)], seconds)

    waits = rng.uniform(0, 1, count)
    return await asyncio.gather(*(one(number, wait) for number, wait in enumerate(waits)))


async def arrivals(rate: float, seconds: float) -> AsyncIterator[int]:
    """Numbers, at the random times of a Poisson process."""
    rng = np.random.default_rng(round(1000 * rate))
    start = time.perf_counter()
    moments = np.cumsum(rng.exponential(1 / rate, round(3 * rate * seconds) + 10))
    for number, moment in enumerate(moments[moments < seconds]):
        await asyncio.sleep(max(start + moment - time.perf_counter(), 0))
        yield number


@dataclass
class Answers:
    """What came of requests: seconds until each answer, the audio in them, and refusals."""

    latencies: list[float] = field(default_factory=list)
    audio_seconds: float = 0.0
    refused: int = 0


async def requests(
    url: str,
    signals: Sequence[Signal],
    codec_rate: tuple[int, int],
    rate: float,
    seconds: float,
) -> Answers:
    """Clips to decode and to encode, in turns, of random lengths."""
    answers = Answers()
    sample_rate, hop = codec_rate
    rng = np.random.default_rng(0)
    limits = httpx.Limits(max_connections=None)

    async def one(path: str, body: bytes, lasting: float) -> None:
        begun = time.perf_counter()
        answer = await http.post(path, content=body)
        if answer.is_error:
            answers.refused += 1
            return
        answers.latencies.append(time.perf_counter() - begun)
        answers.audio_seconds += lasting

    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        tasks = []
        async for number in arrivals(rate, seconds):
            lasting = rng.uniform(*REQUEST_SECONDS)
            chosen = signals[number % len(signals)]
            body = io.BytesIO()
            if number % 2:
                soundfile.write(
                    body, chosen.audio[: round(lasting * sample_rate)], sample_rate, format="WAV"
                )
                path = "/v1/encode?format=npy"
            else:
                frames = round(lasting * sample_rate / hop)
                np.save(body, chosen.codes[None, :, :frames].astype(np.uint16))
                path = "/v1/decode"
            tasks.append(asyncio.ensure_future(one(path, body.getvalue(), lasting)))
        await asyncio.gather(*tasks)
    return answers

"""`python -m bench serve`: a server under load, beside one without batches and a plain loop.

The load comes from outside, in an open loop: requests and streams arrive at random times (Poisson),
whether earlier ones are answered or not, so waiting shows. A stream is one of a TTS back end: the
frames that the decoder looks ahead come at once with the first ones, then four frames every 46 ms
(at 44.1 kHz). Each piece of audio is due 50 ms after its codes were sent.

The result file is one JSON document: `environment`, `load` (what was asked), and `rows`, one per
server and measurement:

    streams   the most real-time streams without a piece that came late, and latencies at that load
    first     the time from a stream's opening to its first audio, at half of that load
    requests  latencies of requests at a rate, alone
    mixed     both at once: half of those streams, and requests
    soak      streams that join, leave, stall and die at random; memory; whether all came out right
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from bench.document import SCHEMA, Json, environment, write
from bench.serving.load import (
    FRAMES,
    Answers,
    Signal,
    arrivals,
    one_stream,
    requests,
    some_signals,
    streams,
)
from bench.serving.servers import Server, servers
from dac_fast.codec import load
from dac_fast.serving import AsyncClient, ServerError

DEADLINE = 0.05  # seconds, from codes to audio


@dataclass(frozen=True)
class ServeSettings:
    """What is measured.

    Attributes:
        model: a preset or the path of a checkpoint.
        seconds: of each measurement; the number of streams is sought in a sixth of that.
        rates: requests per second, one measurement each.
        most_streams: the search for the number of streams ends there.
        published_python: a Python that can import the published package, FastAPI, uvicorn and
            websockets; None: without its server.
        soak_minutes: of streams at random; 0: none.
    """

    model: str = "tiny"
    seconds: float = 60.0
    rates: Sequence[float] = (2.0, 4.0, 8.0)
    most_streams: int = 256
    published_python: str | None = None
    soak_minutes: float = 0.0


def run_serve(settings: ServeSettings, path: Path, commit: str | None = None) -> Json:
    """Measures every server and writes the document, again after each row; returns it."""
    codec = load(settings.model).fold_weight_norm()
    rows: list[Json] = []
    document = {
        "schema": SCHEMA,
        "environment": environment("cpu", commit),
        "load": {
            "model": settings.model,
            "seconds": settings.seconds,
            "deadline_ms": 1000 * DEADLINE,
            "frames_of_a_message": FRAMES,
        },
        "rows": rows,
    }

    def report(row: Json) -> None:
        rows.append(row)
        print(", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        write(document, path)

    signals = some_signals(codec)
    for name, start in servers(
        settings.model, settings.most_streams, settings.published_python, codec
    ).items():
        with start() as server:
            asyncio.run(_measure(name, server, signals, settings, report))
    return document


async def _measure(
    name: str,
    server: Server,
    signals: Sequence[Signal],
    settings: ServeSettings,
    report: Callable[[Json], None],
) -> None:
    """Every measurement of a server, reported one by one."""
    codec = load(settings.model)
    rates = codec.sample_rate, codec.hop_length
    seconds = settings.seconds
    async with AsyncClient(server.url) as client:
        count, latencies = await _most_streams(client, signals, settings)
        report({"server": name, "what": "streams", "streams": count, **_percentiles(latencies)})
        half = max(count // 2, 1)
        first = await _first_audio(client, signals, half, seconds)
        report({"server": name, "what": "first", "streams": half, **_percentiles(first)})
        for rate in settings.rates:
            answers = await requests(server.url, signals, rates, rate, seconds)
            report({"server": name, "what": "requests", **_answered(answers, rate, seconds)})
        heard, answers = await asyncio.gather(
            streams(client, signals, half, seconds),
            requests(server.url, signals, rates, settings.rates[0], seconds),
        )
        late = [latency for one in heard for latency in one.latencies]
        row = {"server": name, "what": "mixed", "streams": half, "late": _late(late)}
        report(row | _answered(answers, settings.rates[0], seconds))
        if settings.soak_minutes and name == "dac-fast serve":
            report({"server": name, "what": "soak", **await _soak(server, signals, settings)})


async def _most_streams(
    client: AsyncClient, signals: Sequence[Signal], settings: ServeSettings
) -> tuple[int, list[float]]:
    """The most streams without a late piece, and their latencies: found in short, then held."""

    async def held(count: int, seconds: float) -> list[float] | None:
        try:
            heard = await streams(client, signals, count, seconds)
        except ServerError:
            return None
        latencies = [latency for one in heard for latency in one.latencies]
        return None if _late(latencies) else latencies

    good, bad = 0, 1
    while bad <= settings.most_streams and await held(bad, settings.seconds / 6):
        good, bad = bad, 2 * bad
    while bad - good > 1 + good // 16:
        middle = (good + bad) // 2
        if await held(middle, settings.seconds / 6):
            good = middle
        else:
            bad = middle
    while good:
        if latencies := await held(good, settings.seconds):
            return good, latencies
        good -= 1 + good // 16
    return 0, []


def _late(latencies: Sequence[float]) -> int:
    """Pieces that came after their deadline."""
    return sum(latency > DEADLINE for latency in latencies)


async def _first_audio(
    client: AsyncClient, signals: Sequence[Signal], count: int, seconds: float
) -> list[float]:
    """Seconds to the first audio of streams that open at random times beside so many others."""
    others = asyncio.ensure_future(streams(client, signals, count, seconds))
    await asyncio.sleep(1)
    tasks = []
    async for number in arrivals(2.0, seconds - 2):
        signal = signals[number % len(signals)]
        tasks.append(asyncio.ensure_future(one_stream(client, signal, 0.2)))
    heard = await asyncio.gather(*tasks)
    await others
    return [one.first for one in heard]


async def _soak(server: Server, signals: Sequence[Signal], settings: ServeSettings) -> Json:
    """Streams of all sorts for minutes; those that end well are held against the whole signal."""
    until = time.monotonic() + 60 * settings.soak_minutes
    outcomes = {"right": 0, "wrong": 0, "died": 0, "refused": 0}
    memory: list[float] = []
    rng = np.random.default_rng(0)

    async def one(client: AsyncClient, seed: int) -> None:
        mine = np.random.default_rng(seed)
        chosen = signals[seed % len(signals)]
        frames = int(mine.integers(1, 200))
        dies = mine.random() < 0.2
        received = [np.zeros(0, np.float32)]
        async with client.decode_stream() as stream:

            async def send() -> None:
                sent = 0
                while sent < frames:
                    size = min(int(mine.integers(1, 16)), frames - sent)
                    await stream.send(chosen.codes[:, sent : sent + size])
                    sent += size
                    if mine.random() < 0.1:
                        await asyncio.sleep(float(mine.exponential(0.2)))
                    if dies and mine.random() < 0.1:
                        stream.abort()
                        return
                await stream.finish()

            sending = asyncio.ensure_future(send())
            try:
                async for piece in stream:
                    received.append(piece)
            finally:
                await asyncio.gather(sending, return_exceptions=True)
        # The frames that follow in the longer signal change what its end sees.
        samples = max(frames * stream.header["hop_length"] - 2 * stream.header["look_ahead"], 0)
        audio = np.concatenate(received)
        whole = len(audio) == frames * stream.header["hop_length"]
        close = np.allclose(audio[:samples], chosen.audio[:samples], atol=1e-4)
        outcomes["right" if whole and close else "wrong"] += 1

    async def guarded(client: AsyncClient, seed: int) -> None:
        try:
            await one(client, seed)
        except ServerError as error:
            outcomes["refused" if error.status == 1013 else "died"] += 1

    async def watch() -> None:
        while True:
            memory.append(round(server.resident_mib, 1))
            await asyncio.sleep(min(10.0, 6 * settings.soak_minutes))

    async with AsyncClient(server.url) as client:
        watching = asyncio.ensure_future(watch())
        running: set[asyncio.Task[None]] = set()
        while time.monotonic() < until:
            if len(running) < 24:
                task = asyncio.ensure_future(guarded(client, int(rng.integers(2**31))))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.sleep(float(rng.exponential(0.05)))
        await asyncio.gather(*running)
        watching.cancel()
    async with httpx.AsyncClient() as http:
        numbers = (await http.get(f"{server.url}/metrics")).text
    left = [line for line in numbers.splitlines() if line.startswith('dac_streams{direction="dec')]
    slots = float(left[0].rsplit(" ", 1)[1]) if left else 0.0
    return {**outcomes, "slots_left_taken": slots, "memory_mib": memory}


def _percentiles(seconds: Sequence[float]) -> Json:
    if not seconds:
        return {}
    p50, p95, p99 = (1000 * np.percentile(seconds, (50, 95, 99))).tolist()
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def _answered(answers: Answers, rate: float, seconds: float) -> Json:
    return {
        "rate": rate,
        "answered": len(answers.latencies),
        "refused": answers.refused,
        "times_real_time": answers.audio_seconds / seconds,
        **_percentiles(answers.latencies),
    }


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

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
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bench.document import SCHEMA, environment, facts, table_row, title, write
from dac_fast.codec import DAC, load
from dac_fast.serving import AsyncClient, ServerError

Json = dict[str, Any]
PEER = Path(__file__).with_name("peers") / "published_server.py"

DEADLINE = 0.05  # seconds, from codes to audio
FRAMES = 4  # of a message
FIRST_FRAMES = 14  # of the first one: what the decoder looks ahead, and four
SIGNALS = 8  # different ones
REQUEST_SECONDS = (0.5, 3.0)


@dataclass(frozen=True)
class ServeSettings:
    """What is measured.

    Attributes:
        model: a preset or the path of a checkpoint.
        seconds: of each measurement; the number of streams is sought in a sixth of that.
        rates: requests per second, one measurement each.
        most_streams: the search for the number of streams ends there.
        peers: names of the servers to measure, of `SERVERS`; empty: all.
        published_python: a Python that can import the published package, FastAPI, uvicorn and
            websockets; None: without its server.
        soak_minutes: of streams at random; 0: none.
    """

    model: str = "tiny"
    seconds: float = 60.0
    rates: Sequence[float] = (2.0, 4.0, 8.0)
    most_streams: int = 256
    peers: Sequence[str] = ()
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

    signals = _signals(codec)
    for name, start in _servers(settings, codec).items():
        if settings.peers and name not in settings.peers:
            continue
        with start() as server:
            asyncio.run(_measure(name, server, signals, settings, report))
    return document


# ---- servers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server to be asked.

    Attributes:
        url: where it is.
        process: its number.
    """

    url: str
    process: int

    @property
    def resident_mib(self) -> float:
        """Its memory."""
        for line in Path(f"/proc/{self.process}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise OSError(f"process {self.process} is gone")


def _servers(
    settings: ServeSettings, codec: DAC
) -> dict[str, Callable[[], contextlib.AbstractContextManager[Server]]]:
    """The servers by name, each with what starts it."""
    main = "from dac_fast.cli import main; main()"
    ours = [sys.executable, "-c", main, "serve", "--model", settings.model, "--device", "cpu"]
    ours += ["--slots", str(settings.most_streams), "--max-requests", "1000", "--port"]
    single = ("--step-frames", "1", "--max-batch-seconds", "0")
    found: dict[str, Callable[[], contextlib.AbstractContextManager[Server]]] = {
        "dac-fast serve": lambda: _started([*ours, "PORT"]),
        "without batches": lambda: _started([*ours, "PORT", *single]),
    }
    if python := settings.published_python:
        found["published package"] = lambda: _published(python, codec)
    return found


@contextlib.contextmanager
def _published(python: str, codec: DAC) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "weights.pth"
        codec.save(checkpoint)
        threads = str(os.cpu_count() or 1)
        command = [python, "-W", "ignore", str(PEER), str(checkpoint), "PORT", threads]
        with _started(command, PYTHONPATH="") as server:
            yield server


@contextlib.contextmanager
def _started(command: Sequence[str], **variables: str) -> Iterator[Server]:
    """The server that a command starts at "PORT", once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [port if part == "PORT" else part for part in command],
            stdout=log,
            stderr=log,
            env=os.environ | variables,
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                time.sleep(0.1)
            else:
                log.seek(0)
                raise OSError(f"the server ended: {log.read().strip()[-500:]}")
            yield Server(url, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


# ---- what is asked -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Signal:
    """Codes [N, F], and the samples [n] that they are."""

    codes: NDArray[np.int64]
    audio: NDArray[np.float32]


def _signals(codec: DAC, seconds: float = 20.0) -> list[Signal]:
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


async def _stream(client: AsyncClient, signal: Signal, seconds: float) -> Heard:
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


async def _streams(
    client: AsyncClient, signals: Sequence[Signal], count: int, seconds: float
) -> list[Heard]:
    """So many streams at once, each beginning at a random moment of a second."""
    rng = np.random.default_rng(count)

    async def one(number: int, wait: float) -> Heard:
        await asyncio.sleep(wait)
        return await _stream(client, signals[number % len(signals)], seconds)

    waits = rng.uniform(0, 1, count)
    return await asyncio.gather(*(one(number, wait) for number, wait in enumerate(waits)))


async def _arrivals(rate: float, seconds: float) -> AsyncIterator[int]:
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


async def _requests(
    server: Server,
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

    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
        tasks = []
        async for number in _arrivals(rate, seconds):
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


# ---- measurements ------------------------------------------------------------------------------


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
            answers = await _requests(server, signals, rates, rate, seconds)
            report({"server": name, "what": "requests", **_answered(answers, rate, seconds)})
        heard, answers = await asyncio.gather(
            _streams(client, signals, half, seconds),
            _requests(server, signals, rates, settings.rates[0], seconds),
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
            heard = await _streams(client, signals, count, seconds)
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
    others = asyncio.ensure_future(_streams(client, signals, count, seconds))
    await asyncio.sleep(1)
    tasks = []
    async for number in _arrivals(2.0, seconds - 2):
        signal = signals[number % len(signals)]
        tasks.append(asyncio.ensure_future(_stream(client, signal, 0.2)))
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


# ---- pages -------------------------------------------------------------------------------------


def markdown(document: Json) -> str:
    """The page of a result file."""
    asked, machine = document["load"], document["environment"]
    rows = document["rows"]
    lines = [
        f"# A server under load: {title(machine)}",
        "",
        f"Model {asked['model']}, {asked['seconds']:g} s each. A stream gets {FRAMES} frames at a "
        f"time, in real time; each piece is due {asked['deadline_ms']:g} ms after its codes.",
        "",
        "Real-time streams held without a late piece, the latency of their pieces, and the time to "
        "first audio at half that load:",
        "",
        table_row(("server", "streams", "p50", "p95", "p99", "first audio p50", "p95", "p99")),
        table_row(["---"] * 8),
    ]
    first = {row["server"]: row for row in rows if row["what"] == "first"}
    for row in (row for row in rows if row["what"] == "streams"):
        cells = [row["server"], str(row["streams"]), *_ms(row)]
        lines.append(table_row([*cells, *_ms(first.get(row["server"], {}))]))
    lines += [
        "",
        "Requests, and requests beside streams:",
        "",
        table_row(("server", "requests/s", "streams", "late pieces", "answered", "refused", "× real time", "p50", "p95", "p99")),  # noqa: E501
        table_row(["---"] * 10),
    ]  # fmt: skip
    for row in (row for row in rows if row["what"] in ("requests", "mixed")):
        cells = [row["server"], f"{row['rate']:g}", str(row.get("streams", 0))]
        cells += [str(row.get("late", "")), str(row["answered"]), str(row["refused"])]
        lines.append(table_row([*cells, f"{row['times_real_time']:.1f}", *_ms(row)]))
    for row in (row for row in rows if row["what"] == "soak"):
        memory = row["memory_mib"]
        lines += [
            "",
            f"Streams at random: {row['right']} right, {row['wrong']} wrong, {row['died']} died on "
            f"purpose, {row['refused']} refused; {row['slots_left_taken']:g} slots left taken; "
            f"memory {memory[0]:.0f} MiB at first, {max(memory):.0f} at most, {memory[-1]:.0f} at "
            "the end.",
        ]
    return "\n".join([*lines, "", *facts(machine), ""])


def _ms(row: Json) -> list[str]:
    return [f"{row[key]:.1f} ms" if key in row else "–" for key in ("p50_ms", "p95_ms", "p99_ms")]


def figure(document: Json) -> Figure:
    """The picture: streams held, and request latencies by rate."""
    rows = document["rows"]
    names = list(dict.fromkeys(row["server"] for row in rows))
    picture = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    held = {row["server"]: row["streams"] for row in rows if row["what"] == "streams"}
    bars = left.barh(names, [held.get(name, 0) for name in names], color="#2459d3")
    left.bar_label(bars, padding=3)
    left.invert_yaxis()
    left.set_title("Real-time streams without a late piece", fontsize=10)
    for name in names:
        asked = [row for row in rows if row["server"] == name and row["what"] == "requests"]
        asked = [row for row in asked if "p95_ms" in row]
        right.plot(
            [row["rate"] for row in asked], [row["p95_ms"] for row in asked], "o-", label=name
        )
    right.set_yscale("log")
    right.set_xlabel("requests per second")
    right.set_ylabel("p95, ms")
    right.set_title("Latency of requests", fontsize=10)
    right.legend(fontsize=8)
    picture.suptitle(title(document["environment"]), fontsize=10)
    return picture

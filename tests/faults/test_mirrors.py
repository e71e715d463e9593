"""Mirrors that send something else than was asked for, or send it badly."""

import functools
import hashlib
import os
import socketserver
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import torch

from dac_fast import DAC
from dac_fast.config import PRESETS
from dac_fast.storage import download
from faults import trials
from faults.commands import PRESET, a_model
from faults.trials import mutated

HTML = b"<!doctype html><title>502</title><h1>\x1b[31mBad gateway</h1>" * 50
# Of a connection, in seconds; SLOWEST bytes in each of them are expected.
TIMEOUT_SECONDS = 0.1

# Answers a request, given as the first byte that it asks for and a function that sends.
Send = Callable[[bytes], None]
Answer = Callable[[int, Send], None]


class Mirror(socketserver.ThreadingTCPServer):
    """A server whose answers a trial chooses."""

    daemon_threads = True
    answer: Answer

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(socketserver.StreamRequestHandler):
    server: Mirror

    def handle(self) -> None:
        request, start = self.rfile.readline(), 0
        while (line := self.rfile.readline()).strip():
            if line.lower().startswith(b"range: bytes="):
                start = int(line[13:].strip().rstrip(b"-"))
        # What comes after the file's hash is not of interest.
        if b".pth " not in request:
            self.wfile.write(b"HTTP/1.0 404 None\r\n\r\n")
            return
        with suppress(OSError):
            self.server.answer(start, self.wfile.write)


def whole(data: bytes, start: int, send: Send) -> None:
    """As an honest mirror answers."""
    rest = data[start:]
    if start and not rest:
        send(b"HTTP/1.0 416 None\r\n\r\n")
        return
    status = b"206 Rest" if start else b"200 OK"
    send(b"HTTP/1.0 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(rest)) + rest)


def hostile(random: Random, data: bytes, url: str) -> Answer:
    """One of the ways to answer badly."""
    size = len(data)
    body = random.choice((data, mutated(random, data), HTML, b"", data[: random.randrange(size)]))
    claimed = random.choice((len(body), 0, -5, size + 1, 10**30, random.randrange(size)))
    status = random.choice(("200 OK", "206 Rest", "416 None", "404 None", "503 \x1b[31m", "999"))
    moved = random.choice((301, 307, 308))
    loop = f"{url}/0.0.5/again{random.randrange(3)}.pth"
    places = loop, "file:///etc/passwd", "http://[", "", "http://127.0.0.1:9/x", "\x1b[31m"
    head = random.choice(
        (
            f"HTTP/1.0 {status}\r\nContent-Length: {claimed}\r\n\r\n",
            f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n",
            f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n{len(body) + 7:x}\r\n",
            f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{'f' * 100}\r\n",
            f"HTTP/1.0 {moved} -\r\nLocation: {random.choice(places)}\r\n\r\n",
            "HTTP/1.0 200 OK\r\n" + "X: y\r\n" * 200 + "\r\n",
        )
    ).encode()
    if random.random() < 0.2:
        head = mutated(random, head)
    slow = random.random() < 0.01

    def answer(start: int, send: Send) -> None:
        if not slow:
            send(head + body[start if random.random() < 0.5 else 0 :])
            return
        # A byte at a time, each before the connection's own limit.
        for byte in (head + body)[random.choice((0, len(head))) :]:
            send(bytes([byte]))
            time.sleep(TIMEOUT_SECONDS / 5)

    return answer


def mirrors(folder: Path) -> trials.Trial:
    """Downloads: what is accepted is the model, and what was refused does no harm to the next."""
    os.environ["DAC_FAST_CACHE"] = str(folder / "cache")
    codec = a_model(folder / "a.pth")
    PRESETS[PRESET] = codec.config
    data, state = (folder / "a.pth").read_bytes(), DAC.load(folder / "a.pth").state_dict()
    cache, mirror = folder / "cache", Mirror()
    path, part = cache / f"{PRESET}.pth", cache / f"{PRESET}.pth.part"
    honest = functools.partial(whole, data)

    def trial(random: Random) -> None:
        for file in cache.glob("*"):
            file.unlink()
        cache.mkdir(exist_ok=True)
        if random.random() < 0.3:
            end = random.randrange(len(data))
            part.write_bytes(random.choice((data[:end], HTML, data + HTML, data, b"")))
        mirror.answer = hostile(random, data, mirror.url)
        download.TIMEOUT_SECONDS = TIMEOUT_SECONDS
        try:
            download.download(PRESET, mirror.url)
        except download.DownloadError:
            assert not path.exists()
            mirror.answer = honest
            download.TIMEOUT_SECONDS = 30
            download.download(PRESET, mirror.url)
            raise
        finally:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert path.with_suffix(".pth.sha256").read_text().split()[0] == digest
            assert sorted(os.listdir(cache)) == [path.name, f"{path.name}.sha256"]
            # Bytes between the archive's records may differ: nothing reads them.
            restored = DAC.load(path).state_dict()
            assert all(torch.equal(restored[key], tensor) for key, tensor in state.items())

    return trial


def test_mirrors(tmp_path: Path) -> None:
    trials.run(mirrors, tmp_path, 60)

"""The servers to be asked: ours, ours without batches, a plain loop over the published package."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from dac_fast.codec import DAC

PEER = Path(__file__).parents[1] / "peers" / "published_server.py"


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


def servers(
    model: str, most_streams: int, published_python: str | None, codec: DAC
) -> dict[str, Callable[[], contextlib.AbstractContextManager[Server]]]:
    """The servers by name, each with what starts it."""
    main = "from dac_fast.cli import main; main()"
    ours = [sys.executable, "-c", main, "serve", "--model", model, "--device", "cpu"]
    ours += ["--slots", str(most_streams), "--max-requests", "1000", "--port"]
    single = ("--step-frames", "1", "--max-batch-seconds", "0")
    found: dict[str, Callable[[], contextlib.AbstractContextManager[Server]]] = {
        "dac-fast serve": lambda: _started([*ours, "PORT"]),
        "without batches": lambda: _started([*ours, "PORT", *single]),
    }
    if python := published_python:
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

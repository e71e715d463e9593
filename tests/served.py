"""A server in a thread of the test's own process, on a free port, and the codec that it serves."""

import contextlib
import socket
import threading
import time

import numpy as np
import torch

from dac_fast import DAC
from dac_fast.serving import Client
from dac_fast.serving.app import create_app
from dac_fast.serving.server import Server, listen
from dac_fast.serving.settings import Settings

# Trains nothing and sounds like nothing, but it computes in a moment.
SIZES = {
    "encoder_dim": 4,
    "encoder_rates": (2, 4),
    "decoder_dim": 16,
    "decoder_rates": (4, 2),
    "n_codebooks": 3,
    "codebook_size": 16,
    "sample_rate": 8000,
}


def small_codec(**changes) -> DAC:
    """The same random codec every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = DAC(**{**SIZES, **changes}).eval().fold_weight_norm()
    codec.name = "small"
    return codec


def noise(seconds: float, channels: int = 1, seed: int = 0, rate: int = 8000):
    samples = round(seconds * rate)
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (channels, samples)).astype(np.float32)


class Served:
    """What a test sees of a server."""

    def __init__(self, server: Server, url: str, token: str | None):
        self.server, self.url, self.token = server, url, token
        self.service = server.config.app.state.service
        self.address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))

    def client(self, **options) -> Client:
        return Client(self.url, token=self.token, **options)

    def metrics(self) -> dict[str, float]:
        """The numbers at `/metrics`, by name with labels."""
        lines = self.service.telemetry.exposition().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    @contextlib.contextmanager
    def busy(self):
        """The codec's thread does nothing meanwhile."""
        go_on, begun = threading.Event(), threading.Event()

        def wait():
            begun.set()
            go_on.wait(30)
            return torch.zeros(0)

        self.service.worker._run(wait)
        begun.wait(10)
        try:
            yield
        finally:
            go_on.set()


@contextlib.contextmanager
def serving(codec: DAC | None = None, **settings):
    """A `Served`, warm; it has ended in order when the block ends."""
    server = Server(create_app(codec or small_codec(), Settings(**settings)))
    listener = listen("127.0.0.1", 0)
    # The kernel takes little of what a client does not read.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    served = Served(server, url, settings.get("token"))
    try:
        eventually(lambda: server.started)
        yield served
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not served.service.worker.alive


def eventually(holds, seconds: float = 10.0):
    """Waits until `holds()`, and fails if that takes longer."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)

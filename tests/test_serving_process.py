"""`dac-fast serve` as a process: how it starts and how it ends."""

import contextlib
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from served import eventually, noise

from dac_fast.serving import Client, ServerError

SERVE = [sys.executable, "-c", "from dac_fast.cli import main; main()", "serve"]


@contextlib.contextmanager
def process(*options):
    """`dac-fast serve` with tiny: the process, and its address as it prints it."""
    running = subprocess.Popen(
        [*SERVE, "--device", "cpu", "--threads", "1", "--slots", "2", "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = running.stdout.readline()
        url = re.search(r"serving tiny on cpu at (http://127\.0\.0\.1:\d+)", line)[1]
        eventually(lambda: ready(url), 60)
        yield running, url
    finally:
        running.kill()
        running.wait()


def ready(url):
    try:
        return httpx.get(f"{url}/readyz", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def test_sigterm_in_the_middle_of_fifty_requests_and_a_stream():
    with (
        process("--max-requests", "50") as (running, url),
        Client(url) as client,
        client.decode_stream() as stream,
        ThreadPoolExecutor(50) as pool,
    ):

        def ask(i):
            try:
                return client.encode((noise(0.5, seed=i, rate=44100), 44100)).n_frames
            except ServerError as error:
                return error.status
            except httpx.HTTPError:
                return None

        stream.send([[1, 2, 3]] * 9)
        answers = [pool.submit(ask, i) for i in range(50)]
        eventually(lambda: accepted(client) >= 10, 30)
        before = accepted(client)
        running.send_signal(signal.SIGTERM)
        eventually(lambda: not ready(url))
        # What has begun may go on.
        stream.send([[4]] * 9)
        stream.finish()
        assert sum(len(piece) for piece in stream) == 4 * 512
        frames = [answer.result() for answer in answers]
        # Whoever was let in got an answer; whoever came later was told so, or found nobody.
        assert frames.count(44) >= before
        assert set(frames) <= {44, 503, None}
        assert running.wait(60) == 0
        assert running.stderr.read() == ""


def accepted(client):
    """Requests that were let in so far."""
    text = client._http.get("/metrics").text
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    done = numbers.get('dac_requests_total{route="/v1/encode",status="200"}', 0)
    return float(done) + float(numbers["dac_requests_in_progress"])


def test_after_sigkill_the_next_one_starts_at_the_same_port():
    with process() as (running, url), Client(url) as client, client.decode_stream() as stream:
        stream.send([[1]] * 9)
        running.kill()
        running.wait()
        port = url.rsplit(":", 1)[1]
    options = "--port", port, "--token", "secret", "--grace-seconds", "0.2"
    with process(*options) as (running, url):
        assert url.endswith(f":{port}")
        with Client(url) as client, pytest.raises(ServerError, match="401"):
            client.models()
        with Client(url, "secret") as client:
            assert client.models()[0]["name"] == "tiny"
        # The second one finds the address taken, and says so in a line.
        command = [*SERVE, "--port", port]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 1
        assert second.stderr.startswith(f"error: cannot listen at 127.0.0.1:{port}: ")
        # A stream that does not end is closed when the time for it is over.
        with Client(url, "secret") as client, client.decode_stream() as stream:
            running.send_signal(signal.SIGTERM)
            with pytest.raises(ServerError, match="1012"):
                stream.receive()
        assert running.wait(30) == 0


def test_without_the_extra_the_command_says_what_is_missing():
    program = f"import sys; sys.modules['fastapi'] = None; {SERVE[2]}"
    ended = subprocess.run([*SERVE[:2], program, "serve"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: serving needs fastapi, which is not here: pip install 'dac-fast[serve]'\n"
    )

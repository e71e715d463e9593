"""Every command that writes, killed at random moments: no half file, and the next run finishes."""

import http.server
import io
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from safetensors.torch import load as from_safetensors
from small_codec import SMALL

from dac_fast.files import write_bytes
from faults import trials
from faults.commands import PRESET, a_model, begin, end, hidden, outputs, recordings

Reader = Callable[[bytes], object]


@dataclass
class Command:
    """What is killed.

    Attributes:
        arguments: of `dac-fast`; `{given}` and `{made}` stand for folders.
        readers: for outputs that grow or are replaced, by the ends of their names, what reads them.
            Every other output is there with the undisturbed run's bytes, or not at all.
        passing: ends of names of files that are no outputs, which only unfinished runs have.
        timed: ends of names of files that differ between runs: they hold times, or the folder.
    """

    arguments: str
    readers: dict[str, Reader]
    passing: tuple[str, ...] = ()
    timed: tuple[str, ...] = ()


def _checkpoint(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=True)


COMMANDS = {
    "encode": Command("encode {given} -o {made} -m {model} --existing skip", {}),
    "decode": Command("decode {codes} -o {made} -m {model} --existing skip --suffix flac", {}),
    "train": Command(
        "train tiny data.train={given} trainer.folder={made} trainer.steps=6 "
        "trainer.batch_size=2 trainer.save_every=2 trainer.validate_every=3 trainer.log_every=1 "
        "trainer.tensorboard=false trainer.device=cpu trainer.keep_last=2 data.workers=0 "
        f"data.seconds=0.128 data.validation_seconds=0.2 data.validation=0.3 {' '.join(SMALL)}",
        {".safetensors": from_safetensors, ".pt": _checkpoint, ".yaml": yaml.safe_load},
        # A checkpoint holds its recipe, and that the run's folder.
        timed=("log.jsonl", "recipe.yaml", ".pt"),
    ),
    "tokenize": Command(
        "tokenize {given} -o {made} -m {model} --local --workers 1 --shard-hours 0.0002",
        {"dataset.json": json.loads, "failures.jsonl": bytes.decode},
    ),
    "convert": Command("convert {model} {made}/a --existing overwrite", {}),
    "download": Command(
        f"download {PRESET} --mirror {{mirror}}", {}, passing=(".part", ".lock", ".sha256")
    ),
    "serve": Command("serve -m {model} --port {port} --threads 1 --device cpu", {}),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the commands are given."""
    folder = tmp_path_factory.mktemp("given")
    given = recordings(folder / "recordings", [0.3, 2, 1, 4, 0.5])
    codec = a_model(folder / "model.safetensors")
    (folder / "codes").mkdir()
    for path in given.iterdir():
        codec.compress(path).save(folder / "codes" / f"{path.stem}.dac")
    codec.save(folder / "weights.pth")
    with slow_mirror((folder / "weights.pth").read_bytes()) as mirror:
        yield {
            "given": str(given),
            "codes": str(folder / "codes"),
            "model": str(folder / "model.safetensors"),
            "mirror": mirror,
            "port": str(free_port()),
        }


@contextmanager
def slow_mirror(data: bytes) -> Iterator[str]:
    """The address of a server that sends a file in pieces, and goes on where it is asked to."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.endswith(".pth"):
                self.send_error(404)
                return
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            with suppress(OSError):
                for at in range(start, len(data), len(data) // 10):
                    self.wfile.write(data[at : at + len(data) // 10])
                    time.sleep(0.01)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def run(command: Command, places: dict[str, str], made: Path, after: float | None = None) -> None:
    """Runs a command to its end, or kills it after so many seconds."""
    made.mkdir(exist_ok=True)
    arguments = [part.format(made=made, **places) for part in command.arguments.split()]
    log = made.with_suffix(".log")
    process = begin(arguments, log, {"DAC_FAST_CACHE": str(made)})
    killer = threading.Timer(after or 60, process.kill)
    killer.start()
    if arguments[0] == "serve":
        while process.is_alive() and not (answer := asked(places)):
            time.sleep(0.01)
        if process.is_alive() and after is None:
            write_bytes(made / "answer.dac", answer)
            process.terminate()
    if after is None:
        end(process, log)
    process.join()
    killer.cancel()


def asked(places: dict[str, str]) -> bytes:
    """The server's answer to a recording; nothing where it does not answer."""
    body = Path(places["given"], "1.wav").read_bytes()
    with suppress(httpx.HTTPError):
        answer = httpx.post(f"http://127.0.0.1:{places['port']}/v1/encode", content=body)
        if answer.status_code == 200:
            return answer.content
    return b""


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_moment(name: str, places: dict[str, str], tmp_path: Path) -> None:
    command = COMMANDS[name]
    begun = time.monotonic()
    run(command, places, tmp_path / "whole")
    lasting = time.monotonic() - begun
    whole = outputs(tmp_path / "whole")
    moments = random.Random(os.environ.get("FAULT_SEED", "0"))
    for number in range(trials.count(3, one_in=2000)):
        made = tmp_path / str(number)
        # The folder has the same name in both runs: some outputs say where they are.
        for _ in range(2):
            run(command, places, made, moments.uniform(0, lasting))
            assert_whole(command, outputs(made), whole)
        run(command, places, made)
        found = outputs(made)
        assert found.keys() == whole.keys()
        for file in found:
            if not file.endswith(command.timed):
                assert found[file] == whole[file], file
        assert not hidden(made)


def assert_whole(command: Command, found: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """No output of a killed run is half written."""
    for file, data in found.items():
        for end_of_name, read in command.readers.items():
            if file.endswith(end_of_name):
                read(data)
                break
        else:
            if not file.endswith((*command.passing, *command.timed)):
                assert data == whole[file], file

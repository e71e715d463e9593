"""The server on Ray Serve: the configuration in its guide, two replicas on a local Ray."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import yaml
from served import eventually, noise

import dac_fast
from dac_fast.serving import Client, ServerError
from dac_fast.serving.server import listen

pytest.importorskip("ray.serve", reason="needs ray[serve]")

ROOT = Path(dac_fast.__file__).parents[1]


def configurations():
    """The Serve configurations in the guide."""
    guide = (ROOT / "docs" / "serving.md").read_text()
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)]


def test_the_guides_configurations_are_accepted():
    from ray.serve.schema import ServeDeploySchema

    from dac_fast.serving.deployment import Arguments

    for configuration in configurations():
        (application,) = ServeDeploySchema(**configuration).applications
        Arguments(**application.args)
    with pytest.raises(ValueError, match="modell"):
        Arguments(modell="tiny")


@pytest.fixture
def cluster(tmp_path):
    """`serve run` of the first configuration in the guide; its address and token."""
    configuration = configurations()[0]
    with listen("127.0.0.1", 0) as free:
        port = configuration["http_options"]["port"] = free.getsockname()[1]
    (tmp_path / "serving.yaml").write_text(yaml.safe_dump(configuration))
    # The names of sockets below it may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="dac-ray-") as folder:
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            # On a crowded machine a proxy takes longer than the 5 s after which Ray kills it.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "100",
        }
        command = [Path(sys.executable).with_name("serve"), "run", tmp_path / "serving.yaml"]
        with open(tmp_path / "log", "w+") as log:
            running = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                url = f"http://127.0.0.1:{port}"
                eventually(lambda: running.poll() is not None or ready(url), 120)
                log.seek(0)
                assert running.poll() is None, log.read()[-3000:]
                yield url, configuration["applications"][0]["args"]["settings"]["token"]
            finally:
                running.terminate()
                running.wait(60)
        eventually(lambda: not processes_naming(folder), 30)


def ready(url):
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/readyz").status_code == 200


def processes_naming(text):
    """Processes whose command line has the text."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text.encode() in entry.read_bytes():
                found.append(entry.parent.name)
    return found


def test_two_replicas_answer_as_one_server(cluster):
    url, token = cluster
    codec = dac_fast.load("tiny")
    audio = noise(0.5, rate=44100)
    expected = codec.compress((audio, 44100))
    with Client(url) as client, pytest.raises(ServerError, match="401"):
        client.models()
    replicas = set()
    with Client(url, token) as client:
        with ThreadPoolExecutor(8) as pool:
            files = list(pool.map(client.encode, [(audio, 44100)] * 16))
        assert all(torch.equal(file.codes, expected.codes) for file in files)
        decoded, _ = client.decode(files[0])
        whole, _ = codec.decompress(expected)
        np.testing.assert_allclose(decoded, whole.clip(-1, 1), atol=1e-4)
        with torch.no_grad():
            alone = codec.decode_codes(expected.codes)[0, 0].numpy()
        with client.decode_stream() as stream:
            for piece in np.array_split(expected.codes[0].numpy(), 5, axis=1):
                stream.send(piece)
            stream.finish()
            np.testing.assert_allclose(np.concatenate(list(stream)), alone, atol=1e-5)
        # Each replica counts for itself, and both have worked.
        for _ in range(30):
            numbers = client._http.get("/metrics").text
            done = re.search(r'dac_requests_total\{route="/v1/encode",status="200"\} (.*)', numbers)
            replicas.add(float(done[1]) if done else 0.0)
    assert sum(replicas) == 16 or replicas == {8.0}

"""Requests to a server: answers as the library's own, limits, and what hostile clients get."""

import contextlib
import io
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import piped
import pytest
import soundfile
import torch
from served import eventually, noise, serving, small_codec

from dac_fast import DACFile
from dac_fast.recordings.compress import decompress
from dac_fast.serving import ServerError, worker
from dac_fast.serving.batching import Call, gather
from dac_fast.serving.formats import audio_to_bytes
from dac_fast.serving.telemetry import Telemetry

LONGEST_STEP = 1 / 32768


@pytest.fixture(scope="module")
def served():
    with serving(max_seconds=60, chunk_seconds=0.5, max_channels=2) as served:
        yield served


@pytest.fixture(scope="module")
def codec():
    return small_codec()


def wav(audio, rate=8000, **options):
    file = io.BytesIO()
    soundfile.write(file, audio.T, rate, format="WAV", subtype="FLOAT", **options)
    return file.getvalue()


def post(served, path, body=b"", **options):
    return httpx.post(f"{served.url}{path}", content=body, timeout=30, **options)


def test_a_stereo_codec_is_served_but_for_streams():
    codec, audio = small_codec(channels=2), noise(0.5, 2)
    expected = codec.compress((audio, 8000))
    with serving(small_codec(channels=2)) as served, served.client() as client:
        file = client.encode((audio, 8000))
        assert (file.stereo, file.channels) == (True, 2)
        assert torch.equal(file.codes, expected.codes)
        restored, _ = client.decode(file)
        exact = codec.decompress(expected)[0].clip(-1, 1)
        np.testing.assert_allclose(restored, exact, rtol=0, atol=1.01 * LONGEST_STEP)
        with (
            pytest.raises(ServerError, match="the model is stereo; accepted in streams: mono"),
            client.decode_stream(),
        ):
            pass


@pytest.mark.parametrize(("seconds", "channels", "rate"), [(0.01, 1, 8000), (3.3, 2, 44100)])
def test_encode_gives_the_files_of_the_library(served, codec, seconds, channels, rate):
    audio = noise(seconds, channels, rate=rate)
    expected = codec.compress((audio, rate))
    with served.client() as client:
        whole, first = client.encode((audio, rate)), client.encode((audio, rate), n_quantizers=1)
        plain = client.encode((audio, rate), normalize_db=None)
    assert torch.equal(whole.codes, expected.codes)
    assert (whole.original_length, whole.model) == (audio.shape[1], "small")
    assert torch.equal(first.codes, expected.codes[:, :1])
    assert (plain.gains == 1).all()
    body = wav(audio, rate)
    assert DACFile.from_bytes(post(served, "/v1/encode?format=dac1", body).content).gains is None
    as_json = post(served, "/v1/encode?format=json", body)
    assert as_json.json()["codes"] == expected.codes.tolist()
    as_npy = np.load(io.BytesIO(post(served, "/v1/encode?format=npy", body).content))
    assert as_npy.dtype == np.uint16
    np.testing.assert_array_equal(as_npy, expected.codes)
    # JSON has all that a .dac file has.
    audio_again = post(served, "/v1/decode", as_json.content).content
    assert audio_again == post(served, "/v1/decode", whole.to_bytes()).content


@pytest.mark.parametrize("channels", [1, 2])
def test_decode_gives_the_audio_of_the_library_piece_by_piece(served, codec, channels):
    file = codec.compress((noise(4.0, channels, rate=11025), 11025))
    expected, rate = codec.decompress(file)
    with served.client() as client:
        audio, got_rate = client.decode(file)
        assert got_rate == rate
        np.testing.assert_allclose(audio, expected.clip(-1, 1), atol=LONGEST_STEP)
        pieces = list(client.decode_pieces(file, format="flac"))
        flac, _ = soundfile.read(io.BytesIO(b"".join(pieces)), always_2d=True, dtype="float32")
        np.testing.assert_array_equal(flac.T, audio)
        vorbis = soundfile.SoundFile(io.BytesIO(b"".join(client.decode_pieces(file, format="ogg"))))
        assert (vorbis.frames, vorbis.channels) == (expected.shape[1], channels)
        few, _ = client.decode(file, n_quantizers=1)
    fewer, _ = codec.decompress(DACFile(**vars(file) | {"codes": file.codes[:, :1]}))
    np.testing.assert_allclose(few, fewer.clip(-1, 1), atol=LONGEST_STEP)


def test_bare_codes_are_the_codecs_own(served, codec):
    codes = np.random.default_rng(0).integers(16, size=(1, 3, 40)).astype(np.uint16)
    expected = codec.decode_codes(torch.from_numpy(codes.astype(np.int64)))[0]
    array = io.BytesIO()
    np.save(array, codes)
    lists = codes.tolist()
    for body in (array.getvalue(), json.dumps({"codes": lists}), json.dumps(lists)):
        audio, rate = soundfile.read(io.BytesIO(post(served, "/v1/decode", body).content))
        assert rate == 8000
        np.testing.assert_allclose(audio, expected[0].detach().clip(-1, 1), atol=LONGEST_STEP)


def test_files_of_the_published_packages_chunk_mode(served, golden):
    codec = small_codec()
    audio = noise(3.0)
    file = codec.compress((audio, 8000), chunk_seconds=0.5, padding=False)
    file = DACFile.from_bytes(file.to_bytes("dac1"))
    assert not file.padding
    expected, _ = codec.decompress(file)
    with served.client() as client:
        got, _ = client.decode(file)
    np.testing.assert_allclose(got, expected.clip(-1, 1), atol=LONGEST_STEP)


def test_audio_leaves_before_all_of_it_is_made(served, codec):
    file = codec.compress((noise(20.0), 8000))
    with served.client() as client:
        pieces = client.decode_pieces(file)
        assert next(pieces)[:4] == b"RIFF"
        # The codec's thread works on, but no further than the client takes.
        with served.busy():
            pieces.close()


def test_flac_says_its_length_from_the_beginning():
    audio = noise(2.0, 2)
    head = next(audio_to_bytes(iter([audio]), "flac", 8000, 2, audio.shape[1]))
    assert soundfile.info(io.BytesIO(head)).frames == audio.shape[1]


def test_reconstruct_reports_what_the_library_measures(served, codec):
    from dac_fast.metrics import mel_distance, si_sdr

    audio = noise(1.0)
    restored, _ = decompress(codec, codec.compress((audio, 8000), n_quantizers=2))
    with served.client() as client:
        got = client.reconstruct((audio, 8000), n_quantizers=2)
    np.testing.assert_allclose(got.audio, restored.clip(-1, 1), atol=LONGEST_STEP)
    x, y = torch.from_numpy(audio)[None], torch.from_numpy(restored)[None]
    assert got.report["si_sdr"] == pytest.approx(si_sdr(x, y).item(), abs=1e-3)
    assert got.report["mel_distance"] == pytest.approx(mel_distance(x, y, 8000).item(), abs=1e-4)
    assert got.report["kbps"] == pytest.approx(8.0)
    assert got.report["ratio"] == pytest.approx(16.0)


def test_requests_share_batches_and_get_what_they_get_alone(codec):
    clips = [noise(0.1 + 0.07 * i, 1 + i % 2, seed=i) for i in range(16)]
    expected = [codec.compress((clip, 8000)) for clip in clips]
    with (
        serving(max_wait_ms=200, max_batch_seconds=30, chunk_seconds=2) as served,
        served.client() as client,
    ):
        with ThreadPoolExecutor(16) as pool:
            files = list(pool.map(lambda clip: client.encode((clip, 8000)), clips))
            audios = list(pool.map(client.decode, files))
        eventually(lambda: not served.service.in_progress)
        numbers = served.metrics()
    for file, alone, (audio, _) in zip(files, expected, audios):
        assert torch.equal(file.codes, alone.codes)
        np.testing.assert_allclose(
            audio, codec.decompress(alone)[0].clip(-1, 1), atol=LONGEST_STEP + 1e-6
        )
    for direction in ("encode", "decode"):
        items = numbers[f'dac_batch_items_sum{{direction="{direction}"}}']
        batches = numbers[f'dac_batch_items_count{{direction="{direction}"}}']
        # Every other clip has two channels, each an item of its own.
        assert items == 24
        assert batches <= 8
    assert numbers['dac_requests_total{route="/v1/encode",status="200"}'] == 16
    assert numbers["dac_requests_in_progress"] == numbers["dac_calls_waiting"] == 0


def test_a_batch_has_the_oldest_call_and_those_of_its_length():
    def call(seconds, direction="encode", rows=1):
        return Call(direction, torch.zeros(rows, 1, 8), seconds)

    waiting = [call(1.0), call(9.0), call(1.2), call(1.1, "decode"), call(0.9, rows=2), call(1.0)]
    assert gather(waiting, 5.0) == [waiting[0], waiting[5], waiting[4]]
    assert gather(waiting, 0.0) == waiting[:1]
    assert gather(waiting[1:2], 1.0) == waiting[1:2]


def test_streams_go_first_and_what_is_overdue_takes_turns_with_them(codec, monkeypatch):
    now = 100.0
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now))
    it = worker.Worker(codec, 2, 8, 4, 2.0, 0.0, Telemetry())

    def order(tasks):
        names = {it._step: "step", it._compute: "batch", it._answer: "function"}
        return [names[getattr(task, "func", task)] for task in (it._next() for _ in range(tasks))]

    pool = it.pools["decode"]
    stream = pool.open(3, print)
    pool.feed(stream, np.zeros((3, 1), np.int64))
    it._submit(Call("encode", torch.zeros(1, 1, 8), 0.001, since=now))
    now += 0.1
    it._run(lambda: torch.zeros(0))
    now += 0.1
    it._submit(Call("decode", torch.zeros(1, 3, 1), 0.001, since=now))
    assert order(3) == ["step"] * 3
    now += 1
    assert order(7) == ["batch", "step", "function", "step", "batch", "step", "step"]
    it._run(lambda: torch.zeros(0))
    pool.close(stream)
    assert order(1) == ["function"]


def test_the_fault_of_one_call_is_not_that_of_its_batch(monkeypatch):
    right = worker.compute

    def picky(codec, batch):
        if any(call.signal.shape[2] == 2400 for call in batch):
            raise ValueError("a call that cannot be computed")
        return right(codec, batch)

    monkeypatch.setattr(worker, "compute", picky)
    with serving(max_wait_ms=200) as served, ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(post, served, "/v1/encode", wav(noise(seconds)))
            for seconds in (0.28, 0.3, 0.31, 0.29)
        ]
        assert [answer.result().status_code for answer in answers] == [200, 400, 200, 200]
        assert answers[1].result().json() == {"detail": "a call that cannot be computed"}


HOSTILE = {
    "empty": b"",
    "text": b"not audio, and no codes",
    "wav cut short": wav(noise(1.0))[:-1000],
    "wav of NaN": wav(np.full((1, 100), np.nan, np.float32)),
    "dac2 magic alone": b"\x89DAC\r\n\x1a\n",
    "pickle": b"\x80\x04cos\nsystem\n(S'touch WAS_HERE'\ntR.",
    "npy of floats": (lambda f: (np.save(f, np.zeros((1, 1, 1))), f.getvalue())[1])(io.BytesIO()),
    "npy that promises much": b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, "
    b"'shape': (1, 9, 99999999999999), }".ljust(117)
    + b"\n",
    "npy with a bad header": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
    "JSON that ends": b'{"codes": [[[1, 2',
    "deep JSON": b"[" * 100_000,
    "ragged JSON": b"[[[1, 2], [3]]]",
    "JSON of text": b'{"codes": "abc"}',
    "huge number": b"[[[" + b"9" * 4000 + b"]]]",
    "JSON with another's key": b'{"codes": [[[1]]], "path": "/etc/passwd"}',
    "JSON of wrong attributes": b'{"codes": [[[1]]], "chunk_length": {}, "model": []}',
    "a code too large": b"[[[16]]]",
    "a negative code": b"[[[-1]]]",
    "too many codebooks": b"[[[1], [1], [1], [1]]]",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", ["/v1/encode", "/v1/decode", "/v1/reconstruct"])
def test_what_is_neither_audio_nor_codes_gets_one_line(served, path, name, tmp_path):
    answer = post(served, path, HOSTILE[name].replace(b"WAS_HERE", bytes(tmp_path / "here")))
    assert not (tmp_path / "here").exists()
    assert answer.status_code == 400
    detail = answer.json()["detail"]
    assert detail
    assert "\n" not in detail
    assert "/tmp" not in detail


def test_mutated_dac_files_are_refused_or_decoded(served, codec):
    rng = np.random.default_rng(0)
    file = codec.compress((noise(0.5), 8000))
    statuses = set()
    with httpx.Client(base_url=served.url) as client:
        for original in (file.to_bytes("dac2"), file.to_bytes("dac1")):
            for _ in range(60):
                body = bytearray(original)
                for _ in range(rng.integers(1, 4)):
                    body[rng.integers(len(body))] = rng.integers(256)
                cut = rng.integers(len(body)) if rng.random() < 0.2 else len(body)
                statuses.add(client.post("/v1/decode", content=bytes(body[:cut])).status_code)
    assert statuses <= {200, 400, 413}
    assert served.service.worker.alive


@pytest.mark.parametrize(
    ("path", "body", "detail"),
    [
        ("/v1/encode", wav(noise(62.0)), "62.0 s of audio; accepted: up to 60 s"),
        ("/v1/encode", piped.flac(noise(62.0), 8000), "62.0 s of audio; accepted: up to 60 s"),
        ("/v1/encode", wav(noise(0.1, 3)), "3 channels; accepted: up to 2"),
        ("/v1/decode", json.dumps([[[0] * 70000]]), "70.0 s of audio; accepted: up to 60 s"),
        ("/v1/decode", json.dumps([[[0]]] * 3), "3 channels; accepted: up to 2"),
    ],
)
def test_more_audio_than_accepted(served, path, body, detail):
    answer = post(served, path, body)
    assert (answer.status_code, answer.json()) == (413, {"detail": detail})


def test_options_out_of_range(served):
    body = wav(noise(0.1))
    answer = post(served, "/v1/encode?n_quantizers=4", body)
    assert (answer.status_code, answer.json()["detail"]) == (400, "4 codebooks; accepted: 1 to 3")
    assert post(served, "/v1/encode?n_quantizers=0", body).status_code == 400
    answer = post(served, "/v1/decode?format=../../etc/passwd", body)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("format is '../../etc/passwd': ")
    assert post(served, "/v1/encode?normalize_db=1000", body).status_code == 400


def test_a_body_that_is_too_large_is_not_read():
    with serving(max_body_mib=0.25) as served:
        answer = post(served, "/v1/encode", bytes(300_000))
        assert answer.status_code == 413
        assert answer.json()["detail"] == "the body is too large; accepted: up to 262144 bytes"

        def pieces():
            for _ in range(1000):
                yield bytes(100_000)

        # The answer may be lost where the connection closes under what is still being sent.
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            assert post(served, "/v1/encode", pieces()).status_code == 413
        eventually(lambda: not served.service.in_progress)
        assert post(served, "/v1/encode", wav(noise(0.1))).status_code == 200


def test_the_token():
    with serving(token="open sesame") as served:
        right = {"Authorization": "Bearer open sesame"}
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(served.url + path).status_code == 401
            assert httpx.get(served.url + path, headers=right).status_code == 200
        body = wav(noise(0.1))
        assert post(served, "/v1/encode", body).status_code == 401
        wrong = {"Authorization": "Bearer open sesamf"}
        assert post(served, "/v1/encode", body, headers=wrong).status_code == 401
        assert post(served, "/v1/encode", body, headers=right).status_code == 200
        for path in ("/healthz", "/readyz", "/"):
            assert httpx.get(served.url + path).status_code == 200


def test_a_full_queue_says_when_to_try_again():
    with (
        serving(max_requests=3) as served,
        served.client() as client,
        ThreadPoolExecutor(3) as pool,
    ):
        with served.busy():
            accepted = [pool.submit(client.encode, (noise(0.2, seed=i), 8000)) for i in range(3)]
            eventually(lambda: served.service.in_progress == 3)
            with pytest.raises(ServerError, match="429") as refused:
                client.encode((noise(0.2), 8000))
            assert refused.value.retry_after == 1
            # Whoever asks how it stands is answered.
            assert client.ready()
        # Everyone who was let in is served.
        assert all(call.result().original_length == 1600 for call in accepted)
        assert client.encode((noise(0.2), 8000)).n_codebooks == 3


def test_a_client_that_goes_leaves_its_batch():
    with serving() as served:
        with served.busy():
            with socket.create_connection(served.address) as connection:
                connection.sendall(request("/v1/encode", wav(noise(0.2))))
                eventually(lambda: served.service.worker.waiting == 1)
            eventually(lambda: not served.service.in_progress)
        eventually(lambda: not served.service.worker.waiting)
        assert 'dac_batch_items_count{direction="encode"}' not in served.metrics()


def test_a_request_that_takes_too_long():
    with serving(total_seconds=0.3) as served:
        with served.busy():
            answer = post(served, "/v1/encode", wav(noise(0.2)))
        assert answer.status_code == 504
        assert answer.json() == {"detail": "the request took longer than 0.3 s"}
        assert post(served, "/v1/encode", wav(noise(0.2))).status_code == 200


def request(path, body, length=None):
    length = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + body


def read_all(connection):
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


@pytest.fixture(scope="module")
def impatient():
    """A server that waits half a second for what a client has begun."""
    with serving(idle_seconds=0.5, total_seconds=30, max_requests=400) as served:
        yield served


HEAD = b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "


@pytest.mark.parametrize(
    ("first", "head"),
    [(b"", b""), (b"", HEAD), (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", HEAD)],
)
def test_a_head_that_does_not_come_ends_the_connection(impatient, first, head):
    with socket.create_connection(impatient.address, timeout=10) as connection:
        if first:
            connection.sendall(first)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(head)
        begun = time.monotonic()
        read_all(connection)
        assert time.monotonic() - begun >= 0.4


def test_a_body_that_does_not_come_is_not_waited_for(impatient):
    with socket.create_connection(impatient.address, timeout=5) as connection:
        connection.sendall(request("/v1/encode", b"RIFF", length=1000))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"nothing of the body came for 0.5 s" in answer
    eventually(lambda: not impatient.service.in_progress)


def test_those_who_send_slowly_hold_up_nobody():
    with serving(max_requests=2) as served, contextlib.ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(socket.create_connection(served.address))
            connection.sendall(request("/v1/encode", b"RIFF", length=1000))
        assert post(served, "/v1/encode", wav(noise(0.1))).status_code == 200


def test_a_reader_that_does_not_read_is_dropped(impatient, codec):
    body = json.dumps([[[1] * 60_000]]).encode()
    with socket.create_connection(impatient.address, timeout=20) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request("/v1/decode", body))
        # Others are served meanwhile.
        eventually(lambda: impatient.service.in_progress == 1)
        assert post(impatient, "/v1/encode", wav(noise(0.2))).status_code == 200
        eventually(lambda: not impatient.service.in_progress)
        assert len(read_all(connection)) < 2 * 8 * 60_000


def test_half_closed_and_broken_connections(impatient):
    good = request("/v1/encode", wav(noise(0.1)))
    for data in (good, good[:-100], b"GARBAGE\r\n\r\n", b"\x00" * 100_000, good[:20]):
        with socket.create_connection(impatient.address, timeout=5) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            read_all(connection)
    eventually(lambda: not impatient.service.in_progress)
    eventually(lambda: not impatient.server.server_state.connections)
    assert post(impatient, "/v1/encode", wav(noise(0.1))).status_code == 200


def test_two_hundred_connections_at_once(impatient):
    body = request("/v1/encode?format=json", wav(noise(0.1)))
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(impatient.address, timeout=30))
            for _ in range(200)
        ]
        # Half of them say nothing.
        for connection in connections[::2]:
            connection.sendall(body)
        for connection in connections[::2]:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_pages_and_descriptions(served):
    answer = httpx.get(served.url + "/openapi.json").json()
    assert {"/v1/encode", "/v1/decode", "/v1/reconstruct", "/v1/models"} <= set(answer["paths"])
    (model,) = httpx.get(served.url + "/v1/models").json()["models"]
    assert (model["name"], model["n_codebooks"], model["hop_length"]) == ("small", 3, 8)
    for path in ("/", "/docs"):
        page = httpx.get(served.url + path)
        assert page.headers["content-type"].startswith("text/html")
        # Nothing comes from elsewhere.
        assert "http://" not in page.text.replace("http://www.w3.org", "")
        assert "https://" not in page.text

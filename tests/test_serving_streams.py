"""Live streams through a server: each gives what its whole signal gives, whatever the others do."""

import asyncio
import contextlib
import json

import numpy as np
import pytest
import torch
import websockets.sync.client
from served import eventually, noise, serving, small_codec

from dac_fast.serving import AsyncClient, Client, ServerError, client, sockets
from dac_fast.serving.streams import Stream

SLOTS = 8


@pytest.fixture(scope="module")
def served():
    with serving(slots=SLOTS) as served:
        yield served


@pytest.fixture(scope="module")
def codec():
    return small_codec()


def random_codes(frames, seed=0, codebooks=3):
    return np.random.default_rng(seed).integers(16, size=(codebooks, frames))


def audio_of(codec, codes):
    """The whole signal's audio [n]."""
    if not codes.shape[1]:
        return np.zeros(0, np.float32)
    with torch.no_grad():
        return codec.decode_codes(torch.from_numpy(codes)[None])[0, 0].numpy()


def codes_of(codec, audio, n_quantizers=None):
    """The whole signal's codes [N, f]."""
    with torch.no_grad():
        whole = codec.encode(torch.from_numpy(audio)[None, None], n_quantizers=n_quantizers)
    return whole.codes[0].numpy()


def pieces_of(signal, rng, longest):
    """The signal [..., n] in pieces of any size."""
    first = 0
    while first < signal.shape[-1]:
        size = int(rng.integers(1, longest))
        yield signal[..., first : first + size]
        first += size


@pytest.mark.parametrize("frames", [0, 1, 5, 200])
@pytest.mark.parametrize("format", ["float32", "int16"])
def test_decoding_a_stream_is_decoding_the_whole(served, codec, frames, format):
    codes = random_codes(frames)
    with served.client() as client, client.decode_stream(format=format) as stream:
        assert stream.header["hop_length"] == 8
        for piece in pieces_of(codes, np.random.default_rng(1), 40):
            stream.send(piece)
        stream.finish()
        audio = np.concatenate([np.zeros(0), *stream])
    expected = audio_of(codec, codes)
    if format == "int16":
        np.testing.assert_allclose(audio / 32768, expected.clip(-1, 1), atol=1 / 32768 + 1e-6)
    else:
        np.testing.assert_allclose(audio, expected, atol=1e-6)


@pytest.mark.parametrize("samples", [0, 1, 8, 2003])
@pytest.mark.parametrize("n_quantizers", [None, 2])
def test_encoding_a_stream_is_encoding_the_whole(served, codec, samples, n_quantizers):
    audio = noise(samples / 8000)[0]
    with served.client() as client, client.encode_stream(n_quantizers) as stream:
        for piece in pieces_of(audio, np.random.default_rng(1), 200):
            stream.send(piece)
        stream.finish()
        codes = np.concatenate([np.zeros((n_quantizers or 3, 0)), *stream], axis=1)
    expected = codes_of(codec, audio, n_quantizers) if samples else codes
    np.testing.assert_array_equal(codes, expected)


def test_int16_samples_in(served, codec):
    audio = (noise(0.2)[0] * 32767).astype(np.int16)
    with served.client() as client, client.encode_stream(format="int16") as stream:
        stream.send(audio)
        stream.finish()
        codes = np.concatenate(list(stream), axis=1)
    np.testing.assert_array_equal(codes, codes_of(codec, audio.astype(np.float32) / 32768))


def test_long_pieces_go_in_messages_that_are_accepted(served, codec, monkeypatch):
    for module in (client, sockets):
        monkeypatch.setattr(module, "MOST_BYTES", 100)
    codes, audio = random_codes(40), noise(0.02)[0]
    with Client(served.url) as it, it.decode_stream() as stream, it.encode_stream() as other:
        for each, piece in ((stream, codes), (other, audio)):
            each.send(piece)
            each.finish()
        np.testing.assert_allclose(np.concatenate(list(stream)), audio_of(codec, codes), atol=1e-6)
        codes = np.concatenate(list(other), axis=1)
    np.testing.assert_array_equal(codes, codes_of(codec, audio))


def test_audio_comes_as_soon_as_its_codes_are_there(served, codec):
    codes, hop = random_codes(40), codec.hop_length
    with served.client() as client, client.decode_stream() as stream:
        stream.send(codes)
        audio = np.zeros(0)
        while len(audio) < 40 * hop - stream.header["look_ahead"]:
            audio = np.concatenate([audio, stream.receive()])
    np.testing.assert_allclose(audio, audio_of(codec, codes)[: len(audio)], atol=1e-6)


def test_streams_at_random(served, codec):
    """Two hundred streams join, stall, end, die, are too many; those that end well are right."""
    rng = np.random.default_rng(0)
    outcomes = {"ended": 0, "died": 0, "refused": 0}

    async def decode(client, seed):
        mine = np.random.default_rng(seed)
        codes = random_codes(int(mine.integers(0, 120)), seed, int(mine.integers(1, 4)))
        dies = mine.random() < 0.25
        received = [np.zeros(0)]
        async with client.decode_stream(codes.shape[0]) as stream:

            async def talk():
                for piece in pieces_of(codes, mine, 30):
                    await stream.send(piece)
                    if mine.random() < 0.3:
                        await asyncio.sleep(float(mine.random()) * 0.02)
                    if dies and mine.random() < 0.3:
                        stream.abort()
                        return
                await stream.finish()

            talking = asyncio.ensure_future(talk())
            try:
                async for piece in stream:
                    received.append(piece)
            finally:
                await asyncio.gather(talking, return_exceptions=True)
        np.testing.assert_allclose(np.concatenate(received), audio_of(codec, codes), atol=1e-6)

    async def one(client, seed, room):
        async with room:
            while True:
                try:
                    await decode(client, seed)
                    outcomes["ended"] += 1
                    return
                except ServerError as error:
                    if error.status != 1013:
                        outcomes["died"] += 1
                        return
                    outcomes["refused"] += 1
                    await asyncio.sleep(0.02)

    async def all_of_them():
        # More than there are slots, now and then.
        room = asyncio.Semaphore(SLOTS + 2)
        async with AsyncClient(served.url) as client:
            seeds = rng.integers(2**31, size=200)
            await asyncio.gather(*(one(client, int(seed), room) for seed in seeds))

    asyncio.run(all_of_them())
    assert outcomes["ended"] + outcomes["died"] == 200
    assert min(outcomes.values()) > 10
    eventually(lambda: served.service.idle)


def test_encoding_and_decoding_and_requests_at_once(served, codec):
    """Live codes go straight into a decoding stream, while requests come in between."""
    audio = noise(1.0)[0]

    async def main():
        async with AsyncClient(served.url) as client:

            async def through():
                heard = []
                async with client.encode_stream() as encoding, client.decode_stream() as decoding:

                    async def speak():
                        for piece in np.array_split(audio, 50):
                            await encoding.send(piece)
                        await encoding.finish()

                    async def forward():
                        async for codes in encoding:
                            await decoding.send(codes)
                        await decoding.finish()

                    async def listen():
                        async for piece in decoding:
                            heard.append(piece)

                    await asyncio.gather(speak(), forward(), listen())
                return np.concatenate(heard)

            calls = [client.encode((noise(0.3, seed=i), 8000)) for i in range(8)]
            return await asyncio.gather(through(), through(), *calls)

    first, second, *files = asyncio.run(main())
    expected = audio_of(codec, codes_of(codec, audio))
    np.testing.assert_allclose(first, expected, atol=1e-6)
    np.testing.assert_allclose(second, expected, atol=1e-6)
    for i, file in enumerate(files):
        assert torch.equal(file.codes, codec.compress((noise(0.3, seed=i), 8000)).codes)


def connect(served, direction="decode", **options):
    url = served.url.replace("http", "ws") + f"/v1/{direction}/stream"
    return websockets.sync.client.connect(url, **options)


def closed_with(socket, *messages):
    """The code and reason that the server closes with, after these messages."""
    try:
        for message in messages:
            socket.send(message)
        while True:
            socket.recv(10)
    except websockets.exceptions.ConnectionClosed as closed:
        return closed.rcvd.code, closed.rcvd.reason


FRAME = np.zeros((1, 3), "<u2").tobytes()


@pytest.mark.parametrize(
    ("messages", "code", "reason"),
    [
        (["no JSON"], 1007, "header: Invalid JSON"),
        ([b"\x00\x01"], 1007, "header: Invalid JSON"),
        (['{"n_quantizers": 4}'], 1007, "4 codebooks; accepted: 1 to 3"),
        (['{"n_quantizers": 0}'], 1007, "n_quantizers: Input should be greater"),
        (['{"format": "mp3"}'], 1007, "format: Input should be 'float32'"),
        (['{"path": "/etc/passwd"}'], 1007, "path: Extra inputs"),
        (["{}", FRAME[:-1]], 1007, "5 bytes; accepted: whole frames of 6"),
        (["{}", b"\x10\x00" * 3], 1007, "code 16; accepted: 0 to 15"),
        (["{}", b"\xff" * 600], 1007, "code 65535; accepted: 0 to 15"),
        (["{}", FRAME, "hello"], 1003, "a text that is not accepted"),
        (["{}", '{"end": true}', FRAME], None, None),
        (["{}", bytes(6 * 50_000)], 1009, ""),
    ],
)
def test_what_is_not_accepted_of_a_stream_to_decode(served, messages, code, reason):
    with connect(served) as socket:
        got, why = closed_with(socket, *messages)
    # After the end, the close may come before what is sent too late.
    assert got in ((1000, 1003) if code is None else (code,))
    assert reason is None or why.startswith(reason)
    eventually(lambda: served.service.idle)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"\x00" * 5, "5 bytes; accepted: whole samples of 4"),
        (np.full(8, np.nan, "<f4").tobytes(), "a sample is not finite"),
    ],
)
def test_what_is_not_accepted_of_a_stream_to_encode(served, message, reason):
    with connect(served, "encode") as socket:
        assert closed_with(socket, "{}", message) == (1007, reason)


def test_no_slot(served):
    with served.client() as client:
        with contextlib.ExitStack() as stack:
            for _ in range(SLOTS):
                stack.enter_context(client.decode_stream())
            with pytest.raises(ServerError, match="1013: all 8 slots are taken"):
                stack.enter_context(client.decode_stream())
            # The other direction has its own.
            stack.enter_context(client.encode_stream())
        eventually(lambda: served.service.idle)
        with client.decode_stream():
            pass


def test_a_client_that_goes_before_its_answer_keeps_no_slot(served, monkeypatch):
    async def gone(socket, data):
        raise sockets.WebSocketDisconnect(1006)

    monkeypatch.setattr(sockets.WebSocket, "send_json", gone)
    with connect(served) as socket:
        socket.send("{}")
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            socket.recv(10)
    eventually(lambda: served.service.idle)


def test_empty_messages_leave_nothing():
    stream = Stream(slot=0, channels=3, unit=1, next_output=0, sink=print)
    stream.add(random_codes(0))
    assert not stream.pieces


def test_the_token_of_a_stream():
    with serving(token="secret") as served:
        with served.client() as client, client.decode_stream():
            pass
        with connect(served) as socket:
            assert closed_with(socket, "{}") == (1008, "the token is missing or wrong")
        with connect(served) as socket:
            socket.send(json.dumps({"token": "secret"}))
            assert json.loads(socket.recv(10))["n_quantizers"] == 3


def test_silent_clients_and_slow_readers_lose_their_slot(codec, monkeypatch):
    monkeypatch.setattr(sockets, "MOST_UNREAD", 1 << 18)
    monkeypatch.setattr(sockets, "CLOSE_SECONDS", 0.2)
    with serving(idle_seconds=0.4, slots=2) as served:
        with connect(served) as silent, connect(served) as open_only:
            silent.send("{}")
            assert closed_with(silent) == (1008, "nothing was sent or taken for 0.4 s")
            assert closed_with(open_only) == (1008, "no header came for 0.4 s")
        with connect(served, max_queue=1, close_timeout=0.1) as slow:
            slow.send("{}")
            slow.recv()
            # It sends on and on, and takes nothing.
            with contextlib.suppress(websockets.exceptions.ConnectionClosed):
                for _ in range(200):
                    slow.send(bytes(6 * 30_000))
            eventually(lambda: served.service.idle)
        with served.client() as client, client.decode_stream() as stream:
            stream.send(random_codes(3))
            stream.finish()
            assert sum(len(piece) for piece in stream) == 3 * codec.hop_length


def test_the_longest_stream():
    with serving(stream_seconds=0.3) as served, connect(served) as socket:
        assert closed_with(socket, "{}") == (1008, "the stream lasted 0.3 s, the most")


def test_a_model_that_fails_ends_its_streams_and_no_others(monkeypatch):
    with serving() as served, served.client() as client:
        pool = served.service.worker.pools["decode"]
        right = pool._streams.push

        def picky(codes, active):
            if codes.shape[1] == 2:
                raise RuntimeError("out of memory")
            return right(codes, active)

        monkeypatch.setattr(pool._streams, "push", picky)
        with client.decode_stream() as good, client.decode_stream(2) as bad:
            bad.send(random_codes(4, codebooks=2))
            with pytest.raises(ServerError, match="1011: the model failed"):
                bad.receive()
            with pytest.raises(ServerError, match="1011: the model failed"):
                bad.finish()
            good.send(random_codes(4))
            good.finish()
            assert sum(len(piece) for piece in good) == 32

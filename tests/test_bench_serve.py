"""The load generator: it times what it says, and its pages show every row."""

import asyncio

import numpy as np
import pytest
import torch
from served import noise, serving, small_codec

from bench.document import environment
from bench.serving import load, page
from dac_fast.serving import AsyncClient


def test_a_stream_is_timed_piece_by_piece():
    codec = small_codec()
    codes = np.random.default_rng(0).integers(16, size=(3, 300))
    with torch.no_grad():
        audio = codec.decode_codes(torch.from_numpy(codes)[None])[0, 0].numpy()
    signals = [load.Signal(codes, audio)]

    async def main(url):
        async with AsyncClient(url) as client:
            return await load.streams(client, signals, 3, 0.2)

    # Frames of 1 ms: 0.2 s are 50 messages.
    with serving() as served:
        heard = asyncio.run(main(served.url))
    for one in heard:
        assert 0 < one.first < 10
        assert len(one.latencies) == 50
        assert min(one.latencies) > 0


def test_requests_arrive_at_random_and_all_are_counted():
    async def moments():
        return [number async for number in load.arrivals(200, 0.5)]

    assert 60 < len(asyncio.run(moments())) < 140
    signals = [load.Signal(np.zeros((3, 3000), np.int64), noise(3.0)[0])]
    with serving() as served:
        answers = asyncio.run(load.requests(served.url, signals, (8000, 8), 20, 0.5))
    assert answers.refused == 0
    assert len(answers.latencies) >= 4
    assert answers.audio_seconds > 0.5 * len(answers.latencies)


def test_the_page_and_the_picture_have_every_row():
    times = {"p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": 3.0}
    answered = {"rate": 2.0, "answered": 7, "refused": 1, "times_real_time": 4.0, **times}
    soak = {"right": 5, "wrong": 0, "died": 2, "refused": 0, "slots_left_taken": 0.0}
    rows = [
        {"server": "ours", "what": "streams", "streams": 12, **times},
        {"server": "ours", "what": "first", "streams": 6, **times},
        {"server": "ours", "what": "requests", **answered},
        {"server": "ours", "what": "mixed", "streams": 6, "late": 0, **answered},
        {"server": "ours", "what": "soak", "memory_mib": [900.0, 905.0, 901.0], **soak},
        {"server": "theirs", "what": "streams", "streams": 0},
    ]
    asked = {"model": "tiny", "seconds": 60.0, "deadline_ms": 50.0, "frames_of_a_message": 4}
    document = {"schema": 1, "environment": environment("cpu"), "load": asked, "rows": rows}
    text = page.markdown(document)
    assert "| ours | 12 | 1.0 ms | 2.0 ms | 3.0 ms | 1.0 ms | 2.0 ms | 3.0 ms |" in text
    assert "| theirs | 0 | – | – | – | – | – | – |" in text
    assert "| ours | 2 | 6 | 0 | 7 | 1 | 4.0 | 1.0 ms | 2.0 ms | 3.0 ms |" in text
    assert "5 right, 0 wrong, 2 died on purpose" in text
    bars = page.figure(document).axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([12, 0])

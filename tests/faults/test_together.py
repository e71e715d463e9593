"""Several processes on one output and one cache; several threads on one codec."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from served import noise, small_codec

from dac_fast import DAC
from faults import trials
from faults.commands import PRESET, a_model, begin, end, hidden, outputs, recordings
from faults.test_kills import slow_mirror

PROCESSES = 4


@pytest.mark.parametrize("existing", ["error", "skip", "overwrite"])
def test_encoders_of_one_folder(existing: str, tmp_path: Path) -> None:
    """Every file is made whole; unless it may be replaced, by one of the processes."""
    given = recordings(tmp_path / "given", [0.1] * 30)
    model = tmp_path / "model.safetensors"
    codec = a_model(model)
    whole = {f"{path.stem}.dac": codec.compress(path).to_bytes() for path in given.iterdir()}
    for number in range(trials.count(1, one_in=2000)):
        made = tmp_path / str(number)
        arguments = f"encode {given} -o {made} -m {model} --existing {existing}".split()
        logs = [tmp_path / f"{i}.log" for i in range(PROCESSES)]
        processes = [begin(arguments, log) for log in logs]
        for process in processes:
            process.join(60)
        printed = [log.read_text() for log in logs]
        done = [int(re.search(r"^encoded (\d+) of 30", text, re.MULTILINE)[1]) for text in printed]
        failed = [text.count("error: ") for text in printed]
        assert sum(done) == (30 * PROCESSES if existing == "overwrite" else 30)
        # Whatever a process has not made is an error, or is none.
        missing = [30 - count for count in done]
        assert failed == (missing if existing == "error" else [0] * PROCESSES)
        assert [process.exitcode for process in processes] == [min(n, 1) for n in failed]
        assert outputs(made) == whole
        assert not hidden(made)


def test_downloads_into_one_cache(tmp_path: Path) -> None:
    a_model(tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    with slow_mirror(data) as mirror:
        for number in range(trials.count(2, one_in=2000)):
            cache = tmp_path / str(number)
            cache.mkdir()
            if number % 2:
                (cache / f"{PRESET}.pth.part").write_bytes(b"of another file" * 100)
            logs = [tmp_path / f"{i}.log" for i in range(PROCESSES)]
            arguments = ["download", PRESET, "--mirror", mirror]
            environment = {"DAC_FAST_CACHE": str(cache)}
            processes = [begin(arguments, log, environment) for log in logs]
            for process, log in zip(processes, logs):
                assert f"{PRESET}: {cache}" in end(process, log)
            assert set(outputs(cache)) == {f"{PRESET}.pth", f"{PRESET}.pth.sha256"}
            assert outputs(cache)[f"{PRESET}.pth"] == data


def test_threads_on_a_codec_that_is_optimized() -> None:
    """All of them get what they would get alone, before, while and after the layers are folded."""
    audio = torch.from_numpy(noise(0.3))[None]
    for _ in range(trials.count(20, one_in=200)):
        torch.manual_seed(0)
        # Not folded, so that `optimize` has to.
        codec, stop = DAC(**small_codec().config.to_dict()).eval(), threading.Event()
        expected = used(codec, audio)
        with ThreadPoolExecutor(PROCESSES) as pool:
            uses = [pool.submit(use_until, stop, codec, audio, expected) for _ in range(PROCESSES)]
            try:
                for _ in range(3):
                    codec.optimize()
            finally:
                stop.set()
            for use in uses:
                use.result()


def test_recordings_of_threads_share_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there until the last of them ends, and an engine that a user makes stays."""
    codec = small_codec()
    inside, ends = threading.Barrier(3), {"first": threading.Event(), "second": threading.Event()}

    def slow(codec: DAC, name: str, *_: object) -> object:
        inside.wait(20)
        assert ends[name].wait(20)
        return codec.engine

    monkeypatch.setattr("dac_fast.codec.compress.compress", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(codec.compress, name) for name in ends)
        inside.wait(20)
        lent = codec.engine
        assert lent is not None
        ends["first"].set()
        assert first.result(20) is lent
        assert codec.engine is lent
        mine = codec.optimize().engine
        ends["second"].set()
        assert second.result(20) is mine
    assert codec.engine is mine
    codec.engine = None
    monkeypatch.undo()
    codec.compress((noise(0.3), codec.sample_rate))
    assert codec.engine is None


Used = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def used(codec: DAC, audio: torch.Tensor) -> Used:
    """Codes, and the audio that they stand for."""
    codes = codec.encode(audio).codes
    return codes, codec.decode_codes(codes)


def use_until(stop: threading.Event, codec: DAC, audio: torch.Tensor, expected: Used) -> None:
    while not stop.is_set():
        codes, restored = used(codec, audio)
        assert torch.equal(codes, expected[0])
        torch.testing.assert_close(restored, expected[1], rtol=1e-4, atol=1e-5)

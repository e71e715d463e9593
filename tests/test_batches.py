"""Many recordings at once: windows of all in common batches, read ahead by threads."""

import dataclasses
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import dac_fast
from dac_fast.audio.reading import AudioError
from dac_fast.recordings import windows
from dac_fast.recordings.compress import compress_all, decompress_all
from dac_fast.recordings.pipeline import in_batches, read_ahead, results


@pytest.fixture(scope="module", params=["even", "odd"])
def codec(request, golden):
    return dac_fast.load(golden / f"weights_{request.param}.pth").fold_weight_norm()


def recordings(codec):
    """Of several lengths, rates and numbers of channels; the fourth one is no recording."""
    rng = np.random.default_rng(0)
    sizes = (1, 3000), (2, 20000), (1, 3), (1, 0), (3, 9000), (1, 25000)
    rates = (codec.sample_rate, codec.sample_rate, 8000, 8000, 48000, 22050)
    return [
        (rng.uniform(-0.5, 0.5, size).astype(np.float32), rate) for size, rate in zip(sizes, rates)
    ]


@pytest.mark.parametrize(("threads", "seconds"), [(1, 0), (3, 0.7), (0, 100)])
def test_everyone_gets_what_they_get_alone(codec, threads, seconds, monkeypatch):
    sources, alone = recordings(codec), {}
    for i in (0, 1, 2, 4, 5):
        alone[i] = codec.compress(sources[i], chunk_seconds=0.3)
    items = []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda x, *rest: items.append(x.shape) or encode(x, *rest))
    progress = []
    options = {"batch_seconds": seconds, "threads": threads, "progress": progress.append}
    results = list(compress_all(codec, sources, 0.3, **options))
    assert [number for number, _ in results] == list(range(6))
    assert isinstance(results[3][1], AudioError)
    assert sum(progress) == pytest.approx(
        sum(array.shape[1] / rate for array, rate in sources), abs=0.01
    )
    for batch, _, size in items:
        assert batch == 1 or batch * size <= max(seconds * codec.sample_rate, 3 * size)
    for i, expected in alone.items():
        file = results[i][1]
        assert torch.equal(file.codes, expected.codes)
        assert {**vars(file), "codes": 0, "gains": 0} == {**vars(expected), "codes": 0, "gains": 0}
    if seconds == 100:
        assert len(items) == 1

    files = [alone[i] for i in (5, 0, 2, 4)]
    files.insert(2, dataclasses.replace(alone[0], model_sample_rate=codec.sample_rate + 1))
    few = codec.compress(sources[1], n_quantizers=2)
    short = codec.compress(sources[1], chunk_seconds=0.3, padding=False)
    files += [few, few, dataclasses.replace(short, gains=None)]
    found = decompress_all(
        lambda i: (codec, files[i]), range(len(files)), batch_seconds=seconds, threads=threads
    )
    for number, result in found:
        if number == 2:
            assert "the file is of a codec at" in str(result)
            continue
        restored = np.concatenate(list(result[1]), axis=1)
        expected = codec.decompress(files[number])[0]
        np.testing.assert_allclose(
            restored, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max())
        )


def test_what_is_not_taken_is_passed_over(codec):
    """A file whose writing fails halfway does not spoil the next one's."""
    file = codec.compress(recordings(codec)[5], chunk_seconds=0.3)
    files = decompress_all(lambda f: (codec, f), [file] * 3, batch_seconds=2, threads=1)
    next(next(files)[1][1])
    for _ in range(2):
        restored = np.concatenate(list(next(files)[1][1]), axis=1)
        np.testing.assert_allclose(restored, codec.decompress(file)[0], rtol=0, atol=1e-3)


@dataclasses.dataclass(eq=False)
class Counting:
    """A job of some windows, then perhaps an error."""

    codec: dac_fast.DAC
    sizes: tuple[int, ...]
    error: Exception | None = None

    def windows(self):
        for size in self.sizes:
            yield windows.Window(self.codec, torch.zeros(1, size))
        if self.error:
            raise self.error

    def result(self, outputs):
        return [output.shape[-1] for output in outputs]


def taken(jobs, threads):
    """The number of the job, and the size of the window or the error, of everything read."""
    return [
        (jobs.index(job), got if isinstance(got, Exception) else got.signal.shape[-1])
        for job, got in read_ahead(jobs, threads)
    ]


def test_threads_keep_the_order_and_end(codec):
    jobs = [Counting(codec, tuple(range(1, n + 1))) for n in (5, 0, 40, 3)]
    expected = [(k, i) for k, n in enumerate((5, 0, 40, 3)) for i in range(1, n + 1)]
    others = set(threading.enumerate())
    for threads in (0, 1, 2, 9):
        assert taken(jobs, threads) == expected
    left = read_ahead([Counting(codec, (1,) * 1000) for _ in range(2)], 2)
    next(left)
    left.close()

    bad = OSError("gone")
    assert taken([Counting(codec, (1,), bad), jobs[0]], 2)[:3] == [(0, 1), (0, bad), (1, 1)]
    with pytest.raises(ZeroDivisionError):
        taken([Counting(codec, (1,), ZeroDivisionError())], 1)
    for thread in set(threading.enumerate()) - others:
        thread.join(timeout=2)
    assert set(threading.enumerate()) <= others


def test_a_process_ends_that_has_not_taken_everything(golden):
    """Threads that read ahead hold nobody up, and are not killed in the middle."""
    program = """if True:
        import sys
        import numpy as np
        import dac_fast
        from dac_fast.recordings.compress import compress_all
        codec = dac_fast.load(sys.argv[1])
        left = compress_all(codec, [(np.ones((2, 400000)), 44100)] * 40, 0.3, threads=2)
        print(next(left)[1].duration)
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-c", program, golden / "weights_even.pth"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_a_batch_that_fails_is_the_fault_of_its_windows(codec):
    """And a result that cannot be made is the fault of its job."""
    gone = OSError("gone")
    jobs = [
        Counting(codec, (10,), gone), Counting(codec, (11,)), Counting(codec, (3000, 3001)),
        Counting(codec, (), gone), Counting(codec, (3002,)),
    ]  # fmt: skip

    def run(batch):
        if len(batch) == 2:
            raise ValueError("no")
        return lambda: [window.signal for window in batch]

    computed = list(in_batches(read_ahead(jobs, 0), run, 100 / codec.sample_rate))
    assert [jobs.index(job) for job, _ in computed] == [0, 0, 1, 2, 2, 3, 4]
    first, passed, second, *rest = (content for _, content in computed)
    assert (str(first), passed, str(second)) == ("no", gone, "no")
    assert [getattr(content, "shape", content) for content in rest] == [
        (1, 3000), (1, 3001), gone, (1, 3002),
    ]  # fmt: skip
    jobs[4].result = lambda outputs: codec.decode_codes(torch.zeros(0))
    *ends, last = results(jobs, run, 100 / codec.sample_rate, threads=2)
    assert [str(end) for end in ends] == ["no", "no", "[3000, 3001]", "gone"]
    assert "accepted: [B, N, T]" in str(last)


@pytest.mark.gpu
def test_batches_on_a_gpu(golden):
    """With an engine, pinned memory and a stream for the copies."""
    pytest.importorskip("pyloudnorm")
    plain = dac_fast.load(golden / "weights_even.pth").fold_weight_norm()
    codec = dac_fast.load(golden / "weights_even.pth", device="cuda", engine=True)
    sources = [source for source in recordings(plain) if source[0].size] * 3
    alone = [plain.compress(source, chunk_seconds=0.1) for source in sources]
    files = [file for _, file in compress_all(codec, sources, 0.1, batch_seconds=1, threads=2)]
    for file, expected in zip(files, alone):
        assert (file.codes == expected.codes).float().mean() > 0.99
    for number, (file, blocks) in decompress_all(
        lambda f: (codec, f), alone, batch_seconds=1, threads=2
    ):
        expected = torch.from_numpy(plain.decompress(file)[0])
        error = torch.from_numpy(np.concatenate(list(blocks), axis=1)) - expected
        assert error.square().sum() < 1e-4 * expected.square().sum(), number

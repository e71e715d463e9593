"""Reading, resampling, loudness, writing; the published package's numbers are in tests/golden."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import piped
import pytest

from dac_fast import audio
from dac_fast.audio import ffmpeg
from dac_fast.audio.loudness import LoudnessMeter, normalization_gains
from dac_fast.audio.reading import AudioError, Recording
from dac_fast.audio.writing import AudioWriter
from dac_fast.files import OutputError, atomic_path

pytest.importorskip("soundfile")


def noise(channels, samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal((channels, samples))).astype(
        np.float32
    )


def loudness(x, rate, block=777):
    meter = LoudnessMeter(rate, len(x))
    for start in range(0, x.shape[1], block):
        meter.update(x[:, start : start + block])
    assert np.array_equal(meter.peaks, np.abs(x).max(axis=1))
    return meter.integrated()


@pytest.mark.parametrize(
    ("name", "channels", "samples", "rate", "subtype", "error"),
    [
        ("a.wav", 1, 1, 44100, None, 2**-15),
        ("a.wav", 10, 5000, 1000, "FLOAT", 0),
        ("a.wav", 2, 70001, 44100, "PCM_24", 2**-23),
        ("a.flac", 8, 1000, 16000, None, 2**-15),
        ("a.ogg", 2, 70001, 44100, None, None),
        ("a.mp3", 2, 70001, 44100, None, None),
    ],
)
def test_files_come_back(tmp_path, name, channels, samples, rate, subtype, error):
    x = noise(channels, samples)
    x[:, : samples // 2] += 0.5 * np.sin(0.02 * np.arange(samples // 2), dtype=np.float32)
    audio.write(tmp_path / name, x, rate, subtype)
    recording = Recording(tmp_path / name)
    assert (recording.channels, recording.sample_rate, recording.frames) == (
        channels,
        rate,
        samples,
    )
    blocks = list(recording.blocks(seconds=0.3))
    y = np.concatenate(blocks, axis=1)
    assert y.dtype == np.float32
    assert y.shape == x.shape
    assert np.array_equal(y, audio.read(tmp_path / name)[0]), "the block size shows"
    if error is None:
        assert np.corrcoef(x[0], y[0])[0, 1] > 0.9  # a lossy format, on noise
    else:
        assert np.abs(x - y).max() <= error


@pytest.fixture
def by_ffmpeg(tmp_path):
    """Writes audio [C, T] at 44.1 kHz to a file of a format that ffmpeg alone reads."""
    if not ffmpeg.installed():
        pytest.skip("ffmpeg is not installed")

    def encoded(x, name, *options):
        audio.write(tmp_path / "given.wav", x, 44100, "FLOAT")
        given = ("-i", tmp_path / "given.wav", *options, tmp_path / name)
        subprocess.run(["ffmpeg", "-v", "error", "-y", *given], check=True)
        return tmp_path / name

    return encoded


@pytest.mark.parametrize("name", ["-a.m4a", "a.aac", "a.WMA", "a.wv", "a.mp4"])
def test_files_that_ffmpeg_reads(by_ffmpeg, name):
    x = np.sin(np.outer([0.02, 0.03], np.arange(50000)), dtype=np.float32) / 4
    path = by_ffmpeg(x, name)
    recording = Recording(path)
    assert (recording.channels, recording.sample_rate) == (2, 44100)
    assert abs(recording.frames - 50000) < 5000
    y = np.concatenate(list(recording.blocks(seconds=0.3)), axis=1)
    assert recording.frames == y.shape[1]
    assert np.array_equal(y, audio.read(path)[0]), "the block size shows"
    # An encoder's delay may be left at the beginning.
    spectra = np.abs(np.fft.rfft(y[:, 10000:40000]))
    assert np.abs(spectra.argmax(axis=1) - 30000 * np.array([0.02, 0.03]) / (2 * np.pi)).max() < 1


def test_what_ffmpeg_cannot_read_is_one_line(by_ffmpeg, tmp_path, monkeypatch):
    path = by_ffmpeg(noise(1, 200000), "a.m4a", "-movflags", "faststart")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioError, match=r"a.m4a: damaged or cut short beyond [12]\.\d+ s \(.*\)$"):
        audio.read(path)
    # A playlist would have ffmpeg read what it names.
    (tmp_path / "list.m4a").write_text(f"#EXTM3U\n#EXTINF:1,\nfile:{path}\n#EXT-X-ENDLIST\n")
    silent = tmp_path / "silent.mp4"
    given = ("-f", "lavfi", "-i", "color=size=16x16:duration=0.1", silent)
    subprocess.run(["ffmpeg", "-v", "error", *given], check=True)
    for name in ("list.m4a", "silent.mp4"):
        with pytest.raises(AudioError, match=rf"{name}: not an audio file .* \([^\n]*\)$"):
            Recording(tmp_path / name)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AudioError, match=r"ffmpeg reads it, and is not installed\)$"):
        Recording(path)


def test_ffmpeg_ends_with_its_reader(by_ffmpeg):
    def children():
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()

    blocks = ffmpeg.blocks(str(by_ffmpeg(noise(1, 400000), "a.m4a")), 10, 1, 44100)
    before = children()
    next(blocks)
    assert len(children()) == len(before) + 1
    blocks.close()
    assert children() == before


def test_clipping(tmp_path):
    audio.write(tmp_path / "a.wav", np.array([[2.0, -2.0]]), 8000)
    assert np.allclose(audio.read(tmp_path / "a.wav")[0], [[1, -1]], atol=1e-4)
    audio.write(tmp_path / "b.wav", np.array([2.0, -2.0]), 8000, "FLOAT")
    assert np.array_equal(audio.read(tmp_path / "b.wav")[0], [[2, -2]])


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    audio.write(path, noise(2, 20000), 44100)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(AudioError, match=r"a\.\w+: .*cut short"):
            audio.read(path)


def test_wav_from_a_pipe_is_read(tmp_path):
    path = tmp_path / "a.wav"
    audio.write(path, noise(1, 1000), 44100)
    data = path.read_bytes()
    where = data.index(b"data") + 4

    def claim(length):
        size = length.to_bytes(4, "little")
        path.write_bytes(data[:4] + size + data[8:where] + size + data[where + 4 :])

    for length in (0x7FFFF000, 0x80000000, 0xFFFFFFDB, 0xFFFFFFFF):
        claim(length)
        assert audio.read(path)[0].shape == (1, 1000)
    for length in (0x7FFEFFFF, 0x90000000, 0xFFFE0000):
        claim(length)
        with pytest.raises(AudioError, match=f"cut short: 2000 of {length} bytes of audio"):
            audio.read(path)


def test_flac_from_a_pipe_is_read(tmp_path):
    path, x = tmp_path / "a.flac", noise(2, 20000)
    whole = piped.flac(x, 8000)
    path.write_bytes(whole)
    recording = Recording(path)
    assert recording.frames == 0
    for _ in range(2):
        y = np.concatenate(list(recording.blocks(seconds=0.3)), axis=1)
        assert recording.frames == 20000
        assert np.abs(x - y).max() <= 2**-15
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioError, match="damaged or cut short beyond"):
        audio.read(path)


def test_bad_sources(tmp_path):
    (tmp_path / "text.wav").write_text("no audio " * 100)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "a.raw").write_bytes(b"1234" * 100)
    audio.write(tmp_path / "none.wav", np.zeros((1, 0)), 44100)
    for name, reason in {
        "missing.wav": "no such file",
        "text.wav": "not an audio file",
        "empty.wav": "the file is empty",
        "a.raw": "not an audio file",
        "none.wav": "holds no samples",
        "": "not a file",
    }.items():
        with pytest.raises(AudioError, match=reason):
            Recording(tmp_path / name)
    for source, reason in {
        "nothing": (None, "audio is NoneType; accepted: a path, or"),
        "integers": ((np.zeros(10, np.int16), 44100), "dtype is int16"),
        "3 axes": ((np.zeros((1, 1, 10)), 44100), r"shape is \[1, 1, 10\]"),
        "[T, C]": ((np.zeros((44100, 2)), 44100), r"shape is \[44100, 2\]"),
        "no samples": ((np.zeros((2, 0)), 44100), "holds no samples"),
        "10 Hz": ((np.zeros(10), 10), "sample rate is 10; accepted: 100 to"),
        "half a Hz": ((np.zeros(10), 44100.5), "sample rate is 44100.5"),
    }.values():
        with pytest.raises(AudioError, match=reason):
            Recording(source)


def test_between_two_blocks_numpy_is_as_it_was():
    before = np.geterr()
    blocks = Recording((np.zeros(100), 8000)).blocks(8000, 0.005)
    next(blocks)
    assert np.geterr() == before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_samples_are_located(tmp_path, bad):
    x = noise(2, 3000)
    x[1, 2500] = bad
    for rate in (1000, 700):
        with pytest.raises(AudioError, match=r"array: a sample is not finite, at 2\.500 s"):
            list(Recording((x, 1000)).blocks(rate, seconds=0.7))
    with pytest.raises(AudioError, match="not finite"):
        audio.write(tmp_path / "a.wav", x, 1000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("rates", [(48000, 44100), (22050, 44100), (44100, 16000)])
def test_resampling_is_the_published_one(golden, rates):
    stored = np.load(golden / "resample.npz")
    x, y = (stored[f"{which}_{rates[0]}_{rates[1]}"][0] for which in ("in", "out"))
    recording = Recording((x, rates[0]))
    for seconds in (5, 0.011):
        blocks = list(recording.blocks(rates[1], seconds))
        assert np.allclose(np.concatenate(blocks, axis=1), y, atol=1e-5)
    assert len(blocks) > 10


@pytest.mark.parametrize(
    ("channels", "samples", "rates"), [(1, 1, (48000, 16000)), (10, 999, (1000, 44100))]
)
def test_resampled_shape(channels, samples, rates):
    y = audio.resample(noise(channels, samples), *rates)
    assert y.shape == (channels, max(1, samples * rates[1] // rates[0]))
    assert y.dtype == np.float32


def test_loudness_is_the_published_one(golden):
    stored, expected = (
        np.load(golden / "losses.npz"),
        json.loads((golden / "losses.json").read_text()),
    )
    assert loudness(stored["x"][0], 44100) == pytest.approx(expected["loudness_db_x"], abs=1e-4)
    assert loudness(stored["long"][0], 44100) == pytest.approx(
        expected["loudness_db_long"][0], abs=1e-4
    )


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_loudness_against_pyloudnorm(rate, channels):
    x = (
        noise(channels, rate * 3, seed=rate)
        * np.linspace(0.001, 1, rate * 3, dtype=np.float32) ** 2
    )
    x += 0.05 * np.sin(2 * np.pi * 40 / rate * np.arange(rate * 3), dtype=np.float32)
    expected = (
        pytest.importorskip("pyloudnorm").Meter(rate).integrated_loudness(x.T.astype(np.float64))
    )
    assert loudness(x, rate) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("rate", "samples"), [(44100, 1), (11025, 5000), (16000, 12345), (1000, 3000), (100, 1000)]
)
def test_loudness_does_not_depend_on_the_blocks(rate, samples):
    x = noise(10, samples)
    assert loudness(x, rate, block=97) == pytest.approx(loudness(x, rate, block=samples), abs=1e-9)


def test_loudness_of_silence():
    assert LoudnessMeter(44100, 2).integrated() == -70
    assert loudness(np.zeros((2, 50000), np.float32), 44100) == -70
    assert loudness(1e-6 * noise(1, 50000), 44100) == -70


def test_gains():
    assert np.allclose(normalization_gains(-26, np.array([0.1, 0.2]), -16), 10**0.5)
    assert np.allclose(normalization_gains(-36, np.array([0.05, 0.2, 0]), -16), [10, 5, 10])
    assert np.allclose(normalization_gains(-16, np.array([0.5, 2]), None), [1, 0.5])
    assert normalization_gains(-70, np.zeros(1), -16).dtype == np.float32


def test_writer_refuses(tmp_path):
    for name, *arguments, reason in [
        ("a.aac", 44100, 1, r"suffix is '.aac'; accepted: .wav, .flac, .ogg, .mp3"),
        ("a.mp3", 44100, 3, "cannot write 3 channels at 44100 Hz as MP3"),
        ("a.flac", 44100, 10, "cannot write 10 channels"),
        ("a.flac", 44100, 1, "FLOAT", "subtype is 'FLOAT'; accepted for .flac: PCM_16, PCM_24"),
    ]:
        with pytest.raises(AudioError, match=reason), AudioWriter(tmp_path / name, *arguments):
            pass
    with (
        pytest.raises(AudioError, match=r"block is \[3, 5\]"),
        AudioWriter(tmp_path / "a.wav", 8000, 2) as writer,
    ):
        writer.write(np.zeros((3, 5)))
    with pytest.raises(OutputError, match="there is no folder"):
        audio.write(tmp_path / "missing" / "a.wav", np.zeros(5), 8000)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(OutputError, match="not a regular file"):
        audio.write(tmp_path / "folder.wav", np.zeros(5), 8000)
    assert os.listdir(tmp_path) == ["folder.wav"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_path(path) as temporary:
        temporary.write_text("new \ud800", "utf-8")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / "link").symlink_to(path)
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_kill_in_the_middle_leaves_no_file(tmp_path):
    program = """if True:
        import os, signal, sys
        import numpy as np
        from dac_fast.audio.writing import AudioWriter
        first, second = (AudioWriter(path, 44100, 1) for path in sys.argv[1:])
        with first, second:
            for writer in (first, second):
                writer.write(np.zeros((1, 10**6)))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    new, replaced = tmp_path / "new.wav", tmp_path / "replaced.wav"
    audio.write(replaced, noise(1, 100), 44100)
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-c", program, new, replaced], env=os.environ | {"PYTHONPATH": paths}
    )
    assert run.returncode == -signal.SIGKILL
    assert not new.exists()
    assert audio.read(replaced)[0].shape == (1, 100)

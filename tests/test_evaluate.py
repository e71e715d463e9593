"""Evaluation of a codec and of reconstructions, its files, and the pictures."""

import csv
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from dac_fast import DAC, metrics
from dac_fast.audio.reading import read
from dac_fast.audio.writing import write
from dac_fast.cli.commands import app
from dac_fast.evaluation.outcome import METRICS
from dac_fast.evaluation.run import evaluate_codec, evaluate_folders
from dac_fast.plots import PlotError, mel_decibels, spectrograms

RATE = 44100


def tone(hz, seconds=0.3, rate=RATE, channels=1):
    """Harmonics that fade, a little different in each channel: float32 [C, T]."""
    t = np.arange(int(seconds * rate)) / rate
    partials = sum(np.sin(2 * np.pi * hz * k * t) / k for k in (1, 2, 3))
    return np.stack([0.3 * np.exp(-3 * t) * partials / (1 + c) for c in range(channels)]).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def codec(golden):
    return DAC.load(golden / "weights_even.pth").fold_weight_norm()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two domains, a file outside both, stereo, another rate, two that cannot be measured."""
    folder = tmp_path_factory.mktemp("recordings")
    for path, audio, rate in (
        ("music/low.wav", tone(220), RATE),
        ("music/wide.flac", tone(500, channels=2), RATE),
        ("speech/other rate.wav", tone(300, rate=16000), 16000),
        ("silence.wav", np.zeros((1, 4000), np.float32), RATE),
        ("speech/short.wav", tone(300, seconds=0.01), RATE),
    ):
        (folder / path).parent.mkdir(exist_ok=True)
        write(folder / path, audio, rate)
    (folder / "speech/broken.wav").write_bytes(b"RIFF and nothing else")
    return folder


@pytest.fixture(scope="module")
def evaluation(codec, recordings):
    return evaluate_codec(codec, recordings, [5, 1], visqol=False)


def test_rows_are_the_metrics_of_each_file(evaluation, codec, recordings):
    assert [(row["file"], row["codebooks"]) for row in evaluation.files] == [
        (name, count)
        for name in ("music/low.wav", "music/wide.flac", "silence.wav", "speech/other rate.wav")
        for count in (1, 5)
    ]
    for count in (1, 5):
        # Encoded with that many codebooks, where the evaluation takes the first of all.
        file = codec.compress(recordings / "music/wide.flac", n_quantizers=count)
        restored, _ = codec.decompress(file)
        original, _ = read(recordings / "music/wide.flac")
        x, y = torch.from_numpy(original)[None], torch.from_numpy(restored)[None]
        row = next(
            r for r in evaluation.files if (r["file"], r["codebooks"]) == ("music/wide.flac", count)
        )
        assert row["mel_distance"] == pytest.approx(
            metrics.mel_distance(x, y, RATE).item(), rel=1e-4
        )
        assert row["stft_distance"] == pytest.approx(metrics.stft_distance(x, y).item(), rel=1e-4)
        assert row["si_sdr"] == pytest.approx(metrics.si_sdr(x, y).item(), rel=1e-3)
        # 6 bits of 64 entries for every 32 samples
        assert row["kbps"] == pytest.approx(count * 6 * RATE / 32 / 1000)
        assert (row["seconds"], row["sample_rate"], row["domain"]) == (0.3, RATE, "music")
    assert all(row["si_sdr"] is None for row in evaluation.files if row["file"] == "silence.wav")


def test_summary(evaluation, codec, recordings):
    assert [(row["domain"], row["codebooks"], row["files"]) for row in evaluation.summary] == [
        ("music", 1, 2), ("music", 5, 2), (recordings.name, 1, 1), (recordings.name, 5, 1),
        ("speech", 1, 1), ("speech", 5, 1),
        ("overall", 1, 4), ("overall", 5, 4),
    ]  # fmt: skip
    overall = evaluation.summary[-2]
    rows = [row for row in evaluation.files if row["codebooks"] == 1]
    assert overall["mel_distance"] == pytest.approx(np.mean([row["mel_distance"] for row in rows]))
    assert overall["si_sdr"] == pytest.approx(
        np.mean([r["si_sdr"] for r in rows if r["si_sdr"] is not None])
    )
    assert overall["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    # Efficiency is of all codes of the row together: not the mean of the files'.
    codes = [codec.compress(recordings / "music" / name).codes for name in ("low.wav", "wide.flac")]
    together = torch.cat([c.transpose(0, 1).flatten(1) for c in codes], dim=1)[None]
    for row, count in zip(evaluation.summary, (1, 5), strict=False):
        assert row["bitrate_efficiency"] == pytest.approx(
            metrics.bitrate_efficiency(together[:, :count], 64), rel=1e-5
        )


def test_files_that_fail_are_reported(evaluation):
    broken, short = evaluation.failures
    assert broken["file"] == "speech/broken.wav"
    assert "not an audio file" in broken["problem"]
    # 441 samples
    assert short == {
        "file": "speech/short.wav",
        "problem": "441 samples at 44100 Hz are too few to compare; accepted: from 1025",
    }


def test_processes_change_nothing(evaluation, codec, recordings):
    done = []
    again = evaluate_codec(
        codec,
        recordings,
        [1, 5],
        visqol=False,
        jobs=2,
        progress=lambda *progress: done.append(progress),
    )
    assert done == [(i, 6) for i in range(1, 7)]
    assert again.failures == evaluation.failures
    # Convolutions round differently with another number of threads.
    for row, other in zip(
        again.files + again.summary, evaluation.files + evaluation.summary, strict=True
    ):
        near = [
            pytest.approx(value, rel=1e-2) if isinstance(value, float) else value
            for value in other.values()
        ]
        assert list(row) == list(other)
        assert list(row.values()) == near


def test_written_files(evaluation, codec, recordings, tmp_path):
    evaluation.save(tmp_path / "new/folder")
    written = {path.name: path.read_bytes() for path in (tmp_path / "new/folder").iterdir()}
    assert sorted(written) == ["evaluation.json", "files.csv", "rate_distortion.png", "summary.csv"]
    assert not any(str(recordings).encode() in content for content in written.values())
    content = json.loads(written["evaluation.json"])
    assert (content["files"], content["summary"]) == (evaluation.files, evaluation.summary)
    assert content["settings"]["config"] == codec.config.to_dict()
    rows = list(csv.DictReader(written["files.csv"].decode().splitlines()))
    assert [row["si_sdr"] for row in rows if row["file"] == "silence.wav"] == ["", ""]
    assert written["rate_distortion.png"].startswith(b"\x89PNG")
    assert evaluation.table().row_count == len(evaluation.summary)


def test_seconds_and_rate(codec, recordings):
    result = evaluate_codec(
        codec, recordings / "music", seconds=0.1, sample_rate=32000, visqol=False
    )
    assert {(row["seconds"], row["sample_rate"]) for row in result.files} == {(0.1, 32000)}
    # Two files and no domain beside them: the halvings of five codebooks, overall.
    assert [(row["domain"], row["codebooks"]) for row in result.summary] == [
        ("overall", n) for n in (1, 2, 5)
    ]


def test_bitrates_are_those_of_a_channel(tmp_path):
    codec = DAC(encoder_dim=4, encoder_rates=(2, 4), decoder_dim=16, decoder_rates=(4, 2),
                n_codebooks=3, codebook_size=16, channels=2, sample_rate=RATE)  # fmt: skip
    write(tmp_path / "a.wav", tone(440, channels=2), RATE)
    result = evaluate_codec(codec.eval(), tmp_path, [1, 3], visqol=False)
    # 4 bits of 16 entries for every 8 samples of two channels.
    assert [row["kbps"] for row in result.files] == [
        pytest.approx(n * 4 * RATE / 8 / 2 / 1000) for n in (1, 3)
    ]


def test_folders(tmp_path):
    original, restored = tmp_path / "original", tmp_path / "restored"
    x, noise = tone(440), np.random.default_rng(0).normal(0, 0.01, (1, 13230)).astype(np.float32)
    for folder, path, audio, rate in (
        (original, "a/same.wav", x, RATE),
        (restored, "a/same.wav", x, RATE),
        (original, "a/noisy.wav", x, RATE),
        (restored, "a/noisy.flac", np.pad(x + noise, ((0, 0), (0, 100))), RATE),
        (original, "a/silent.wav", x, RATE),
        (restored, "a/silent.wav", np.zeros_like(x), RATE),
        (original, "b/half rate.wav", x[:, ::2], RATE // 2),
        (restored, "b/half rate.wav", x, RATE),
        (original, "b/late.wav", x, RATE),
        (restored, "b/late.wav", x[:, :6615], RATE),
        (original, "b/stereo.wav", tone(440, channels=2), RATE),
        (restored, "b/stereo.wav", x, RATE),
        (original, "b/lonely.wav", x, RATE),
        (restored, "c/stranger.wav", x, RATE),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write(folder / path, audio, rate)
    result = evaluate_folders(original, restored, visqol=False)

    noisy, same, silent, half = result.files
    assert (same["file"], same["mel_distance"], same["si_sdr"]) == ("a/same.wav", 0, None)
    expected = metrics.si_sdr(torch.from_numpy(x)[None], torch.from_numpy(x + noise)[None]).item()
    assert noisy["si_sdr"] == pytest.approx(expected, abs=0.01)
    assert (half["sample_rate"], half["domain"]) == (RATE // 2, "b")
    assert half["si_sdr"] > 40
    assert silent["si_sdr"] is None
    assert {f["file"]: f["problem"] for f in result.failures} == {
        "b/late.wav": "the reconstruction lasts 0.150 s; accepted: 0.300 s within 0.1 s",
        "b/lonely.wav": "there is no reconstruction of it",
        "b/stereo.wav": "the reconstruction has 1 channels; accepted: 2, as the reference",
    }
    assert result.without_reference == ["c/stranger.wav"]
    assert [row["domain"] for row in result.summary] == ["a", "b", "overall"]
    result.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "evaluation.json",
        "files.csv",
        "summary.csv",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebooks": [0, 1]}, "codebooks has 0; accepted: whole numbers from 1 to 5"),
        ({"codebooks": [6]}, "codebooks has 6"),
        ({"codebooks": []}, "codebooks is empty"),
        ({"seconds": 0.0}, "seconds is 0.0; accepted: above 0"),
        ({"sample_rate": 0}, "sample_rate is 0; accepted: 100 to 1000000"),
        ({"jobs": 0}, "jobs is 0; accepted: 1 or more"),
        ({"data": "/no/such/folder"}, "/no/such/folder: no such folder or .jsonl manifest"),
    ],
)
def test_arguments(codec, recordings, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_codec(codec, **{"data": recordings, "visqol": False} | arguments)


def test_a_domain_that_is_called_overall(codec, tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"file": "a.wav", "domain": "overall"}')
    with pytest.raises(ValueError, match="a.wav is of domain 'overall'"):
        evaluate_codec(codec, tmp_path)


def test_visqol_that_is_not_installed(codec, recordings, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="visqol-python is not installed"):
        evaluate_codec(codec, recordings, visqol=True)
    result = evaluate_codec(codec, recordings / "music", [1])
    assert "visqol" not in result.summary[0]
    assert result.notes == [
        "no ViSQOL: visqol-python is not installed (pip install 'dac-fast[metrics]')"
    ]


def test_visqol(tmp_path):
    pytest.importorskip("visqol")
    for name, audio in (("x", tone(440, seconds=1.2)), ("x/short", tone(440))):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "tone.wav", audio, RATE)
    short, long = evaluate_folders(tmp_path / "x", tmp_path / "x").files
    assert set(METRICS) < set(long)
    assert 4.5 < long["visqol"] <= 5
    assert short["visqol"] is None


def test_spectrogram_shows_a_tone_where_it_is():
    t = np.arange(2 * RATE) / RATE
    audio = np.where(t < 1, np.sin(2 * np.pi * 1000 * t), 0)
    decibels = mel_decibels(np.stack([audio, audio]), RATE)
    mels, columns = decibels.shape
    first, second = decibels[:, : columns // 2 - 4], decibels[:, columns // 2 + 4 :]
    # 1 kHz is mel 15 of 61.2.
    assert abs(first.argmax(0) - 15 / 61.2 * mels).max() <= 1
    assert second.max() == -100


def test_pictures_of_anything(tmp_path):
    spectrograms(tmp_path / "silence.png", {"one": np.zeros(1), "two": np.zeros((2, 1))}, 8000)
    long = np.random.default_rng(0).normal(size=(1, 4_000_000)).astype(np.float32)
    assert mel_decibels(long, RATE).shape[1] <= 1601
    spectrograms(tmp_path / "long.png", {"long": long, "other": long[:, :-1]}, RATE)
    assert (tmp_path / "long.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib(evaluation, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        PlotError, match=r"drawing needs matplotlib: pip install 'dac-fast\[plot\]'"
    ):
        evaluation.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "evaluation.json",
        "files.csv",
        "summary.csv",
    ]


def test_commands_ask_for_matplotlib_before_they_work(recordings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for command, more in (("evaluate", ", or --no-plot$"), ("reconstruct --plot", "$")):
        arguments = [*command.split(), str(recordings), "-o", str(tmp_path / "out")]
        needed = r"^drawing needs matplotlib: pip install 'dac-fast\[plot\]'"
        with pytest.raises(ValueError, match=needed + more):
            app(arguments, standalone_mode=False)
    assert not (tmp_path / "out").exists()

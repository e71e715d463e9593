"""Training data: what is drawn, that it can be drawn again, and bad files."""

import json
import os
import subprocess
from collections import Counter
from dataclasses import replace

import numpy as np
import piped
import pytest
import torch

from dac_fast.audio import ffmpeg
from dac_fast.audio.loudness import LoudnessMeter
from dac_fast.audio.sources import AudioFile
from dac_fast.training import DataError
from dac_fast.training.data import Batches, Excerpts, loader, read_excerpt, shift_phase
from dac_fast.training.recipe import DataConfig
from dac_fast.training.split import find_files, hold_out

soundfile = pytest.importorskip("soundfile")
RATE = 8000


def write_tone(path, seconds=2.0, rate=RATE, frequency=440.0, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = 0.3 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)
    soundfile.write(
        path,
        np.stack([tone] * channels, axis=1),
        rate,
        subtype="FLOAT" if path.suffix == ".wav" else None,
    )


@pytest.fixture
def library(tmp_path):
    """Three domains of different sizes; speech has half the rate."""
    for domain, count, rate in (("speech", 7, RATE // 2), ("music", 3, RATE), ("effects", 2, RATE)):
        for i in range(count):
            write_tone(
                tmp_path / domain / f"{i}.wav",
                rate=rate,
                frequency=200.0 + 50 * i,
                channels=1 + i % 2,
            )
    return tmp_path


def excerpts(folder, batch_size=6, seed=3, **config):
    files, _ = find_files(folder, RATE)
    return Excerpts(files, DataConfig(seconds=0.2, **config), RATE, batch_size, seed)


def test_domains_get_equal_shares_and_every_batch_something_full_band(library):
    data = excerpts(library, batch_size=6)
    for step in range(5):
        batch = [data._choose(i)[1] for i in range(step * 6, step * 6 + 6)]
        assert Counter(f.domain for f in batch) == {"speech": 2, "music": 2, "effects": 2}
        assert any(f.full_band for f in batch)
    # A batch that no domain with full-band files would have a turn in still gets such a file.
    data = excerpts(library, batch_size=1)
    assert all(data._choose(i)[1].full_band for i in range(6))


def test_full_band_items_keep_no_file_from_its_turn(library):
    # One full-band file in each domain, and batches no larger than the number of domains.
    files, _ = find_files(library, RATE)
    first = {file.domain: file for file in files[::-1]}.values()
    files = [replace(file, full_band=file in first) for file in files]
    for batch_size in (2, 3):
        data = Excerpts(files, DataConfig(seconds=0.2), RATE, batch_size, seed=3)
        drawn = [data._choose(i)[1] for i in range(300 * batch_size)]
        assert {file.path for file in drawn} == {file.path for file in files}
        steps = [drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size)]
        assert all(any(file.full_band for file in batch) for batch in steps)
        counts = Counter(file.domain for file in drawn if file.full_band)
        assert max(counts.values()) < 3 * min(counts.values())


@pytest.mark.skipif(not ffmpeg.installed(), reason="ffmpeg is not installed")
@pytest.mark.parametrize("channels", [1, 2])
def test_excerpts_of_what_ffmpeg_reads_have_the_channels_of_the_model(tmp_path, channels):
    write_tone(tmp_path / "a.wav", channels=3 - channels)
    path = tmp_path / "a.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", path], check=True)
    audio = read_excerpt(str(path), 1000, RATE, np.random.default_rng(0), channels)
    assert audio.shape == (channels, 1000)
    assert 0.2 < np.abs(audio).max() < 0.4


def test_plain_sampling_draws_every_file_once_before_any_twice(library):
    data = excerpts(library, balanced=False)
    drawn = [data._choose(i)[1].path for i in range(24)]
    assert len(set(drawn[:12])) == len(set(drawn[12:])) == 12
    assert drawn[:12] != drawn[12:]


def test_items_depend_on_seed_and_number_only(library):
    first, again, other = excerpts(library), excerpts(library), excerpts(library, seed=4)
    for i in (5, 0, 17):
        assert torch.equal(first[i]["audio"], again[i]["audio"])
    assert not torch.equal(first[0]["audio"], other[0]["audio"])

    def run(workers, first_step=0, rank=0, processes=1):
        batches = Batches(range(first_step, 4), 6, rank, processes)
        return [batch["audio"] for batch in loader(excerpts(library), batches, workers)]

    alone = run(workers=0)
    assert all(torch.equal(a, b) for a, b in zip(alone, run(workers=2), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(alone[2:], run(workers=1, first_step=2), strict=True)
    )
    halves = zip(run(0, processes=2), run(0, rank=1, processes=2), strict=True)
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(alone, halves, strict=True))


def test_excerpts_are_normalized_resampled_mono_and_padded(tmp_path):
    write_tone(tmp_path / "short.flac", seconds=0.05, rate=11025, channels=2)
    audio = excerpts(tmp_path, phase_shift=False)[0]["audio"]
    assert audio.shape == (1, int(0.2 * RATE))
    assert audio.dtype == torch.float32
    assert audio[0, 450:].abs().max() == 0
    assert audio.abs().max() <= 1
    write_tone(tmp_path / "long.wav", seconds=3.0)
    (tmp_path / "short.flac").unlink()
    data = excerpts(tmp_path, phase_shift=False)
    data.samples = 2 * RATE
    meter = LoudnessMeter(RATE, 1)
    meter.update(data[0]["audio"].numpy())
    assert meter.integrated() == pytest.approx(-16, abs=0.01)


def test_phase_shift():
    time = np.arange(800) / RATE
    shifted = shift_phase(np.cos(2 * np.pi * 100 * time).astype(np.float32), 0.7)
    assert np.allclose(shifted, np.cos(2 * np.pi * 100 * time + 0.7), atol=1e-6)


def test_unreadable_files_are_skipped_counted_and_listed(library):
    (library / "music" / "noise.mp3").write_bytes(b"no audio at all")
    (library / "music" / "empty.wav").touch()
    (library / "music" / "pipe.flac").write_bytes(piped.flac(np.full((1, RATE), 0.1), RATE))
    (library / "music" / "notes.txt").write_text("no audio file by its name")
    files, unreadable = find_files(library, RATE)
    assert len(files) == 12
    names = {path.rpartition("/")[2] for path in unreadable}
    assert names == {"noise.mp3", "empty.wav", "pipe.flac"}
    # One whose header is good and whose samples are not turns up when it is drawn.
    soundfile.write(
        library / "speech" / "bad.wav", np.full(2 * RATE, np.nan), RATE, subtype="FLOAT"
    )
    data = excerpts(library, batch_size=3)
    seen = {}
    for batch in loader(data, Batches(range(10), 3), workers=1):
        assert batch["audio"].isfinite().all()
        seen |= batch["unreadable"]
    assert seen == {str(library / "speech" / "bad.wav"): "samples that are not finite"}


def test_a_name_that_is_not_utf_8(tmp_path):
    path = tmp_path / os.fsdecode(b"\xe9.wav")
    write_tone(tmp_path / "a.wav")
    (tmp_path / "a.wav").rename(path)
    assert read_excerpt(str(path), 800, RATE, np.random.default_rng(0)).any()


def test_nothing_to_train_on_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"^data.train: no audio in .*; accepted: .wav .flac"):
        find_files(tmp_path, RATE)
    with pytest.raises(DataError, match="no such folder or .jsonl manifest"):
        find_files(tmp_path / "missing", RATE)
    (tmp_path / "broken.wav").write_bytes(b"nothing")
    with pytest.raises(
        DataError, match="none of 1 files can be read, for example .*broken.wav: not an audio file"
    ):
        find_files(tmp_path, RATE)
    soundfile.write(tmp_path / "broken.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(
        DataError, match="^20 draws in a row cannot be read.*samples that are not finite$"
    ):
        list(loader(excerpts(tmp_path), Batches(range(1), 6), workers=1))


def test_manifest_and_hold_out(tmp_path):
    lines = []
    for i in range(8):
        write_tone(tmp_path / f"{i}.wav", seconds=1.0)
        lines.append(
            {"file": f"{i}.wav", "domain": "speech" if i < 6 else "music", "package": f"p{i // 2}"}
        )
    lines[0]["full_band"] = False
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    files, _ = find_files(tmp_path, RATE)
    assert [f.full_band for f in files] == [False] + [True] * 7
    training, validation = hold_out(files, 0.2)
    # A third of speech; music has one source, which stays.
    assert [f.path.rpartition("/")[2] for f in validation] == ["0.wav", "1.wav"]
    assert len(training) == 6
    assert hold_out(files[::-1], 0.2)[1] == validation[::-1]
    manifest.write_text('{"file": "0.wav"}\nnonsense\n')
    with pytest.raises(
        DataError, match="manifest.jsonl: line 2 is 'nonsense'; accepted: a JSON object"
    ):
        find_files(manifest, RATE)


def test_what_is_held_out_is_never_trained_on():
    def sound(name, domain, package, seconds):
        return AudioFile(name, name, domain, package, full_band=True, seconds=seconds, rate=RATE)

    # A package in two domains, one of which would not have had it held out.
    files = [
        sound("a", "speech", "film", 10),
        sound("b", "speech", "book", 500),
        sound("c", "music", "film", 300),
        sound("d", "music", "choir", 400),
        sound("e", "music", "band", 40),
    ]
    training, validation = hold_out(files, 0.05)
    assert [file.path for file in validation] == ["a", "c", "e"]
    # Where a run goes on with more files, none that it was trained on is held out.
    more = [*files, sound("f", "speech", "talk", 9000), sound("g", "music", "talk", 1)]
    held = {file.package for file in validation}
    assert hold_out(more, 0.05, held) == ([*training, *more[5:]], validation)
    assert hold_out(more, 0.05)[1] != validation
    # Where the film is all the speech there is, it stays.
    del files[1]
    assert [file.path for file in hold_out(files, 0.05)[1]] == ["e"]


def test_full_band_domains_of_the_recipe_count(library):
    files, _ = find_files(
        {"voice": str(library / "speech"), "rest": [str(library / "music")]}, RATE, ["voice"]
    )
    assert {(f.domain, f.full_band) for f in files} == {("voice", True), ("rest", False)}


def test_stereo_excerpts_keep_the_balance_of_the_channels(tmp_path):
    time = np.arange(RATE) / RATE
    tone = np.sin(2 * np.pi * 300 * time)
    files = {"wide": np.stack([0.8 * tone, 0.2 * tone]), "mono": 0.5 * tone[None]}
    for name, audio in files.items():
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", audio.T, RATE, subtype="FLOAT")
        found, _ = find_files(tmp_path / name, RATE)
        left, right = Excerpts(found, DataConfig(seconds=0.2), RATE, 1, 0, channels=2)[0]["audio"]
        # One phase shift and one gain for both.
        torch.testing.assert_close(right, left / 4 if name == "wide" else left)
        assert 0.1 < left.abs().max() <= 1.001

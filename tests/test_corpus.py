"""A corpus to codes and back: exact, resumable, whatever the source, the format and the workers."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import piped
import pytest
import soundfile
import torch
from dac_kernels import native
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import dac_fast
from dac_fast.cli.commands import app
from dac_fast.corpus import DatasetError, on_ray, read, shards
from dac_fast.corpus.encoding import Encoder, Reading
from dac_fast.corpus.folder import Folder, Work
from dac_fast.corpus.items import Item, SourceError
from dac_fast.corpus.meter import Meter
from dac_fast.corpus.sources import files_of, items_of
from dac_fast.corpus.tokenize import Options, forecast, tokenize
from dac_fast.corpus.verify import regret_of, verify
from dac_fast.files import OutputError
from dac_fast.recordings.windows import sample_windows

RATE = 8000
MARK = "DAC_FAST_TEST_RUN"
FORMATS = ("webdataset", "parquet", "npy")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of a codec that encodes in a moment."""
    torch.manual_seed(3)
    codec = dac_fast.DAC(
        encoder_dim=4, encoder_rates=[2, 4], decoder_dim=16, decoder_rates=[4, 2], n_codebooks=3,
        codebook_size=16, sample_rate=RATE,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    codec.save(path)
    return str(path)


def noise(seconds, channels=1, rate=RATE, seed=0):
    generator = np.random.default_rng([seed, channels])
    return generator.normal(0, 0.1, (round(seconds * rate), channels)).astype(np.float32), rate


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Recordings of several lengths (one of three windows), rates and channel counts."""
    folder = tmp_path_factory.mktemp("clips")
    for number, seconds in enumerate((0.4, 25.0, 0.01, 1.3, 0.7, 2.0)):
        path = folder / f"{'ab'[number % 2]}/clip.{number}.wav"
        path.parent.mkdir(exist_ok=True)
        channels, rate = (1, 2, 8)[number % 3] if seconds < 10 else 1, (8000, 11025)[number % 2]
        soundfile.write(path, *noise(seconds, channels, rate, number))
    soundfile.write(folder / "silent.flac", np.zeros(4000), RATE)
    return folder


@pytest.fixture
def options(model):
    """Three shards or so of `clips`."""
    return Options(model=model, local=True, workers=1, shard_hours=2 / 3600)


def made(source, output, options):
    return tokenize([str(source)], output, options, Meter())


def contents(folder):
    """Every file of a dataset, but those that name its sources."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name not in ("plan.jsonl", "dataset.json")
    }


def as_tar(clips, path):
    with tarfile.open(path, "w") as tar:
        for file in sorted(clips.rglob("*.*"), reverse=True):
            tar.add(file, str(file.relative_to(clips)))
    return path


def as_parquet(clips, path, embedded=True):
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(clips.rglob("*.*"))
    keys = [str(file.relative_to(clips).with_suffix("")) for file in files]
    audio = [{"bytes": file.read_bytes(), "path": None} for file in files]
    if not embedded:
        audio = [os.path.relpath(file, path.parent) for file in files]
    pq.write_table(pa.table({"key": keys, "audio": audio}), path, row_group_size=3)
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_follow_from_the_recordings_alone(clips, options, tmp_path, format):
    options = replace(options, format=format)
    card = made(clips, tmp_path / "one", options)
    assert card.complete
    assert (card.items, card.failures) == (7, 0)
    assert card.shards > 2
    expected = contents(tmp_path / "one")
    assert not [name for name in expected if Path(name).name.startswith(".")]
    made(clips, tmp_path / "two", replace(options, workers=2, batch_seconds=60.0))
    made(as_tar(clips, tmp_path / "c.tar"), tmp_path / "tar", options)
    made(as_parquet(clips, tmp_path / "c.parquet"), tmp_path / "parquet", options)
    for name in ("two", "tar", "parquet"):
        assert contents(tmp_path / name) == expected, name


@pytest.mark.parametrize("format", FORMATS)
def test_records_are_what_compress_gives(clips, model, options, tmp_path, format):
    options = replace(options, format=format, shuffle=5)
    made(clips, tmp_path / "codes", options)
    records = {record.key: record for record in read(tmp_path / "codes")}
    assert list(records) != sorted(records)
    assert len(records) == 7
    codec = dac_fast.load(model).fold_weight_norm()
    for path in sorted(clips.rglob("*.*")):
        key, codes, metadata = records[str(path.relative_to(clips).with_suffix(""))]
        file = codec.compress(path)
        assert codes.dtype == np.uint16
        assert np.array_equal(codes, file.codes.numpy()), key
        assert metadata == {
            "frames": file.n_frames, "channels": file.channels, "rate": file.sample_rate,
            "samples": file.original_length, "loudness": file.input_db,
            "gains": file.gains.tolist(), "duration": file.duration, "model": model,
        }  # fmt: skip


def test_packed_codes_in_a_tar_are_files_of_the_codec(clips, options, tmp_path):
    made(clips, tmp_path / "npy", options)
    made(clips, tmp_path / "dac", replace(options, codes="dac"))
    for plain, packed in zip(read(tmp_path / "npy"), read(tmp_path / "dac"), strict=True):
        assert plain.key == packed.key
        assert np.array_equal(plain.codes, packed.codes)
    with tarfile.open(next((tmp_path / "dac").glob("*.tar"))) as tar:
        member = next(member for member in tar if member.name.endswith(".dac"))
        file = dac_fast.DACFile.from_bytes(tar.extractfile(member).read())
    assert file.model_sample_rate == RATE


def test_a_launch_gives_what_the_window_gives_in_any_company(model):
    encoder = Encoder(dac_fast.load(model).fold_weight_norm())
    encoder.longest = 4000
    windows = []
    for number, seconds in enumerate((0.5, 1.0, 3.0, 0.2)):
        audio = torch.from_numpy(noise(seconds, seed=number)[0].T)
        windows += sample_windows(encoder.codec, [audio], 10_000)
    with torch.inference_mode():
        together = encoder._launched(windows)
        backwards = encoder._launched(windows[::-1])[::-1]
        apart = [encoder._launched([window])[0] for window in windows]
    for window, *codes in zip(windows, together, backwards, apart):
        frames = -(-window.signal.shape[1] // encoder.codec.hop_length)
        assert torch.equal(codes[0][..., :frames], codes[1][..., :frames])
        assert torch.equal(codes[0][..., :frames], codes[2][..., :frames])


def test_what_cannot_be_read_is_reported_and_nothing_else_is_lost(clips, options, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "sources"
    shutil.copytree(clips, folder / "clips")
    whole = (folder / "clips/a/clip.4.wav").read_bytes()
    (folder / "bad.wav").write_bytes(b"no audio")
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.flac").write_bytes(b"")
    soundfile.write(folder / "nan.wav", np.full(800, np.nan, np.float32), RATE, subtype="FLOAT")
    as_tar(clips / "a", tmp_path / "all.tar")
    (folder / "half.tar").write_bytes((tmp_path / "all.tar").read_bytes()[: len(whole) // 2 + 600])
    audio = pa.array([whole, None, b"no audio"], pa.binary())
    pq.write_table(pa.table({"audio": audio, "seconds": [0.7, 0.1, 0.1]}), folder / "p.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1")

    card = made(folder, tmp_path / "codes", options)
    lines = (tmp_path / "codes/failures.jsonl").read_text().splitlines()
    reasons = {row["key"]: row["reason"] for row in map(json.loads, lines)}
    assert card.complete
    assert card.items == 8
    assert card.failures == len(reasons)
    for key, part in {
        "bad": "not an audio file", "cut": "cut short", "empty": "empty", "nan": "not finite",
        "half.tar": "damaged tar", "clip.4": "cut short", "p/00000001": "null",
        "p/00000002": "not an audio file", "broken.parquet": "damaged Parquet",
    }.items():  # fmt: skip
        assert part in reasons.pop(key)
    assert not reasons
    assert str(tmp_path) not in "".join(lines)
    assert "p/00000000" in {record.key for record in read(tmp_path / "codes")}


def test_a_tar_that_ends_without_its_end_is_damaged(clips, tmp_path):
    path = as_tar(clips, tmp_path / "c.tar")
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.isfile()]
    whole = path.read_bytes()
    header = members[3].offset
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    flipped = bytearray(whole)
    flipped[header + 5] ^= 1
    for content, kept in (
        (flipped, 3), (whole[:header], 3), (whole[: header + 100], 3), (whole[:end], 7),
        (whole[: end + 512], None),
    ):  # fmt: skip
        path.write_bytes(content)
        *items, last = items_of(*files_of([str(path)]))
        lost = f"a damaged tar; what it holds beyond {kept} recordings is lost (neither a member"
        assert last.problem.startswith(lost) == (kept is not None)
        assert [item.key for item in items] == [
            str(Path(member.name).with_suffix("")) for member in members[: kept or 6]
        ]


def test_hidden_members_of_a_tar_are_passed_over(clips, tmp_path):
    with tarfile.open(tmp_path / "mac.tar", "w") as tar:
        for name in ("./x/._a.wav", "./x/a.wav", "x/._a.json", ".y/b.wav", "../c.wav"):
            tar.add(clips / "a/clip.0.wav", name)
    assert [item.key for item in items_of(*files_of([str(tmp_path)]))] == ["x/a", "../c"]


@pytest.mark.parametrize("format", FORMATS)
def test_names_and_texts_that_are_not_utf_8_stop_nothing(clips, options, tmp_path, format):
    folder = tmp_path / os.fsdecode(b"\xe0")
    folder.mkdir()
    shutil.copy(clips / "a/clip.0.wav", folder / os.fsdecode(b"\xe9t\xe9.wav"))
    (folder / os.fsdecode(b"\xe8.wav")).write_bytes(b"no audio")
    (tmp_path / "a.json").write_text(r'{"caption": "hi \ud83d", "\ud83d": ["\\\ud83d"]}')
    with tarfile.open(folder / "t.tar", "w") as tar:
        tar.add(clips / "a/clip.0.wav", "a.wav")
        tar.add(tmp_path / "a.json", "a.json")
    card = made(folder, tmp_path / "codes", replace(options, format=format))
    assert (card.complete, card.sources.named) == (True, [str(tmp_path / r"\udce0")])
    records = {record.key: record.metadata for record in read(tmp_path / "codes")}
    assert records.keys() == {"a", r"\udce9t\udce9"}
    assert records["a"]["caption"] == r"hi \ud83d"
    assert records["a"][r"\ud83d"] == ["\\" + r"\ud83d"]
    [failure] = (tmp_path / "codes/failures.jsonl").read_text().splitlines()
    assert json.loads(failure)["key"] == r"\udce8"
    assert "not an audio file that can be read (F" in failure


def test_what_a_source_says_of_one_recording_ends_nothing(clips, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [
        {"file": str(clips / "a/clip.0.wav"), "seconds": value, "key": str(value)[:9]}
        for value in (10**400, float("inf"), float("nan"))
    ]
    lines.append({"file": "a\0.wav"})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = files_of([str(tmp_path / "m.jsonl")])
    assert [item.seconds for file in found for item in items_of(file)] == [0.4, 0.4, 0.4, 0]
    for number, text in enumerate(("[" * 200_000, '{"a":' * 300 + "1" + "}" * 300, "[1]")):
        (tmp_path / f"{number}.json").write_text(text)
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for number in range(3):
            tar.add(clips / "a/clip.0.wav", f"{number}.wav")
            tar.add(tmp_path / f"{number}.json", f"{number}.json")
    problems = [item.problem for item in items_of(*files_of([str(tmp_path / "c.tar")]))]
    assert problems == ["its .json is damaged"] * 3
    text = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"audio": [b""], "text": text}), tmp_path / "p.parquet")
    [item] = items_of(*files_of([str(tmp_path / "p.parquet")]))
    assert item.problem.startswith("a damaged Parquet file ('utf-8' codec can't decode")


def test_what_a_file_of_codes_cannot_hold_is_one_failure(clips, options, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    shutil.copy(clips / "a/clip.0.wav", folder / "good.wav")
    audio, rate = noise(0.5)
    soundfile.write(folder / "loud.wav", audio * 1e13, rate, subtype="FLOAT")
    card = made(folder, tmp_path / "codes", replace(options, codes="dac"))
    assert (card.items, card.failures) == (1, 1)
    [failure] = map(json.loads, (tmp_path / "codes/failures.jsonl").read_text().splitlines())
    assert failure["key"] == "loud"
    assert failure["reason"].startswith("input_db is 2")

    # Likewise where rows of a stream are put together.
    assembly = on_ray._Assembly(Folder(tmp_path / "codes").plan.shard(0), card)
    facts = {"channels": 1, "rate": RATE, "samples": 800, "loudness": 236.0, "gains": [1.0]}
    assembly.add(0, 0, "", np.zeros((3, 100), np.uint16).tobytes())
    assembly.add(0, 1, json.dumps({"facts": facts}), b"")
    assert assembly.outcomes[0].reason.startswith("input_db is 236.0")


@pytest.mark.parametrize("format", FORMATS)
def test_what_failed_is_tried_again_alone(clips, options, tmp_path, format):
    options = replace(options, format=format)
    made(clips, tmp_path / "whole", options)
    damaged = shutil.copytree(clips, tmp_path / "clips")
    path = damaged / "b/clip.3.wav"
    good = path.read_bytes()
    names = [file.relative_to(damaged) for file in sorted(damaged.rglob("*.*"))]
    manifest = [{"file": str(name), "seconds": seconds_of(clips / name)} for name in names]
    (damaged / "manifest.jsonl").write_text("\n".join(map(json.dumps, manifest)))
    path.write_bytes(b"")
    assert made(damaged, tmp_path / "codes", options).failures == 1
    untouched = tmp_path / f"codes/shard-000002{shards.SUFFIXES[format]}"
    changed = untouched.stat().st_mtime_ns
    path.write_bytes(good)
    retry = replace(options, retry_failures=True)
    assert made(damaged, tmp_path / "codes", retry).failures == 0
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")
    assert untouched.stat().st_mtime_ns == changed


def seconds_of(path):
    info = soundfile.info(path)
    return info.frames / info.samplerate


def test_what_sources_say_is_carried_along(clips, options, tmp_path):
    lines = [
        {
            "file": "a/clip.0.wav",
            "key": "x",
            "speaker": "s1",
            "duration": 9,
            "level": 1,
            "number": 2**60 + 1,
        },
        {
            "file": "b/clip.1.wav",
            "level": 0.5,
            "number": 0.5,
            "tags": ["a", 2],
            "model": "theirs",
            "key": "/../b.%",
        },
    ]
    for line in lines:
        line["file"] = str(clips / line["file"])
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for format in FORMATS:
        options = replace(options, format=format)
        made(tmp_path / "m.jsonl", tmp_path / format, options)
        first, second = (record.metadata for record in sorted(read(tmp_path / format))[::-1])
        assert (first["speaker"], first["level"], first["duration"]) == ("s1", 1, 0.4)
        assert (second["level"], second["tags"], second["source_model"]) == (
            0.5,
            ["a", 2],
            "theirs",
        )
        assert "speaker" not in second
        assert (first["number"], second["number"]) == (2**60 + 1, 0.5)
    with tarfile.open(tmp_path / "webdataset/shard-000000.tar") as tar:
        assert tar.getnames()[0] == "%2F/%2E%2E/b%2E%25.npy"


def test_links_to_folders_are_followed(clips, tmp_path):
    (tmp_path / "linked").symlink_to(clips)
    names = [file.name for file in files_of([str(tmp_path)])]
    assert names == [f"linked/{file.name}" for file in files_of([str(clips)])]


def test_sources_of_other_filesystems(clips, options, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(clips), "/corpus", recursive=True)
    memory.put(str(as_tar(clips, tmp_path / "c.tar")), "/tars/c.tar")
    made(clips, tmp_path / "here", options)
    for name, source in (("folder", "memory://corpus"), ("tar", "memory://tars/*.tar")):
        tokenize([source], tmp_path / name, options, Meter())
        assert contents(tmp_path / name) == contents(tmp_path / "here")


class Command:
    """`dac-fast tokenize` in a process group of its own."""

    def __init__(self, *arguments, **options):
        main = "from dac_fast.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", main, "tokenize", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            **options,
        )  # fmt: skip

    def end(self):
        """Exit code, and both streams."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(clips, model, options, tmp_path):
    options = replace(options, shard_hours=0.2 / 3600)
    made(clips, tmp_path / "whole", options)
    arguments = clips, "-o", tmp_path / "codes", "--model", model, "--local", "--workers", "1"
    arguments = (*arguments, "--shard-hours", str(0.2 / 3600))
    moments = random.Random(1)
    for _ in range(3):
        command = Command(*arguments)
        deadline = time.monotonic() + 60
        # The imports take most of the time, and nothing happens before.
        while not (tmp_path / "codes").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.3)
        command.kill()
    made(clips, tmp_path / "codes", options)
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")


def test_a_worker_encodes_on_one_thread(clips, options, tmp_path, monkeypatch):
    """Whatever the process did before: sums of PyTorch's libraries depend on their threads."""
    begin, seen = Encoder.begin, set()

    def noted(self, windows):
        with native.torch_on_all_threads():
            seen.add((native.threads.count(), torch.get_num_threads()))
        return begin(self, windows)

    monkeypatch.setattr(Encoder, "begin", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with native.torch_on_one_thread():
            pass
        made(clips, tmp_path / "out", replace(options, workers=2))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {(1, 1)}


def test_finished_shards_are_not_made_again(clips, options, tmp_path):
    made(clips, tmp_path / "codes", options)
    before = contents(tmp_path / "codes")
    paths = sorted((tmp_path / "codes").glob("shard-*"))
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    (tmp_path / "codes/.shard-000001.dac_fast-0123abcd.tar").write_bytes(b"of a killed process")
    card = made(clips, tmp_path / "codes", options)
    assert card.complete
    assert contents(tmp_path / "codes") == before
    after = [path.stat().st_mtime_ns for path in paths]
    assert [a == b for a, b in zip(after, times)] == [number != 1 for number in range(len(paths))]


def test_two_at_once_share_the_work(clips, model, options, tmp_path):
    options = replace(options, shard_hours=0.2 / 3600)
    made(clips, tmp_path / "whole", options)
    arguments = clips, "-o", tmp_path / "codes", "--model", model, "--local", "--workers", "1"
    arguments = (*arguments, "--shard-hours", str(0.2 / 3600))
    both = [Command(*arguments), Command(*arguments)]
    for code, out, err in [command.end() for command in both]:
        assert code == 0, err
        assert "complete; 7 recordings" in out
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")


def test_one_that_waits_for_others_can_be_stopped(clips, options, tmp_path):
    made(clips, tmp_path / "codes", options)
    next((tmp_path / "codes").glob("shard-*")).unlink()
    folder, stopped = Folder(tmp_path / "codes"), threading.Event()
    folder.locks.take = lambda number: False
    work = Work(folder)
    waiting = threading.Thread(target=work.claim, args=(1, stopped), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    stopped.set()
    waiting.join(60)
    assert not waiting.is_alive()


def test_shares_and_budgets_come_to_the_whole(clips, options, tmp_path):
    made(clips, tmp_path / "whole", options)
    for share in ((0, 2), (1, 2)):
        card = made(clips, tmp_path / "shares", replace(options, share=share))
    assert card.complete
    assert contents(tmp_path / "shares") == contents(tmp_path / "whole")

    trial = replace(options, budget_hours=0.1 / 3600)
    card = made(clips, tmp_path / "trial", trial)
    assert not card.complete
    assert 0 < card.items < 7
    assert len(list(read(tmp_path / "trial"))) == card.items
    made(clips, tmp_path / "trial", options)
    assert contents(tmp_path / "trial") == contents(tmp_path / "whole")


def test_a_forecast_writes_nothing(clips, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = forecast([str(clips)], options)
    assert (found.files, found.items, found.problems) == (7, 7, 0)
    assert found.hours * 3600 == pytest.approx(29.91, abs=1e-3)
    assert found.shards == made(clips, tmp_path / "codes", options).shards
    size = sum(record.codes.nbytes for record in read(tmp_path / "codes"))
    assert found.gigabytes * 1e9 == pytest.approx(size, rel=0.02)
    assert not list(tmp_path.glob("[!c]*"))


def test_another_model_other_settings_or_sources_are_refused(clips, options, tmp_path):
    made(clips, tmp_path / "codes", options)
    before = contents(tmp_path / "codes")
    there = json.loads((tmp_path / "codes/dataset.json").read_text())["model"]["sha256"]
    with pytest.raises(DatasetError, match=f"sha256 {there}.*not of tiny .sha256 [0-9a-f]{{64}}"):
        made(clips, tmp_path / "codes", replace(options, model="tiny"))
    with pytest.raises(DatasetError, match="shuffle None, not 3"):
        made(clips, tmp_path / "codes", replace(options, shuffle=3))
    with pytest.raises(DatasetError, match=f"made of {clips} .7 files.*not of {clips}/a .3 files"):
        made(clips / "a", tmp_path / "codes", options)
    assert contents(tmp_path / "codes") == before


def test_bad_input_is_one_clear_line(clips, options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty: nothing to tokenize"):
        made(tmp_path / "empty", tmp_path / "codes", options)
    with pytest.raises(SourceError, match="missing: no such file or folder"):
        made(tmp_path / "missing", tmp_path / "codes", options)
    source = as_parquet(clips, tmp_path / "c.parquet")
    with pytest.raises(SourceError, match="no column 'sound'.*key, audio"):
        made(source, tmp_path / "column", replace(options, audio_column="sound"))
    with pytest.raises(SourceError, match="two recordings have the key 'silent'"):
        tokenize([str(clips), str(clips / "silent.flac")], tmp_path / "clash", options, Meter())
    for line in ('{"name": "x.wav"}', '{"file": ".."}', '{"file": ' + "[" * 200_000):
        (tmp_path / "m.jsonl").write_text(line)
        with pytest.raises(SourceError, match='line 1 .* a JSON object with at least "file"'):
            made(tmp_path / "m.jsonl", tmp_path / "codes", options)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make this folder|it is a file"):
        made(clips, tmp_path / "file/codes", options)
    with pytest.raises(DatasetError, match="no dataset of codes"):
        read(tmp_path)
    for wrong in (
        {"format": "zip"}, {"codes": "dac", "format": "npy"}, {"shard_hours": 0.0},
        {"workers": (2, 1)}, {"share": (3, 2)}, {"n_quantizers": 9}, {"budget_hours": 0.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="accepted: "):
            made(clips, tmp_path / "codes", replace(options, **wrong))
    assert not (tmp_path / "codes").exists()


def test_a_full_disk_ends_the_run_in_a_line_and_leaves_no_part(clips, model, tmp_path):
    arguments = clips, "-o", tmp_path / "codes", "--model", model, "--local", "--workers", "1"

    def half_full():
        # Files of more than that cannot be written.
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    code, _, err = Command(*arguments, preexec_fn=half_full).end()
    assert code == 1
    assert err.strip().count("\n") == 0
    assert "shard-000000.tar: cannot write: File too large" in err
    assert not [path for path in (tmp_path / "codes").iterdir() if "shard" in path.name]
    assert made(clips, tmp_path / "codes", Options(model=model, local=True, workers=1)).complete


def test_room_is_asked_for_before_anything_is_encoded(clips, options, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="the shards need 0.0 GB, and the disk has 0.0 GB"):
        made(clips, tmp_path / "codes", options)


def test_verify_judges_codes_that_differ(clips, model, options, tmp_path):
    made(clips, tmp_path / "codes", options)
    verdict = verify(tmp_path / "codes", 1.0)
    assert verdict.items == 7
    assert verdict.codes == sum(record.codes.size for record in read(tmp_path / "codes"))
    assert verdict.differing == 0 or verdict.regret < 1e-5

    folder = tmp_path / "codes"
    layout = read(folder).card.layout
    path = sorted(folder.glob("shard-*"))[0]
    records = list(shards.read(path, layout))
    wrong = records[0].codes.copy()
    wrong[0, 1, 3] = (wrong[0, 1, 3] + 5) % 16
    shards.write(path, [records[0]._replace(codes=wrong), *records[1:]], layout)
    verdict = verify(folder, 1.0)
    assert verdict.differing > 0
    assert verdict.regret > 0.01
    with pytest.raises(DatasetError, match="not of tiny"):
        verify(folder, 0.1, "tiny")


def test_regret_is_none_for_the_nearest_codes(model):
    codec = dac_fast.load(model)
    z = torch.randn(2, 16, 30, generator=torch.Generator().manual_seed(0))
    codes = codec.quantizer(z)[1]
    assert regret_of(codec.quantizer, z, codes).abs().max() < 1e-5
    codes[0, 2, 7] = (codes[0, 2, 7] + 1) % 16
    assert regret_of(codec.quantizer, z, codes)[0, 2, 7] > 1e-3


def keys(records):
    return [record.key for record in records]


def together(records):
    return keys(records)


def test_a_dataset_is_dealt_out_and_goes_on_where_it_was(clips, options, tmp_path):
    made(clips, tmp_path / "codes", options)
    everything = keys(read(tmp_path / "codes"))
    loader = DataLoader(read(tmp_path / "codes"), batch_size=2, num_workers=2, collate_fn=together)
    dealt = [key for batch in loader for key in batch]
    assert sorted(dealt) == everything

    shuffled = read(tmp_path / "codes", seed=1)
    order = keys(shuffled)
    assert sorted(order) == everything
    assert order != everything
    assert keys(read(tmp_path / "codes", seed=1)) == order
    assert next(iter(shuffled)).key == order[0]
    assert keys(shuffled) == order
    shuffled.set_epoch(1)
    assert keys(shuffled) != order
    for seen in range(len(order) + 1):
        first = read(tmp_path / "codes", seed=1)
        iterator = iter(first)
        begun = [next(iterator).key for _ in range(seen)]
        second = read(tmp_path / "codes", seed=1)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + keys(second) == order


def test_the_state_of_workers_is_kept_by_a_stateful_loader(clips, options, tmp_path):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    made(clips, tmp_path / "codes", options)

    def loader():
        dataset = read(tmp_path / "codes", seed=2)
        return torchdata.StatefulDataLoader(dataset, 2, num_workers=2, collate_fn=together)

    order = list(loader())
    first = loader()
    iterator = iter(first)
    begun = [next(iterator) for _ in range(2)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert begun + list(second) == order


def test_other_libraries_read_the_shards(clips, options, tmp_path):
    import datasets
    import webdataset

    cache = str(tmp_path / "cache")
    for format in ("webdataset", "parquet"):
        made(clips, tmp_path / format, replace(options, format=format))
    expected = {record.key: record for record in read(tmp_path / "parquet")}

    files = [str(path) for path in sorted((tmp_path / "parquet").glob("*.parquet"))]
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    assert len(table) == 7
    for row in table.with_format("numpy"):
        assert np.array_equal(np.stack(row["codes"]), expected[row["key"]].codes)
        assert row["duration"] == expected[row["key"]].metadata["duration"]

    tars = [str(path) for path in sorted((tmp_path / "webdataset").glob("*.tar"))]
    stream = datasets.load_dataset(
        "webdataset", data_files=tars, split="train", streaming=True, cache_dir=cache
    )
    found = {row["json"]["key"]: row for row in stream}
    assert found.keys() == expected.keys()
    assert found["a/clip.0"]["json"]["frames"] == expected["a/clip.0"].metadata["frames"]

    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert len(samples) == 7
    for sample in samples:
        assert np.array_equal(sample["npy"], expected[sample["json"]["key"]].codes)


def test_lengths_of_members_are_read_from_their_headers(clips, tmp_path):
    [found] = files_of([str(as_tar(clips, tmp_path / "c.tar"))])
    items = {item.key: item for item in items_of(found)}
    assert items["b/clip.1"].seconds == 25.0
    assert items["a/clip.4"].channels == 2
    for embedded in (True, False):
        (found,) = files_of([str(as_parquet(clips, tmp_path / "c.parquet", embedded))])
        assert {item.key: item.seconds for item in items_of(found)} == {
            key: item.seconds for key, item in items.items()
        }


def test_a_length_that_is_not_known_plans_for_nothing(options, tmp_path):
    audio, rate = noise(0.5)
    (tmp_path / "pipe.flac").write_bytes(piped.flac(audio.T, rate))
    card = made(tmp_path / "pipe.flac", tmp_path / "codes", options)
    assert (card.items, card.hours * 3600) == (1, 0.5)


def test_windows_do_not_hold_a_long_recording(model, tmp_path):
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        for second in range(120):
            file.write(noise(1, seed=second)[0])
    reading = Reading(dac_fast.load(model), Item("long", str(path)), -16.0, "audio")
    sizes = [window.signal.shape[1] for window in reading.windows()]
    assert len(sizes) == 12
    assert max(sizes) < 11 * RATE


def marked(value):
    """Processes that were started with that value of `MARK`, and their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={value}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_text()
        # It has ended meanwhile, or is another user's.
        except OSError:
            continue
    return found


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_ray_makes_the_same_bytes_survives_a_worker_and_ends(clips, model, options, tmp_path):
    pytest.importorskip("ray.data")
    sources = shutil.copytree(clips, tmp_path / "clips")
    (sources / "bad.wav").write_bytes(b"no audio")
    made(sources, tmp_path / "local", options)
    command = Command(
        sources, "-o", tmp_path / "ray", "--model", model, "--workers", "2", "--batch-seconds",
        "30", "--shard-hours", str(options.shard_hours), env={**os.environ, MARK: str(tmp_path)},
    )  # fmt: skip
    actors = []

    def began():
        actors[:] = [pid for pid, line in marked(tmp_path).items() if "MapWorker" in line]
        return actors

    assert until(began)
    os.kill(actors[0], signal.SIGKILL)
    code, out, err = command.end()
    assert code == 0, err
    assert "complete; 7 recordings" in out
    assert "bad" in (tmp_path / "ray/failures.jsonl").read_text()
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert until(lambda: not marked(tmp_path)), marked(tmp_path)


def test_without_ray_a_line_says_what_to_do(clips, options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ValueError, match=r"pip install 'dac-fast\[corpus\]', or --local"):
        made(clips, tmp_path / "codes", replace(options, local=False))
    assert not (tmp_path / "codes").exists()


def test_a_ray_that_gives_up_is_one_line(clips, options, tmp_path, monkeypatch):
    exceptions = pytest.importorskip("ray.exceptions")

    def fail(*arguments):
        raise exceptions.RayError("a traceback\nof many lines\nValueError: no model")

    monkeypatch.setattr(on_ray, "_run", fail)
    with pytest.raises(OSError, match=r"^Ray gave up \(ValueError: no model\); the same command"):
        made(clips, tmp_path / "codes", replace(options, local=False))


def test_the_command_tells_forecast_run_and_verdict(clips, model, tmp_path, monkeypatch):
    def command(*arguments):
        result = CliRunner().invoke(app, ["tokenize", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    options = "-o", tmp_path / "codes", "--model", model, "--local", "--workers", "1"
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "start", lambda _: signal.raise_signal(signal.SIGINT))
        stopped = CliRunner().invoke(app, ["tokenize", str(clips), *map(str, options)])
    assert stopped.exit_code == 128 + signal.SIGINT
    assert "0.00 of 0.01 h" in stopped.output
    assert "the same command goes on after the shards that are written" in stopped.output
    shutil.rmtree(tmp_path / "codes")
    assert re.search(r"recordings\W+7", command(clips, *options, "--dry-run"))
    assert not (tmp_path / "codes").exists()
    said = command(clips, *options, "--shuffle", "1", "--verify", "0.5")
    assert "complete; 7 recordings, 0.01 h, 0 failures" in said
    assert "bottleneck" in said
    assert re.search(r"codes that differ\W+0", command(tmp_path / "codes", "--verify", "1"))

"""The command line as a user calls it: what it writes, what it says, and its exit code."""

import dataclasses
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import typer

from dac_fast import DACFile, load
from dac_fast.audio import ffmpeg
from dac_fast.audio.reading import read
from dac_fast.audio.sources import SourceError, audio_files
from dac_fast.audio.writing import write
from dac_fast.cli import evaluation, jobs, report


@pytest.fixture
def folder(tmp_path):
    """Two recordings in a tree, with files that are not audio, empty, and no recording at all."""
    rng = np.random.default_rng(0)
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    write(root / "a.wav", rng.uniform(-0.5, 0.5, (1, 20000)).astype(np.float32), 44100)
    write(root / "deep" / "b.flac", rng.uniform(-0.5, 0.5, (2, 9000)).astype(np.float32), 16000)
    (root / "deep" / "bad.wav").write_bytes(b"not audio")
    (root / "empty.mp3").touch()
    (root / "readme.txt").write_text("left alone")
    return root


def test_folders_keep_their_tree_and_bad_files_do_not_stop_the_others(
    dac_fast_cli, folder, tmp_path
):
    code, out, err = dac_fast_cli("encode", folder, "-o", tmp_path / "codes", "--device", "cpu")
    assert code == 1
    assert "encoded 2 of 4, 2 failed" in out
    assert sorted(line for line in err.splitlines() if line.startswith("error:")) == [
        f"error: {folder}/deep/bad.wav: not an audio file that can be read (Format not recognised)",
        f"error: {folder}/empty.mp3: the file is empty",
    ]
    written = sorted(
        str(p.relative_to(tmp_path / "codes"))
        for p in (tmp_path / "codes").rglob("*")
        if p.is_file()
    )
    assert written == ["a.dac", "deep/b.dac"]

    code, out, _ = dac_fast_cli(
        "decode", tmp_path / "codes", "-o", tmp_path / "out", "--suffix", "flac"
    )
    assert code == 0
    assert "decoded 2 of 2" in out
    for name, shape, rate in (("a.flac", (1, 20000), 44100), ("deep/b.flac", (2, 9000), 16000)):
        audio, found = read(tmp_path / "out" / name)
        assert (audio.shape, found) == (shape, rate)


def test_batches_and_precisions_of_folders(dac_fast_cli, folder, tmp_path):
    """Chunks of all files in common batches: the same files as without."""
    assert dac_fast_cli("encode", folder, "-o", tmp_path / "alone", "--batch-seconds", 0)[0] == 1
    code, out, err = dac_fast_cli(
        "encode", folder, "-o", tmp_path / "codes", "--batch-seconds", 5, "--precision", "fp32"
    )
    assert (code, "encoded 2 of 4, 2 failed" in out, err.count("error:")) == (1, True, 2)
    for name in ("a.dac", "deep/b.dac"):
        assert (tmp_path / "codes" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    (tmp_path / "codes" / "bad.dac").write_bytes(b"no codes")
    for precision in ("fp32", "bf16"):
        options = ("--batch-seconds", 5, "--precision", precision, "--subtype", "FLOAT")
        code, out, err = dac_fast_cli(
            "decode", tmp_path / "codes", "-o", tmp_path / precision, *options
        )
        assert (code, "decoded 2 of 3, 1 failed" in out, err.count("error:")) == (1, True, 1)
    exact, rounded = (read(tmp_path / precision / "a.wav")[0] for precision in ("fp32", "bf16"))
    assert 0 < np.square(exact - rounded).mean() < 1e-2 * np.square(exact).mean()


def test_single_files_options_and_info(dac_fast_cli, folder, tmp_path):
    assert (
        dac_fast_cli("encode", folder / "a.wav", "-o", tmp_path / "x.dac", "--codebooks", 3)[0] == 0
    )
    assert DACFile.load(tmp_path / "x.dac").codes.shape == (1, 3, 40)
    code, out, _ = dac_fast_cli("info", tmp_path / "x.dac", "tiny")
    assert code == 0
    for fact in ("3 codebooks × 40 frames", "44100 Hz", "2,535,870"):
        assert fact in out
    # the published package's format, in its chunk mode
    published = (
        "encode",
        folder / "a.wav",
        "-o",
        tmp_path / "y.dac",
        "--format",
        "dac1",
        "--no-padding",
    )
    assert dac_fast_cli(*published, "--chunk-seconds", 0.4)[0] == 0
    assert not DACFile.load(tmp_path / "y.dac").padding
    code, _, err = dac_fast_cli("decode", tmp_path / "y.dac")
    assert (code, "give it by --model" in err) == (1, True)
    assert (
        dac_fast_cli("decode", tmp_path / "y.dac", "--model", "tiny", "-o", tmp_path / "y.wav")[0]
        == 0
    )
    assert read(tmp_path / "y.wav")[0].shape == (1, 20000)


def test_reconstruct_reports_and_converted_models_work(dac_fast_cli, folder, tmp_path):
    assert dac_fast_cli("convert", "tiny", tmp_path / "folded.safetensors", "--fold")[0] == 0
    code, out, _ = dac_fast_cli(
        "reconstruct", folder / "a.wav", "-o", tmp_path / "r", "-m", tmp_path / "folded.safetensors"
    )
    assert code == 0
    assert "SI-SDR" in out
    assert read(tmp_path / "r" / "a.wav")[0].shape == (1, 20000)


def test_reconstruct_at_several_bitrates(dac_fast_cli, folder, tmp_path):
    target = tmp_path / "out"
    arguments = ("reconstruct", folder / "a.wav", "-o", target, "--codebooks", "3,1", "--listen")
    code, out, _ = dac_fast_cli(*arguments, "--plot")
    assert code == 0
    assert sorted(path.name for path in target.iterdir()) == [
        "a.1_codebooks.wav",
        "a.html",
        "a.png",
        "a.wav",
    ]
    rows = [line.split()[:2] for line in out.splitlines() if "a.wav" in line]
    assert rows == [["a.wav", "3"], ["a.wav", "1"]]
    codec = load("tiny")
    for name, count in (("a.wav", 3), ("a.1_codebooks.wav", 1)):
        expected, _ = codec.decompress(codec.compress(folder / "a.wav", n_quantizers=count))
        assert np.abs(read(target / name)[0] - expected.clip(-1, 1)).max() < 2**-14
    page = (target / "a.html").read_text()
    assert page.count("data:audio/flac;base64,") == 3
    (target / "a.wav").unlink()
    code, _, err = dac_fast_cli(*arguments)
    assert (code, "a.1_codebooks.wav exists" in err) == (1, True)
    (target / "a.html").unlink()
    (target / "a.1_codebooks.wav").write_bytes(b"kept")
    code, out, _ = dac_fast_cli(*arguments, "--existing", "skip")
    assert (code, "reconstructed 1 of 1" in out) == (0, True)
    assert (target / "a.html").read_text() == page
    assert read(target / "a.wav")[0].shape == (1, 20000)
    assert (target / "a.1_codebooks.wav").read_bytes() == b"kept"
    code, out, _ = dac_fast_cli(*arguments, "--existing", "skip")
    assert (code, "reconstructed 0 of 1, 1 skipped" in out) == (0, True)
    code, _, err = dac_fast_cli("reconstruct", folder / "a.wav", "-o", target, "--codebooks", "1;3")
    assert (code, err.count("\n")) == (1, 1)
    assert "--codebooks is '1;3'; accepted: whole numbers with commas" in err


def test_faults_of_single_files_do_not_stop_the_others(
    dac_fast_cli, folder, tmp_path, monkeypatch, no_backend_set
):
    monkeypatch.chdir(tmp_path)
    write(folder / "a.flac", np.zeros((1, 100), np.float32), 44100)
    code, out, err = dac_fast_cli("encode", folder, "-o", "codes [b]")
    assert (code, "encoded 1 of 5, 4 failed" in out) == (1, True)
    assert err.count("2 inputs would become codes [b]/a.dac; convert them apart") == 2
    # A file of the published package's chunk mode with a chunk too short to decode, and one that
    # names a path as its model.
    good = DACFile.load("codes [b]/deep/b.dac")
    unpadded = dataclasses.replace(good, padding=False, chunk_length=4, gains=None)
    unpadded.save(tmp_path / "codes [b]" / "short.dac", format="dac1")
    dataclasses.replace(good, model="/etc").save(tmp_path / "codes [b]" / "path.dac")
    code, out, err = dac_fast_cli("decode", "codes [b]", "-o", "out", "--model", "tiny")
    assert (code, "decoded 2 of 3, 1 failed" in out) == (1, True)
    assert "short.dac: the file has a chunk of" in err
    assert "too few to decode without padding" in err
    code, _, err = dac_fast_cli("decode", "codes [b]/path.dac", "-o", "out2")
    assert (code, "the file names the model '/etc'; give it by --model" in err) == (1, True)
    # a folder named like a preset does not take its place
    (tmp_path / "tiny").mkdir()
    code, out, _ = dac_fast_cli("info", "codes [b]/deep/b.dac", "tiny")
    assert (code, "codes [b]/deep/b.dac" in out) == (0, True)
    (tmp_path / "out3.png").write_text("keep")
    assert dac_fast_cli("reconstruct", folder / "a.flac", "-o", "out3.wav", "--plot")[0] == 1
    assert (tmp_path / "out3.png").read_text() == "keep"
    monkeypatch.setenv("DAC_FAST_BACKEND", "native")
    code, _, err = dac_fast_cli("decode", "codes [b]/deep/b.dac", "-o", "out4")
    assert (code, "'native' cannot run rvq_decode" in err) == (1, True)


def test_the_help_of_train_has_recipes_and_keys(dac_fast_cli):
    code, out, _ = dac_fast_cli("train", "--help")
    assert code == 0
    for fact in (
        "Recipes: 16khz, ",
        "  model.encoder_rates=[2,4,8,8]\n",
        "  data.validation=0.05\n",
        "steps: total number of training steps.",
        "  trainer.init_from=null\n",
    ):
        assert fact in out


def test_weights_that_cannot_be_had(dac_fast_cli, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DAC_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DAC_FAST_MIRROR", str(tmp_path / "none"))
    code, out, err = dac_fast_cli("encode", folder / "a.wav", "-m", "44khz")
    downloading, error = err.splitlines()
    assert (code, out) == (1, "")
    assert downloading == f"downloading 44khz into {tmp_path}/cache, once"
    assert error.startswith(
        f"error: cannot get 44khz from {tmp_path}/none/0.0.1/weights.pth: No such"
    )
    assert "--model PATH" in error


def test_curves_of_runs(dac_fast_cli, tmp_path):
    rows = [
        {"step": i, "part": part, "mel": 1 / i, "mel_distance": 2 / i}
        for i in (1, 2, 3)
        for part in ("train", "x")
    ]
    # The second one was killed.
    for name, cut in (("a", ""), ("b", '{"step": 4, "pa')):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "log.jsonl").write_text(lines + cut)
    picture = tmp_path / "curves.png"
    assert dac_fast_cli("curves", tmp_path / "a", tmp_path / "b", "-o", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, err = dac_fast_cli("curves", tmp_path, "-o", tmp_path / "other.png")
    assert (code, "no readable log.jsonl" in err, (tmp_path / "other.png").exists()) == (
        1,
        True,
        False,
    )


def test_nothing_is_overwritten_unasked(dac_fast_cli, folder):
    original = (folder / "a.wav").read_bytes()
    assert dac_fast_cli("encode", folder / "a.wav")[0] == 0
    code, _, err = dac_fast_cli("decode", folder / "a.dac")
    assert code == 1
    assert (
        f"error: {folder / 'a.dac'}: {folder / 'a.wav'} exists; --existing overwrite replaces it"
        in err
    )
    assert (folder / "a.wav").read_bytes() == original
    code, out, _ = dac_fast_cli("decode", folder / "a.dac", "--existing", "skip")
    assert (code, "decoded 0 of 1, 1 skipped" in out) == (0, True)
    assert dac_fast_cli("decode", folder / "a.dac", "--existing", "overwrite")[0] == 0
    assert (folder / "a.wav").read_bytes() != original


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "absent.wav"], "error: absent.wav: no such file"),
        (["encode", "a.wav", "--model", "96khz"], "unknown model '96khz'; accepted: 44khz"),
        (["encode", "a.wav", "--codebooks", "0"], "0 codebooks; accepted: 1 to 9"),
        (["encode", "a.wav", "--codebooks", "10"], "10 codebooks; accepted: 1 to 9"),
        (["encode", "a.wav", "--device", "tpu"], "--device is 'tpu'; accepted: auto, cpu, cuda"),
        (["encode", "a.wav", "--device", "cuda:9"], "--device is 'cuda:9'; there are"),
        (["encode", "a.wav", "--chunk-seconds", "0"], "chunk_seconds is 0.0; accepted: above 0"),
        (
            ["encode", "a.wav", "--batch-seconds", "-1"],
            "--batch-seconds is -1.0; accepted: 0 or above",
        ),
        (["encode", "a.wav", "--no-padding"], "accepted: with --format dac1"),
        (["encode", "a.wav", "-o", "a.wav/x/y.dac"], "a.wav"),
        (["reconstruct", "a.wav", "-o", "-"], "- with reconstruct; accepted: files and folders"),
        (["encode", "a.wav", "deep", "-o", "one.dac"], "accepted for several inputs: a folder"),
        (["encode", "deep/none"], "holds no file that ends in"),
        (
            ["reconstruct", "a.wav", "-o", ".", "--existing", "overwrite"],
            "a.wav would be replaced by its own output",
        ),
        (
            ["encode", "a.wav", "-o", "new.wav"],
            "--output is new.wav; accepted: a folder, or a file that ends in .dac",
        ),
        (["encode", "a.wav", "--chunk-seconds", "inf"], "chunk_seconds is inf; accepted: above 0"),
        (
            ["encode", "a.wav", "--normalize-db", "nan"],
            "normalize_db is nan; accepted: -100 to 20 LUFS",
        ),
        (["decode", "a.wav", "-o", "o"], "not a .dac file"),
        (
            ["decode", "a.wav", "--suffix", "xyz", "-m", "tiny"],
            "--suffix is '.xyz'; accepted: .wav, .flac",
        ),
        (["info", "44khz"], "44khz is not downloaded; dac-fast download 44khz does that"),
        (["export", "a.wav"], "a.wav: cannot write there: it is a file, not a folder"),
        (
            ["convert", "tiny", "x.pth", "--fold"],
            "accepted: with a target that ends in .safetensors",
        ),
        (["info", "a.txt"], "a.txt: no such checkpoint"),
        (["download", "96khz"], "unknown model '96khz'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    dac_fast_cli, folder, monkeypatch, arguments, message
):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DAC_FAST_CACHE", str(folder / "cache"))
    (folder / "deep" / "none").mkdir()
    before = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    code, _, err = dac_fast_cli(*arguments)
    assert code == 1
    assert err.count("\n") == 1, err
    assert message in err
    assert {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()} == before


def test_entry_point_and_doctor(tmp_path):
    """In a process of its own, as installed."""
    command = [sys.executable, "-c", "from dac_fast.cli import main; main()"]
    done = subprocess.run(
        [*command, "doctor"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    for fact in ("torch", "snake on cpu", "rvq_encode on cpu", "tiny", "native extension"):
        assert fact in done.stdout
    assert (
        subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "0.1.0"
    )


def test_one_bad_recording_does_not_stop_the_others(dac_fast_cli, folder, tmp_path):
    """One far too loud; codes whose loudness is a number that no float holds."""
    write(folder / "loud.wav", np.full((1, 9000), 1e12, np.float32), 44100, "FLOAT")
    code, out, err = dac_fast_cli("encode", folder, "-o", tmp_path / "codes")
    assert (code, "encoded 2 of 5, 3 failed" in out) == (1, True)
    assert f"error: {folder}/loud.wav: input_db is 2" in err
    file = DACFile.load(tmp_path / "codes" / "a.dac")
    file.save(tmp_path / "codes" / "0.dac", format="dac1")
    published = pickle.loads((tmp_path / "codes" / "0.dac").read_bytes()[128:])
    published.item()["metadata"]["input_db"] = 10**400
    np.save(tmp_path / "codes" / "0.npy", published, allow_pickle=True)
    (tmp_path / "codes" / "0.npy").rename(tmp_path / "codes" / "0.dac")
    code, out, err = dac_fast_cli("decode", tmp_path / "codes", "-o", tmp_path / "o", "-m", "tiny")
    assert (code, "decoded 2 of 3, 1 failed" in out) == (1, True)
    assert f"error: {tmp_path}/codes/0.dac: its pickle holds a number of more" in err


def test_nothing_of_a_file_reaches_the_terminal_raw(dac_fast_cli, folder, tmp_path):
    title, rewritten = "\x1b]0;owned\x07", "\r\x1b[2Kfine\u202e\x9b1m"
    assert dac_fast_cli("encode", folder / "a.wav", "-o", tmp_path / "a.dac")[0] == 0
    file = dataclasses.replace(DACFile.load(tmp_path / "a.dac"), model=title + rewritten)
    path = tmp_path / f"{title}.dac"
    file.save(path)
    code, out, err = dac_fast_cli("info", path)
    assert code == 0
    assert "\\x1b]0;owned\\x07" in out.replace("\n", "")
    for arguments in (["decode", path], ["info", tmp_path / f"{rewritten}.dac"]):
        code, more, problem = dac_fast_cli(*arguments)
        assert code == 1
        assert "\\x1b" in problem
        out, err = out + more, err + problem
    assert all(c.isprintable() or c == "\n" for c in out + err)


def test_hidden_files_are_no_inputs(dac_fast_cli, folder, tmp_path):
    """What killed processes, file managers and version control leave behind."""
    for name in (".f07.dc8714b7.wav", "._a.wav", ".git/c.wav"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no recording")
    _, out, err = dac_fast_cli("encode", folder, "-o", tmp_path / "codes")
    assert "encoded 2 of 4, 2 failed" in out
    assert not any(f"/{name}" in err for name in (".f07", "._a", ".git"))


def test_subfolders_that_cannot_be_read_are_named(dac_fast_cli, folder, tmp_path, monkeypatch):
    scandir = os.scandir

    def forbidden(place):
        if str(place) == str(folder / "deep"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", forbidden)
    code, out, err = dac_fast_cli("encode", folder, "-o", tmp_path / "codes")
    assert (code, "encoded 1 of 3, 2 failed" in out) == (1, True)
    assert f"error: {folder}/deep: cannot read this folder: Permission denied" in err
    with pytest.raises(SourceError, match="deep: cannot read this folder: Permission denied"):
        audio_files(folder)


def test_of_two_at_once_one_writes(dac_fast_cli, folder, tmp_path, monkeypatch):
    """Both have found no output; the one that comes second replaces nothing."""
    target = tmp_path / "a.dac"
    to_bytes = DACFile.to_bytes

    def late(file, format):
        target.write_bytes(b"of the other")
        return to_bytes(file, format)

    monkeypatch.setattr(DACFile, "to_bytes", late)
    code, out, err = dac_fast_cli("encode", folder / "a.wav", "-o", target)
    assert (code, "encoded 0 of 1, 1 failed" in out) == (1, True)
    assert f"{target}: another process wrote it meanwhile" in err
    target.unlink()
    code, out, _ = dac_fast_cli("encode", folder / "a.wav", "-o", target, "--existing", "skip")
    assert (code, "encoded 0 of 1, 1 skipped" in out) == (0, True)
    assert target.read_bytes() == b"of the other"
    assert dac_fast_cli("encode", folder / "a.wav", "-o", target, "--existing", "overwrite")[0] == 0
    assert DACFile.load(target).channels == 1


def test_lines_of_progress_without_a_terminal(dac_fast_cli, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LINE_SECONDS", 0)
    _, _, err = dac_fast_cli("encode", folder / "a.wav", "-o", tmp_path / "codes")
    line = err.splitlines()[-1]
    assert re.fullmatch(r"encoded 1 of 1, 0\.5 s of audio in .* × real time, 0:00:00 left", line)


@pytest.mark.parametrize(
    ("command", "number"), [("encode", signal.SIGINT), ("decode", signal.SIGTERM)]
)
def test_stopped_in_the_middle(dac_fast_cli, tmp_path, command, number):
    """What is half written goes, what is done stays, and both are said."""
    given, made = tmp_path / "given", tmp_path / "made"
    given.mkdir()
    for i in range(8):
        write(given / f"{i}.wav", np.full((1, 20000 + 400000 * i), 0.1, np.float32), 44100)
    if command == "decode":
        file = DACFile(np.zeros((1, 9, 2000), np.int64), 2000, 2000 * 512, -20, 1, 44100)
        for path in given.iterdir():
            file.save(path.with_suffix(".dac"), format="dac1")
    script = "from dac_fast.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, command, given, "-o", made, "-m", "tiny"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # A decoded file takes a while to be written; codes are written at once.
    awaited = "*" if command == "decode" else "[0-9]*"
    while not any(made.glob(awaited)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (128 + number, "")
    done = len(list(made.iterdir()))
    assert re.search(rf"^{command}d {done} of 8, {8 - done} left", out, re.MULTILINE)
    assert not any(path.name.startswith(".") for path in made.iterdir())
    assert 0 <= done < 8


def test_a_file_that_was_written_as_the_signal_came_is_counted(tmp_path, capsys):
    def work(to_do, advance):
        for job in to_do:
            job.target.write_bytes(b"")
            if job is to_do[1]:
                signal.raise_signal(signal.SIGTERM)
            yield job, 1.0

    todo = [jobs.Job(tmp_path / f"{i}.wav", tmp_path / f"{i}.dac") for i in range(4)]
    # This one is still the old file.
    todo[3].target.write_bytes(b"")
    with pytest.raises(typer.Exit) as stopped:
        jobs.run(todo, work, "encoded", jobs.Existing.overwrite)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert "encoded 2 of 4, 2 left" in capsys.readouterr().out


def test_evaluate_says_how_far_it_came(dac_fast_cli, folder, tmp_path, monkeypatch):
    def stopped_at_the_third(codec, data, counts, *, progress, **settings):
        progress(2, 4)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(evaluation, "evaluate_codec", stopped_at_the_third)
    monkeypatch.setattr(report, "LINE_SECONDS", 0)
    code, out, err = dac_fast_cli("evaluate", folder, "-o", tmp_path / "measured")
    assert code == 128 + signal.SIGTERM
    assert out.endswith("measured 2 of 4, 2 left; nothing is written\n")
    assert err.endswith("measured 2 of 4, 2 left\n")
    assert not list((tmp_path / "measured").iterdir())


def test_standard_input_and_output(folder, tmp_path):
    """`-` in a pipeline: nothing but the file goes through it."""
    script = "from dac_fast.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def call(data, *arguments):
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            input=data,
            env=environment,
            cwd=tmp_path,
            capture_output=True,
        )

    encoded = call((folder / "a.wav").read_bytes(), "encode", "-", "--codebooks", "2")
    assert (encoded.returncode, b"encoded 1 of 1" in encoded.stderr) == (0, True)
    (tmp_path / "x.dac").write_bytes(encoded.stdout)
    assert DACFile.load(tmp_path / "x.dac").codes.shape == (1, 2, 40)
    decoded = call(encoded.stdout, "decode", "-", "-o", "-", "--suffix", "flac")
    (tmp_path / "x.flac").write_bytes(decoded.stdout)
    assert read(tmp_path / "x.flac")[0].shape == (1, 20000)
    failed = call(b"no audio", "encode", "-", "-o", "y.dac")
    assert failed.returncode == 1
    assert b"standard input: not an audio file that can be read" in failed.stderr
    several = call(b"", "encode", "-", "x.flac")
    assert (several.returncode, b"accepted: a single input" in several.stderr) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "x.dac", "x.flac"]


def test_no_codes_go_to_a_terminal(dac_fast_cli, folder, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for arguments in (["encode", "-"], ["encode", folder / "a.wav", "-o", "-"]):
        code, out, err = dac_fast_cli(*arguments)
        assert (code, out) == (1, "")
        assert err.startswith("error: standard output is a terminal; accepted: a pipe, or --output")


def test_other_settings_are_not_mixed(dac_fast_cli, folder, tmp_path):
    """What is there is skipped where it is what would be made."""
    made = ("encode", folder / "a.wav", "-o", tmp_path / "a.dac", "--existing", "skip")
    code, out, _ = dac_fast_cli(*made, "--codebooks", 3)
    assert (code, "model tiny: bundled" in out) == (0, True)
    code, out, _ = dac_fast_cli(*made, "--codebooks", 3)
    assert (code, "encoded 0 of 1, 1 skipped" in out) == (0, True)
    code, out, err = dac_fast_cli(*made)
    assert (code, "encoded 0 of 1, 1 failed" in out) == (1, True)
    assert "a.dac is there with other settings: codebooks 3, now 9; accepted: the same" in err
    code, _, err = dac_fast_cli(*made, "--codebooks", 3, "--format", "dac1")
    assert (code, "settings: format 'dac2', now 'dac1'; accepted" in err) == (1, True)
    assert DACFile.load(tmp_path / "a.dac").n_codebooks == 3


def test_audio_that_is_not_read_is_named(dac_fast_cli, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ffmpeg, "installed", lambda: False)
    for name in ("1.m4a", "deep/2.AAC", "3.wma", "4.m4a", ".5.m4a"):
        (folder / name).touch()
    _, out, err = dac_fast_cli("encode", folder, "-o", tmp_path / "codes")
    assert "encoded 2 of 4, 2 failed" in out
    names = "1.m4a, 3.wma, 4.m4a, …"
    why = "only ffmpeg reads, which is not installed"
    assert f"left out 4 files, whose formats {why}: {names}\n" in err

"""Files on the disk: found, written whole or not at all, by several processes, on a full disk."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from dac_fast import audio
from dac_fast.audio.writing import WRITABLE
from dac_fast.files import OutputError, atomic_path, files_below, write_bytes


def python(program, *arguments, **options):
    """Starts a Python process with this process's import path."""
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


WRITES_AND_WAITS = """if True:
    import sys, time
    from dac_fast.files import atomic_path
    with atomic_path(sys.argv[1]) as temporary:
        temporary.write_text("new")
        print("written", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that has written its temporary file for out.txt, and waits."""
    process = python(WRITES_AND_WAITS, tmp_path / "out.txt")
    assert process.stdout.readline() == "written\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def fresh_process():
    """As if this process had written into no folder yet."""
    from dac_fast import files

    files._sweep_once.cache_clear()


def test_what_a_killed_process_left_is_swept(tmp_path, writer, fresh_process):
    (tmp_path / ".other.dac_fast-12345678.txt").mkdir()
    (tmp_path / ".out.12345678.txt").touch()
    kept = {".other.dac_fast-12345678.txt", ".out.12345678.txt"}
    writer.kill()
    writer.wait()
    assert len(os.listdir(tmp_path)) == 3
    write_bytes(tmp_path / "b.txt", b"")
    assert set(os.listdir(tmp_path)) == {"b.txt"} | kept


def test_what_a_living_process_writes_is_left_alone(tmp_path, writer, fresh_process):
    before = os.listdir(tmp_path)
    write_bytes(tmp_path / "out.txt", b"ours")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out.txt"])
    (temporary,) = before
    assert (tmp_path / temporary).read_text() == "new"


def test_of_two_that_must_not_replace_one_wins(tmp_path, monkeypatch):
    for links in (True, False):
        path = tmp_path / f"{links}.txt"
        if not links:
            monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError))
        with atomic_path(path, replace=False) as temporary:
            temporary.write_bytes(b"first")
        with pytest.raises(FileExistsError, match="another process wrote it meanwhile"):
            write_bytes(path, b"second", replace=False)
        assert path.read_bytes() == b"first"
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("suffix", WRITABLE)
def test_a_disk_that_fills_up_in_the_last_block(tmp_path, suffix):
    """Whatever is lost, is said, and the good file stays; the file that just fits is whole."""
    pytest.importorskip("soundfile")
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 30000).astype(np.float32)
    audio.write(path, noise[:100], 44100)
    good = path.read_bytes()
    whole = tmp_path / f"whole{suffix}"
    audio.write(whole, noise, 44100)
    size = whole.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for missing in (1, 7, 300, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, before[1]))
        try:
            with pytest.raises(OutputError, match=f"a{suffix}: cannot write: File too large"):
                audio.write(path, noise, 44100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == good
        assert sorted(os.listdir(tmp_path)) == [path.name, whole.name]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        audio.write(path, noise, 44100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert audio.read(path)[0].shape == audio.read(whole)[0].shape


def test_the_search_of_folders(tmp_path):
    outside = tmp_path / "outside"
    root = tmp_path / ".root"
    for path in (
        root / "b.WAV", root / "a.wav", root / "deep/er/c.wav", root / "deep/no.txt",
        root / "._a.wav", root / ".cache/d.wav", root / "deep/.hidden/e.wav", outside / "f.wav",
    ):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "linked").symlink_to(outside)
    (outside / "back").symlink_to(root)
    (root / "deep/self").symlink_to(root / "deep")
    (root / "gone.wav").symlink_to(tmp_path / "nowhere")
    found = files_below(root, (".wav",), unreadable=pytest.fail)
    assert [str(path.relative_to(root)) for path in found] == [
        "a.wav", "b.WAV", "deep/er/c.wav", "gone.wav", "linked/f.wav",
    ]  # fmt: skip

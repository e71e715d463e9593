"""Folders and manifests of audio files."""

import json

import pytest

from dac_fast.audio.sources import SourceError, audio_files, files_below


def test_a_folders_files_and_their_domains(tmp_path):
    for path in ("music/deep/b.FLAC", "speech/a.wav", "c.ogg", ".hidden.wav", "notes.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = [(file.name, file.domain, file.path == file.package) for file in audio_files(tmp_path)]
    assert found == [
        ("c.ogg", tmp_path.name, True),
        ("music/deep/b.FLAC", "music", True),
        ("speech/a.wav", "speech", True),
    ]
    assert {file.domain for file in audio_files(tmp_path, "given")} == {"given"}


def test_a_manifest_says_more(tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    entries = [
        {"file": "x/b.wav", "rate": 8000, "seconds": 2, "package": "p", "full_band": False},
        {"file": "a.wav", "domain": "speech"},
        {"file": "/elsewhere/c.wav"},
    ]
    manifest.write_text("\n\n".join(map(json.dumps, entries)))
    (tmp_path / "unlisted.wav").touch()
    files = audio_files(manifest)
    assert files == audio_files(tmp_path)
    assert [(f.path, f.domain) for f in files] == [
        ("/elsewhere/c.wav", tmp_path.name),
        (str(tmp_path / "a.wav"), "speech"),
        (str(tmp_path / "x/b.wav"), "x"),
    ]
    assert (files[2].rate, files[2].seconds, files[2].package, files[2].full_band) == (
        8000,
        2.0,
        "p",
        False,
    )
    assert [file.name for file in files_below(tmp_path)] == ["unlisted.wav"]


@pytest.mark.parametrize(
    "line",
    [
        '{"file"',
        '{"path": "a.wav"}',
        '["a.wav"]',
        '{"file": 3}',
        '{"file": "."}',
        '{"file": "a", "rate": "x"}',
        '{"file": "a", "full_band": "yes"}',
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path, line):
    manifest = tmp_path / "list.jsonl"
    manifest.write_text('{"file": "a.wav"}\n' + line)
    with pytest.raises(
        SourceError,
        match=r"list.jsonl: line 2 is .*; accepted: a JSON object with at least \"file\"$",
    ):
        audio_files(manifest)


def test_nothing_there_is_one_line(tmp_path):
    with pytest.raises(SourceError, match="missing: no such folder or .jsonl manifest"):
        audio_files(tmp_path / "missing")
    with pytest.raises(SourceError, match="no audio in .*; accepted: .wav"):
        audio_files(tmp_path)

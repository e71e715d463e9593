"""Every writer on a disk that fills up: a clean error, and what was there is still there, whole."""

import io
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from served import noise, small_codec

from bench import document
from dac_fast import audio
from dac_fast.audio.writing import WRITABLE
from dac_fast.cli.commands import app
from dac_fast.training import load_recipe, state
from faults.commands import a_model, hidden, outputs, recordings

# Exports take a while, and are tried with one size; the slow one not among the other tests.
SLOW = () if "FAULT_TRIALS" in os.environ else ("export onnx",)
# Of `dac-fast`, with places for folders; {made} is the one that is written to.
COMMANDS = {
    "encode": "encode {given} -o {made} -m {model}",
    "encode dac1": "encode {given} -o {made} -m {model} --format dac1",
    "decode": "decode {codes} -o {made} -m {model}",
    "reconstruct": "reconstruct {given} -o {made} -m {model} --plot",
    "evaluate": "evaluate {given} -o {made} -m {model} --no-visqol --jobs 1 --listen {made}/a.html",
    "export onnx": "export {made} -m {model} --format onnx",
    "export pt2": "export {made} -m {model} --format pt2",
    "curves": "curves {run} -o {made}/a.png",
    "convert": "convert {model} {made}/a.safetensors",
    "convert pth": "convert {model} {made}/a.pth",
    "convert folder": "convert {model} {made}/a",
    "tokenize webdataset": "tokenize {given} -o {made} -m {model} --local --format webdataset",
    "tokenize parquet": "tokenize {given} -o {made} -m {model} --local --format parquet",
    "tokenize npy": "tokenize {given} -o {made} -m {model} --local --format npy",
}
Writer = Callable[[Path], object]
WRITERS: dict[str, Writer] = {
    **{
        suffix: lambda made, suffix=suffix: audio.write(made / f"a{suffix}", noise(1), 8000)
        for suffix in WRITABLE
    },
    "training checkpoint": lambda made: state.save(
        made, 1, load_recipe("tiny"), {"networks": small_codec().state_dict()}, keep_last=1
    ),
    "bench result": lambda made: document.write({"rows": [1] * 1000}, made / "a.json"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands are given."""
    folder = tmp_path_factory.mktemp("given")
    codec = a_model(folder / "model.safetensors")
    given = recordings(folder / "given", [0.5])
    (folder / "codes").mkdir()
    codec.compress(given / "0.wav").save(folder / "codes" / "0.dac")
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text('{"part": "train", "step": 1, "loss": 1.0}\n')
    return {
        "given": given,
        "codes": folder / "codes",
        "run": folder / "run",
        "model": folder / "model.safetensors",
    }


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failed(name: str, made: Path, places: dict[str, Path]) -> str:
    """What a writer said of its failure; "" where it did not fail."""
    made.mkdir(exist_ok=True)
    if name in WRITERS:
        try:
            WRITERS[name](made)
        except OSError as error:
            return str(error)
        return ""
    arguments = COMMANDS[name].format(made=made, **places).split()
    if not name.startswith("tokenize"):
        arguments += ["--existing", "overwrite"]
    # Not to a file, which could not grow.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        try:
            code = app(arguments, standalone_mode=False)
        except (OSError, ValueError) as error:
            return str(error)
    return said.getvalue().strip() if code else ""


@pytest.mark.parametrize("name", sorted({*WRITERS, *COMMANDS} - {*SLOW}))
def test_a_disk_that_fills_up(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    assert failed(name, tmp_path / "whole", places) == ""
    whole = outputs(tmp_path / "whole")
    # A dataset that is there would be gone on with.
    before = {} if name.startswith("tokenize") else dict.fromkeys(whole, b"before" * 9)
    largest = max(map(len, whole.values()))
    sizes = (largest - 1,) if name.startswith("export") else (largest - 1, largest // 2, 1)
    for size in sizes:
        made = tmp_path / str(size)
        for file, data in before.items():
            (made / file).parent.mkdir(parents=True, exist_ok=True)
            (made / file).write_bytes(data)
        with files_of_at_most(size):
            line = failed(name, made, places)
        assert "cannot write" in line
        assert line.isprintable()
        assert len(line) < 500
        found = outputs(made)
        assert max(map(len, found.values()), default=0) <= max(size, 54)
        # Of several files, those that had room may be there.
        assert {file for file in found if found[file] == before.get(file)} or len(whole) > 1
        for file in before:
            assert file in found
        assert not [file for file in hidden(made) if "dac_fast" in file]

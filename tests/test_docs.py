"""The documentation: every block of code runs, and every link leads somewhere.

A block with `title="needs ..."`, which the site shows above it, needs what a test has not: its
syntax and the options of its commands are checked. All others run, page by page, in a folder with
recordings, with small stand-ins for large models and for long training.
"""

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import typer
import yaml
from served import SIZES, serving
from small_codec import SMALL
from tolerances import FLOOR

import dac_fast
from dac_fast.audio import write
from dac_fast.cli import commands

ROOT = Path(dac_fast.__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r'^```(\S*)(?: title="needs ([^"\n]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# In place of what the pages name, and beside the options that they give.
STAND_INS = {"44khz": "tiny", 'device="cuda"': 'device="cpu"'}
ALSO = {
    "tokenize": ("--local",),
    "train": (
        *SMALL, "data.seconds=0.2", "data.workers=0", "trainer.batch_size=1", "trainer.steps=1",
        "trainer.device=cpu", "trainer.samples=1",
    ),
}  # fmt: skip
# By page: tracing a large model takes its time.
SMALLER = {"exporting": {"44khz": "small.safetensors"}}
# They take a while, and have tests of their own.
SLOW = ("evaluate", "export")
NEEDED = {
    "exporting": ["onnxruntime", "onnxscript"],
    "README": ["fastapi", "matplotlib"],
    "first_steps": ["matplotlib"],
    "from_transformers": ["transformers"],
    "serving": ["httpx", "fastapi"],
    "tokenizing": ["pyarrow", "torchdata", "webdataset", "datasets"],
}


class Block(NamedTuple):
    language: str
    needs: str
    text: str

    def commands(self):
        """Its lines of shell, as words."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page):
    text = page.read_text()
    found = [Block(*match) for match in FENCE.findall(text)]
    assert text.count("```") == 2 * len(found), "a fence is indented, or has another title"
    return found


def check_options(words):
    """There is such a command of dac-fast, and it takes these arguments."""
    name, *arguments = words[words.index("dac-fast") + 1 :]
    command = typer.main.get_command(commands.app).commands[name]
    command.make_context(name, arguments)


class Desk:
    """Where a page's blocks run, one after the other."""

    def __init__(self, running, monkeypatch):
        self.running, self.monkeypatch = running, monkeypatch
        self.stand_ins = dict(STAND_INS)
        x = torch.randn(2, 1, 40 * 512, generator=torch.manual_seed(0)) / 8
        lengths = torch.tensor([40 * 512, 9000])
        self.names = {"x": x, "batch": x, "lengths": lengths, "folder": "model"}

    def run(self, block):
        text = block.text
        for name, stand_in in self.stand_ins.items():
            text = text.replace(name, stand_in)
        if block.language == "python":
            exec(compile(text, "block", "exec"), self.names)
        else:
            for words in block._replace(text=text).commands():
                self.call(words)

    def call(self, words):
        if words[0] == "dac-fast":
            check_options(words)
        if words[:2] == ["dac-fast", "serve"]:
            url = self.running.enter_context(serving(dac_fast.load("tiny"))).url
            self.stand_ins |= {"http://127.0.0.1:8000": url, "localhost:8000": url}
        elif words[0] == "dac-fast" and words[1] not in SLOW:
            self.monkeypatch.setattr(sys, "argv", [*words, *ALSO.get(words[1], ())])
            with pytest.raises(SystemExit) as ended:
                commands.main()
            assert not ended.value.code, words
        elif words[0] != "dac-fast":
            subprocess.run(words, check=True)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 44100)).astype(np.float32)
    write(tmp_path / "song.flac", noise, 44100)
    (tmp_path / "recordings").mkdir()
    for name in ("song", "speech", "noise"):
        write(tmp_path / f"recordings/{name}.wav", noise[:1, :30000], 44100)
    dac_fast.load("tiny").save(tmp_path / "model")
    one_block = {"encoder_rates": [8], "decoder_rates": [8]}
    dac_fast.DAC(**(SIZES | one_block)).save(tmp_path / "small.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(ROOT))
    with contextlib.ExitStack() as running:
        yield Desk(running, monkeypatch)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs(page, desk):
    for module in NEEDED.get(page.stem, ()):
        pytest.importorskip(module, reason=f"{module} is not installed")
    desk.stand_ins |= SMALLER.get(page.stem, {})
    for block in blocks(page):
        if block.language in ("python", "sh") and not block.needs:
            desk.run(block)
        elif block.language == "python":
            compile(block.text, page.name, "exec")
        elif block.language == "sh":
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
            for words in block.commands():
                if "dac-fast" in words:
                    check_options(words)
        elif block.language == "yaml":
            spec = yaml.safe_load(block.text).get("spec", {})
            if "entrypoint" in spec:
                check_options(shlex.split(spec["entrypoint"]))
        else:
            assert block.language in ("text", "bibtex"), f"a block of {block.language!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_table_of_floors():
    rows = re.findall(r"^\| (\w+) \| (\S+) \|$", (ROOT / "docs/kernels/index.md").read_text(), re.M)
    assert {name: float(floor) for name, floor in rows[1:]} == {
        str(dtype).removeprefix("torch."): floor for dtype, floor in FLOOR.items()
    }

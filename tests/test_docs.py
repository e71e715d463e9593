"""The guides: their Python runs, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

import dac_fast

ROOT = Path(dac_fast.__file__).parents[1]
GUIDES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("name", ["from_descript", "from_transformers"])
def test_the_code_of_a_guide_runs(name, tmp_path):
    if name == "from_transformers":
        pytest.importorskip("transformers", reason="transformers is not installed")
    text = (ROOT / "docs" / f"{name}.md").read_text()
    folder = tmp_path / "model"
    dac_fast.load("tiny").save(folder)
    x = torch.randn(2, 1, 40 * 512, generator=torch.manual_seed(0)) / 8
    names = {"x": x, "folder": folder}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    with torch.no_grad():
        for block in blocks:
            exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_links_lead_to_files(guide):
    for target in re.findall(r"\]\(([^)#]+)", guide.read_text()):
        if "://" not in target:
            assert (guide.parent / target).exists(), target

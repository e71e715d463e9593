"""dac_kernels as a repository for Hugging Face's `kernels`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As that package imports it: under the name in its metadata, from wherever it lies.
LOAD = """
import importlib.util, sys

import torch

name, folder = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
kernels = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
x, alpha = torch.randn(2, 5, 40), torch.rand(1, 5, 1) + 0.5
exact = x + (alpha * x).sin().square() / (alpha + 1e-9)
assert (kernels.snake.snake(x, alpha) - exact).abs().max() < 1e-5
assert hasattr(getattr(torch.ops, name), "snake")
assert not [module for module in sys.modules if module.startswith("dac_")]
"""


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "release"))
    import hub

    return hub


def test_the_repository_of_kernels_loads_on_its_own(hub, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    hub.write(tmp_path / "hub", "someone/kernels", "0123abc")
    variant = tmp_path / "hub/build/torch-cuda"
    metadata = json.loads((variant / "metadata.json").read_text())
    files = hub.digests(variant)
    del files["metadata.json"]
    assert metadata["digest"]["files"] == files
    # Of the two places where `kernels` looks, this one loads the other.
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, metadata["id"], variant / "dac_kernels"],
        cwd=tmp_path, env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_no_other_folder_is_replaced(hub, tmp_path):
    with pytest.raises(ValueError, match="no repository of kernels"):
        hub.write(tmp_path, "someone/kernels", "0123abc")

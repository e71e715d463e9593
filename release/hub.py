"""Writes dac_kernels as a repository for Hugging Face's `kernels` package.

    python release/hub.py build/hub --repo-id someone/dac-kernels

The repository holds the Triton kernels. (Compiled ones need one module for all Pythons there, which
pybind11 does not make.) It has kernel-builder's source layout, build.toml, flake.nix and torch-ext,
and in build/torch-cuda what kernel-builder makes of it, for `kernels.get_kernel` to load. In there
imports are relative and the ops' names have the commit in them, since a process may load several
versions of a kernel. The layout: https://huggingface.co/docs/kernels/kernel-requirements
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from dac_fast.version import __version__

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels/dac_kernels"
# A change of it means an incompatible interface; 0 promises nothing.
VERSION = int(__version__.split(".")[0])

INIT = '''"""Kernels of neural audio codecs, for any model: a module for each op."""

from . import conv1d, residual_unit, rvq, snake

__all__ = ["conv1d", "residual_unit", "rvq", "snake"]
'''

OPS = '''"""The name under which this build registers its ops."""

import torch

ops = torch.ops.{identity}


def add_op_namespace_prefix(op_name: str) -> str:
    """An op's name with the namespace of this build."""
    return f"{identity}::{{op_name}}"
'''

# Older versions of `kernels` look for the module in a folder of the kernel's name.
NESTED = '''"""The module one folder up, for older versions of `kernels`."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parents[1] / "__init__.py"
_spec = importlib.util.spec_from_file_location("{identity}", _path)
_module = sys.modules["{identity}"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
'''

BUILD = """[general]
name = "dac-kernels"
version = {version}
edition = 5
license = "MIT"
backends = ["cuda"]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""

FLAKE = """{
  description = "Triton kernels of neural audio codecs";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs {
    inherit self;
    path = ./.;
  };
}
"""

CARD = """---
library_name: kernels
license: mit
---

# dac-kernels

Snake activations, residual vector quantisation, convolutions with their epilogues, and residual
units of neural audio codecs, in Triton, for CUDA.

```python
from kernels import get_kernel

kernels = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
y = kernels.snake.snake(x, alpha)        # x: [B, C, T], alpha: [1, C, 1], on a GPU
```
"""


def portable(source: str) -> str:
    """A module's text with relative imports, and with ops in the build's own namespace."""
    source = re.sub(r"^from dac_kernels\.", "from .", source, flags=re.MULTILINE)
    source, ops = re.subn(r'"dac_kernels::(\w+)"', r'add_op_namespace_prefix("\1")', source)
    if ops:
        source = source.replace(
            "\nfrom .", "\nfrom ._ops import add_op_namespace_prefix\nfrom .", 1
        )
    assert not re.search(r"^(from|import) dac_", source, re.MULTILINE), "an absolute import"
    return source


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, in base64, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in files
    }


def write(folder: Path, repo_id: str, commit: str) -> None:
    """Writes the repository.

    Args:
        folder: a new one, or one with an earlier repository, which is replaced.
        repo_id: its name on the Hub.
        commit: of the sources, as a part of a Python name.
    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and not (folder / "build.toml").exists():
        raise ValueError(f"{folder} is there, and no repository of kernels; accepted: a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    sources = folder / "torch-ext/dac_kernels"
    sources.mkdir(parents=True)
    for path in SOURCES.glob("*.py"):
        (sources / path.name).write_text(portable(path.read_text()))
    (sources / "__init__.py").write_text(INIT)
    (folder / "build.toml").write_text(BUILD.format(version=VERSION, repo_id=repo_id))
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "README.md").write_text(CARD.format(version=VERSION, repo_id=repo_id))

    identity = f"_dac_kernels_cuda_{commit}"
    variant = folder / "build/torch-cuda"
    shutil.copytree(sources, variant)
    (variant / "_ops.py").write_text(OPS.format(identity=identity))
    (variant / "dac_kernels").mkdir()
    (variant / "dac_kernels/__init__.py").write_text(NESTED.format(identity=identity))
    metadata = {
        "name": "dac-kernels",
        "id": identity,
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": digests(variant)},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder, or one written before")
    parser.add_argument("--repo-id", default="dac-fast/dac-kernels", help="its name on the Hub")
    arguments = parser.parse_args()
    command = ("git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude", "*")
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        write(arguments.out, arguments.repo_id, commit.replace("-", "_"))
    except ValueError as error:
        sys.exit(str(error))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()

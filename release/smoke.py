"""Says in one line that an installed dac_fast works: `python smoke.py`, away from the checkout.

Imports, `dac-fast doctor`, a tiny recording to codes and back, and each compiled op of the CPU.
"""

import platform
import subprocess
import sys
from pathlib import Path

import dac_kernels
import numpy as np
import torch
from dac_kernels import native

import dac_fast
from dac_fast import ops


def main() -> None:
    """Prints the line, or fails."""
    for package in (dac_fast, dac_kernels):
        assert Path(package.__file__).with_name("py.typed").exists(), package
    assert native.extension is not None, native.status()
    command = [sys.executable, "-c", "from dac_fast.cli import main; main()", "doctor"]
    doctor = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "native" in doctor, doctor

    codec = dac_fast.load("tiny")
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 6000)).astype(np.float32)
    file = codec.compress((noise, 44100))
    audio, rate = codec.decompress(file)
    assert (audio.shape, rate) == (noise.shape, 44100)
    with torch.no_grad(), ops.use_backend("reference"):
        codes = dac_fast.load("tiny").compress((noise, 44100)).codes
    assert (file.codes == codes).float().mean() > 0.99

    x, alpha = torch.randn(2, 8, 4000), torch.rand(1, 8, 1) + 0.5
    for run in (
        lambda: ops.snake(x, alpha),
        lambda: ops.disc_preprocess(x),
        lambda: ops.stft_bands(x[0], (512,))[0][0],
    ):
        with ops.use_backend("native"):
            ours = run()
        with ops.use_backend("reference"):
            assert (ours - run()).abs().max() < 1e-4

    print(f"python {platform.python_version()}, torch {torch.__version__}: {native.status()}")


if __name__ == "__main__":
    main()

"""Shared fixtures. The Triton interpreter must be chosen before Triton is imported, hence here."""

import os
import sys
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch
from device import DEVICE

GPU = DEVICE == "cuda"
# The tests' models are too small for more: threads would mostly wait for each other.
torch.set_num_threads(1)
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none; where there is one, Triton's tests need it."""
    for item in items:
        if item.get_closest_marker("triton") and GPU:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def golden():
    """The folder of golden vectors (see its README)."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def dac_fast_cli(capsys, monkeypatch):
    """Call `dac-fast ARGUMENTS`: (exit code, standard output, standard error)."""

    from dac_fast.cli import commands

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dac-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            commands.main()
        captured = capsys.readouterr()
        return exited.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def no_backend_set(monkeypatch):
    """Nothing has called `use_backend` before the test, and what the test calls ends with it."""
    from dac_fast import ops

    monkeypatch.setattr(ops, "_process", None)
    monkeypatch.setattr(ops, "_here", ContextVar("of the test", default=None))


@pytest.fixture
def pretend_graphs(monkeypatch):
    """CUDA graphs are captured and replayed on the CPU; has the number of `replays`."""
    from pretend_graphs import PretendCapturer

    from dac_fast.ops import cuda_graph

    monkeypatch.setattr(PretendCapturer, "replays", 0)
    monkeypatch.setattr(cuda_graph, "Capturer", PretendCapturer)
    return PretendCapturer


@pytest.fixture(autouse=True)
def strict_float32(request):
    """cuDNN's convolutions, which kernels are compared with, are not in TF32, their default."""
    if not any(map(request.node.get_closest_marker, ("triton", "gpu"))):
        yield
        return
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


@pytest.fixture
def poisoned():
    """New memory holds NaN, so that an element which no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def products_in_order(monkeypatch):
    """Triton's interpreter adds products to a sum one by one, as a GPU's instructions do.

    NumPy's own product of a tile has an order that depends on the tile's shape.
    """
    from dac_kernels import launch

    if not launch.INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, sums, *rest):
        total = sums.data
        for k in range(a.data.shape[1]):
            # Exact in float64, and rounded once: a fused multiply-add.
            products = a.data[:, k, None].astype("float64") * b.data[None, k].astype("float64")
            total = (total + products).astype("float32")
        return TensorHandle(total, sums.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)

"""The choice of backends: one signature everywhere, named backends that raise, `auto` that falls back."""

import inspect

import pytest
import torch

import dac_fast
from dac_fast import ops
from dac_fast.ops import reference

X, ALPHA = torch.randn(2, 3, 50), torch.ones(1, 3, 1)


@pytest.mark.parametrize("op", ops.IMPLEMENTATIONS)
def test_every_backend_has_the_reference_signature(op):
    def parameters(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    expected = parameters(getattr(reference, op))
    assert parameters(getattr(ops, op)) == expected
    for module in ops.IMPLEMENTATIONS[op].values():
        assert parameters(getattr(module, op)) == expected
        assert parameters(getattr(module, f"{op}_unsupported")) == expected


def test_named_backends_raise_and_auto_falls_back():
    with (
        dac_fast.use_backend("native"),
        pytest.raises(RuntimeError, match="'native' cannot run rvq_decode: it has no"),
    ):
        ops.rvq_decode(torch.zeros(1, 1, 4, dtype=torch.int64), [X[0]], [X[0]], [X[0]])
    with (
        dac_fast.use_backend("native"),
        pytest.raises(RuntimeError, match="cannot run snake: native: the dtype is torch.float16"),
    ):
        ops.snake(X.half(), ALPHA.half())
    with dac_fast.use_backend("auto"):
        assert torch.equal(
            ops.snake(X.half(), ALPHA.half()), reference.snake(X.half(), ALPHA.half())
        )
        assert ops.choose("snake", X.half(), ALPHA.half())[0] == "reference"


def test_the_backend_is_set_for_a_block_or_for_good(monkeypatch):
    monkeypatch.setattr(ops, "_backend", None)
    monkeypatch.setenv("DAC_FAST_BACKEND", "native")
    assert ops.backend() == "native"
    with dac_fast.use_backend("reference"):
        assert ops.backend() == "reference"
        with pytest.raises(ValueError, match="inside"), dac_fast.use_backend("auto"):
            raise ValueError("inside")
        assert ops.backend() == "reference"
    assert ops.backend() == "native"
    dac_fast.use_backend("reference")
    assert ops.backend() == "reference"
    monkeypatch.setattr(ops, "_backend", None)
    monkeypatch.setenv("DAC_FAST_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="DAC_FAST_BACKEND is 'fast'; accepted: auto, reference, native, triton"
    ):
        ops.backend()
    with pytest.raises(ValueError, match="backend is 'cuda'; accepted"):
        dac_fast.use_backend("cuda")


def test_auto_takes_triton_on_cuda_only():
    """Even where the interpreter could run it on the CPU."""
    with dac_fast.use_backend("auto"):
        assert ops.choose("snake", X, ALPHA)[0] != "triton"


def test_the_model_compiles_as_one_graph(golden):
    """torch.compile sees through the dispatch and the ops."""
    codec = dac_fast.load(golden / "weights_even.pth")
    assert ops.choose("snake", X, ALPHA)[0] == "native"
    z = torch.randn(1, 64, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled = torch.compile(codec.decoder, fullgraph=True, backend="aot_eager")(z)
        torch.testing.assert_close(compiled, codec.decoder(z), rtol=0, atol=1e-6)

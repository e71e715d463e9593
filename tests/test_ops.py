"""The choice of backends: one signature, named backends that raise, `auto` that falls back."""

import asyncio
import inspect
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dac_fast
from dac_fast import ops
from dac_fast.model.layers import Block, ResidualUnit
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
        pytest.raises(RuntimeError, match="cannot run snake: native: the dtype is torch.complex64"),
    ):
        ops.snake(X.cfloat(), ALPHA.cfloat())
    with dac_fast.use_backend("auto"):
        assert torch.equal(
            ops.snake(X.cfloat(), ALPHA.cfloat()), reference.snake(X.cfloat(), ALPHA.cfloat())
        )
        assert ops.choose("snake", X.cfloat(), ALPHA.cfloat())[0] == "reference"


def test_the_backend_is_set_for_a_block_or_for_good(monkeypatch, no_backend_set):
    monkeypatch.setenv("DAC_FAST_BACKEND", "native")
    assert ops.backend() == "native"
    with dac_fast.use_backend("reference"):
        assert ops.backend() == "reference"
        with pytest.raises(ValueError, match="inside"), dac_fast.use_backend("auto"):
            raise ValueError("inside")
        assert ops.backend() == "reference"
    assert ops.backend() == "native"
    monkeypatch.setenv("DAC_FAST_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="DAC_FAST_BACKEND is 'fast'; accepted: auto, reference, native, triton"
    ):
        ops.backend()
    with pytest.raises(ValueError, match="backend is 'cuda'; accepted"):
        dac_fast.use_backend("cuda")
    dac_fast.use_backend("reference")
    assert ops.backend() == "reference"


def in_a_thread(function):
    """What the function returns in a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_plain_call_counts_everywhere_and_a_block_in_its_thread(no_backend_set):
    with dac_fast.use_backend("native"):
        assert in_a_thread(ops.backend) == "auto"
        in_a_thread(lambda: dac_fast.use_backend("reference") and None)
        assert in_a_thread(ops.backend) == "reference"
        assert ops.backend() == "native"
    assert ops.backend() == "reference"
    dac_fast.use_backend("native")
    assert ops.backend() == in_a_thread(ops.backend) == "native"


def test_blocks_of_threads_do_not_meet(no_backend_set):
    """Whatever their order: no thread sees another's, and nothing is left over."""
    wrong, interval = [], sys.getswitchinterval()

    def blocks(name):
        for _ in range(300):
            with dac_fast.use_backend(name):
                if ops.backend() != name:
                    wrong.append(name)
            if ops.backend() != "auto":
                wrong.append("auto")

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(blocks, ["reference", "native", "triton"]))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert ops.backend() == in_a_thread(ops.backend) == "auto"


def test_tasks_have_blocks_of_their_own(no_backend_set):
    async def block(name):
        with dac_fast.use_backend(name):
            await asyncio.sleep(0)
            return ops.backend()

    async def both():
        return await asyncio.gather(block("reference"), block("native"))

    assert asyncio.run(both()) == ["reference", "native"]


def test_a_checkpointed_block_is_computed_again_by_the_same_backend():
    """Though the backward pass runs elsewhere: on a GPU, in a thread of autograd's."""
    unit = ResidualUnit(4, 1, "snake")
    unit.checkpointed = True
    x = torch.randn(1, 4, 20, requires_grad=True)
    with dac_fast.use_backend("reference"):
        y = Block.forward(unit, x)
    with dac_fast.use_backend("native"):
        y.sum().backward()
    assert x.grad.isfinite().all()


def test_implementations_are_functions_or_reasons():
    with dac_fast.use_backend("auto"):
        found = ops.implementations("snake", X.cfloat(), ALPHA.cfloat())
        assert list(found) == ["triton", "native"]
        assert found["triton"] == "Triton is chosen for CUDA tensors only"
        assert "torch.complex64" in found["native"]
        native = ops.implementations("snake", X, ALPHA)["native"]
        torch.testing.assert_close(native(X, ALPHA), reference.snake(X, ALPHA))
    with dac_fast.use_backend("native"):
        assert ops.implementations("rvq_decode", X) == {}


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

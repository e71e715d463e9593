"""cuDNN's fused convolution as a way of the engine, by a stand-in for cuDNN."""

import sys

import pytest
import torch
from stand_in_cudnn import ComputingGraph, cudnn

import dac_fast
from dac_fast.inference import choices, cudnn_graphs
from dac_fast.inference.cudnn_graphs import CudnnGraphs
from dac_fast.inference.plan import Plan, Unit
from dac_fast.ops import reference

LAYERS = {
    "ragged, with a residual": (8, 8, 1, 1, 0, 1, {"residual": True, "ragged": True}),
    "dilated, Snake alone": (8, 8, 7, 1, 9, 3, {"keep": False}),
    "strided, ragged": (8, 16, 4, 2, 1, 1, {"ragged": True}),
    "from one channel": (1, 8, 7, 1, 3, 1, {}),
    "to one, tanh": (8, 1, 7, 1, 3, 1, {"tanh": True, "alpha": None}),
}


def layer(c, n, k, stride, padding, dilation, options, positions=40, dtype=torch.float16):
    """The arguments and options of `ops.conv1d`, with channels innermost."""
    rng = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=rng).to(dtype)

    # the constants first: they are the same whatever the positions
    weight, bias = random(n, c, k) * (c * k) ** -0.5, random(n).float()
    options = {"alpha": 0.5 + torch.rand(1, n, 1, generator=rng)} | options
    if options.pop("ragged", False):
        options["lengths"] = torch.tensor([5, positions // stride])
    if options.pop("residual", False):
        # as a view of a longer signal
        options["residual"] = random(2, positions + 4, n).transpose(1, 2)[..., 2:-2]
    x = random(2, positions, c).transpose(1, 2)
    return [x, weight, bias, stride, padding, dilation], options


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    monkeypatch.setattr(cudnn_graphs, "takes", lambda x: x.dtype != torch.float32)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_gives_what_the_op_gives(name):
    graphs = CudnnGraphs()
    for positions in (40, 24):
        arguments, options = layer(*LAYERS[name], positions=positions)
        # none is made where nothing is timed
        assert graphs.way(arguments, options, None) is None
        graphs.way(arguments, options, lambda a=arguments, o=options: reference.conv1d(*a, **o))
        # the same graph, of another input
        arguments[0] = arguments[0].flip(2)
        found = graphs.way(arguments, options, None)()
        for ours, exact in zip(found, reference.conv1d(*arguments, **options)):
            assert (ours is None) == (exact is None)
            if ours is not None:
                torch.testing.assert_close(ours, exact, rtol=4e-3, atol=4e-3)
                assert ours.dtype == exact.dtype
                assert ours.stride(1) == 1


@pytest.mark.filterwarnings("error")
def test_what_cudnn_cannot_run_is_no_way(monkeypatch):
    arguments, options = layer(*LAYERS["strided, ragged"], dtype=torch.bfloat16)
    # the stand-in has no kernel for bfloat16
    assert (
        CudnnGraphs().way(arguments, options, lambda: reference.conv1d(*arguments, **options))
        is None
    )
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert CudnnGraphs().way(*layer(*LAYERS["strided, ragged"]), pytest.fail) is None


@pytest.mark.parametrize(
    ("method", "broken", "message"),
    [
        ("sin", lambda self, x: self.tanh(x), "left out: its result is wrong"),
        ("validate", lambda self: 1 / 0, "left out: division by zero"),
    ],
)
def test_a_graph_that_fails_is_left_out_aloud(monkeypatch, method, broken, message):
    monkeypatch.setattr(ComputingGraph, method, broken)
    arguments, options = layer(*LAYERS["strided, ragged"])
    graphs = CudnnGraphs()
    with pytest.warns(RuntimeWarning, match=message):
        way = graphs.way(arguments, options, lambda: reference.conv1d(*arguments, **options))
    assert way is None
    # said once
    assert graphs.way(arguments, options, pytest.fail) is None


@pytest.mark.filterwarnings("error")
@torch.no_grad()
def test_a_plan_takes_the_graphs_where_it_timed_and_nowhere_else(monkeypatch):
    """A whole encoder and decoder, ragged; but for the transposed convolutions by graphs alone."""
    executed = []
    execute = ComputingGraph.execute
    monkeypatch.setattr(
        ComputingGraph, "execute", lambda *a, **o: executed.append(1) or execute(*a, **o)
    )
    favoured = {choices.CUDNN: 1.0, "two layers": 2.0, choices.LIBRARY: 3.0}
    monkeypatch.setattr(
        choices, "_milliseconds", lambda ways, _: {name: favoured.get(name, 9.0) for name in ways}
    )
    codec = dac_fast.load("tiny")
    lengths, hop = torch.tensor([3, 5]), codec.hop_length
    audio = torch.randn(2, 1, 5 * hop, generator=torch.Generator().manual_seed(0)) / 8
    z = codec.encode(audio, lengths * hop).z
    for part, x, valid in (("encoder", audio, lengths * hop), ("decoder", z, lengths)):
        exact = Plan(part, getattr(codec, part), torch.float32)(x, valid)
        plan = Plan(part, getattr(codec, part), torch.float16)
        with choices.choosing(plan.choices):
            plan(x, valid)
        executed.clear()
        found = plan(x, valid)
        assert (found - exact).norm() < 1e-2 * exact.norm()
        units = sum(isinstance(layer, Unit) for layer in plan.layers)
        others = sum(not getattr(layer, "transposed", True) for layer in plan.layers)
        assert len(executed) == 2 * units + others
        # not ragged, which was timed of a unit's first convolution alone
        executed.clear()
        plan(x)
        assert len(executed) == units
        # of another size
        executed.clear()
        plan(x[..., : x.shape[2] // 5], valid // valid * (x.shape[2] // 5))
        assert not executed


def test_nothing_is_timed_and_so_no_graph_made_where_bits_must_not_vary():
    for invariant in (False, True):
        made = choices.Choices(invariant)
        with choices.choosing(made):
            assert made.timing != invariant

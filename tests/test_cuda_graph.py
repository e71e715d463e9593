"""When a step is captured and replayed, on the CPU; tests of engine and streams have more."""

import pytest
import torch

from dac_fast.ops.cuda_graph import Capturer, GraphedStep


def test_a_step_is_captured_in_its_fourth_call(pretend_graphs):
    weight, sizes = torch.zeros(3), []

    def step(audio):
        sizes.append(audio.shape)
        weight.add_(audio.mean())
        return {"loss": weight.sum() + audio.sum()}

    graphed, batches = GraphedStep(step), torch.arange(28.0).view(7, 1, 1, 4)
    values = []
    for number, audio in enumerate(batches):
        values.append(graphed(audio))
        assert pretend_graphs.replays == max(number - 2, 0)
    # The pretended capture computes, as the captures of a GPU do not.
    expected = batches[:4].mean((1, 2, 3)).sum() + batches[3:].mean((1, 2, 3)).sum()
    torch.testing.assert_close(weight, expected.expand(3))
    assert all(value["loss"] is values[3]["loss"] for value in values[3:])
    assert values[2]["loss"] is not values[3]["loss"]
    torch.testing.assert_close(values[-1]["loss"], weight.sum() + batches[-1].sum())


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="the codec is on cpu; accepted: a CUDA device"):
        Capturer(torch.device("cpu"))

"""Compiled convolutions by minimal filtering, and their gradients, against float64."""

import pytest
import torch
import torch.nn.functional as F
from dac_kernels import native
from test_native import threads
from tolerances import MINIMAL_FILTERING, assert_as_good_as

pytestmark = pytest.mark.skipif(
    native.extension is None, reason=f"dac_kernels._C: {native.status()}"
)


def random(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def signal(batch, positions, channels):
    """[B, C, T] with channels innermost."""
    return random(batch, positions, channels).transpose(1, 2)


def by_pytorch(x, weight, bias, grad, padding, dilation):
    given = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y = F.conv1d(*given, padding=padding, dilation=dilation)
    return [y.detach(), *torch.autograd.grad(y, given, grad)]


def check(x, weight, bias, grad, padding, dilation):
    actual = [
        native.winograd(x, weight, bias, padding, dilation),
        *native.winograd_gradients(grad, x, weight, padding, dilation),
    ]
    assert actual[0].stride(1) == 1
    same = by_pytorch(x, weight, bias, grad, padding, dilation)
    wide = (tensor.double() for tensor in (x, weight, bias, grad))
    exact = by_pytorch(*wide, padding, dilation)
    for result in zip(actual, same, exact, strict=True):
        assert_as_good_as(*result, floor=MINIMAL_FILTERING)


@pytest.mark.parametrize(
    ("batch", "positions", "inputs", "outputs", "padding", "dilation"),
    [
        (2, 300, 16, 16, 3, 1),
        (3, 5000, 12, 12, 27, 9),
        (2, 1000, 64, 64, 9, 3),
        (1, 200, 130, 40, 3, 1),
        (2, 5, 33, 24, 27, 9),
        (2, 7, 8, 31, 0, 1),
        (1, 61, 13, 9, 0, 2),
        (2, 30, 8, 8, 11, 1),
        (0, 30, 8, 8, 3, 1),
    ],
)
def test_results_and_gradients(batch, positions, inputs, outputs, padding, dilation):
    weight, bias = random(outputs, inputs, 7), random(outputs)
    x = signal(batch, positions, inputs)
    grad = signal(batch, positions + 2 * padding - 6 * dilation, outputs)
    if batch:
        check(x, weight, bias, grad, padding, dilation)
        # Any layout, and some of wider rows and a longer signal.
        check(x.contiguous(), weight.flip(0), bias.flip(0), grad.contiguous(), padding, dilation)
        wide = signal(batch, positions + 4, inputs + 3)[:, 1:-2, 2:-2]
        check(
            wide, weight.transpose(0, 1).contiguous().transpose(0, 1), bias, grad, padding, dilation
        )
    else:
        assert native.winograd(x, weight, bias, padding, dilation).shape == grad.shape
        of_x, *others = native.winograd_gradients(grad, x, weight, padding, dilation)
        assert of_x.shape == x.shape
        assert not any(other.any() for other in others)


def test_bits_do_not_depend_on_threads():
    x, grad, weight = signal(3, 7001, 40), signal(3, 7001, 70), random(70, 40, 7)
    results = []
    for count in (1, 2, 8):
        with threads(count):
            y = native.winograd(x, weight, None, 9, 3)
            results.append([y, *native.winograd_gradients(grad, x, weight, 9, 3)])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_bits_depend_on_the_item_alone():
    x, weight = signal(4, 500, 24), random(24, 24, 7)
    together = native.winograd(x, weight, None, 3, 1)
    for i in range(4):
        assert torch.equal(together[i : i + 1], native.winograd(x[i : i + 1], weight, None, 3, 1))


def test_refusals_name_the_value():
    x, weight, bias = signal(2, 20, 8), random(9, 8, 7), random(9)
    for changed, reason in (
        ((x.double(), weight, bias, 3, 1), "dtype is torch.float64, not torch.float32"),
        ((x, weight.double(), bias, 3, 1), "weight is torch.float64 on cpu, not torch.float32"),
        ((x, weight, bias[1:], 3, 1), r"bias has shape \[8\], not \[9\]"),
        ((x[:, 1:], weight, bias, 3, 1), r"x has shape \[2, 7, 20\], not \[B, 8, T\]"),
        ((x, weight[..., 1:], bias, 3, 1), r"\[9, 8, 6\], not 7 taps and at least 8 channels"),
        ((x, weight[0], bias, 3, 1), r"weight has shape \[8, 7\], not \[C', C, 7\]"),
        ((x, weight[:7], bias, 3, 1), r"\[7, 8, 7\], not 7 taps and at least 8 channels"),
        ((x, weight, bias, -1, 1), "padding is -1 and dilation 1, not at least 0 and 1"),
        ((x, weight, bias, 0, 4), "nothing comes out of 20 positions"),
    ):
        with pytest.raises(RuntimeError, match=f"winograd cannot run: .*{reason}"):
            native.winograd(*changed)
    with pytest.raises(RuntimeError, match=r"grad has shape \[2, 9, 19\], not \[2, 9, 20\]"):
        native.winograd_gradients(signal(2, 19, 9), x, weight, 3, 1)

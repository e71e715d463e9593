"""The compiled gradient of a convolution's weight, against float64."""

import pytest
import torch
import torch.nn.functional as F
from dac_kernels import native
from test_native import threads
from tolerances import assert_as_good_as

pytestmark = pytest.mark.skipif(
    native.extension is None, reason=f"dac_kernels._C: {native.status()}"
)


def random(*shape):
    """[B, T, C] as [B, C, T]."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).transpose(1, 2)


def autograd(grad, x, kernel, stride, padding, dilation):
    weight = torch.zeros(grad.shape[1], x.shape[1], kernel, dtype=x.dtype).requires_grad_()
    y = F.conv1d(x, weight, None, stride, padding, dilation)
    return torch.autograd.grad(y, weight, grad)[0]


def check(grad, x, *sizes):
    actual = native.conv1d_weight_gradient(grad, x, *sizes)
    exact = autograd(grad.double(), x.double(), *sizes)
    assert actual.is_contiguous()
    assert_as_good_as(actual, autograd(grad, x, *sizes), exact)


@pytest.mark.parametrize(
    ("batch", "positions", "inputs", "outputs", "kernel", "stride", "padding", "dilation"),
    [
        (2, 300, 16, 16, 7, 1, 3, 1),
        (3, 5000, 12, 12, 7, 1, 27, 9),
        (1, 200, 1, 16, 7, 1, 3, 1),
        (2, 100, 12, 1, 7, 1, 3, 1),
        (2, 61, 5, 3, 7, 1, 9, 3),
        (2, 61, 20, 17, 4, 2, 1, 1),
        (1, 64, 70, 130, 16, 8, 4, 1),
        (1, 5, 33, 40, 7, 1, 27, 9),
        (5, 1, 8, 24, 1, 1, 0, 1),
        (2, 9, 8, 2, 3, 1, 5, 1),
        (0, 30, 8, 8, 7, 1, 3, 1),
    ],
)
def test_weight_gradient(batch, positions, inputs, outputs, kernel, stride, padding, dilation):
    x = random(batch, positions, inputs)
    length = (positions + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    grad = random(batch, length, outputs)
    sizes = (kernel, stride, padding, dilation)
    if batch:
        check(grad, x, *sizes)
        # Any layout, and some of wider rows and a longer signal.
        check(grad.contiguous(), x.contiguous(), *sizes)
        wide = random(batch, positions + 4, inputs + 3)[:, 1:-2, 2:-2]
        check(grad, wide, *sizes)
    else:
        assert not native.conv1d_weight_gradient(grad, x, *sizes).any()


def test_bits_do_not_depend_on_threads():
    x, grad = random(3, 7001, 40), random(3, 7001, 70)
    results = []
    for count in (1, 2, 8):
        with threads(count):
            results.append(native.conv1d_weight_gradient(grad, x, 7, 1, 9, 3))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_refusals_name_the_value():
    x, grad = random(2, 20, 6), random(2, 20, 8)
    for changed, reason in (
        ((grad.double(), x.double()), "dtype is torch.float64, not torch.float32"),
        ((grad[..., 1:], x), r"grad has shape \[2, 8, 19\], not \[2, 8, 20\]"),
        ((grad[:1], x), r"grad has shape \[1, 8, 20\], not \[2, 8, 20\]"),
        ((grad.bfloat16(), x), "grad is torch.bfloat16 on cpu, not torch.float32 on cpu"),
        ((grad[0], x), r"shapes \[2, 6, 20\] and \[8, 20\], not \[B, C, T\]"),
    ):
        with pytest.raises(RuntimeError, match=f"weight_gradient cannot run: .*{reason}"):
            native.conv1d_weight_gradient(*changed, 7, 1, 3, 1)

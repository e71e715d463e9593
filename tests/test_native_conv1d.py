"""The compiled convolutions and residual units: against float64, and whose bits depend on what."""

import pytest
import torch
from dac_kernels import native
from dac_kernels.native.conv1d import _conv1d, _processor_unsupported, _residual_unit
from test_native import threads
from tolerances import assert_as_good_as

from dac_fast.ops import reference

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        _processor_unsupported(torch.zeros(1, 2, 1)) is not None, reason="no compiled kernels here"
    ),
]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    if reason := _processor_unsupported(torch.zeros(1, 2, 1, dtype=request.param)):
        pytest.skip(reason)
    return request.param


def random(*shape, dtype=torch.float32, terms=1):
    """[B, T, C] as [B, C, T], or a weight of unit gain."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / terms**0.5
    return (x.transpose(1, 2) if terms == 1 else x).to(dtype)


def alpha(channels):
    return torch.rand(1, channels, 1, generator=torch.Generator().manual_seed(1)) + 0.1


def compare(op, arguments, **options):
    """A native op's results are as good as PyTorch's in the same dtype."""

    def doubles(values):
        return [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in values]

    actual = getattr(native, op)(*arguments, **options)
    same = getattr(reference, op)(*arguments, **options)
    exact_options = dict(zip(options, doubles(options.values()), strict=True))
    exact = getattr(reference, op)(*doubles(arguments), **exact_options)
    for a, s, e in zip(actual, same, exact, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert a.dtype == s.dtype
            assert a.shape[1] == 1 or a.stride(1) == 1
            assert_as_good_as(a, s, e)


@pytest.mark.parametrize(
    ("batch", "positions", "inputs", "outputs", "kernel", "stride", "padding", "dilation"),
    [
        (2, 300, 96, 96, 7, 1, 27, 9),
        (3, 50, 2, 70, 7, 1, 3, 1),
        (2, 41, 8, 33, 4, 2, 1, 1),
        (1, 5, 40, 24, 7, 1, 27, 9),
        (2, 64, 12, 1, 7, 1, 0, 1),
        (5, 1, 6, 6, 1, 1, 0, 1),
        (1, 9, 128, 256, 16, 8, 4, 1),
    ],
)
def test_convolutions(batch, positions, inputs, outputs, kernel, stride, padding, dilation, dtype):
    x = random(batch, positions, inputs, dtype=dtype)
    weight = random(outputs, inputs, kernel, dtype=dtype, terms=kernel * inputs)
    arguments = [x, weight, torch.randn(outputs), stride, padding, dilation]
    result, _ = native.conv1d(*arguments)
    length = result.shape[2]
    lengths = torch.arange(batch) % length + 1
    residual = random(batch, length, outputs, dtype=dtype)
    compare("conv1d", arguments)
    compare("conv1d", arguments, alpha=alpha(outputs), keep=False)
    options = {"residual": residual, "lengths": lengths, "tanh": True}
    compare("conv1d", arguments, alpha=alpha(outputs), **options)
    assert native.conv1d(*arguments, tanh=True)[0].dtype == torch.float32
    # Any layout, and a part of a longer signal.
    compare("conv1d", [x.contiguous(), *arguments[1:]])
    if positions > 30:
        compare("conv1d", [x[..., 3:], *arguments[1:]], alpha=alpha(outputs))


@pytest.mark.parametrize(
    ("batch", "positions", "inputs", "outputs", "stride", "padding"),
    [(2, 30, 16, 8, 4, 2), (1, 7, 8, 3, 5, 3), (2, 2, 64, 96, 8, 4), (1, 250, 10, 20, 2, 0)],
)
def test_transposed_convolutions(batch, positions, inputs, outputs, stride, padding, dtype):
    x = random(batch, positions, inputs, dtype=dtype)
    weight = random(inputs, outputs, 2 * stride, dtype=dtype, terms=2 * inputs)
    arguments = [x, weight, torch.randn(outputs), stride, padding]
    compare("conv_transpose1d", arguments)
    lengths = torch.arange(batch) * stride + 3
    compare("conv_transpose1d", arguments, alpha=alpha(outputs), lengths=lengths)
    compare("conv_transpose1d", arguments, alpha=alpha(outputs), keep=False)


def unit(batch, positions, channels, dilation, padded, dtype):
    x, snaked = (random(batch, positions, channels, dtype=dtype) * scale for scale in (1, 0.7))
    wide = random(channels, channels, 7, dtype=dtype, terms=7 * channels)
    narrow = random(channels, channels, 1, dtype=dtype, terms=channels + 1)
    bias = torch.randn(channels)
    padding = 3 * dilation if padded else 0
    return [x, snaked, wide, bias, alpha(channels), narrow, bias, dilation, padding]


# Short ones as two convolutions, the long one in pieces.
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("shape", [(2, 100, 24, 3), (1, 3000, 32, 9)], ids=str)
def test_residual_units(shape, padded, dtype):
    arguments = unit(*shape, padded, dtype)
    batch, positions, channels, _ = shape
    compare("residual_unit", arguments, alpha=alpha(channels))
    lengths = torch.arange(batch) * 5 + positions // 3
    compare("residual_unit", arguments, alpha=alpha(channels), lengths=lengths, keep=False)


def test_an_empty_batch_gives_an_empty_result(dtype):
    weight, bias = random(4, 4, 3, dtype=dtype, terms=12), torch.zeros(4)
    x, memory = random(0, 20, 4, dtype=dtype), native.Memory()
    with memory.in_force():
        result, snaked = native.conv1d(x, weight, bias, alpha=alpha(4))
        assert result.shape == snaked.shape == (0, 4, 18)
        memory.give_back(result)
        again, _ = native.conv1d(snaked, weight, bias)
        assert again.shape == (0, 4, 16)
    result, _ = native.residual_unit(*unit(0, 20, 6, 1, True, dtype))
    assert result.shape == (0, 6, 20)


def test_bits_depend_on_the_item_alone(dtype):
    """Not on its neighbours, on the threads, or on whether a unit is computed in pieces."""
    weight = random(70, 40, 7, dtype=dtype, terms=280)
    x = random(5, 1000, 40, dtype=dtype)
    arguments = [weight, torch.randn(70), 1, 9, 3]
    alone = [native.conv1d(x[i : i + 1], *arguments, alpha=alpha(70)) for i in range(5)]
    for count in (1, 2, 8):
        with threads(count):
            together = native.conv1d(x, *arguments, alpha=alpha(70))
            for i, results in enumerate(alone):
                for a, b in zip(results, together, strict=True):
                    assert torch.equal(a[0], b[i])
            x_unit, snaked, *weights, dilation, padding = unit(1, 3000, 32, 3, True, dtype)
            whole = native.residual_unit(x_unit, snaked, *weights, dilation, padding)[0]
            # Away from the ends, a shorter signal's result: one that is not computed in pieces.
            part = [tensor[..., 500:600] for tensor in (x_unit, snaked)]
            short = native.residual_unit(*part, *weights, dilation, 0)[0]
            assert torch.equal(short, whole[..., 509:591])


def test_weights_are_packed_for_each_version_of_them():
    weight, bias = random(8, 4, 3, terms=12), torch.zeros(8)
    x = random(1, 9, 4)
    before, _ = native.conv1d(x, weight, bias)
    weight.mul_(2)
    after, _ = native.conv1d(x, weight, bias)
    torch.testing.assert_close(after, 2 * before)


def test_results_in_memory_that_is_used_again():
    weight, x = random(8, 8, 3, terms=24), random(1, 50, 8)
    memory = native.Memory()
    expected, _ = native.conv1d(x, weight, torch.zeros(8))
    for _ in range(3):
        with memory.in_force():
            first, _ = native.conv1d(x, weight, torch.zeros(8))
            second, _ = native.conv1d(first, weight, torch.zeros(8))
            assert torch.equal(first, expected)
            memory.give_back(first, x)
            third, _ = native.conv1d(second, weight, torch.zeros(8))
            assert third.data_ptr() == first.data_ptr()
        assert memory.size == 4 * (48 + 46) * 8


def test_registration(dtype):
    x, weight = random(2, 20, 6, dtype=dtype), random(10, 6, 4, dtype=dtype, terms=24)
    bias, residual, lengths = torch.zeros(10), random(2, 9, 10, dtype=dtype), torch.tensor([3, 9])
    tensors = (x, weight, bias, alpha(10), residual, lengths)
    torch.library.opcheck(_conv1d, (*tensors, 2, 0, 1, False, True, True))
    weight = random(6, 10, 4, dtype=dtype, terms=12)
    torch.library.opcheck(_conv1d, (x, weight, bias, None, None, None, 2, 1, 1, True, False, True))
    *tensors, dilation, padding = unit(2, 30, 6, 1, True, dtype)
    options = (None, None, dilation, padding, True)
    torch.library.opcheck(_residual_unit, (*tensors, *options))


def test_refusals_name_the_value():
    x, weight, bias = random(1, 9, 3), random(8, 3, 3, terms=9), torch.zeros(8)
    assert native.conv1d_unsupported(x, weight, bias) is None
    assert "torch.float64" in native.conv1d_unsupported(x.double(), weight.double(), bias)
    assert "weight has shape (8, 2, 3)" in native.conv1d_unsupported(x, weight[:, :2], bias)
    with pytest.raises(RuntimeError, match="native conv1d cannot run: bias has shape"):
        native.conv1d(x, weight, bias[1:])
    half = [tensor.bfloat16() for tensor in (x, weight)]
    reason = native.conv1d_unsupported(*half, bias)
    assert "3 channels; accepted in bfloat16: an even number" in reason or "lacks" in reason
    needy = weight.clone().requires_grad_()
    assert "for inference" in native.conv1d_unsupported(x, needy, bias)

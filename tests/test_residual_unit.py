"""dac_kernels.residual_unit against float64, on a GPU or in Triton's interpreter."""

import pytest
import torch
from dac_kernels import residual_unit as module
from dac_kernels.residual_unit import _residual_unit, residual_unit, residual_unit_unsupported
from dac_kernels.tiles import PRODUCTS
from device import DEVICE
from tolerances import assert_as_good_as

from dac_fast.ops import reference

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unit(channels, size, dtype=torch.float32, items=2):
    """x, its Snake, and the weights of one unit, channels innermost; and the alpha that follows."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    alpha0, alpha1, alpha = (normal(1, channels, 1).abs() + 0.1 for _ in range(3))
    x = normal(items, size, channels).transpose(1, 2)
    weight1 = normal(channels, 7, channels, scale=(7 * channels) ** -0.5).transpose(1, 2)
    weight2 = normal(channels, channels, 1, scale=channels**-0.5)
    snaked = reference.snake(x, alpha0)
    return [x, snaked, weight1, normal(channels), alpha1, weight2, normal(channels)], alpha


def compare(arguments, dilation, padding, dtype=None, **options):
    """Run the op, and check what it gives; returns it."""

    def double(value):
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    actual = residual_unit(*arguments, dilation, padding, **options)
    same = reference.residual_unit(*arguments, dilation, padding, **options)
    exact = reference.residual_unit(
        *map(double, arguments),
        dilation,
        padding,
        **{name: double(value) for name, value in options.items()},
    )
    for a, s, e in zip(actual, same, exact):
        assert (a is None) == (s is None)
        if a is not None:
            assert a.dtype == arguments[0].dtype
            assert a.transpose(1, 2).is_contiguous()
            assert_as_good_as(a, s, e, dtype)
    return actual


@pytest.mark.parametrize(
    ("channels", "size", "dilation", "padded", "dtype"),
    [
        (24, 63, 1, True, torch.float32),
        (40, 70, 3, True, torch.float32),
        (48, 100, 9, True, torch.float16),
        (16, 1, 9, True, torch.bfloat16),
        (96, 70, 3, False, torch.bfloat16),
        (24, 55, 9, False, torch.float16),
    ],
)
def test_as_accurate_as_pytorch(channels, size, dilation, padded, dtype):
    arguments, alpha = unit(channels, size, dtype)
    padding = 3 * dilation * padded
    time = size if padded else size - 6 * dilation
    valid = (time + 2) // 3
    y, _ = compare(
        arguments,
        dilation,
        padding,
        alpha=alpha,
        lengths=torch.tensor([valid, time], device=DEVICE),
    )
    crop = 3 * dilation - padding
    assert torch.equal(y[0, :, valid:], arguments[0][0, :, crop + valid : crop + time])
    if dtype != torch.float32:
        singles = [
            tensor if i in (0, 1, 2, 5) else tensor.float() for i, tensor in enumerate(arguments)
        ]
        compare(singles, dilation, padding, alpha=alpha.float(), keep=False)


def test_any_strides():
    arguments, alpha = unit(24, 40)
    expected = residual_unit(*arguments, 3, 9, alpha=alpha)
    wide = torch.zeros(2, 60, 24, device=DEVICE).transpose(1, 2)
    wide[..., 7:47] = arguments[0]
    others = [
        [wide[..., 7:47], *arguments[1:]],
        [arguments[0].contiguous(), arguments[1].contiguous(), *arguments[2:]],
        [
            *arguments[:2],
            arguments[2].contiguous(),
            *arguments[3:5],
            arguments[5].mT.contiguous().mT,
            arguments[6],
        ],
    ]
    for other in others:
        for a, e in zip(residual_unit(*other, 3, 9, alpha=alpha), expected):
            assert torch.equal(a, e)


def test_short_items_share_a_tile():
    arguments, alpha = unit(16, 2, items=20)
    compare(arguments, 9, 27, alpha=alpha, lengths=torch.arange(20, device=DEVICE) % 3)


def test_tiles_past_the_length():
    arguments, alpha = unit(16, 300, items=1)
    compare(arguments, 3, 9, alpha=alpha, lengths=torch.tensor([20], device=DEVICE))


@pytest.mark.parametrize("kind", module.TILES)
def test_every_tile(kind, monkeypatch, products_in_order):
    arguments, alpha = unit(
        50 if kind == "unaligned" else 96, 70, torch.float16 if kind == "half" else torch.float32
    )
    tf32, made = kind == "tf32", []
    products = kind if kind in PRODUCTS else "ieee"
    options = {"alpha": alpha, "products": products}
    for tile in range(len(module.TILES[kind])):
        choice = lambda op, x, shape, configs, run, tile=tile: configs[tile]  # noqa: E731
        monkeypatch.setattr(module, "tuned", choice)
        made += [compare(arguments, 3, 9, dtype=torch.float16 if tf32 else None, **options)]
    # what `launch.tuned` asks for
    assert all(torch.equal(a, b) for outputs in made[1:] for a, b in zip(outputs, made[0]))


def test_registered():
    arguments, alpha = unit(16, 20)
    lengths = torch.tensor([5, 20], device=DEVICE)
    torch.library.opcheck(_residual_unit, (*arguments, alpha, lengths, 3, 9, True, "ieee"))
    torch.library.opcheck(_residual_unit, (*arguments, None, None, 3, 0, True, "ieee"))
    compiled = torch.compile(residual_unit, fullgraph=True, backend="aot_eager")
    outputs = residual_unit(*arguments, 1, 3, alpha=alpha)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments, 1, 3, alpha=alpha), outputs))


def test_refusals_name_the_value():
    arguments, alpha = unit(16, 20)
    assert residual_unit_unsupported(*arguments, 3, 9, alpha=alpha) is None
    assert "padding 8" in residual_unit_unsupported(*arguments, 3, 8)
    assert "no output" in residual_unit_unsupported(*arguments, 3, 9, keep=False)
    assert "accepted: ieee, tf32" in residual_unit_unsupported(*arguments, 3, 9, products="tf32x3")
    assert "2 x -34 output" in residual_unit_unsupported(*arguments, 9, 0)
    x, snaked, *weights = arguments
    reason = residual_unit_unsupported(x, snaked[..., :10], *weights, 3, 9)
    assert "snaked has shape (2, 16, 10)" in reason
    wide = torch.zeros(1, 256, 8, device=DEVICE)
    assert "256 channels; accepted: up to 192" in residual_unit_unsupported(
        wide, wide, *arguments[2:], 3, 9
    )
    with pytest.raises(ValueError, match="alpha is torch.float16"):
        residual_unit(*arguments, 3, 9, alpha=alpha.half())


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 96, 128, 192])
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"], ids=str)
def test_real_sizes(channels, dtype):
    products, dtype = (dtype, torch.float32) if dtype in PRODUCTS else ("ieee", dtype)
    arguments, alpha = unit(channels, 20_001, dtype)
    for dilation in (1, 9):
        lengths = torch.tensor([333, 20_001], device=DEVICE)
        options = {"alpha": alpha, "lengths": lengths, "products": products}
        bound = torch.float16 if products == "tf32" else None
        compare(arguments, dilation, 3 * dilation, dtype=bound, **options)


@pytest.mark.gpu
def test_graph_capture():
    arguments, alpha = unit(96, 4096, torch.float16)
    run = lambda: residual_unit(*arguments, 3, 9, alpha=alpha)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    arguments[0].mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, run()))

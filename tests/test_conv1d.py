"""dac_kernels.conv1d against float64, on a GPU or in Triton's interpreter."""

import pytest
import torch
from dac_kernels import conv1d as module
from dac_kernels.conv1d import (
    _conv1d,
    conv1d,
    conv1d_unsupported,
    conv_transpose1d,
    conv_transpose1d_unsupported,
)
from dac_kernels.tiles import PRODUCTS
from device import DEVICE
from tolerances import assert_as_good_as

from dac_fast.ops import reference

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def innermost(tensor, axis=1):
    """The same values with that axis innermost in memory."""
    return tensor.movedim(axis, -1).contiguous().movedim(-1, axis)


def make(*shapes, dtype=torch.float32, seed=0):
    """A normal tensor of each shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def layer(channels, out, kernel, size, transposed=False, items=2, dtype=torch.float32):
    """x, weight and bias with channels innermost, and alpha."""
    shape = (channels, out, kernel) if transposed else (out, channels, kernel)
    x, weight, bias, alpha = make((items, channels, size), shape, (out,), (1, out, 1), dtype=dtype)
    fan_in = 2 * channels if transposed else channels * kernel
    return (
        innermost(x),
        innermost(weight, 0 if transposed else 1) * fan_in**-0.5,
        bias,
        alpha.abs() + 0.1,
    )


def compare(op, *args, dtype=None, **options):
    """Run the op, and check what it gives; returns it."""

    def double(value):
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    actual = {"conv1d": conv1d, "conv_transpose1d": conv_transpose1d}[op](*args, **options)
    same = getattr(reference, op)(*args, **options)
    exact = getattr(reference, op)(
        *map(double, args), **{name: double(value) for name, value in options.items()}
    )
    for a, s, e in zip(actual, same, exact):
        assert (a is None) == (s is None)
        if a is not None:
            assert a.dtype == s.dtype
            # channels innermost, without gaps
            assert a.transpose(1, 2).is_contiguous()
            assert_as_good_as(a, s, e, dtype or args[0].dtype)
    return actual


# in, out, kernel, stride, padding, dilation, size
LAYERS = {
    "dilation 1": (24, 40, 7, 1, 3, 1, 63),
    "dilation 3": (48, 24, 7, 1, 9, 3, 100),
    "dilation 9": (16, 16, 7, 1, 27, 9, 100),
    "dilation 9, one position": (16, 20, 7, 1, 27, 9, 1),
    "no padding": (16, 16, 7, 1, 0, 3, 40),
    "stride 2": (16, 32, 4, 2, 1, 1, 100),
    "stride 4": (24, 48, 8, 4, 2, 1, 63),
    "stride 5": (8, 16, 10, 5, 3, 1, 100),
    "stride 8": (16, 32, 16, 8, 4, 1, 100),
    "kernel 1": (40, 24, 1, 1, 0, 1, 1),
    "kernel 3": (80, 72, 3, 1, 1, 1, 7),
    "one channel in": (1, 16, 7, 1, 3, 1, 63),
    "one channel out": (24, 1, 7, 1, 3, 1, 130),
    "two channels in": (2, 16, 7, 1, 3, 1, 63),
    "two channels out": (24, 2, 7, 1, 3, 1, 130),
}


# every kind in float32, every third one in each half precision
KINDS = [(name, DTYPES[0]) for name in LAYERS] + [
    (name, DTYPES[1 + i % 3]) for i, name in enumerate(LAYERS) if i % 3 < 2
]


@pytest.mark.parametrize(("name", "dtype"), KINDS, ids=str)
def test_every_kind_of_layer(name, dtype):
    channels, out, kernel, stride, padding, dilation, size = LAYERS[name]
    x, weight, bias, alpha = layer(channels, out, kernel, size, dtype=dtype)
    time = module.output_length(size, kernel, stride, padding, dilation, False)
    (residual,) = make((2, out, time), dtype=dtype, seed=1)
    lengths = torch.tensor([(time + 2) // 3, time], device=DEVICE)
    geometry = stride, padding, dilation
    options = {"alpha": alpha, "residual": innermost(residual), "lengths": lengths}
    compare("conv1d", x, weight, bias, *geometry, **options)
    options = {"alpha": alpha.float(), "lengths": lengths, "tanh": True}
    y, snaked = compare("conv1d", x, weight, bias.float(), *geometry, **options)
    assert y.dtype == snaked.dtype == torch.float32
    # Nor were they rounded on the way.
    assert dtype == torch.float32 or (y != y.to(dtype).float()).any()
    past = slice((time + 2) // 3, None)
    assert not y[0, :, past].any()
    assert not snaked[0, :, past].any()


@pytest.mark.parametrize(
    ("stride", "dtype"), [*zip((2, 4, 5, 8), DTYPES * 2), (8, torch.float16)], ids=str
)
def test_transposed(stride, dtype):
    for channels, out, padding, size in (
        (40, 24, -(-stride // 2), 9),
        (16, 1, 0, 1),
        (16, 48, -(-stride // 2), 17),
    ):
        x, weight, bias, alpha = layer(channels, out, 2 * stride, size, True, dtype=dtype)
        lengths = torch.tensor([stride + 1, 2 * stride], device=DEVICE)
        y, _ = compare(
            "conv_transpose1d", x, weight, bias, stride, padding, alpha=alpha, lengths=lengths
        )
        assert not y[0, :, stride + 1 :].any()
        compare(
            "conv_transpose1d",
            x,
            innermost(weight),
            bias.float(),
            stride,
            padding,
            alpha=alpha,
            keep=False,
        )


def test_any_strides():
    x, weight, bias, alpha = layer(16, 16, 7, 50)
    (residual,) = make((2, 16, 32), seed=1)
    wide, _ = make((4, 16, 120), (1,), seed=2)
    # as published, out innermost, every other element, one item for all
    weights = (weight.contiguous(), innermost(weight, 0), weight.repeat_interleave(2, 1)[:, ::2])
    inputs = (
        x.contiguous(),
        innermost(wide)[::2, :, 7:57],
        wide[:2, :, ::2][..., :50],
        x[:1].expand(2, -1, -1),
    )
    residuals = (
        residual,
        innermost(wide)[1:3, :, 9:41],
        wide[:2, :, 3:35],
        residual[:1].expand(2, -1, -1),
    )
    for values in inputs:
        compare("conv1d", values, weight, bias, 1, 0, 3, residual=residual)
    for values in weights:
        compare("conv1d", x, values, bias, 1, 0, 3, alpha=alpha)
        compare("conv1d", x, values, bias, 1, 3, 1, alpha=alpha)
        compare("conv_transpose1d", x, values[..., :4], bias, 2, 1)
    for values in residuals:
        compare("conv1d", x, weight, bias, 1, 0, 3, residual=values)
    alpha = alpha.repeat_interleave(2, 1)[:, ::2]
    compare("conv1d", x, weight, bias[:1].expand(16), 1, 0, 3, alpha=alpha)


def test_outputs_that_are_wanted():
    x, weight, bias, alpha = layer(16, 24, 7, 40, dtype=torch.float16)
    y, snaked = conv1d(x, weight, bias, 1, 3, alpha=alpha)
    alone, none = conv1d(x, weight, bias, 1, 3)
    assert torch.equal(alone, y)
    assert none is None
    none, alone = conv1d(x, weight, bias, 1, 3, alpha=alpha, keep=False)
    assert torch.equal(alone, snaked)
    assert none is None
    assert conv1d(x[:0], weight, bias, 1, 3)[0].shape == (0, 24, 40)


def test_short_items_share_a_tile():
    x, weight, bias, alpha = layer(16, 24, 7, 2, items=70)
    lengths = torch.arange(70, device=DEVICE) % 3
    compare("conv1d", x, weight, bias, 1, 3, alpha=alpha, lengths=lengths)
    x, weight, bias, alpha = layer(16, 24, 10, 2, True, items=70)
    compare("conv_transpose1d", x, weight, bias, 5, 3, alpha=alpha, lengths=5 * lengths)


def test_tiles_past_the_length():
    x, weight, bias, alpha = layer(16, 24, 4, 300, items=1)
    lengths = torch.tensor([20], device=DEVICE)
    compare("conv1d", x, weight, bias, alpha=alpha, lengths=lengths)
    x, weight, bias, alpha = layer(16, 24, 4, 300, True, items=1)
    compare("conv_transpose1d", x, weight, bias, 2, 1, alpha=alpha, lengths=lengths)


def test_more_than_one_group_of_tiles():
    x, weight, bias, _ = layer(8, 70, 1, 1200, items=1)
    compare("conv1d", x, weight, bias)


@pytest.mark.parametrize(
    ("kind", "few"),
    [*((kind, False) for kind in module.TILES), *((kind, True) for kind in module.FEW)],
)
def test_every_tile(kind, few, monkeypatch, products_in_order):
    dtype = torch.float16 if kind == "half" else torch.float32
    # wide enough that no tile is narrowed
    channels = 50 if kind == "unaligned" else 144 if few else 48
    items, size = (1, 20) if few else (2, 70)
    x, weight, bias, alpha = layer(channels, 144, 1, size, items=items, dtype=dtype)
    # one result, which all tiles can give
    products = kind if kind in PRODUCTS else "ieee"
    options = {"alpha": alpha, "keep": False, "products": products}
    made = []
    for tile in range(len((module.FEW if few else module.TILES)[kind])):
        choice = lambda op, x, shape, configs, run, tile=tile: configs[tile]  # noqa: E731
        monkeypatch.setattr(module, "tuned", choice)
        bound = torch.float16 if kind == "tf32" else None
        made.append(compare("conv1d", x, weight, bias, dtype=bound, **options)[1])
    # what `launch.tuned` asks for
    assert all(torch.equal(snaked, made[0]) for snaked in made[1:])


def test_tiles_of_three_products_have_one_length():
    """Triton adds those of a block by themselves, so that its length is part of their order."""
    tiles = module.TILES["tf32x3"] + module.FEW["tf32x3"]
    assert {length for _, _, length, _, _ in tiles} == {32}


def test_few_rows_share_no_choice_with_more(monkeypatch):
    """Their tiles differ, so what was fastest for one says nothing about the other."""
    asked = []

    def choice(op, x, shape, configs, run):
        asked.append((shape, configs))
        return configs[0]

    monkeypatch.setattr(module, "tuned", choice)
    for rows in (module.FEW_ROWS, module.FEW_ROWS + 1):
        x, weight, bias, _ = layer(16, 16, 1, rows, items=1, dtype=torch.float16)
        conv1d(x, weight, bias)
    (few, tiles), (more, other_tiles) = asked
    assert tiles != other_tiles
    assert few != more


@pytest.mark.parametrize("transposed", [False, True])
def test_an_item_has_its_bits_in_any_batch_and_piece(transposed, monkeypatch, products_in_order):
    """By every tile: alone, in a batch, ragged, and what a piece of it determines."""
    x, weight, bias, alpha = layer(16, 40, 4 if transposed else 7, 70, transposed, items=3)
    op = conv_transpose1d if transposed else conv1d
    where, sizes = ((2, 1), (140, 60)) if transposed else ((1, 3), (70, 30))
    lengths, batches = torch.tensor([sizes[0], 9, sizes[1]], device=DEVICE), []
    for tile in range(len(module.TILES["ieee"])):
        choice = lambda op, x, shape, configs, run, tile=tile: configs[tile]  # noqa: E731
        monkeypatch.setattr(module, "tuned", choice)
        batch = op(x, weight, bias, *where, alpha=alpha)[1]
        batches.append(batch)
        assert torch.equal(batch, batches[0])
        assert torch.equal(op(x[1:2], weight, bias, *where, alpha=alpha)[1], batch[1:2])
        ragged = op(x, weight, bias, *where, alpha=alpha, lengths=lengths)[1]
        for item, length in enumerate(lengths):
            assert torch.equal(ragged[item, :, :length], batch[item, :, :length])
        scale = sizes[0] // 70
        piece = op(innermost(x[..., 20:50]), weight, bias, *where, alpha=alpha)[1]
        assert torch.equal(piece[..., 4 * scale : 26 * scale], batch[..., 24 * scale : 46 * scale])


def test_offsets_beyond_32_bits():
    """Two items 2^31 elements apart; the memory between them is never touched."""
    torch.use_deterministic_algorithms(False)
    far = torch.empty(2**31 + 512, dtype=torch.float16, device=DEVICE).as_strided(
        (2, 16, 32), (2**31, 1, 16)
    )
    x, weight, bias, _ = layer(16, 16, 7, 32, dtype=torch.float16)
    far.copy_(x)
    assert torch.equal(conv1d(far, weight, bias, 1, 3)[0], conv1d(x, weight, bias, 1, 3)[0])
    assert torch.equal(
        conv1d(x, weight, bias, 1, 3, residual=far)[0], conv1d(x, weight, bias, 1, 3, residual=x)[0]
    )  # fmt: skip


def test_not_a_number_stays_in_its_item_and_passes():
    x, weight, bias, alpha = layer(16, 16, 7, 40)
    x[0, 3, 20] = float("nan")
    x[1, 0, 0] = float("inf")
    y, snaked = conv1d(x, weight, bias, 1, 3, alpha=alpha, tanh=True)
    for values in (y, snaked):
        assert values[0, :, 17:24].isnan().all()
        assert values[0, :, :17].isfinite().all()
        assert values[1, :, 4:].isfinite().all()
    assert (y[1, :, :4].abs() == 1).all()


def test_registered():
    x, weight, bias, alpha = layer(16, 24, 7, 20)
    lengths = torch.tensor([5, 20], device=DEVICE)
    torch.library.opcheck(
        _conv1d, (x, weight, bias, alpha, None, lengths, 1, 3, 1, False, False, True, "ieee")
    )
    torch.library.opcheck(
        _conv1d, (x, weight, bias, None, None, None, 2, 3, 1, False, True, True, "ieee")
    )
    x, weight, bias, alpha = layer(16, 24, 10, 20, True)
    torch.library.opcheck(
        _conv1d, (x, weight, bias, alpha, None, None, 5, 3, 1, True, False, False, "ieee")
    )
    compiled = torch.compile(conv_transpose1d, fullgraph=True, backend="aot_eager")
    outputs = conv_transpose1d(x, weight, bias, 5, 3, alpha=alpha)
    assert all(
        torch.equal(a, b) for a, b in zip(compiled(x, weight, bias, 5, 3, alpha=alpha), outputs)
    )


def test_refusals_name_the_value():
    x, weight, bias, alpha = layer(16, 24, 7, 20)
    assert conv1d_unsupported(x, weight, bias, 1, 3, alpha=alpha) is None
    assert "float64" in conv1d_unsupported(x.double(), weight, bias)
    assert "weight has shape (24, 16, 7); accepted: (24, 8, 7)" in conv1d_unsupported(
        x[:, :8], weight, bias
    )
    assert "bias is torch.float16; accepted: torch.float32" in conv1d_unsupported(
        x, weight, bias.half()
    )
    assert "weight is torch.float16" in conv1d_unsupported(x, weight.half(), bias)
    assert "no output" in conv1d_unsupported(x, weight, bias, keep=False)
    assert "2 x 0 output" in conv1d_unsupported(x[..., :6], weight, bias)
    assert "residual has shape" in conv1d_unsupported(x, weight, bias, residual=x)
    assert "lengths is torch.int32; accepted: torch.int64" in conv1d_unsupported(
        x, weight, bias, lengths=torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    )
    assert "gradient" in conv1d_unsupported(x, weight.clone().requires_grad_(), bias)
    assert "kernel of 7 at stride 4; accepted: 8" in conv_transpose1d_unsupported(
        x, weight.transpose(0, 1), bias, 4
    )
    with pytest.raises(ValueError, match="alpha has shape"):
        conv1d(x, weight, bias, alpha=alpha[0])
    with pytest.raises(ValueError, match="products is 'fp8'; accepted: ieee, tf32, tf32x3"):
        conv1d(x, weight, bias, products="fp8")


# The 44.1 kHz model: channels in, out, kernel, stride, padding, dilation, size of one second.
REAL = [
    (1, 64, 7, 1, 3, 1, 44_100), (64, 128, 4, 2, 1, 1, 44_100), (512, 1024, 16, 8, 4, 1, 690),
    (1024, 1536, 7, 1, 3, 1, 87), (768, 768, 7, 1, 27, 9, 690), (384, 384, 7, 1, 9, 3, 5_513),
    (96, 96, 7, 1, 3, 1, 44_100), (96, 1, 7, 1, 3, 1, 44_100),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32", "tf32x3"], ids=str)
def test_real_sizes(shape, dtype):
    channels, out, kernel, stride, padding, dilation, size = shape
    products, dtype = (dtype, torch.float32) if dtype in PRODUCTS else ("ieee", dtype)
    x, weight, bias, alpha = layer(channels, out, kernel, size, dtype=dtype)
    time = module.output_length(size, kernel, stride, padding, dilation, False)
    lengths = torch.tensor([time // 3, time], device=DEVICE)
    options = {"alpha": alpha, "lengths": lengths, "products": products}
    bound = torch.float16 if products == "tf32" else None
    compare("conv1d", x, weight, bias, stride, padding, dilation, dtype=bound, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "stride", "size"), [(1536, 8, 87), (768, 8, 689), (384, 4, 5512), (192, 2, 22048)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_sizes_transposed(channels, stride, size, dtype):
    x, weight, bias, alpha = layer(channels, channels // 2, 2 * stride, size, True, dtype=dtype)
    compare("conv_transpose1d", x, weight, bias, stride, stride // 2, alpha=alpha)
    compare("conv_transpose1d", x, innermost(weight), bias, stride, stride // 2, alpha=alpha)


@pytest.mark.gpu
def test_items_of_more_than_2_31_elements():
    torch.use_deterministic_algorithms(False)
    size = 2**31 // 96 + 1000
    x = torch.randn(1, size, 96, device="cuda", dtype=torch.float16).transpose(1, 2)
    _, weight, bias, _ = layer(96, 96, 7, 1, dtype=torch.float16)
    y, _ = conv1d(x, weight, bias, 1, 27, 9)
    for window, inner in ((x[..., :500], slice(0, 400)), (x[..., -500:], slice(100, 500))):
        expected, _ = conv1d(window, weight, bias, 1, 27, 9)
        assert torch.equal(
            y[..., :400] if inner.start == 0 else y[..., -400:], expected[..., inner]
        )


@pytest.mark.gpu
def test_graph_capture():
    x, weight, bias, alpha = layer(96, 96, 7, 4096, dtype=torch.float16)
    run = lambda: conv1d(x, weight, bias, 1, 3, alpha=alpha)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    x.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, run()))

"""The ops of dac_kernels.native against the specification, in float64 and in the same dtype."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from dac_kernels import native
from dac_kernels.native.stft_bands import _edges
from tolerances import assert_as_good_as

from dac_fast.ops import reference

pytestmark = pytest.mark.skipif(
    native.extension is None, reason=f"dac_kernels._C: {native.status()}"
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TRAINING = {"windows": [2048, 1024, 512]}


@contextmanager
def poisoned():
    """New tensors start as NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def flat(nested):
    return [tensor for tensors in nested for tensor in tensors]


def compare(op, spec, leaves):
    """Outputs and gradients of `op` are as close to float64's as those of `spec`, in one dtype."""

    def results(function, dtype):
        inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        outputs = function(*inputs)
        rng = torch.Generator().manual_seed(0)
        grads = [torch.randn(o.shape, generator=rng).to(o.dtype).to(o) for o in outputs]
        return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]

    with poisoned():
        actual = results(op, leaves[0].dtype)
    for a, same, exact in zip(
        actual, results(spec, leaves[0].dtype), results(spec, torch.float64), strict=True
    ):
        assert a.dtype == same.dtype
        if a.numel():
            assert_as_good_as(a.detach(), same.detach(), exact.detach().double())
        assert a.shape == same.shape


# [B, C, T] as a view of a leaf: contiguous, channels last, every other step, part of a longer one.
LAYOUTS = {
    "contiguous": (lambda b, c, t: (b, c, t), lambda x: x),
    "channels_last": (lambda b, c, t: (b, t, c), lambda x: x.transpose(1, 2)),
    "strided": (lambda b, c, t: (b, c, 2 * t), lambda x: x[..., ::2]),
    "narrowed": (lambda b, c, t: (b, c, t + 5), lambda x: x[..., 2:-3]),
    "permuted": (lambda b, c, t: (t, c, b), lambda x: x.permute(2, 1, 0)),
}


@pytest.mark.parametrize(
    "shape", [(2, 40, 1), (3, 5, 63), (2, 3, 1000), (1, 600, 3), (2, 2, 40000)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_snake(layout, shape, dtype):
    torch.manual_seed(0)
    leaf_shape, view = LAYOUTS[layout]
    x = 3 * torch.randn(leaf_shape(*shape), dtype=dtype)
    alpha = torch.rand(1, shape[1], 1, dtype=dtype) + 0.1
    compare(
        lambda x, a: [native.snake(view(x), a)],
        lambda x, a: [reference.snake(view(x), a)],
        [x, alpha],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_snake_beside_bfloat16(layout, dtype):
    """Its result is rounded too, and gradients come and go in bfloat16, as if they were not."""
    torch.manual_seed(0)
    leaf_shape, view = LAYOUTS[layout]
    x = view(3 * torch.randn(leaf_shape(2, 40, 63), dtype=dtype))
    alpha = torch.rand(1, 40, 1) + 0.1
    with poisoned():
        y, rounded = native.snake_rounded(x, alpha, torch.bfloat16)
        itself, same = native.snake_rounded(x, alpha, dtype)
    assert torch.equal(y, native.snake(x, alpha))
    assert torch.equal(rounded, y.bfloat16())
    assert rounded.stride() == y.stride()
    assert itself is same
    assert torch.equal(itself, y)

    leaves = x.detach().clone().requires_grad_(), alpha.clone().requires_grad_()
    for given in {dtype, torch.bfloat16}:
        grad = torch.randn(x.shape).to(given)
        wanted = torch.autograd.grad(native.snake(*leaves), leaves, grad.to(dtype))
        for into in {dtype, given}:
            with poisoned():
                grad_x, grad_alpha = native.snake_gradients(grad, x, alpha, into)
            assert torch.equal(grad_x, wanted[0].to(into))
            torch.testing.assert_close(grad_alpha, wanted[1], rtol=1e-5, atol=1e-4)


def test_what_does_not_go_beside_bfloat16_is_refused():
    x, alpha = torch.randn(2, 3, 5), torch.ones(1, 3, 1)
    grad = torch.randn(2, 3, 5).bfloat16()
    with pytest.raises(RuntimeError, match="dtype is torch.float64, not torch.float32 or"):
        native.snake_rounded(x.double(), alpha.double(), torch.bfloat16)
    with pytest.raises(RuntimeError, match="float32 is not rounded to torch.float16, but to"):
        native.snake_rounded(x, alpha, torch.float16)
    with pytest.raises(RuntimeError, match=r"float32 \[2, 3, 5\] on cpu, not torch.bfloat16"):
        native.snake_gradients(x, x.bfloat16(), alpha, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"\[2, 3, 4\] on cpu, not .* \[2, 3, 5\]"):
        native.snake_gradients(grad[..., 1:], x, alpha, torch.float32)
    with pytest.raises(RuntimeError, match="to be torch.float16, not torch.float32 or"):
        native.snake_gradients(grad, x, alpha, torch.float16)
    with pytest.raises(RuntimeError, match="to be torch.bfloat16, not torch.float32 or"):
        native.snake_gradients(x, x, alpha, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"not \[B, C, T\] and \[1, C, 1\]"):
        native.snake_gradients(grad, x, alpha[:, :2], torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_snake_beta(layout, dtype):
    torch.manual_seed(0)
    leaf_shape, view = LAYOUTS[layout]
    x = view(3 * torch.randn(leaf_shape(2, 40, 63), dtype=dtype))
    scales = [torch.randn(1, 40, 1, dtype=dtype) for _ in range(2)]
    for log_scale in (False, True):
        alpha, beta = scales if log_scale else [scale.abs() + 0.1 for scale in scales]
        same = reference.snake_beta(x, alpha, beta, log_scale)
        exact = reference.snake_beta(x.double(), alpha.double(), beta.double(), log_scale)
        assert_as_good_as(native.snake_beta(x, alpha, beta, log_scale), same, exact)
    with pytest.raises(RuntimeError, match="snake_beta cannot run: it computes no gradients"):
        native.snake_beta(x.clone().requires_grad_(), alpha, beta)


def test_snake_of_extreme_values():
    """Past the polynomial's range, for infinities, NaN and alphas near zero: as PyTorch."""
    x = torch.tensor(
        [
            0.0,
            -0.0,
            1e-30,
            1e4,
            24999.0,
            25001.0,
            -3e6,
            1e20,
            3e38,
            torch.inf,
            -torch.inf,
            torch.nan,
        ]
    )
    x = torch.cat([x, torch.linspace(-3e4, 3e4, 5000)]).expand(1, 5, -1)
    alpha = torch.tensor([1.0, 0.0, -1e-9, 1e-6, -7.5]).view(1, 5, 1)
    expected = reference.snake(x, alpha)
    for layout in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        actual = native.snake(layout, alpha)
        assert torch.equal(actual.isnan(), expected.isnan())
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_snake_gradients_past_the_polynomials_range():
    """Each far element counts once in alpha's gradient."""
    x = torch.cat([torch.tensor([25001.0, -3e5, 4e6]), torch.linspace(-9, 9, 600)]).expand(2, 3, -1)
    alpha = torch.tensor([1.5, 0.7, -2.0]).view(1, 3, 1)
    for layout in (x.clone(), x.transpose(1, 2).contiguous().transpose(1, 2)):
        leaves = layout.requires_grad_(), alpha.clone().requires_grad_()
        grad = torch.linspace(-1, 2, x.numel()).view(x.shape)
        actual = torch.autograd.grad(native.snake(*leaves), leaves, grad)
        expected = torch.autograd.grad(reference.snake(*leaves), leaves, grad)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_snake_of_every_16_bit_number(dtype):
    """In and out exactly as PyTorch converts them; alpha may be in float32."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, -1)
    identity, two = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 2.0)
    for alpha in (identity, two, two.to(dtype)):
        expected = reference.snake(numbers.float(), alpha.float()).to(dtype)
        actual = native.snake(numbers, alpha)
        assert actual.dtype == dtype
        assert torch.equal(actual.isnan(), expected.isnan())
        bits = actual.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16)
        # Where sin^2 falls next to a rounding boundary.
        assert int((bits[0].int() - bits[1].int()).abs().max()) <= (0 if alpha is identity else 1)
    x, grad = torch.randn(2, 5, 70).to(dtype).requires_grad_(), torch.randn(2, 5, 70).to(dtype)
    alpha = (torch.rand(1, 5, 1) + 0.5).requires_grad_()
    native.snake(x, alpha).backward(grad)
    assert (x.grad.dtype, alpha.grad.dtype) == (dtype, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (x, alpha)]
    reference.snake(*exact).backward(grad.double())
    torch.testing.assert_close(alpha.grad.double(), exact[1].grad, rtol=1e-4, atol=1e-4)


def test_same_bits_with_any_number_of_threads():
    x, alpha = (
        torch.randn(3, 40, 9000, requires_grad=True),
        torch.rand(1, 40, 1, requires_grad=True),
    )
    audio = torch.randn(5, 20000, requires_grad=True)

    def everything():
        y = native.snake(x, alpha)
        last = native.snake(x.transpose(1, 2).contiguous().transpose(1, 2), alpha)
        spectra = flat(native.stft_bands(native.disc_preprocess(audio), **TRAINING))
        loss = sum(t.square().sum() for t in (y, last, *spectra))
        return [y, last, *spectra, *torch.autograd.grad(loss, (x, alpha, audio))]

    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(everything())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_callers_on_several_threads():
    x, alpha = torch.randn(1, 64, 20000), torch.rand(1, 64, 1)
    expected, wrong = native.snake(x, alpha), []

    def call():
        wrong.extend(1 for _ in range(20) if not torch.equal(native.snake(x, alpha), expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("device", DEVICES)
def test_disc_preprocess_golden(golden, device):
    vectors = np.load(golden / "disc_preprocess.npz")
    x, y = (torch.from_numpy(vectors[name]).to(device) for name in ("x", "y"))
    torch.testing.assert_close(native.disc_preprocess(x), y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 1, 1000), (70001,), (0, 5), (200, 63)], ids=str)
def test_disc_preprocess(shape, device):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device) + 0.3
    if x.numel():
        compare(
            lambda x: [native.disc_preprocess(x)], lambda x: [reference.disc_preprocess(x)], [x]
        )
    assert native.disc_preprocess(x).shape == x.shape


@pytest.mark.parametrize("device", DEVICES)
def test_disc_preprocess_of_ties_silence_and_nan(device):
    """Samples that share the peak share its gradient; a NaN reaches its own signal only."""
    ties = torch.tensor([[3.0, -3.0, 3.0, 0.0, -3.0]], device=device)
    compare(lambda x: [native.disc_preprocess(x)], lambda x: [reference.disc_preprocess(x)], [ties])
    x = torch.tensor([[0.25, 0.25], [torch.nan, 1.0], [torch.inf, 1.0], [2.0, 1.0]], device=device)
    actual, expected = native.disc_preprocess(x), reference.disc_preprocess(x)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_stft_bands_golden(golden, device):
    vectors = np.load(golden / "bands.npz")
    audio = torch.from_numpy(vectors["audio"]).to(device)
    windows = sorted(
        {int(name[1:].split("_")[0]) for name in vectors.files if name.startswith("w")}
    )
    for window, bands in zip(
        windows, native.stft_bands(audio.flatten(0, -2), windows), strict=True
    ):
        for i, band in enumerate(bands):
            expected = torch.from_numpy(vectors[f"w{window}_b{i}"]).to(device)
            torch.testing.assert_close(
                band, expected, rtol=0, atol=2e-6 * expected.abs().max().item()
            )


# Odd T, T no multiple of a hop, T below one window, the shortest T that reflects, many items, one,
# none.
STFT_CASES = [
    (2, 16758, TRAINING),
    (3, 5001, {"windows": [32, 64, 128, 256, 512, 1024, 2048, 4096]}),
    (1, 897, {"windows": [2048]}),
    (2, 449, {"windows": [1024]}),
    (200, 321, {"windows": [64, 32]}),
    (1, 33333, {"windows": [512], "bands": [(0.1, 0.3), (0.3, 0.3), (0.5, 0.9)]}),
    (0, 5001, TRAINING),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize(("items", "samples", "options"), STFT_CASES, ids=str)
def test_stft_bands(items, samples, options, layout, device):
    torch.manual_seed(0)
    # Rows of a longer signal, so not contiguous.
    x = torch.randn(items, samples + 3, device=device)
    compare(
        lambda x: flat(native.stft_bands(x[:, 1:-2], **options, layout=layout)),
        lambda x: flat(reference.stft_bands(x[:, 1:-2], **options, layout=layout)),
        [x],
    )
    actual, expected = (ops.stft_bands(x, **options, layout=layout) for ops in (native, reference))
    assert all(
        a.stride() == e.stride()
        for a, e in zip(flat(actual), flat(expected), strict=True)
        if a.numel()
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_stft_bands_in_bfloat16(layout, device):
    torch.manual_seed(0)
    options = {**TRAINING, "layout": layout, "dtype": torch.bfloat16}
    x = torch.randn(3, 9001, device=device)
    compare(
        lambda x: flat(native.stft_bands(x, **options)),
        lambda x: flat(
            reference.stft_bands(x, **(options if x.dtype == torch.float32 else TRAINING))
        ),
        [x],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_stft_bands_at_odd_addresses(dtype, layout, device):
    """Gradients that are parts of a longer tensor, as those of a concatenation."""
    x = torch.randn(2, 500, device=device, requires_grad=True)
    bands = flat(native.stft_bands(x, [64, 32], layout=layout, dtype=dtype))
    grads = [torch.randn_like(band) for band in bands]
    parts = [g.new_empty(g.numel() + 1)[1:].as_strided(g.shape, g.stride()) for g in grads]
    for part, grad in zip(parts, grads):
        part.copy_(grad)
    (expected,) = torch.autograd.grad(bands, x, grads, retain_graph=True)
    assert torch.equal(torch.autograd.grad(bands, x, parts)[0], expected)


def test_stft_bands_refuses():
    with pytest.raises(
        ValueError, match="800 samples are too few for a window of 2048: at least 993"
    ):
        native.stft_bands(torch.zeros(1, 800), [512, 2048])
    with pytest.raises(
        ValueError, match="layout is 'last'; accepted: channels_first, channels_last"
    ):
        native.stft_bands(torch.zeros(1, 5000), [512], layout="last")
    assert "powers of two" in native.stft_bands_unsupported(torch.zeros(1, 5000), [600])
    assert "overlap" in native.stft_bands_unsupported(
        torch.zeros(1, 5000), [512], [(0, 0.5), (0.4, 1)]
    )
    assert "float16" in native.stft_bands_unsupported(
        torch.zeros(1, 5000), [512], dtype=torch.float16
    )
    assert "shapes [2, 3, 4] and [3]" in native.snake_unsupported(
        torch.zeros(2, 3, 4), torch.ones(3)
    )
    with pytest.raises(RuntimeError, match="native snake cannot run: the dtype is torch.int64"):
        native.snake(torch.zeros(2, 3, 4).long(), torch.ones(1, 3, 1).long())


@pytest.mark.parametrize("ops", [native, reference], ids=["native", "reference"])
@pytest.mark.parametrize("band", [0.5, (0.5,), (0.1, 0.2, 0.3), ("0", "1"), (None, 1), (0, np.nan)])
def test_a_band_is_two_numbers(ops, band):
    with pytest.raises(ValueError, match="a band is .*; accepted: two fractions of the spectrum"):
        ops.stft_bands(torch.zeros(1, 5000), [512], [band])


def test_the_longest_signal():
    """Beyond 2^30 samples positions would not be ints; csrc's own test is in native_main.cpp."""
    one = torch.zeros(1)
    assert native.stft_bands_unsupported(one.expand(1, 2**30), [512]) is None
    for items, samples in ((1, 2**30 + 1), (1, 2**31 - 2), (0, 2**31 - 2), (4, 2**30)):
        reason = native.stft_bands_unsupported(one.expand(items, samples), [512])
        assert f"there are {items} x {samples} samples; accepted: up to 1073741824 each" in reason
        with pytest.raises(RuntimeError, match="native stft_bands cannot run"):
            native.stft_bands(one.expand(items, samples), [512])


X, ALPHA, EDGES = torch.zeros(2, 3, 50), torch.ones(1, 3, 1), _edges([32], native.BANDS)
BAND_GRADS = [torch.zeros(2, 2, 7, high - low) for low, high in zip(EDGES[::2], EDGES[1::2])]


@pytest.mark.parametrize(
    ("op", "arguments", "reason"),
    [
        ("snake", [X, ALPHA[:, :2]], "shapes"),
        ("snake", [X, ALPHA.double()], "alpha is torch.float64 on cpu, not torch.float32 on cpu"),
        ("snake", [X, ALPHA.to("meta")], "alpha is torch.float32 on meta"),
        ("snake", [X.int(), ALPHA.int()], "the dtype is torch.int32"),
        ("snake", [X.to("meta"), ALPHA.to("meta")], "the tensor is on meta"),
        ("snake_backward", [X[..., :1], X, ALPHA], "gradient has shape"),
        ("disc_preprocess", [torch.zeros(2, 0)], "no samples"),
        ("disc_preprocess_backward", [X[:1], X, torch.zeros(2, 3, 2)], "gradient has shape"),
        ("disc_preprocess_backward", [X, X, torch.zeros(2, 3)], "levels has shape"),
        ("stft_bands", [X[0], [32], EDGES[:-1], False, torch.float32], "there are 4 bands"),
        ("stft_bands", [X[0], [32], [*EDGES[:-1], 18], False, torch.float32], "leave the spectrum"),
        ("stft_bands", [X[0], [], [], False, torch.float32], "the windows are"),
        ("stft_bands", [X[0], [64], EDGES, False, torch.float16], "outputs of torch.float16"),
        ("stft_bands", [X[0, :, :13], [64], EDGES, False, torch.float32], "too few for a window"),
        ("stft_bands_backward", [[], 50, [32], EDGES, False, torch.float32], "gradients are"),
        (
            "stft_bands_backward",
            [BAND_GRADS[:4], 50, [32], EDGES, False, torch.float32],
            "there are 4 gradients for 5 bands",
        ),
        (
            "stft_bands_backward",
            [BAND_GRADS, 60, [32], EDGES, False, torch.float32],
            "a gradient has shape",
        ),
    ],
)
def test_registered_ops_check_their_arguments(op, arguments, reason):
    """Whoever calls them: these crashed the interpreter, or gave memory that nobody had written."""
    with pytest.raises((RuntimeError, ValueError), match=reason):
        getattr(torch.ops.dac_native, op)(*arguments)


def test_gradients_numerically():
    torch.manual_seed(0)
    x = torch.randn(2, 75, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(1, 3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: native.snake(x.view(2, 3, 25), a), (x, alpha))
    assert torch.autograd.gradcheck(native.disc_preprocess, (x,))
    assert torch.autograd.gradcheck(lambda x: tuple(flat(native.stft_bands(x, [32, 64]))), (x,))


@pytest.mark.parametrize("device", DEVICES)
def test_registration(device):
    ops, x = torch.ops.dac_native, torch.randn(2, 300, device=device, requires_grad=True)
    torch.library.opcheck(ops.disc_preprocess.default, (x,))
    for channels_last in (False, True):
        edges = _edges([32, 64], native.BANDS)
        torch.library.opcheck(
            ops.stft_bands.default, (x, [32, 64], edges, channels_last, torch.float32)
        )
    if device == "cpu":
        x, alpha = (
            torch.randn(2, 3, 17, requires_grad=True),
            torch.rand(1, 3, 1, requires_grad=True),
        )
        torch.library.opcheck(ops.snake.default, (x, alpha))
        torch.library.opcheck(
            ops.snake.default, (torch.randn(2, 17, 3, requires_grad=True).transpose(1, 2), alpha)
        )


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device):
    def loss(ops, x):
        bands = flat(ops.stft_bands(ops.disc_preprocess(x), [32, 64], layout="channels_last"))
        total = sum(band.square().mean() for band in bands)
        if device == "cpu":
            total = total + ops.snake(x.view(2, 3, 100), torch.ones(1, 3, 1)).sum()
        return total

    x = torch.randn(2, 300, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: loss(native, x), fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x), loss(reference, x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x), torch.autograd.grad(expected, x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a CUDA device")
def test_without_a_gpu():
    """The CUDA half imports, and says in one line why it cannot run."""
    if not native.extension.cuda_architectures:
        assert "no CUDA ops: install again with nvcc on PATH" in native.status()
        return
    assert "cannot run here" in native.status()
    with pytest.raises(RuntimeError, match=r"^disc_preprocess: .*(driver|device)"):
        native.extension.disc_preprocess_forward_cuda_float32(
            native.extension.Signals(1, 8, 8, 8), 0, 0, 0, 0, 0, 0
        )


# 144 signals of 0.38 s.
SIGNALS = (144, 16758)


@pytest.mark.gpu
def test_stft_bands_of_the_training_size():
    """Equal bits every time, on any stream."""
    x = torch.randn(SIGNALS, device="cuda", requires_grad=True)
    outputs = flat(native.stft_bands(native.disc_preprocess(x), **TRAINING))
    (grad,) = torch.autograd.grad(outputs, x, [torch.ones_like(o) for o in outputs])
    expected = flat(
        reference.stft_bands(reference.disc_preprocess(x.detach().double()), **TRAINING)
    )
    for actual, exact in zip(outputs, expected, strict=True):
        assert (actual - exact).abs().max() <= 4e-6 * exact.abs().max()
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        torch.cuda.synchronize()
        again = flat(native.stft_bands(native.disc_preprocess(x), **TRAINING))
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    repeated = flat(native.stft_bands(native.disc_preprocess(x), **TRAINING))
    assert torch.equal(
        grad, torch.autograd.grad(repeated, x, [torch.ones_like(o) for o in repeated])[0]
    )


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_of_the_training_size():
    """Its replay has the bits of a call. (Under compute-sanitizer nothing can be captured.)"""
    x = torch.randn(SIGNALS, device="cuda")
    expected = flat(native.stft_bands(native.disc_preprocess(x), **TRAINING))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(native.stft_bands(native.disc_preprocess(x), **TRAINING))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))

"""Training on a CPU: gradients of convolutions, and what has to stay in float32 beside bfloat16."""

import copy
from importlib import resources
from unittest import mock

import pytest
import soundfile
import torch
import torch.nn.functional as F
from dac_kernels import native
from tolerances import MINIMAL_FILTERING, assert_as_good_as
from torch.utils._python_dispatch import TorchDispatchMode

from dac_fast import ops
from dac_fast.codec import load
from dac_fast.model import channels_last
from dac_fast.model.channels_last import set_channels_last
from dac_fast.model.layers import (
    Chain,
    Conv1d,
    ConvTranspose1d,
    ResidualUnit,
    Snake,
    WeightNorm,
    set_gradients,
)
from dac_fast.training import load_recipe
from dac_fast.training.step import TrainingStep
from dac_fast.training.trainer import default_precision

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    native.extension is None, reason=f"dac_kernels._C: {native.status()}"
)


class Operators(TorchDispatchMode):
    """Keeps the operators' names, and in which dtype convolutions compute which gradients."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes, self.of_weights = [], [], []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.overloadpacket.__name__)
        if operator.overloadpacket is torch.ops.aten.convolution_backward:
            self.dtypes.append(args[0].dtype)
            self.of_weights.append(args[-1][1])
        return operator(*args, **(kwargs or {}))


# What a gradient's error may be, as a share of its norm. In bfloat16 each product is of two rounded
# factors, and their sum is rounded once more.
ROUNDING = {torch.bfloat16: (1e-4, 6e-3), torch.float32: (0, 1e-6)}


@needs_native
@pytest.mark.parametrize("name", ["conv1d", "conv_transpose1d"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_gradients_alone_are_in_that_dtype(name, bias, dtype):
    shapes = {"conv1d": (6, 4, 5), "conv_transpose1d": (4, 6, 5)}
    generator = torch.Generator().manual_seed(0)
    x, weight, biases = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((2, 4, 50), shapes[name], (6,))
    )
    given = (x, weight, biases) if bias else (x, weight)
    stride, padding, dilation, extra = 2, 3, 2, 1
    sizes = {
        "conv1d": (stride, padding, dilation),
        "conv_transpose1d": (stride, padding, extra, 1, dilation),
    }[name]
    convolve = getattr(channels_last, name)
    actual = convolve(x, weight, biases if bias else None, *sizes, gradients=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = getattr(F, name)(wide[0], wide[1], wide[2] if bias else None, *sizes)
    assert torch.equal(actual, convolve(x, weight, biases if bias else None, *sizes))

    grad = torch.randn(actual.shape, generator=generator)
    ours = torch.autograd.grad(actual, given, grad)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    low, high = ROUNDING[dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert low <= (a - b).norm() / b.norm() < high


def pair(layer):
    """Snake and a convolution behind it, which it trains with in one step of autograd."""
    channels = layer.weight_v.shape[0 if isinstance(layer, ConvTranspose1d) else 1]
    return Chain(Snake(channels), layer)


FUSED = {
    "unit": lambda: ResidualUnit(6, 3, "snake"),
    "strided": lambda: pair(Conv1d(6, 10, 8, stride=4, padding=2)),
    "transposed": lambda: pair(ConvTranspose1d(6, 4, 3, padding=2)),
}


@needs_native
@pytest.mark.parametrize(
    ("dtype", "gradients"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
    ],
)
@pytest.mark.parametrize("name", FUSED)
def test_snake_and_convolutions_are_one_step_of_autograd(name, dtype, gradients):
    torch.manual_seed(0)
    layers = FUSED[name]()
    for snake in layers.modules():
        if isinstance(snake, Snake):
            torch.nn.init.uniform_(snake.alpha, 0.5, 2)
    wide = copy.deepcopy(layers).double()
    set_channels_last(layers)
    if gradients:
        # What is in bfloat16 itself needs no word.
        set_gradients(layers, gradients)
    leaf = torch.randn(2, 41, 6).to(dtype)

    def results(layers, dtype):
        x = leaf.to(dtype).transpose(1, 2).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layers(x)
        torch.manual_seed(1)
        grad = torch.randn(y.shape).to(dtype)
        return [y, *torch.autograd.grad(y, [x, *layers.parameters()], grad)]

    actual = results(layers, dtype)
    with ops.use_backend("reference"):
        plain = results(layers, dtype)
    assert type(actual[0].grad_fn).__name__ == "_ActivatedBackward"
    assert type(plain[0].grad_fn).__name__ != "_ActivatedBackward"
    assert actual[0].stride(1) == 1
    for ours, same, exact in zip(actual, plain, results(wide, torch.float64), strict=True):
        assert ours.dtype == same.dtype
        assert_as_good_as(ours.detach(), same.detach(), exact.detach())


@pytest.fixture
def filtered(monkeypatch):
    """What `native.winograd` and its gradients are called with."""
    spies = []
    for name in ("winograd", "winograd_gradients"):
        spies.append(mock.Mock(wraps=getattr(native, name)))
        monkeypatch.setattr(native, name, spies[-1])
    return spies


@needs_native
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_unit_of_enough_channels_is_filtered(dtype, filtered):
    torch.manual_seed(0)
    plain = ResidualUnit(8, 3, "snake")
    set_channels_last(plain)
    unit, wide = copy.deepcopy(plain), copy.deepcopy(plain).double()
    set_gradients(unit, dtype)
    leaf, grad = torch.randn(2, 8, 41), torch.randn(2, 8, 41)

    def results(layers, dtype=torch.float32):
        x = leaf.to(dtype).requires_grad_()
        y = layers(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *layers.parameters()], grad.to(dtype))]

    actual = results(unit)
    assert [spy.call_count for spy in filtered] == [1, int(dtype == torch.float32)]
    compared = list(zip(actual, results(plain), results(wide, torch.float64), strict=True))
    full = compared if dtype == torch.float32 else compared[:1]
    for result in full:
        assert_as_good_as(*result, floor=MINIMAL_FILTERING)
    for ours, _, exact in compared[len(full) :]:
        # Two convolutions, one behind the other, round.
        assert (ours - exact).norm() / exact.norm() < 2 * ROUNDING[dtype][1]


@needs_native
@pytest.mark.parametrize(
    ("name", "channels", "sizes"),
    [
        ("conv1d", (8, 8), {"stride": 2, "padding": 3, "dilation": 1}),
        ("conv1d", (16, 16), {"stride": 1, "padding": 3, "dilation": 1, "groups": 2}),
        ("conv1d", (257, 8), {"stride": 1, "padding": 3, "dilation": 1}),
        ("conv_transpose1d", (8, 8), {"stride": 1, "padding": 3}),
    ],
)
def test_convolutions_of_other_sizes_are_not_filtered(name, channels, sizes, filtered):
    inputs, outputs = channels
    torch.manual_seed(0)
    x = torch.randn(2, inputs, 50).requires_grad_()
    weight = torch.randn(outputs, inputs // sizes.get("groups", 1), 7).requires_grad_()
    actual = getattr(channels_last, name)(x, weight, None, **sizes, gradients=torch.float32)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = getattr(F, name)(*wide, None, **sizes)
    grad = torch.randn(actual.shape)
    ours = torch.autograd.grad(actual, (x, weight), grad)
    for a, b in zip(ours, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert (a - b).norm() / b.norm() < ROUNDING[torch.float32][1]
    assert not any(spy.called for spy in filtered)


@needs_native
def test_layers_with_gradients_of_other_dtypes_are_other_steps():
    torch.manual_seed(0)
    layers = Chain(*(f() for _ in range(2) for f in (lambda: Snake(6), lambda: Conv1d(6, 6, 3))))
    set_channels_last(layers)
    layers[1].gradients, layers[3].gradients = torch.bfloat16, torch.float32
    x = torch.randn(2, 41, 6).transpose(1, 2)
    layers(x).square().sum().backward()
    wide = copy.deepcopy(layers).double()
    wide.zero_grad()
    wide(x.double()).square().sum().backward()
    for layer, exact, (low, high) in (
        (layers[1], wide[1], ROUNDING[torch.bfloat16]),
        (layers[3], wide[3], ROUNDING[torch.float32]),
    ):
        expected = exact.weight_v.grad
        assert low <= (layer.weight_v.grad - expected).norm() / expected.norm() < high


def test_other_layers_train_as_they_did():
    """With PyTorch's gradients, by the reference, folded, or when nothing trains."""
    x = torch.randn(2, 41, 6).transpose(1, 2)
    unit = ResidualUnit(6, 3, "snake")
    set_channels_last(unit)
    ways = [unit(x)]
    set_gradients(unit, torch.bfloat16)
    with ops.use_backend("reference"):
        ways.append(unit(x))
    with torch.no_grad():
        ways.append(unit(x))
    for layer in unit.block[1::2]:
        layer.fold()
    ways.append(unit(x))
    for y in ways:
        assert type(y.grad_fn).__name__ != "_ActivatedBackward"
        torch.testing.assert_close(y, ways[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("how", ["ragged", "unpadded", "compiled"])
def test_ragged_unpadded_and_compiled_layers_train_as_they_did(name, how):
    torch.manual_seed(0)
    layers = FUSED[name]()
    set_channels_last(layers)
    set_gradients(layers, torch.bfloat16)
    x = torch.randn(2, 41, 6).transpose(1, 2)
    run = torch.compile(layers, backend="eager") if how == "compiled" else layers
    given = (torch.tensor([41, 30]),) if how == "ragged" else (None, how != "unpadded")
    y = run(x, *given)
    with ops.use_backend("reference"):
        expected = layers(x, *given)
    assert type(y.grad_fn).__name__ != "_ActivatedBackward"
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_one_channel_leads_to_channels_innermost():
    """Else the first layer's result, and its gradient, would be copied to the other layout."""
    for gradients in (None, torch.bfloat16, torch.float32):
        layer = Conv1d(1, 8, 7, padding=3)
        set_channels_last(layer)
        layer.gradients = gradients
        with Operators() as forward:
            y = layer(torch.randn(2, 1, 50))
        assert y.stride(1) == 1
        assert "clone" not in forward.names


@pytest.fixture(scope="module")
def recording():
    """A second without anything above 4 kHz, and with silence: [1, 1, 44032]."""
    path = resources.files("dac_fast") / "assets" / "tabla_cc0.flac"
    audio, rate = soundfile.read(path, dtype="float32", frames=44032)
    assert rate == 44100
    spectrum = torch.fft.rfft(torch.from_numpy(audio))
    spectrum[4000:] = 0
    low = torch.fft.irfft(spectrum)
    low[20000:32000] = 0
    return low[None, None]


@pytest.fixture(scope="module")
def step():
    """The bundled codec in a step in bfloat16, without discriminators."""
    recipe = load_recipe("tiny_cpu", ["losses.adversarial=0", "losses.feature=0"])
    step = TrainingStep(recipe, CPU, "bf16")
    step.codec.load_state_dict(load("tiny").state_dict())
    return step


def test_no_noise_gets_into_the_audio(step, recording):
    """By a block less in float32, the encoder adds 0.08 to the mel distance, the decoder 0.24."""
    with torch.no_grad():
        full = step.mel_loss(step.codec.eval()(recording)["audio"], recording)
        with step.autocast():
            half = step.mel_loss(step.codec(recording)["audio"], recording)
    assert half.item() == pytest.approx(full.item(), abs=0.05)


def test_rounding_leaves_the_gradient(step, recording):
    """In the audio's gradient silence counts most. Rounded too, it would leave a cosine of 0.6."""
    with torch.no_grad():
        z = step.codec.eval().encode(recording).z

    def gradient():
        latent = z.clone().requires_grad_()
        step.stft_loss(step.codec.decoder(latent), recording).backward()
        return latent.grad.flatten()

    full = gradient()
    with step.autocast():
        half = gradient()
    assert F.cosine_similarity(full, half, dim=0) > 0.8


def test_all_convolutions_but_the_last_compute_gradients_in_bfloat16(step, recording):
    coders = (step.codec.encoder, step.codec.decoder)
    with step.autocast():
        audio = step.codec.decoder(step.codec.encoder(recording))
    with Operators() as backward:
        audio.square().mean().backward()
    count = sum(isinstance(layer, WeightNorm) for coder in coders for layer in coder.modules())
    assert backward.dtypes == [torch.float32, *[torch.bfloat16] * (count - 1)]


@needs_native
def test_a_step_in_float32_leaves_no_weight_gradient_to_onednn():
    """It takes three times as long for them where channels are innermost."""
    recipe = load_recipe("tiny_cpu", ["losses.adversarial=0", "losses.feature=0"])
    step = TrainingStep(recipe, CPU, "fp32")
    audio = step.codec.decoder(step.codec.encoder(torch.randn(1, 1, 2048)))
    with Operators() as backward:
        audio.square().mean().backward()
    assert backward.dtypes
    assert not any(backward.of_weights)


def test_sums_of_residual_units_are_half_but_for_those_near_the_audio(step, recording):
    dtypes = []
    units = [m for m in step.codec.modules() if isinstance(m, ResidualUnit)]
    hooks = [u.register_forward_hook(lambda _, given, y: dtypes.append(y.dtype)) for u in units]
    # With gradients, without which sums are made in place.
    with step.autocast():
        step.codec.decoder(step.codec.encoder(recording))
    for hook in hooks:
        hook.remove()
    full, half = torch.float32, torch.bfloat16
    assert dtypes == [full] * 3 + [half] * 9 + [half] * 6 + [full] * 6


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_bfloat16_is_the_default_where_it_is_native(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert default_precision(CPU) == expected
    assert default_precision(torch.device("cuda")) == "bf16"

"""Training in bfloat16: gradients of convolutions in it, and what has to stay in float32 for it."""

from importlib import resources

import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dac_fast.codec import load
from dac_fast.model import half_gradients
from dac_fast.model.layers import ResidualUnit, WeightNorm
from dac_fast.training import load_recipe
from dac_fast.training.step import TrainingStep
from dac_fast.training.trainer import default_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("bias", [True, False])
def test_only_the_gradients_are_rounded(name, bias):
    shapes = {"conv2d": (6, 4, 1, 5), "conv_transpose2d": (4, 6, 1, 5)}
    generator = torch.Generator().manual_seed(0)
    x, weight, biases = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((2, 4, 1, 50), shapes[name], (6,))
    )
    given = (x, weight, biases) if bias else (x, weight)
    stride, padding, dilation, extra = (1, 2), (0, 3), (1, 2), (0, 1)
    sizes = {
        "conv2d": (stride, padding, dilation, 1),
        "conv_transpose2d": (stride, padding, extra, 1, dilation),
    }[name]
    actual = getattr(half_gradients, name)(x, weight, biases if bias else None, *sizes)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = getattr(F, name)(wide[0], wide[1], wide[2] if bias else None, *sizes)
    assert torch.equal(actual, getattr(F, name)(x, weight, biases if bias else None, *sizes))

    grad = torch.randn(actual.shape, generator=generator)
    ours = torch.autograd.grad(actual, given, grad)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        # Each product is of two rounded factors, and their sum is rounded once more.
        assert 1e-4 < (a - b).norm() / b.norm() < 6e-3


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


class Backward(TorchDispatchMode):
    """Keeps the dtype in which each convolution computes its gradients."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket is torch.ops.aten.convolution_backward:
            self.dtypes.append(args[0].dtype)
        return operator(*args, **(kwargs or {}))


def test_all_convolutions_but_the_last_compute_gradients_in_bfloat16(step, recording):
    coders = (step.codec.encoder, step.codec.decoder)
    with step.autocast():
        audio = step.codec.decoder(step.codec.encoder(recording))
    with Backward() as backward:
        audio.square().mean().backward()
    count = sum(isinstance(layer, WeightNorm) for coder in coders for layer in coder.modules())
    assert backward.dtypes == [torch.float32, *[torch.bfloat16] * (count - 1)]


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

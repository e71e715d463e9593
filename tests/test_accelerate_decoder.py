"""`accelerate_decoder`: modules built as the codec's are, whatever their classes, run fused."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dac_fast import accelerate_decoder, restore


class Snake(nn.Module):
    """As SNAC and the published package have it: TorchScript, a frequency per channel."""

    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(1, channels, 1) + 0.5)

    def forward(self, x):
        return scripted(x, self.alpha)


@torch.jit.script
def scripted(x, alpha):
    shape = x.shape
    x = x.reshape(shape[0], shape[1], -1)
    x = x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)
    return x.reshape(shape)


class SnakeBeta(nn.Module):
    """As BigVGAN has it: two logarithms per channel."""

    def __init__(self, channels):
        super().__init__()
        self.alpha, self.beta = (nn.Parameter(torch.randn(channels) / 2) for _ in range(2))

    def forward(self, x):
        alpha, beta = (scale[None, :, None].exp() for scale in (self.alpha, self.beta))
        return x + (1.0 / (beta + 1e-9)) * torch.sin(x * alpha).pow(2)


class Residual(nn.Module):
    """A residual unit, of a depthwise convolution where there are groups."""

    def __init__(self, channels, dilation, groups=1):
        super().__init__()
        dilated = nn.Conv1d(
            channels, channels, 7, padding=3 * dilation, dilation=dilation, groups=groups
        )
        pointwise = nn.Conv1d(channels, channels, 1)
        layers = Snake(channels), weight_norm(dilated), Snake(channels), weight_norm(pointwise)
        self.block = nn.Sequential(*layers)

    def forward(self, x):
        y = self.block(x)
        crop = (x.shape[-1] - y.shape[-1]) // 2
        if crop > 0:
            x = x[..., crop:-crop]
        return x + y


class Noise(nn.Module):
    """SNAC's: noise of one channel, scaled by the signal."""

    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Conv1d(channels, channels, 1, bias=False)

    def forward(self, x):
        return x + torch.randn(x.shape[0], 1, x.shape[2]) * self.linear(x)


class Attention(nn.Module):
    """In windows of 8 positions."""

    def __init__(self, channels):
        super().__init__()
        self.inner = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x):
        batch, channels, positions = x.shape
        windows = x.transpose(1, 2).reshape(-1, 8, channels)
        y = self.inner(windows, windows, windows)[0]
        return x + y.reshape(batch, positions, channels).transpose(1, 2)


def snac(depthwise, extra=None):
    """SNAC's decoder, with an odd stride and another submodule in it."""

    def block(wide, narrow, stride):
        up = nn.ConvTranspose1d(
            wide, narrow, 2 * stride, stride, padding=-(-stride // 2), output_padding=stride % 2
        )
        groups = narrow if depthwise else 1
        units = [Residual(narrow, dilation, groups) for dilation in (1, 3, 9)]
        return nn.Sequential(Snake(wide), weight_norm(up), *units)

    return nn.Sequential(
        weight_norm(nn.Conv1d(5, 16, 7, padding=3, groups=1)),
        *([extra(16)] if extra else []),
        block(16, 8, 3),
        block(8, 4, 2),
        Snake(4),
        nn.Conv1d(4, 1, 7, padding=3),
        nn.Tanh(),
    )


class AntiAliased(nn.Module):
    """BigVGAN's: an activation at twice the rate."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.filter = nn.Buffer(torch.hann_window(12)[None, None] / 6)

    def forward(self, x):
        filters = self.filter.expand(x.shape[1], -1, -1)
        x = F.pad(x, (5, 5), mode="replicate")
        x = 2 * F.conv_transpose1d(x, filters, stride=2, groups=x.shape[1])[..., 15:-15]
        x = F.pad(self.activation(x), (5, 6), mode="replicate")
        return F.conv1d(x, filters, stride=2, groups=x.shape[1])


class BigVGAN(nn.Module):
    """Its residual blocks: several of other kernels on the same signal, and their mean."""

    def __init__(self, wrap):
        super().__init__()
        self.before = nn.Conv1d(5, 16, 7, padding=3)
        self.up = weight_norm(nn.ConvTranspose1d(16, 8, 8, 4, padding=2))
        self.convs = nn.ModuleList(
            weight_norm(
                nn.Conv1d(8, 8, kernel, padding=dilation * (kernel // 2), dilation=dilation)
            )
            for kernel in (3, 7)
            for dilation in (1, 3, 1, 1)
        )
        self.activations = nn.ModuleList(wrap(SnakeBeta(8)) for _ in self.convs)

    def forward(self, x):
        x = self.up(F.leaky_relu(self.before(x), 0.1))
        layers = list(zip(self.convs, self.activations))
        total = 0
        for block in (layers[:4], layers[4:]):
            y = x
            for (conv1, act1), (conv2, act2) in zip(block[::2], block[1::2]):
                y = conv2(act2(conv1(act1(y)))) + y
            total = total + y
        return torch.clamp(total / 2, -1, 1)


def transformers(part):
    """A part of transformers' X-Codec: a DacModel's with its weight norm, and without its tanh."""
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    acoustic = {
        "encoder_hidden_size": 4,
        "downsampling_ratios": [5, 2],
        "decoder_hidden_size": 16,
        "upsampling_ratios": [5, 2],
        "hidden_size": 8,
    }
    semantic = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": [8] * 7,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    config = package.XcodecConfig(acoustic_model_config=acoustic, semantic_model_config=semantic)
    model = package.XcodecModel(config)
    model.apply_weight_norm()
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            nn.init.uniform_(parameter, 0.5, 2)
    return getattr(model, part)


def packaged_snac():
    package = pytest.importorskip("snac.layers", reason="snac is not installed")
    return package.Decoder(5, 16, [3, 2], depthwise=True, attn_window_size=None)


BIGVGAN = {"add", "clamp", "div", "leaky_relu"}
# A module, its channels, how many residual units run fused, and what is left to PyTorch.
MODULES = {
    "xcodec decoder": (lambda: transformers("acoustic_decoder"), 8, 6, set()),
    "xcodec encoder": (lambda: transformers("acoustic_encoder"), 1, 6, set()),
    "snac": (lambda: snac(depthwise=False), 5, 6, set()),
    "snac, depthwise": (lambda: snac(depthwise=True), 5, 0, {"convolution"}),
    "snac, attention": (lambda: snac(depthwise=False, extra=Attention), 5, 6, {"Attention"}),
    "snac, the package": (packaged_snac, 5, 0, {"convolution"}),
    "bigvgan": (lambda: BigVGAN(nn.Identity), 5, 0, BIGVGAN),
    "bigvgan, anti-aliased": (
        lambda: BigVGAN(AntiAliased),
        5,
        0,
        BIGVGAN | {"convolution", "mul", "replication_pad1d", "slice"},
    ),
}


@pytest.fixture(params=MODULES)
def case(request):
    torch.manual_seed(0)
    make, channels, units, by_torch = MODULES[request.param]
    return make().eval(), channels, units, by_torch


@torch.no_grad()
def test_the_module_gives_what_it_gave_by_fused_layers(case):
    module, channels, units, by_torch = case
    inputs = [torch.randn(3, channels, n, generator=torch.manual_seed(n)) for n in (80, 240)]
    expected = [module(x) for x in inputs]
    kind, keys, random = type(module), module.state_dict().keys(), torch.get_rng_state()
    assert accelerate_decoder(module) is module
    assert torch.equal(torch.get_rng_state(), random)
    assert (type(module), module.state_dict().keys()) == (kind, keys)
    for x, before in zip(inputs, expected):
        found = module(x)
        assert (found.shape, found.stride()) == (before.shape, before.stride())
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)
    kinds = str(module.forward)
    assert (f"{units} × residual unit" in kinds) == bool(units)
    assert set(re.findall(r"PyTorch: .*?(?:aten\.)?(\w+)(?:\.\w+)?\)?$", kinds, re.M)) == by_torch
    # A copy is the module as it was.
    assert torch.equal(copy.deepcopy(module)(inputs[0]), expected[0])
    assert restore(module) is module
    assert torch.equal(module(inputs[0]), expected[0])


@torch.no_grad()
def test_noise_stays_the_modules_own():
    module, x = snac(depthwise=True, extra=Noise).eval(), torch.randn(2, 5, 40)
    torch.manual_seed(1)
    expected = module(x)
    accelerate_decoder(module)
    assert "PyTorch: 1 (Noise)" in str(module.forward)
    torch.manual_seed(1)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_tanh_in_the_middle_in_half_precision():
    """What it gives is not the audio, and goes on in half precision: into a sum, a convolution."""
    module = nn.Sequential(
        nn.Conv1d(5, 8, 3, padding=1), nn.Tanh(), Residual(8, 1), nn.Conv1d(8, 1, 1), nn.Tanh()
    ).eval()
    x = torch.randn(2, 5, 40)
    expected = module(x)
    for precision, tolerance in {"fp32": 1e-5, "bf16": 3e-2}.items():
        accelerate_decoder(module, precision=precision)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=tolerance)
        restore(module)


def test_other_precisions_and_what_the_module_runs_itself():
    module, x = snac(depthwise=False).eval(), torch.randn(2, 5, 40)
    expected = module(x)
    accelerate_decoder(module, precision="bf16", shapes=[(1, 40)])
    with torch.no_grad():
        rounded = module(x)
    assert 0 < (rounded - expected).abs().max() < 0.1
    assert torch.equal(module(x.clone().requires_grad_()), expected)
    assert torch.equal(module.train()(x), expected)
    module.eval()
    with torch.no_grad():
        next(module.parameters()).mul_(1.5)
        changed = module(x)
        assert torch.equal(changed, restore(module)(x))
        assert not torch.equal(changed, expected)


class Whole(nn.Module):
    """A convolution, and then something else."""

    def __init__(self, then):
        super().__init__()
        self.conv, self.then = nn.Conv1d(3, 4, 3, padding=1), then

    def forward(self, x):
        return self.then(self.conv(x))


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda x: x - x.mean(2, keepdim=True), r"Whole runs aten\.mean\.dim outside of any sub"),
        (lambda x: x[..., :20], r"Whole runs aten\.slice\.Tensor outside"),
        (lambda x: x + torch.rand(2, 4, 32), "Whole runs aten.add.Tensor outside"),
        (lambda x: x * x.shape[2], "Whole gives something else for 64 positions than"),
        (lambda x: (x, x), "Whole makes no tensor of its input"),
        (nn.Conv1d(5, 4, 1), r"does not run on an input of shape \[2, 3, 32\] \(.*`example`"),
    ],
)
def test_what_cannot_be_accelerated_is_named(then, message):
    module = Whole(then).eval()
    with pytest.raises(ValueError, match=message):
        accelerate_decoder(module)
    assert "forward" not in vars(module)


def test_bad_arguments():
    with pytest.raises(ValueError, match="the Tanh has no parameters; accepted: convolutions"):
        accelerate_decoder(nn.Tanh().eval())
    with pytest.raises(ValueError, match="the Linear has no convolution that tells its channels"):
        accelerate_decoder(nn.Linear(3, 3).eval())
    with pytest.raises(ValueError, match="the Conv1d is in training mode; accepted: eval mode"):
        accelerate_decoder(nn.Conv1d(3, 3, 1))
    with pytest.raises(ValueError, match=r"parameters are torch\.float16; accepted: torch\.float"):
        accelerate_decoder(nn.Conv1d(3, 3, 1).half())
    with pytest.raises(ValueError, match="precision is 'fp8'; accepted: fp32, tf32x3, tf32"):
        accelerate_decoder(nn.Conv1d(3, 3, 1).eval(), precision="fp8")

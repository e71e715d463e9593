"""Discriminators against the published package's maps, and against plain compositions of torch
functions.
"""

import json
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dac_fast.discriminators import MPD, MRD, MSD, Discriminator, SincResample
from dac_fast.losses import GANLoss

SMALL = {"periods": [2], "rates": [2], "fft_sizes": [64, 32], "bands": ((0.0, 0.3), (0.3, 1.0))}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@torch.no_grad()
def fill_by_formula(module):
    """The weights of the golden maps (see golden/README.md)."""
    for key, parameter in module.state_dict().items():
        with np.errstate(over="ignore"):
            x = np.arange(parameter.numel(), dtype=np.uint64) + np.uint64(
                zlib.crc32(key.encode()) * 2654435761 % 2**64
            )
            x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
            x ^= x >> np.uint64(30)
            x *= np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
        value = torch.from_numpy((x >> np.uint64(40)).astype(np.float64) / 2**23 - 1)
        if key.endswith("weight_g"):
            value = torch.full_like(value, 0.8)
        elif key.endswith("bias"):
            value = 0.05 * value
        parameter.copy_(value.view_as(parameter))


GOLDEN = {
    "mpd2": lambda: MPD(2),
    "mpd3": lambda: MPD(3),
    "msd1": lambda: MSD(1, 44100),
    "msd2": lambda: MSD(2, 44100),
    "mrd512": lambda: MRD(512, sample_rate=44100),
    "mrd2048": lambda: MRD(2048, sample_rate=44100),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_maps(golden, name):
    discriminator = GOLDEN[name]()
    fill_by_formula(discriminator)
    with np.load(golden / "bands.npz") as arrays, torch.no_grad():
        maps = discriminator(torch.from_numpy(arrays["audio"]))
    expected = json.loads((golden / "discriminators.json").read_text())[name]
    assert [list(m.shape) for m in maps] == [e["shape"] for e in expected]
    for actual, e in zip(maps, expected, strict=True):
        scale = abs(e["mean"]) + e["std"]
        assert actual.mean().item() == pytest.approx(e["mean"], abs=1e-5 * scale)
        assert actual.std().item() == pytest.approx(e["std"], rel=1e-5)
        torch.testing.assert_close(
            actual.flatten()[:64], torch.tensor(e["head"]), rtol=1e-4, atol=2e-5 * scale
        )


def test_golden_inputs(golden):
    discriminator = Discriminator(periods=[])
    with (
        np.load(golden / "bands.npz") as arrays,
        np.load(golden / "disc_preprocess.npz") as preprocess,
    ):
        for mrd in discriminator.discriminators:
            for b, band in enumerate(mrd.spectrogram(torch.from_numpy(arrays["audio"]))):
                expected = torch.from_numpy(arrays[f"w{mrd.window_length}_b{b}"])
                torch.testing.assert_close(
                    band, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
                )
        spectra = discriminator.spectra(torch.from_numpy(preprocess["x"]))
        torch.testing.assert_close(
            spectra.audio, torch.from_numpy(preprocess["y"]), rtol=1e-5, atol=1e-6
        )


def test_published_keys_and_defaults():
    with torch.device("meta"):
        keys = Discriminator().state_dict()
    # Five MPDs of 6 convolutions, then three MRDs of 5 bands of 5 convolutions and a last one; 3
    # tensors each.
    assert len(keys) == 3 * (5 * 6 + 3 * (5 * 5 + 1))
    assert keys["discriminators.4.convs.3.0.weight_v"].shape == (1024, 512, 5, 1)
    assert keys["discriminators.5.band_convs.4.0.0.weight_v"].shape == (32, 2, 3, 9)
    assert keys["discriminators.7.conv_post.weight_g"].shape == (1, 1, 1, 1)
    assert set(MSD(2).state_dict()) == {
        f"{name}.{tensor}"
        for name in [*(f"convs.{i}.0" for i in range(6)), "conv_post"]
        for tensor in ("weight_g", "weight_v", "bias")
    }


@pytest.mark.parametrize("name", ["48000_44100", "22050_44100", "44100_16000"])
def test_resampling(golden, name):
    old, new = map(int, name.split("_"))
    with np.load(golden / "resample.npz") as arrays:
        actual = SincResample(old, new)(torch.from_numpy(arrays[f"in_{name}"]))
        torch.testing.assert_close(
            actual, torch.from_numpy(arrays[f"out_{name}"]), rtol=0, atol=2e-5
        )


def plain_maps(discriminator, x):
    """The same maps from torch's own functions; only the weights are taken from `discriminator`."""

    def stack(names, x, stride, padding, convolve, groups):
        maps = []
        for name, s, p, g in zip(names, stride, padding, groups, strict=True):
            v, magnitude = state[f"{name}.weight_v"], state[f"{name}.weight_g"]
            norm = v.flatten(1).square().sum(1).sqrt().view_as(magnitude)
            y = convolve(x, v * magnitude / norm, state[f"{name}.bias"], s, p, 1, g)
            x = y if name.endswith("conv_post") else torch.where(y > 0, y, 0.1 * y)
            maps.append(x)
        return maps

    x = x - x.mean(-1, keepdim=True)
    x = 0.8 * x / (x.abs().amax(-1, keepdim=True) + 1e-9)
    outputs = []
    for d in discriminator.discriminators:
        state = dict(d.named_parameters())
        if isinstance(d, MPD):
            folded = F.pad(x, (0, d.period - x.shape[-1] % d.period), mode="reflect").view(
                len(x), 1, -1, d.period
            )
            names = [*(f"convs.{i}.0" for i in range(5)), "conv_post"]
            strides, paddings = [(3, 1)] * 4 + [1, 1], [(2, 0)] * 5 + [(1, 0)]
            outputs.append(stack(names, folded, strides, paddings, F.conv2d, [1] * 6))
        elif isinstance(d, MSD):
            names = [*(f"convs.{i}.0" for i in range(6)), "conv_post"]
            strides, paddings = [1, 4, 4, 4, 4, 1, 1], [7, 20, 20, 20, 20, 2, 1]
            outputs.append(
                stack(names, d.resample(x), strides, paddings, F.conv1d, [1, 4, 16, 64, 256, 1, 1])
            )
        else:
            window = d.window_length
            hop = window // 4
            right = -x.shape[-1] % hop
            padded = F.pad(x, (3 * hop // 2, 3 * hop // 2 + right), mode="reflect")[:, 0]
            hann = 0.5 - 0.5 * torch.cos(
                2 * torch.pi * torch.arange(window, dtype=x.dtype) / window
            )
            spectrum = torch.fft.rfft(padded.unfold(1, window, hop) * hann)
            spectrum = torch.stack([spectrum.real, spectrum.imag], 1)
            maps = []
            for b, (low, high) in enumerate(d.bands):
                bins = window // 2 + 1
                band = spectrum[..., int(low * bins) : int(high * bins)]
                names, strides = (
                    [f"band_convs.{b}.{i}.0" for i in range(5)],
                    [1, (1, 2), (1, 2), (1, 2), 1],
                )
                maps += stack(names, band, strides, [(1, 4)] * 4 + [1], F.conv2d, [1] * 5)
            joined = torch.cat(maps[4::5], -1)
            outputs.append(maps + stack(["conv_post"], joined, [1], [1], F.conv2d, [1]))
    return outputs


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("shared", [False, True], ids=["audio", "spectra"])
def test_step_gradients_equal_a_plain_composition(shared):
    """One discriminator and one generator step in float64; also with the spectra of both signals
    computed once.
    """
    discriminator = Discriminator(**SMALL).double()
    parameters = list(discriminator.parameters())
    real = torch.randn(2, 1, 131, dtype=torch.float64)
    fake = torch.randn(2, 1, 131, dtype=torch.float64, requires_grad=True)

    fakes, reals = plain_maps(discriminator, fake), plain_maps(discriminator, real)
    loss = sum(
        f[-1].square().mean() + (1 - r[-1]).square().mean()
        for f, r in zip(fakes, reals, strict=True)
    )
    adversarial = sum((1 - f[-1]).square().mean() for f in fakes)
    feature = sum(
        (a - b.detach()).abs().mean()
        for f, r in zip(fakes, reals, strict=True)
        for a, b in zip(f[:-1], r[:-1], strict=True)
    )

    gan = GANLoss(discriminator)
    inputs = [discriminator.spectra(x) if shared else x for x in (fake, real)]
    actual_loss = gan.discriminator_loss(*inputs)
    torch.testing.assert_close(actual_loss, loss)
    torch.testing.assert_close(gradients(actual_loss, parameters), gradients(loss, parameters))
    assert gradients(actual_loss, [fake]) == (None,)

    actual_adversarial, actual_feature = gan.generator_loss(*inputs)
    torch.testing.assert_close((actual_adversarial, actual_feature), (adversarial, feature))
    torch.testing.assert_close(
        gradients(actual_adversarial + 2 * actual_feature, [fake]),
        gradients(adversarial + 2 * feature, [fake]),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"periods": []},
        {"periods": [], "rates": [1], "fft_sizes": []},
        {"periods": [], "bands": ((0.0, 1.0),)},
        {"periods": [], "bands": tuple((b / 5, (b + 1) / 5) for b in range(5)), "fft_sizes": [256]},
    ],
)
def test_ablations(options):
    discriminator = Discriminator(**options)
    with torch.no_grad():
        outputs = discriminator(torch.randn(1, 1, 4001))
    bands = len(options.get("bands", range(5)))
    expected = [7] * len(options.get("rates", [])) + [5 * bands + 1] * len(
        options.get("fft_sizes", range(3))
    )
    assert [len(maps) for maps in outputs] == expected
    assert all(m.isfinite().all() for maps in outputs for m in maps)


@pytest.mark.parametrize("width", [0.5, 0.25, 0.125])
def test_narrow_discriminators_have_that_share_of_the_channels(width):
    options = {"rates": [1], "periods": [2], "fft_sizes": [256]}
    x = torch.randn(1, 1, 4001)
    with torch.no_grad():
        whole, narrow = (Discriminator(**options, width=w)(x) for w in (1.0, width))
    for published, maps in zip(whole, narrow, strict=True):
        for wide, slim in zip(published[:-1], maps[:-1], strict=True):
            assert slim.shape == (1, int(wide.shape[1] * width), *wide.shape[2:])
        assert maps[-1].shape == published[-1].shape


def test_bfloat16_audio_under_autocast():
    """A generator under autocast hands over bfloat16; spectra are computed in float32 all the
    same.
    """
    discriminator = Discriminator(**SMALL)
    x = torch.randn(1, 1, 500).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        spectra = discriminator.spectra(x)
        outputs = discriminator(x)
    assert spectra.audio.dtype == torch.float32
    assert spectra.bands[0][0].dtype == torch.bfloat16
    with torch.no_grad():
        expected = discriminator(x.float())
    for actual, exact in zip(outputs, expected, strict=True):
        torch.testing.assert_close(
            actual[0].float(), exact[0], rtol=0.05, atol=0.05 * exact[0].abs().max().item()
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Discriminator(**SMALL)(torch.zeros(1, 2, 500)),
            r"shape \[1, 2, 500\]; accepted: \[B, 1, T\]",
        ),
        (
            lambda: MPD(11)(torch.zeros(1, 1, 11)),
            "11 samples are too few for a period of 11: at least 12",
        ),
        (lambda: MRD(2048)(torch.zeros(1, 1, 700)), "700 samples are too few for a window of 2048"),
        (lambda: MRD(512, hop_factor=0.5), "hop_factor is 0.5; accepted: 0.25"),
        (lambda: MRD(510), "window_length is 510; accepted: multiples of 4"),
        (lambda: MRD(16), r"band \(0.0, 0.1\) holds no bin of a window of 16"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Losses and filterbanks against the published package's values, gradients against plain float64
compositions.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dac_fast import spectral
from dac_fast.losses import GANLoss, L1Loss, MelSpectrogramLoss, MultiScaleSTFTLoss, SISDRLoss
from dac_fast.spectral import Spectrograms, analysis_window, magnitude_spectrogram, mel_filters

MEL_TRAIN = {
    "n_mels": [5, 10, 20, 40, 80, 160, 320],
    "window_lengths": [32, 64, 128, 256, 512, 1024, 2048],
    "pow": 1.0,
    "mag_weight": 0.0,
}


def stand_in(v):
    """The discriminator of the golden GAN losses."""
    return [[v / 2, v.square(), v.mean(-1, keepdim=True)], [v.abs(), 1 - v]]


@pytest.fixture
def pair(golden):
    with np.load(golden / "losses.npz") as arrays:
        return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])


GOLDEN = {
    "mel_train": MelSpectrogramLoss(**MEL_TRAIN),
    "mel_eval": MelSpectrogramLoss(),
    "stft_eval": MultiScaleSTFTLoss(),
    "sisdr_loss": SISDRLoss(),
    "l1": L1Loss(),
    "gan_d": GANLoss(stand_in).discriminator_loss,
    "gan_g": lambda x, y: GANLoss(stand_in).generator_loss(x, y)[0],
    "gan_feat": lambda x, y: GANLoss(stand_in).generator_loss(x, y)[1],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(golden, pair, name):
    expected = json.loads((golden / "losses.json").read_text())[name]
    assert GOLDEN[name](*pair).item() == pytest.approx(expected, rel=1e-5)


FILTERS = {
    "sr44100_n2048_m80": (44100, 2048, 80),
    "sr44100_n32_m5": (44100, 32, 5),
    "sr24000_n512_m40": (24000, 512, 40),
    "sr16000_n1024_m160": (16000, 1024, 160),
}


@pytest.mark.parametrize("name", FILTERS)
def test_mel_filters(golden, name):
    with np.load(golden / "mel_filters.npz") as arrays:
        torch.testing.assert_close(
            mel_filters(*FILTERS[name]), torch.from_numpy(arrays[name]), rtol=1e-6, atol=1e-9
        )


def test_windows_are_those_of_scipy():
    from scipy.signal import get_window

    for name in ("hann", "hamming", "blackman"):
        np.testing.assert_allclose(analysis_window(64, name), get_window(name, 64), atol=1e-7)
    np.testing.assert_allclose(
        analysis_window(64, "sqrt_hann"), get_window("hann", 64) ** 0.5, atol=1e-7
    )


@pytest.mark.parametrize("samples", [20, 63, 1000])
@pytest.mark.parametrize("match_stride", [False, True])
def test_frames_by_definition(samples, match_stride):
    """Every frame is the DFT of a windowed stretch of the signal and its mirror images.

    Gradients are PyTorch's own of that definition.
    """
    window, hop = 32, 8
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(samples, dtype=torch.float64, generator=rng, requires_grad=True)
    start = -12 if match_stride else -16
    frames = -(-samples // hop) if match_stride else samples // hop + 1
    position = start + hop * torch.arange(frames)[:, None] + torch.arange(window)
    position = position.abs()
    position = torch.where(position >= samples, 2 * (samples - 1) - position, position)
    hann = 0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(window, dtype=torch.float64) / window)
    expected = torch.fft.rfft(x[position] * hann).abs().T
    actual = magnitude_spectrogram(x.view(1, 1, -1), analysis_window(window), match_stride)
    torch.testing.assert_close(actual[0, 0], expected, rtol=0, atol=1e-6)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=rng)
    gradients = (torch.autograd.grad(y, x, grad)[0] for y in (actual[0, 0], expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0, 1e-30, 1e-21, 1e-10])
def test_gradient_near_silence(scale):
    """Silence has none, and it is not larger where squares of magnitudes underflow."""
    noise = torch.randn(1, 1, 400, generator=torch.Generator().manual_seed(0))
    gradients = []
    for factor in (scale, 1):
        x = (factor * noise).requires_grad_()
        y = magnitude_spectrogram(x, analysis_window(32))
        gradients += torch.autograd.grad(y.sum(), x)
    quiet, loud = (grad.abs().max() for grad in gradients)
    assert quiet <= 1.01 * loud
    assert quiet > 0 or not scale


def plain_mel_loss(x, y, sample_rate, n_mels, window, power):
    """One scale of the mel loss from torch's FFT and the filters alone."""
    mels = []
    for signal in (x, y):
        frames = F.pad(signal, (window // 2, window // 2), mode="reflect").unfold(
            2, window, window // 4
        )
        hann = torch.hann_window(window, dtype=torch.float64).float().double()
        spectrum = torch.fft.rfft(frames * hann)
        magnitude = (spectrum.real.square() + spectrum.imag.square()).sqrt()
        mels.append(magnitude @ mel_filters(sample_rate, window, n_mels).double().T)
    a, b = ((m.clamp(min=1e-5) ** power).log10() for m in mels)
    return (a - b).abs().mean() + 0.5 * (mels[0] - mels[1]).abs().mean()


def test_gradient_equals_a_plain_composition(pair):
    x, y = (signal.double() for signal in pair)
    scales = {"n_mels": [5, 40], "window_lengths": [32, 512]}
    loss = MelSpectrogramLoss(**scales, pow=1.5, mag_weight=0.5, weight=15.0, sample_rate=24000)
    results = []
    for compute in (
        loss,
        lambda x, y: loss(x, Spectrograms(y)),
        lambda x, y: (
            15
            * sum(
                plain_mel_loss(x, y, 24000, m, w, 1.5)
                for m, w in zip(*scales.values(), strict=True)
            )
        ),
    ):
        leaf = x.clone().requires_grad_()
        value = compute(leaf, y)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-12)


def test_losses_share_spectrograms_of_one_kind(monkeypatch, pair):
    losses = (
        MelSpectrogramLoss(**MEL_TRAIN),
        MultiScaleSTFTLoss(),
        MultiScaleSTFTLoss(window_type="hamming"),
        MultiScaleSTFTLoss(match_stride=True),
    )
    apart = [loss(*pair) for loss in losses]
    computed = []

    def counted(x, window, match_stride):
        computed.append(len(window))
        return magnitude_spectrogram(x, window, match_stride)

    monkeypatch.setattr(spectral, "magnitude_spectrogram", counted)
    signals = [Spectrograms(signal) for signal in pair]
    assert [loss(*signals) for loss in losses] == apart
    # Of the mel loss seven, and two each of the last ones.
    assert len(computed) == 2 * (7 + 2 + 2)


def test_float32_under_autocast(pair):
    loss = MelSpectrogramLoss(**MEL_TRAIN)
    x, y = pair[0].bfloat16(), pair[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(x, y).item() == pytest.approx(loss(x.float(), y).item(), rel=1e-6)


def test_silence_has_finite_gradients():
    silence = torch.zeros(1, 1, 4000, requires_grad=True)
    loss = MelSpectrogramLoss()(silence, torch.randn(1, 1, 4000)) + MultiScaleSTFTLoss()(
        silence, torch.zeros(1, 1, 4000)
    )
    loss.backward()
    assert loss.isfinite()
    assert silence.grad.isfinite().all()


def test_sisdr_options(pair):
    x, y = pair
    batch = torch.cat([x, x]), torch.cat([y, 3 * y + 0.1])
    each = SISDRLoss(reduction="none")(*batch)
    assert each.shape == (2,)
    torch.testing.assert_close(each[0], each[1], rtol=1e-4, atol=0)
    assert SISDRLoss(reduction="sum", weight=2.0)(*batch).item() == pytest.approx(
        2 * each.sum().item()
    )
    assert SISDRLoss(clip_min=-10)(*batch).item() == -10
    noise = x.square().sum() / (x - y).square().sum()
    assert SISDRLoss(scaling=False, zero_mean=False)(x, y).item() == pytest.approx(
        -10 * noise.log10().item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MelSpectrogramLoss(n_mels=[5]),
            "n_mels has 1 values; accepted: one per window length, that is 2",
        ),
        (lambda: MelSpectrogramLoss(mel_fmax=[100, 0]), "mel_fmin is 0.0 Hz and mel_fmax 0 Hz"),
        (
            lambda: MultiScaleSTFTLoss([30]),
            "window length is 30; accepted: positive multiples of 4",
        ),
        (
            lambda: MultiScaleSTFTLoss(window_type="kaiser"),
            "window_type is 'kaiser'; accepted: hann",
        ),
        (
            lambda: MultiScaleSTFTLoss()(torch.zeros(1, 1, 1024), torch.zeros(1, 1, 1024)),
            "1024 samples .* at least 1025",
        ),
        (lambda: SISDRLoss(reduction="max"), "reduction is 'max'; accepted: mean, sum, none"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Metrics against the published package's values and against hand-computed cases."""

import json

import numpy as np
import pytest
import torch

from dac_fast import metrics


def test_golden_values(golden):
    with np.load(golden / "losses.npz") as arrays:
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    expected = json.loads((golden / "losses.json").read_text())
    assert metrics.mel_distance(x, y).item() == pytest.approx(expected["mel_eval"], rel=1e-5)
    assert metrics.stft_distance(x, y).item() == pytest.approx(expected["stft_eval"], rel=1e-5)
    assert metrics.si_sdr(x, y).item() == pytest.approx(-expected["sisdr_loss"], rel=1e-5)


def test_what_is_silent_has_no_ratio_and_does_not_count():
    time = torch.arange(4000) / 8000
    x = torch.sin(2 * torch.pi * 300 * time).expand(3, 1, -1).clone()
    y = x + 0.1 * torch.sin(2 * torch.pi * 500 * time)
    alone = metrics.si_sdr(x[:1], y[:1]).item()
    assert alone == pytest.approx(20, abs=0.01)
    # A silent original with something in its place, and an original that came out silent.
    x[1], y[2] = 0, 0.5
    assert metrics.si_sdr(x, y).item() == pytest.approx(alone)
    assert metrics.si_sdr(x[1:], y[1:]).isnan()


def test_bitrate_efficiency():
    uniform = torch.arange(16).repeat(2, 3)
    constant = torch.full((2, 48), 7)
    half = torch.tensor([3, 9]).repeat(2, 24)
    codes = torch.stack([uniform, constant, half], dim=1)
    counts = metrics.codebook_counts(codes, 16)
    assert counts.shape == (3, 16)
    assert counts.sum(1).tolist() == [96, 96, 96]
    torch.testing.assert_close(
        metrics.codebook_entropy(counts), torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64)
    )
    assert metrics.bitrate_efficiency(codes, 16) == pytest.approx(5 / 12)
    # A codebook of one entry carries nothing.
    assert metrics.bitrate_efficiency(torch.zeros(2, 3, 48, dtype=torch.int64), 1) == 0


def test_codes_outside_the_codebook():
    with pytest.raises(ValueError, match="codes run from 0 to 16; accepted: 0 to 15"):
        metrics.codebook_counts(torch.arange(17).view(1, 1, 17), 16)

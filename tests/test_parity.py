"""The same weights in `transformers.DacModel`: the same codes and audio, both ways through its
checkpoints.
"""

import pytest
import torch

from dac_fast import DAC

transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")


@pytest.fixture
def theirs():
    """A small random `DacModel`."""
    config = transformers.DacConfig(
        encoder_hidden_size=8, downsampling_ratios=[2, 4, 8], decoder_hidden_size=64, n_codebooks=4,
        codebook_size=64, codebook_dim=8, sampling_rate=16000,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DacModel(config).eval()
    for name, parameter in model.named_parameters():
        # away from the initial values, under which every layer nearly vanishes
        if name.endswith("weight"):
            torch.nn.init.normal_(parameter, 0, 0.5 * parameter[0].numel() ** -0.5)
        elif name.endswith("alpha"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def assert_same(theirs, ours):
    """Codes and audio agree for one random signal, and the audio is not trivial."""
    audio = torch.randn(2, 1, 64 * 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(audio)
        found = ours(audio)
    assert torch.equal(found["codes"], expected.audio_codes)
    assert expected.audio_values.std() > 1e-3
    torch.testing.assert_close(found["audio"][:, 0], expected.audio_values, rtol=0, atol=1e-5)


def test_their_checkpoint_is_read(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert_same(theirs, DAC.load(tmp_path))
    assert_same(theirs, DAC.load(tmp_path / "model.safetensors"))


def test_our_checkpoint_is_read_by_them(golden, tmp_path):
    ours = DAC.load(golden / "weights_even.pth")
    ours.save(tmp_path / "folder")
    assert_same(transformers.DacModel.from_pretrained(tmp_path / "folder").eval(), ours)


def test_weight_norm_of_theirs_is_read(theirs, tmp_path):
    """A checkpoint saved in training, with weight norm applied, has other keys and means the
    same.
    """
    theirs.apply_weight_norm()
    theirs.save_pretrained(tmp_path)
    assert_same(theirs, DAC.load(tmp_path))

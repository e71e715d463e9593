"""The reference model against golden vectors of the published package, gradients included."""

import json

import numpy as np
import pytest
import torch

import dac_fast
from dac_fast import DAC, PRESETS, Config
from dac_fast.recordings import windows


@pytest.fixture(params=["even", "odd"])
def case(request, golden):
    """(codec, golden outputs, golden gradients, configuration).

    "even" has even strides, "odd" odd ones and mixed codebook dims.
    """
    name = request.param
    tensors = [
        {k: torch.from_numpy(v) for k, v in np.load(golden / f"{kind}_{name}.npz").items()}
        for kind in ("model", "grads")
    ]
    return (
        DAC.load(golden / f"weights_{name}.pth"),
        *tensors,
        json.loads((golden / f"config_{name}.json").read_text()),
    )


def close(actual, expected, tolerance=1e-5):
    """Shapes are equal, and values relative to the largest one."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance * expected.abs().max().item()
    )


@torch.no_grad()
def test_outputs_are_the_published_ones(case):
    codec, golden, _, _ = case
    audio = golden["audio_in"]
    outputs = codec(audio)
    for key in ("z", "latents"):
        close(outputs[key], golden[key])
    close(outputs["vq/commitment_loss"], golden["commitment_loss"])
    close(outputs["vq/codebook_loss"], golden["codebook_loss"])
    assert torch.equal(outputs["codes"], golden["codes"])
    assert outputs["audio"].shape == audio.shape
    close(outputs["audio"], golden["audio_out"])

    padded = torch.nn.functional.pad(audio, (0, -audio.shape[-1] % codec.hop_length))
    close(codec.encoder(padded), golden["enc"])
    two = codec.encode(audio, n_quantizers=2)
    assert torch.equal(two.codes, golden["codes_nq2"])
    close(two.z, golden["z_nq2"])
    close(codec.quantizer.from_codes(golden["codes"])[0], golden["z_from_codes"])
    z, _, codes = codec.quantizer.from_latents(golden["latents"])
    close(z, golden["z_from_latents"])
    assert torch.equal(codes, golden["codes_from_latents"])


@torch.no_grad()
def test_decode_gives_every_frame_its_samples(case):
    """Odd strides: the published decoder's samples, then zeros where it stops short."""
    codec, golden, _, _ = case
    for frames in (1, 2, 7, 94):
        z = golden["z"][..., :frames]
        audio, published = codec.decode(z), codec.decoder(z)
        assert audio.shape[-1] == frames * codec.hop_length
        assert torch.equal(audio[..., : published.shape[-1]], published)
        assert not audio[..., published.shape[-1] :].any()
    close(
        codec.decode_codes(golden["codes"])[..., : golden["decoded"].shape[-1]], golden["decoded"]
    )


def test_gradients_are_the_published_ones(case):
    codec, golden, gradients, _ = case
    codec.train()
    audio = golden["audio_in"].requires_grad_()
    outputs = codec(audio)
    loss = (
        outputs["audio"].square().mean()
        + 0.25 * outputs["vq/commitment_loss"]
        + outputs["vq/codebook_loss"]
    )
    loss.backward()
    found = {name: parameter.grad for name, parameter in codec.named_parameters()} | {
        "audio_grad": audio.grad
    }
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert (found[name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_unpadded_geometry_is_the_published_one(case):
    codec, _, _, config = case
    assert windows.delay(codec) == config["delay"]
    assert codec.hop_length == config["hop_length"]


@torch.no_grad()
def test_folding_changes_nothing_but_the_storage(case):
    codec, golden, _, _ = case
    batch = torch.cat([golden["audio_in"], golden["audio_in"].flip(2)])
    expected = codec(batch)["audio"]
    frames = codec.encoder.output_length(9000, padded=False)
    unpadded = codec.encoder(batch.repeat(1, 1, 3)[..., :9000], padded=False)
    unpadded_audio = codec.decoder(codec.encode(batch).z, padded=False)
    folded = codec.fold_weight_norm()
    assert torch.equal(folded.encode(golden["audio_in"]).codes, golden["codes"])
    close(folded(golden["audio_in"])["audio"], golden["audio_out"], 1e-4)
    close(folded(batch)["audio"], expected, 1e-4)
    assert unpadded.shape[-1] == frames
    close(folded.encoder(batch.repeat(1, 1, 3)[..., :9000], padded=False), unpadded)
    close(folded.decoder(folded.encode(batch).z, padded=False), unpadded_audio, 1e-4)
    assert not any("weight_g" in key for key in folded.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("name", ["even", "odd"])
def test_every_item_of_a_ragged_batch_gets_what_it_gets_alone(golden, name):
    codec = DAC.load(golden / f"weights_{name}.pth")
    lengths = torch.tensor([1, 700, 333, 64, 699])
    audio = 0.3 * torch.randn(5, 1, 700, generator=torch.Generator().manual_seed(0))
    batch = codec.encode(audio, lengths)
    restored = codec.decode_codes(batch.codes, batch.lengths)
    for i, length in enumerate(lengths):
        alone = codec.encode(audio[i : i + 1, :, :length])
        frames = int(batch.lengths[i])
        assert frames == alone.codes.shape[-1]
        assert torch.equal(batch.codes[i, :, :frames], alone.codes[0])
        torch.testing.assert_close(batch.z[i, :, :frames], alone.z[0], rtol=0, atol=1e-5)
        assert not batch.codes[i, :, frames:].any()
        assert not batch.z[i, :, frames:].any()
        expected = codec.decode_codes(alone.codes)[0]
        torch.testing.assert_close(
            restored[i, :, : expected.shape[-1]], expected, rtol=0, atol=1e-4
        )
        assert not restored[i, :, expected.shape[-1] :].any()
    # the losses are those of the items alone, averaged
    alone = [codec.encode(audio[i : i + 1, :, :length]) for i, length in enumerate(lengths)]
    mean = torch.stack([a.commitment_loss for a in alone]).mean()
    torch.testing.assert_close(batch.commitment_loss, mean, rtol=1e-5, atol=0)


def test_quantizer_dropout_keeps_the_first_items_short(golden):
    codec = DAC.load(golden / "weights_even.pth").train()
    codec.quantizer.dropout = 0.5
    torch.manual_seed(0)
    z = codec.encoder(torch.randn(1, 1, 640)).expand(64, -1, -1)
    full = codec.quantizer(z[:1], n_quantizers=5)
    outputs = codec.quantizer(z)
    # dropped items still report every code, and quantise with the first few only
    assert torch.equal(outputs[1], full[1].expand(64, -1, -1))
    close(outputs[0][32:], full[0].expand(32, -1, -1))
    partial = torch.cat([codec.quantizer(z[:1], n_quantizers=n)[0] for n in range(1, 6)])
    kept = [int((outputs[0][i] - partial).abs().amax((1, 2)).argmin()) + 1 for i in range(32)]
    assert set(kept) == {1, 2, 3, 4, 5}
    assert outputs[3] < full[3]


@pytest.mark.parametrize(
    ("name", "parameters", "delay", "hop"),
    [
        ("44khz", 76_651_890, 7904, 512),
        ("44khz_16kbps", 64_213_250, 7904, 512),
        ("24khz", 74_708_706, 5264, 320),
        ("16khz", 74_175_906, 5264, 320),
        ("tiny", 2_535_870, 7904, 512),
    ],
)
def test_presets_have_the_published_sizes(name, parameters, delay, hop):
    with torch.device("meta"):
        codec = DAC(**PRESETS[name].to_dict())
    assert sum(p.numel() for p in codec.parameters()) == parameters
    assert (windows.delay(codec), codec.hop_length) == (delay, hop)


@torch.no_grad()
def test_leaky_relu_ablation_runs():
    codec = DAC(
        encoder_dim=4,
        encoder_rates=[2, 3],
        decoder_dim=16,
        decoder_rates=[3, 2],
        activation="leaky_relu",
    )
    assert codec(torch.randn(2, 1, 50))["audio"].shape == (2, 1, 50)
    assert not any("alpha" in key for key in codec.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_rates": []}, "encoder_rates is"),
        ({"decoder_rates": [2, 2]}, "decoder_rates is"),
        ({"n_codebooks": 0}, "n_codebooks is 0"),
        ({"codebook_dim": [8, 8]}, "codebook_dim is"),
        ({"quantizer_dropout": 2}, "quantizer_dropout is 2"),
        ({"activation": "relu"}, "activation is 'relu'; accepted: snake or leaky_relu"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Config(**change)


@pytest.mark.parametrize("engine", [False, True])
def test_bad_arguments_say_what_is_accepted(golden, engine):
    codec = dac_fast.load(golden / "weights_even.pth", engine=engine)
    audio = torch.zeros(2, 1, 64)
    codes = torch.zeros(1, 5, 3)
    cases = {
        "audio is torch.int16; accepted: a floating-point": lambda: codec.encode(audio.short()),
        "codes are torch.float32; accepted: torch.int64 or": lambda: codec.decode_codes(codes),
        "codes are torch.uint16": lambda: codec.decode_codes(codes.to(torch.uint16)),
        "audio of shape": lambda: codec.encode(audio[:, 0]),
        "0 codebooks; accepted: 1 to 5": lambda: codec.encode(audio, n_quantizers=0),
        "6 codebooks; accepted: 1 to 5": lambda: codec.encode(audio, n_quantizers=6),
        "lengths are": lambda: codec.encode(audio, [64, 65]),
        "code 64; accepted: 0 to 63": lambda: codec.decode_codes(torch.full((1, 5, 3), 64)),
        "latent of shape": lambda: codec.decode(torch.zeros(1, 3, 4)),
        "latent channels; accepted": lambda: codec.quantizer.from_latents(torch.zeros(1, 12, 4)),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()

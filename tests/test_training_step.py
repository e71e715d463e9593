"""The training step against a plain composition of the published one, its options, and the
quantizer's other forms.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_codec import SMALL
from torch import nn

from dac_fast.codec import DAC
from dac_fast.config import QUANTIZERS
from dac_fast.model.ema_codebook import EMACodebook
from dac_fast.ops import use_backend
from dac_fast.spectral import mel_filters
from dac_fast.training import load_recipe
from dac_fast.training.step import TrainingStep, one_by_one

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _reference_backend():
    with use_backend("reference"):
        yield


def small_step(*overrides):
    return TrainingStep(load_recipe("tiny", [*SMALL, *overrides]), CPU)


def some_audio(seed=0, items=4):
    time = torch.arange(1024) / 8000
    generator = torch.Generator().manual_seed(seed)
    frequencies = 100 + 2000 * torch.rand(items, 1, 3, 1, generator=generator)
    noise = 0.01 * torch.randn(items, 1, 1024, generator=generator)
    return 0.2 * torch.sin(2 * torch.pi * frequencies * time).sum(2) + noise


def plain_step(codec, discriminator, audio):
    """One published step, written out: updates both networks and returns its losses."""
    optimizer_g, optimizer_d = (
        torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.8, 0.99), foreach=False)
        for network in (codec, discriminator)
    )
    out = codec(audio)
    fake = out["audio"]

    loss_d = 0
    for maps_fake, maps_real in zip(
        discriminator(fake.clone().detach()), discriminator(audio), strict=True
    ):
        loss_d += torch.mean(maps_fake[-1] ** 2) + torch.mean((1 - maps_real[-1]) ** 2)
    optimizer_d.zero_grad()
    loss_d.backward()
    nn.utils.clip_grad_norm_(discriminator.parameters(), 10.0)
    gradients_d = [p.grad.clone() for p in discriminator.parameters()]
    optimizer_d.step()

    def log_mel(x, window, bins):
        spectrum = torch.stft(
            x[:, 0],
            window,
            window // 4,
            window=torch.hann_window(window),
            center=True,
            return_complex=True,
        )
        return torch.log10((mel_filters(8000, window, bins) @ spectrum.abs()).clamp(min=1e-5))

    losses = {
        "mel": sum(
            F.l1_loss(log_mel(fake, w, n), log_mel(audio, w, n)) for w, n in ((64, 5), (128, 10))
        )
    }
    losses["adversarial"] = losses["feature"] = 0
    for maps_fake, maps_real in zip(discriminator(fake), discriminator(audio), strict=True):
        losses["adversarial"] += torch.mean((1 - maps_fake[-1]) ** 2)
        for a, b in zip(maps_fake[:-1], maps_real[:-1], strict=True):
            losses["feature"] += F.l1_loss(a, b.detach())
    losses["commitment"], losses["codebook"] = out["vq/commitment_loss"], out["vq/codebook_loss"]
    weights = {"mel": 15, "adversarial": 1, "feature": 2, "commitment": 0.25, "codebook": 1}
    total = sum(weight * losses[name] for name, weight in weights.items())
    optimizer_g.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_(codec.parameters(), 1e3)
    gradients_g = [p.grad.clone() for p in codec.parameters()]
    optimizer_g.step()
    return {**losses, "loss": total, "discriminator": loss_d}, gradients_g, gradients_d


def assert_close(actual, expected, relative):
    """Largest difference relative to the largest value of all tensors together."""
    scale = max(e.abs().max() for e in expected)
    worst = max((a - e).abs().max() for a, e in zip(actual, expected, strict=True))
    assert worst <= relative * scale, f"{worst / scale:.2g} of the largest value"


def test_losses_gradients_and_update_are_those_of_a_plain_composition():
    step, audio = small_step("discriminator.periods=[2]"), some_audio()
    codec, discriminator = copy.deepcopy(step.codec).train(), copy.deepcopy(step.discriminator)
    torch.manual_seed(5)
    expected, gradients_g, gradients_d = plain_step(codec, discriminator, audio)
    torch.manual_seed(5)
    losses = step(audio, 0)

    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert_close([p.grad for p in step.discriminator.parameters()], gradients_d, 1e-5)
    assert_close([p.grad for p in step.codec.parameters()], gradients_g, 1e-4)
    # Adam divides a gradient by its size: where that is rounding noise, so is the update, up to the
    # learning rate.
    for ours, theirs in ((step.codec, codec), (step.discriminator, discriminator)):
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        differences = torch.cat([(a - b).abs().flatten() for a, b in pairs])
        assert differences.max() <= 2.1e-4
        assert (differences > 1e-6).float().mean() < 1e-3


def test_discriminators_judge_the_channels_of_stereo_one_by_one():
    step = small_step("discriminator.periods=[2]", "model.channels=2")
    left, right = some_audio(1), some_audio(2)
    audio, apart = torch.cat([left, right], 1), torch.cat([left, right])
    judged = step.discriminator(one_by_one(audio))
    for maps, expected in zip(judged, step.discriminator(apart), strict=True):
        torch.testing.assert_close(maps[-1][::2], expected[-1][:4])
        torch.testing.assert_close(maps[-1][1::2], expected[-1][4:])
    losses = step(audio, 0)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["discriminator"] > 0


def test_learning_rate_decays_with_every_step():
    step = small_step(
        "optimizer.learning_rate=1e-3",
        "optimizer.decay=0.5",
        "losses.adversarial=0",
        "losses.feature=0",
    )
    step(some_audio(), 3)
    assert step.discriminator is None
    assert step.optimizers["generator"].param_groups[0]["lr"] == 1e-3 / 8


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    step = small_step("trainer.ema=0.9")
    step(some_audio(), 0)
    before = copy.deepcopy(step.state_dict())
    broken = some_audio(1)
    broken[0, 0, 100] = float("nan")
    for number in (1, 2):
        step(broken, number)
    after = step.state_dict()
    for name in ("generator", "discriminator"):
        for key, value in before["networks"][name].items():
            assert torch.equal(value, after["networks"][name][key]), key
        states = [content["optimizers"][name]["state"] for content in (before, after)]
        assert all(
            torch.equal(value, states[1][i][key])
            for i, s in states[0].items()
            for key, value in s.items()
        )
    assert {name: int(count) for name, count in step.skipped.items()} == {
        "total": 2,
        "row": 2,
        "longest": 2,
    }
    step(some_audio(2), 3)
    assert {name: int(count) for name, count in step.skipped.items()} == {
        "total": 2,
        "row": 0,
        "longest": 2,
    }


def test_discriminator_warmup_leaves_the_generator_as_it_is():
    step = small_step("trainer.discriminator_warmup=1")
    before = copy.deepcopy(step.state_dict())["networks"]
    losses = step(some_audio(), 0)
    assert set(losses) == {"discriminator", "grad_norm/discriminator"}
    after = step.state_dict()["networks"]
    assert all(
        torch.equal(value, after["generator"][key]) for key, value in before["generator"].items()
    )
    assert not all(
        torch.equal(value, after["discriminator"][key])
        for key, value in before["discriminator"].items()
    )
    assert "mel" in step(some_audio(), 1)


def test_the_discriminator_starts_late():
    step = small_step("trainer.discriminator_start=1")
    before = copy.deepcopy(step.state_dict()["networks"]["discriminator"])
    losses = step(some_audio(), 0)
    assert not losses.keys() & {"discriminator", "adversarial", "feature"}
    expected = sum(weight * losses[name] for name, weight in step.weights.items() if name in losses)
    assert_close([losses["loss"]], [expected], 1e-6)
    after = step.state_dict()["networks"]["discriminator"]
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert losses.keys() < step(some_audio(), 1).keys()


def test_moving_average_follows_the_codec():
    step = small_step("trainer.ema=0.5")
    average = [p.clone() for p in step.codec.parameters()]
    for number in range(3):
        step(some_audio(number), number)
        decay = min(0.5, (number + 1) / (number + 10))
        pairs = zip(average, step.codec.parameters(), strict=True)
        average = [decay * a + (1 - decay) * p.detach() for a, p in pairs]
    assert_close(list(step.best_codec().parameters()), average, 1e-6)


def test_bf16_autocast_keeps_losses_and_quantizer_in_full_precision():
    recipe = load_recipe("tiny", SMALL)
    full, half = TrainingStep(recipe, CPU), TrainingStep(recipe, CPU, "bf16")
    losses = []
    for step in (full, half):
        torch.manual_seed(0)
        losses.append(step(some_audio(), 0))
    assert all(value.dtype == torch.float32 for value in losses[1].values())
    assert losses[1]["loss"].item() == pytest.approx(losses[0]["loss"].item(), rel=0.03)
    assert all(p.dtype == torch.float32 for p in half.codec.parameters())
    # In bfloat16 the layers nearest to the audio would hide what is quiet under their noise.
    dtypes = []
    for layer in (*half.codec.encoder.block, *half.codec.decoder.model):
        layer.register_forward_hook(lambda _, given, made: dtypes.append(made.dtype))
    with half.autocast():
        half.codec(some_audio())
    encoder = [torch.float32] * 2 + [torch.bfloat16] * 3
    assert dtypes == [*encoder, torch.bfloat16, *[torch.float32] * 5]


@pytest.mark.parametrize("form", QUANTIZERS)
def test_every_form_of_the_quantizer_decodes_what_it_encodes_and_learns(form, tmp_path):
    torch.manual_seed(0)
    shape = {"encoder_dim": 4, "encoder_rates": (2, 4), "decoder_dim": 16, "decoder_rates": (4, 2)}
    codec = DAC(**shape, n_codebooks=3, codebook_size=16, quantizer_dropout=0.5, quantizer=form)
    audio = some_audio()
    with torch.no_grad():
        codec.train()(audio)
        encoded = codec.eval().encode(audio)
        z, latents, _ = codec.quantizer.from_codes(encoded.codes)
        assert torch.allclose(z, encoded.z, atol=1e-5)
        assert latents.shape == encoded.latents.shape
        # The residuals were what it says: quantising the first stage's latents finds the first
        # codes again.
        d = codec.config.codebook_dims[0]
        again = codec.quantizer.from_latents(encoded.latents[:, :d])[2]
        assert torch.equal(again[:, 0], encoded.codes[:, 0])
        # Each item of a ragged batch gets what it gets alone.
        lengths = torch.tensor([1024, 512, 1024, 768])
        ragged = codec.encode(audio, lengths=lengths)
        alone = codec.encode(audio[1:2, :, :512])
        assert torch.equal(ragged.codes[1:2, :, :64], alone.codes)
        assert not ragged.codes[1, :, 64:].any()
    out = codec.train()(audio)
    (out["audio"].square().mean() + out["vq/commitment_loss"] + out["vq/codebook_loss"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())
    codec.save(tmp_path / "codec.safetensors")
    loaded = DAC.load(tmp_path / "codec.safetensors")
    assert loaded.config == codec.config
    assert torch.equal(loaded.encode(audio).codes, codec.eval().encode(audio).codes)


def test_stage_by_stage_equals_the_op():
    torch.manual_seed(0)
    codec = DAC(4, (2, 4), None, 16, (4, 2), n_codebooks=3, codebook_size=16)
    z, lengths, counts = (
        torch.randn(4, 16, 20),
        torch.tensor([20, 7, 1, 13]),
        torch.tensor([3, 1, 2, 3]),
    )
    quantizer = codec.quantizer
    from dac_fast.ops.reference import rvq_encode

    weights = [[q.in_proj.normed_weight().squeeze(2) for q in quantizer.quantizers]]
    weights += [[q.in_proj.bias for q in quantizer.quantizers], *quantizer._decode_weights(3)]
    expected = rvq_encode(z, *weights, counts, lengths)
    for actual, wanted in zip(
        quantizer._encode_stages(z, 3, counts, lengths), expected, strict=True
    ):
        assert torch.allclose(actual, wanted, atol=1e-6)


def test_ema_codebook_finds_clusters_and_revives_dead_entries():
    torch.manual_seed(1)
    centres = 5 * torch.randn(8, 3)
    codebook = EMACodebook(24, 3, decay=0.5)
    for number in range(30):
        codebook.update(centres.repeat(25, 1) + 0.05 * torch.randn(200, 3))
        if number == 4:
            # Entries far from all data die, and come back as data.
            codebook.weight[:4] += 1000
            codebook.sums[:4] += 1000 * codebook.usage[:4, None]
    distances = torch.cdist(centres, codebook.weight)
    assert distances.min(1).values.max() < 0.2  # every cluster has an entry
    assert distances.min(0).values.max() < 0.2  # every entry has a cluster
    codebook.update(torch.full((10, 3), float("nan")))
    assert codebook.weight.isfinite().all()

"""The recipes beyond the published models: each learns, and chunks, streams and engine are exact.

Models are a few channels wide and, where nothing may be a near tie, in float64.
"""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from small_codec import SMALL

import dac_fast
from dac_fast import DAC
from dac_fast.cli import commands
from dac_fast.cli.info import describe
from dac_fast.config import UNTRAINED
from dac_fast.corpus.meter import Meter
from dac_fast.corpus.tokenize import Options, tokenize
from dac_fast.inference import export
from dac_fast.model.bottleneck import Latents
from dac_fast.recordings import latents, windows
from dac_fast.storage.latents import LatentFile
from dac_fast.streaming import StreamingDecoder, StreamingEncoder
from dac_fast.training import load_recipe, train

soundfile = pytest.importorskip("soundfile")
CLIP = Path(dac_fast.__file__).parent / "assets" / "tabla_cc0.flac"
NARROW = ("model.encoder_dim=4", "model.decoder_dim=32")


@pytest.fixture(scope="module", params=UNTRAINED)
def codec(request):
    torch.manual_seed(0)
    codec = DAC(**load_recipe(request.param, NARROW).model.to_dict()).double().eval()
    for name, parameter in codec.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0, 0.05)
    return codec


def noise(codec, batch, frames):
    shape = (batch, codec.config.channels, frames * codec.hop_length - 3)
    return 0.3 * torch.randn(shape, dtype=torch.float64)


def encode(codec, audio, lengths=None):
    """Codes, or of a continuous codec latents."""
    if codec.config.continuous:
        return codec.encode_latents(audio, lengths).mean
    return codec.encode(audio, lengths).codes


def decode(codec, kept, lengths=None):
    whole = codec.decode if codec.config.continuous else codec.decode_codes
    return whole(kept, lengths)


def assert_same(actual, expected, tolerance=1e-12):
    """Codes are equal, anything else up to rounding."""
    rounding = tolerance if expected.is_floating_point() else 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding)


@torch.inference_mode()
def test_chunks_give_what_the_whole_gives(codec):
    audio = noise(codec, 1, 40)
    cut = windows.sample_windows(codec, audio[0].split(5000, dim=1), chunk_frames=7)
    kept = torch.cat([windows.encode_batch([window])()[0] for window in cut], dim=2)
    assert_same(kept, encode(codec, audio))
    cut = windows.code_windows(codec, kept, chunk_frames=7)
    restored = torch.cat([windows.decode_batch([window])()[0] for window in cut], dim=1)
    assert_same(restored, decode(codec, kept)[0])


@torch.inference_mode()
def test_streams_give_what_the_whole_gives(codec):
    audio = noise(codec, 2, 30)
    encoder, decoder = StreamingEncoder(codec), StreamingDecoder(codec)
    pieces = audio.split(2 * codec.hop_length // 3, dim=2)
    kept = torch.cat([*map(encoder.push, pieces), encoder.flush()], dim=2)
    assert_same(kept, encode(codec, audio))
    restored = torch.cat([*map(decoder.push, kept.split(7, dim=2)), decoder.flush()], dim=2)
    assert_same(restored, decode(codec, kept))


@torch.inference_mode()
def test_the_engine_gives_what_the_modules_give(codec, tmp_path, pretend_graphs):
    codec.save(tmp_path / "codec.safetensors")
    fused = dac_fast.load(tmp_path / "codec.safetensors", engine=True)
    assert fused.config == codec.config
    sizes = {direction: [(4, 12)] for direction in ("encode", "decode")}
    for hits in (0, 2):
        audio, lengths = noise(codec, 3, 12), torch.tensor([11 * codec.hop_length, 1, 700])
        frames = -(-lengths // codec.hop_length)
        kept = encode(codec, audio, lengths)
        found = encode(fused, audio.float(), lengths)
        # In float32, two entries may be equally near to within rounding.
        assert_same(found.double(), kept.double(), 1e-4 if codec.config.continuous else 0)
        given = kept.float() if codec.config.continuous else kept
        restored = decode(fused, given, frames).double()
        assert_same(restored, decode(codec, kept, frames), 1e-5)
        assert fused.engine.hits == hits
        with torch.inference_mode(False):
            fused.engine._warm_up(sizes)


@pytest.mark.parametrize("name", UNTRAINED)
def test_it_learns_one_recording(name, tmp_path):
    recipe = load_recipe(name, NARROW)
    time = np.arange(recipe.model.sample_rate) / recipe.model.sample_rate
    tones = 0.3 * np.sin(2 * np.pi * np.outer(time, [220, 550])) * np.exp(-3 * time)[:, None]
    soundfile.write(tmp_path / "tones.wav", tones, recipe.model.sample_rate)
    overrides = (
        f"data.train={tmp_path}",
        f"trainer.folder={tmp_path / 'run'}",
        "data.validation=null",
        "data.workers=0",
        "losses.adversarial=0",
        "losses.feature=0",
        "losses.mel_windows=[512,128]",
        "losses.mel_bins=[40,10]",
        "data.seconds=0.25",
        "optimizer.learning_rate=3e-3",
        "trainer.steps=22",
        "trainer.batch_size=1",
        "trainer.log_every=1",
        "trainer.tensorboard=false",
        "trainer.device=cpu",
    )
    train(name, (*NARROW, *overrides), Console(file=io.StringIO()))
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    mel = [json.loads(line)["mel"] for line in lines]
    assert np.mean(mel[-5:]) < 0.5 * mel[0]
    codec = dac_fast.load(tmp_path / "run" / "codec.safetensors")
    assert codec.config == recipe.model
    if codec.config.continuous:
        restored, rate = latents.decode(codec, latents.encode(codec, tmp_path / "tones.wav"))
    else:
        restored, rate = codec.decompress(codec.compress(tmp_path / "tones.wav"))
    assert (restored.shape, rate) == (tones.T.shape, recipe.model.sample_rate)


def small(*changes):
    torch.manual_seed(0)
    return DAC(**load_recipe("tiny", (*SMALL, *changes)).model.to_dict()).eval()


@pytest.fixture(scope="module")
def stereo():
    return small("model.channels=2")


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_stereo_codec_takes_channels_in_pairs(stereo, channels, tmp_path):
    audio = np.random.default_rng(0).uniform(-0.9, 0.9, (channels, 9000)).astype(np.float32)
    file = stereo.compress((audio, 8000))
    pairs = (channels + 1) // 2
    assert file.codes.shape == (pairs, 3, 9000 // 8)
    assert len(set(file.gains)) == 1
    file.save(tmp_path / "a.dac")
    restored, _ = stereo.decompress(tmp_path / "a.dac")
    assert restored.shape == audio.shape

    padded = np.concatenate([audio, audio[-1:]])[: 2 * pairs] * file.gains[0]
    encoded = stereo.encode(torch.from_numpy(padded).view(pairs, 2, -1))
    assert torch.equal(encoded.codes, file.codes)
    with torch.inference_mode():
        expected = stereo.decode_codes(file.codes).flatten(0, 1)[:, :9000] / file.gains[0]
    if channels % 2:
        expected = torch.cat([expected[:-2], expected[-2:].mean(0, keepdim=True)])
    np.testing.assert_allclose(restored, expected, rtol=0, atol=1e-5)


def test_stereo_codes_are_no_mono_codecs(stereo, tmp_path):
    file = stereo.compress((np.zeros((2, 5000), np.float32), 8000))
    with pytest.raises(ValueError, match="the file is of a stereo codec; this one has 1 channel"):
        dac_fast.load("tiny").decompress(file)
    with pytest.raises(ValueError, match="'dac1' has no stereo models; accepted: 'dac2'"):
        file.save(tmp_path / "a.dac", format="dac1")
    with pytest.raises(ValueError, match="channels is 3; accepted: a whole number from 1 to 2"):
        replace(file, channels=3)
    with pytest.raises(ValueError, match="channels 2 fits a .safetensors checkpoint only"):
        stereo.save(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"shape \[1, 1, 512\]; accepted: \[B, 2, T\]"):
        stereo.encode(torch.zeros(1, 1, 512))


def test_stereo_programs_give_what_the_codec_gives(stereo):
    audio = noise(stereo, 2, 5).float()
    codes = export(stereo, "encoder", n_quantizers=2).module()(audio)
    assert torch.equal(codes, stereo.encode(audio, n_quantizers=2).codes)
    restored = export(stereo, "decoder", n_quantizers=2).module()(codes)
    torch.testing.assert_close(restored, stereo.decode_codes(codes), rtol=0, atol=1e-5)


def test_stereo_is_not_tokenized(stereo, tmp_path):
    stereo.save(tmp_path / "stereo.safetensors")
    options = Options(model=str(tmp_path / "stereo.safetensors"), local=True)
    with pytest.raises(ValueError, match="stereo.safetensors is stereo; accepted: mono models"):
        tokenize([str(CLIP)], tmp_path / "out", options, Meter())


@pytest.fixture(scope="module")
def vae():
    return small("model.bottleneck=vae", "model.latent_dim=6")


def test_latents_are_normal_distributions():
    """Their divergence is PyTorch's, their samples have their moments; nothing lies past an end."""
    torch.manual_seed(1)
    mean, log_variance = torch.randn(2, 2, 3, 5)
    lengths = torch.tensor([5, 2])
    mean[1, :, 2:] = log_variance[1, :, 2:] = 0
    found = Latents(mean, log_variance, lengths)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    nats = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(1)
    expected = (nats[0].mean() + nats[1, :2].mean()) / 2
    torch.testing.assert_close(found.kl_loss(), expected)
    samples = torch.stack([found.sample() for _ in range(5000)])
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.12)
    spread = (log_variance / 2).exp()
    torch.testing.assert_close(samples[:, 0].std(0), spread[0], rtol=0.06, atol=0)
    assert (samples[:, 1, :, 2:] == 0).all()


def test_a_continuous_codec_samples_in_training_only(vae):
    audio = noise(vae, 2, 3).float()
    out = vae(audio)
    assert out.keys() == {"audio", "z", "vae/kl_loss"}
    assert out["audio"].shape == audio.shape
    assert torch.equal(out["z"], vae.encode_latents(audio).mean)
    torch.manual_seed(0)
    trained = vae.train()(audio)
    vae.eval()
    assert 0.1 < (trained["z"] - out["z"]).std() < 10
    torch.testing.assert_close(trained["vae/kl_loss"], out["vae/kl_loss"])


def test_an_item_gets_the_latents_that_it_gets_alone(vae):
    audio = noise(vae, 2, 9).float()
    found = vae.encode_latents(audio, torch.tensor([audio.shape[2], 33]))
    alone = vae.encode_latents(audio[1:, :, :33])
    assert found.lengths.tolist() == [9, 5]
    for batched, expected in zip(found[:2], alone[:2], strict=True):
        assert_same(batched[1:, :, :5], expected, 1e-6)
        assert (batched[1, :, 5:] == 0).all()


def test_what_needs_codes_says_that_there_are_none(vae, tmp_path):
    codes = torch.zeros(1, 9, 4, dtype=torch.int64)
    silence = np.zeros(50000, np.float32), 44100
    calls = {
        "has latents, no codes; accepted: encode_latents": [
            lambda: vae.encode(torch.zeros(1, 1, 4096)),
            lambda: vae.decode_codes(codes),
        ],
        "has no .dac files; accepted: dac_fast.recordings.latents": [
            lambda: vae.compress(silence),
            lambda: vae.decompress(dac_fast.load("tiny").compress(silence)),
        ],
        "3 codebooks; accepted: None, of a continuous codec": [
            lambda: StreamingEncoder(vae, n_quantizers=3),
            lambda: export(vae, "encoder", n_quantizers=3),
        ],
        "bottleneck 'vae' fits a .safetensors checkpoint only": [
            lambda: vae.save(tmp_path / "vae.pth"),
            lambda: vae.save(tmp_path / "vae"),
        ],
    }
    for message, some in calls.items():
        for call in some:
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match="has codes, no continuous latents; accepted: encode"):
        dac_fast.load("tiny").encode_latents(torch.zeros(1, 1, 512))
    with pytest.raises(ValueError, match=r"shape \[1, 9, 4\]; accepted: \[1, 6 to 6, F\]"):
        StreamingDecoder(vae).push(codes)


def test_continuous_programs_give_what_the_codec_gives(vae):
    audio = noise(vae, 2, 3).float()
    z = export(vae, "encoder").module()(audio)
    assert_same(z, vae.encode_latents(audio).mean, 1e-5)
    assert_same(export(vae, "decoder").module()(z), vae.decode(z), 1e-5)


def test_halves_of_a_continuous_codec(vae, tmp_path):
    vae.save(tmp_path / "vae.safetensors")
    first, second = (
        dac_fast.load(tmp_path / "vae.safetensors", parts=part) for part in ("encoder", "decoder")
    )
    audio = noise(vae, 1, 9).float()
    z = first.encode_latents(audio).mean
    assert torch.equal(z, vae.encode_latents(audio).mean)
    assert torch.equal(second.decode(z), vae.decode(z))
    with pytest.raises(ValueError, match="this needs the encoder, which was not loaded"):
        second.encode_latents(audio)


@torch.inference_mode()
def test_recordings_become_latents_and_come_back(vae, tmp_path):
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 50000)).astype(np.float32)
    whole = latents.encode(vae, (audio, 8000), chunk_seconds=10)
    file = latents.encode(vae, (audio, 8000), chunk_seconds=0.3)
    assert file.latents.shape == (2, 6, 50000 // 8)
    assert_same(file.latents, whole.latents, 1e-5)
    file.save(tmp_path / "a.latents")
    restored, rate = latents.decode(vae, tmp_path / "a.latents")
    assert (restored.shape, rate) == (audio.shape, 8000)
    exact = vae.decode(file.latents)[:, 0, :50000] / file.gains[:, None]
    np.testing.assert_allclose(restored, exact, rtol=0, atol=1e-5)

    assert LatentFile.load(tmp_path / "a.latents").latents.equal(file.latents)
    wrong = {
        "latents are .* accepted: finite float32 of 3 axes": {"latents": file.latents / 0},
        "original_length is 99999999; accepted: up to": {"original_length": 99999999},
        "gains are .* accepted: positive ones": {"gains": -file.gains},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            replace(file, **change)
    with pytest.raises(ValueError, match=r"file has .* \(3, 8000, 8, 2\); accepted of this"):
        latents.decode(vae, replace(file, latents=file.latents[:, :3]))
    with pytest.raises(ValueError, match="tabla_cc0.flac: no file of latents: "):
        latents.decode(vae, CLIP)
    with pytest.raises(ValueError, match="the codec has codes, no continuous latents"):
        latents.encode(dac_fast.load("tiny"), CLIP)


@pytest.mark.parametrize("command", ["encode", "reconstruct", "evaluate", "tokenize", "serve"])
def test_commands_about_codes_say_that_there_are_none(command, vae, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    shutil.copy(CLIP, tmp_path / "in")
    vae.save(tmp_path / "vae.safetensors")
    words = {"tokenize": ["--local"], "serve": ["--port", "0"]}.get(command, [])
    if command != "serve":
        words = [str(tmp_path / "in"), "-o", str(tmp_path / "out"), *words]
    words = [command, *words, "--model", str(tmp_path / "vae.safetensors"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["dac-fast", *words])
    with pytest.raises(SystemExit) as exited:
        commands.main()
    assert exited.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert " is continuous" in line
    assert "; accepted: " in line
    assert not list((tmp_path / "out").rglob("*"))


def test_info_of_a_continuous_codec_names_no_codebooks(vae, tmp_path):
    vae.save(tmp_path / "vae.safetensors")
    facts = describe(tmp_path / "vae.safetensors")
    assert (facts["bottleneck"], facts["latent dim"], facts["hop length"]) == ("vae", 6, 8)
    assert not any("codebook" in key or key == "bitrate" for key in facts)

"""The recipes beyond the published models: each learns, and chunks, streams and engine are exact.

Models are a few channels wide and, where nothing may be a near tie, in float64.
"""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import dac_fast
from dac_fast import DAC
from dac_fast.config import UNTRAINED
from dac_fast.corpus.meter import Meter
from dac_fast.corpus.tokenize import Options, tokenize
from dac_fast.inference import export
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


@torch.inference_mode()
def test_chunks_give_what_the_whole_gives(codec):
    audio = noise(codec, 1, 40)[0].float().numpy()
    whole = codec.compress((audio, codec.sample_rate), chunk_seconds=1e3)
    frames = codec.hop_length / codec.sample_rate
    parts = codec.compress((audio, codec.sample_rate), chunk_seconds=7 * frames)
    assert torch.equal(parts.codes, whole.codes)


@torch.inference_mode()
def test_streams_give_what_the_whole_gives(codec):
    audio = noise(codec, 2, 30)
    encoder, decoder = StreamingEncoder(codec), StreamingDecoder(codec)
    pieces = audio.split(5 * codec.hop_length // 2, dim=2)
    codes = torch.cat([*map(encoder.push, pieces), encoder.flush()], dim=2)
    assert torch.equal(codes, codec.encode(audio).codes)
    restored = torch.cat([*map(decoder.push, codes.split(7, dim=2)), decoder.flush()], dim=2)
    torch.testing.assert_close(restored, codec.decode_codes(codes), rtol=0, atol=1e-12)


@torch.inference_mode()
def test_the_engine_gives_what_the_modules_give(codec, tmp_path):
    codec.save(tmp_path / "codec.safetensors")
    engine = dac_fast.load(tmp_path / "codec.safetensors", engine=True)
    audio, lengths = noise(codec, 3, 12), torch.tensor([11 * codec.hop_length, 1, 700])
    expected = codec.encode(audio, lengths)
    z = engine.encode(audio.float(), lengths).z
    torch.testing.assert_close(z.double(), expected.z, rtol=0, atol=1e-4)
    restored = engine.decode(expected.z.float(), expected.lengths)
    exact = codec.decode(expected.z, expected.lengths)
    torch.testing.assert_close(restored.double(), exact, rtol=0, atol=1e-5)


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
        "trainer.steps=30",
        "trainer.batch_size=1",
        "trainer.log_every=1",
        "trainer.tensorboard=false",
        "trainer.device=cpu",
    )
    train(name, (*NARROW, *overrides), Console(file=io.StringIO()))
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    mel = [json.loads(line)["mel"] for line in lines]
    assert np.mean(mel[-5:]) < 0.4 * mel[0]
    codec = dac_fast.load(tmp_path / "run" / "codec.safetensors")
    assert codec.config == recipe.model
    restored, rate = codec.decompress(codec.compress(tmp_path / "tones.wav"))
    assert (restored.shape, rate) == (tones.T.shape, recipe.model.sample_rate)


@pytest.fixture(scope="module")
def stereo():
    torch.manual_seed(0)
    return DAC(**load_recipe("44khz_stereo", NARROW).model.to_dict()).eval()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_stereo_codec_takes_channels_in_pairs(stereo, channels, tmp_path):
    audio = np.random.default_rng(0).uniform(-0.9, 0.9, (channels, 9000)).astype(np.float32)
    file = stereo.compress((audio, 44100))
    pairs = (channels + 1) // 2
    assert file.codes.shape == (pairs, 12, -(-9000 // 512))
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
    file = stereo.compress((np.zeros((2, 5000), np.float32), 44100))
    with pytest.raises(ValueError, match="the file is of a stereo codec; this one has 1 channel"):
        dac_fast.load("tiny").decompress(replace(file, codes=file.codes[:, :9]))
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

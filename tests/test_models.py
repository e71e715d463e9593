"""The recipes beyond the published models: each learns, and chunks, streams and engine are exact.

Models are a few channels wide and, where nothing may be a near tie, in float64.
"""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

import dac_fast
from dac_fast import DAC
from dac_fast.config import UNTRAINED
from dac_fast.streaming import StreamingDecoder, StreamingEncoder
from dac_fast.training import load_recipe, train

soundfile = pytest.importorskip("soundfile")
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
    samples = frames * codec.hop_length - 3
    return 0.3 * torch.randn(batch, 1, samples, dtype=torch.float64)


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

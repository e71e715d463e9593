"""Checkpoints: every format there and back, what is damaged or hostile, and the download of weights."""

import functools
import http.server
import json
import pickle
import re
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import dac_fast
from dac_fast import DAC, PRESETS
from dac_fast.storage import download, hugging_face
from dac_fast.storage.checkpoint import CheckpointError


@pytest.fixture
def codec(golden):
    """A small codec with even strides."""
    return DAC.load(golden / "weights_even.pth")


@pytest.mark.parametrize("target", ["a.safetensors", "a.pth", "a"])
@pytest.mark.parametrize("fold", [False, True])
def test_every_format_gives_the_same_codec(codec, tmp_path, target, fold):
    audio = torch.randn(1, 1, 999, generator=torch.Generator().manual_seed(0))
    expected = codec(audio)
    (codec.fold_weight_norm() if fold else codec).save(tmp_path / target)
    again = dac_fast.load(tmp_path / target)
    assert not again.training
    assert again.config == codec.config
    assert torch.equal(again.encode(audio).codes, expected["codes"])
    torch.testing.assert_close(again(audio)["audio"], expected["audio"], rtol=0, atol=1e-5)
    # the way on is always open: from any format to the published one, whose keys are the model's
    again.save(tmp_path / "b.pth")
    assert set(torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]) == set(
        again.state_dict()
    )


def test_newer_weight_norm_spelling_is_read(codec, tmp_path):
    spelling = {
        "weight_g": "parametrizations.weight.original0",
        "weight_v": "parametrizations.weight.original1",
    }
    state = {}
    for key, tensor in codec.state_dict().items():
        for ours, theirs in spelling.items():
            key = key.replace(ours, theirs)
        state[key] = tensor
    kwargs = codec.config.to_dict()
    del kwargs["activation"]
    torch.save({"state_dict": state, "metadata": {"kwargs": kwargs}}, tmp_path / "new.pth")
    for key, tensor in DAC.load(tmp_path / "new.pth").state_dict().items():
        assert torch.equal(tensor, codec.state_dict()[key])


def test_what_a_format_cannot_hold_is_said(golden, tmp_path):
    odd = DAC.load(golden / "weights_odd.pth")
    with pytest.raises(CheckpointError, match="latent_dim 20 has no place"):
        odd.save(tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"accepted: \.safetensors, \.pth"):
        odd.save(tmp_path / "a.bin")
    leaky = DAC(
        encoder_dim=2, encoder_rates=[2], decoder_dim=4, decoder_rates=[2], activation="leaky_relu"
    )
    with pytest.raises(CheckpointError, match="activation 'leaky_relu'"):
        leaky.save(tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


class Hostile:
    """Unpickles to a call that leaves a trace."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def test_damaged_and_hostile_checkpoints(codec, golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codec.save("good.safetensors")
    good, published = (
        (tmp_path / "good.safetensors").read_bytes(),
        (golden / "weights_even.pth").read_bytes(),
    )
    state = load_file("good.safetensors")
    config = {"dac_fast": json.dumps(codec.config.to_dict())}
    name = "encoder.block.0.bias"
    files = {
        "cut.safetensors": good[: len(good) // 2],
        "cut.pth": published[: len(published) // 2],
        "empty.pth": b"",
        "text.safetensors": b"not a checkpoint",
        "hostile.pth": pickle.dumps(Hostile(), protocol=2),
    }
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    torch.save({"state_dict": Hostile(), "metadata": {"kwargs": {}}}, "hostile2.pth")
    torch.save({"weights": 1}, "other.pth")
    save_file(state, "bare.safetensors")
    save_file({k: v for k, v in state.items() if k != name}, "lacks.safetensors", config)
    save_file({**state, "more": torch.zeros(1)}, "more.safetensors", config)
    save_file({**state, name: torch.zeros(3)}, "shape.safetensors", config)
    save_file(state, "config.safetensors", {"dac_fast": '{"encoder_dim": "eight"}'})
    save_file(state, "key.safetensors", {"dac_fast": '{"encodr_dim": 8}'})
    messages = {
        "cut.safetensors": "not a readable checkpoint",
        "cut.pth": "not a readable checkpoint",
        "empty.pth": "not a readable checkpoint",
        "text.safetensors": "not a readable checkpoint",
        "hostile.pth": "no checkpoint, or it holds more than tensors and plain values",
        "hostile2.pth": "no checkpoint, or it holds more than tensors and plain values",
        "other.pth": "lacks state_dict",
        "bare.safetensors": "no configuration inside",
        "lacks.safetensors": f"lacks {name}",
        "more.safetensors": "has an unexpected more",
        "shape.safetensors": rf"{name} is \[3\], expected \[8\]",
        "config.safetensors": "encoder_dim is 'eight'",
        "key.safetensors": "unknown configuration key 'encodr_dim'",
        "absent.pth": "no such checkpoint",
    }
    for file, message in messages.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            DAC.load(file)
        assert file in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_bundled_model_and_unknown_names():
    codec = dac_fast.load("tiny")
    assert codec.name == "tiny"
    assert codec.config.decoder_dim == PRESETS["tiny"].decoder_dim
    with pytest.raises(ValueError, match="unknown model '48khz'; accepted: 44khz"):
        dac_fast.load("48khz")
    half = dac_fast.load("tiny", dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that knows byte ranges, as the published releases' does."""

    requests: list = []  # noqa: RUF012 (shared by a test's server)

    def do_GET(self):
        data = (self.server.folder / self.path.lstrip("/")).read_bytes()
        asked = self.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        self.requests.append(start)
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + self.server.limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def release(tmp_path, monkeypatch, codec):
    """A preset's weights on a local server: (server, its folder); `limit` breaks a download off."""
    monkeypatch.setitem(PRESETS, "16khz", codec.config)
    monkeypatch.setenv("DAC_FAST_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "release"
    (folder / "0.0.5").mkdir(parents=True)
    codec.save(folder / "0.0.5" / "weights_16khz.pth")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(RangeHandler))
    server.folder, server.limit = folder, 1 << 30
    RangeHandler.requests.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DAC_FAST_MIRROR", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def test_download_goes_on_where_it_broke_off(release):
    release.limit = 100_000
    with pytest.raises(download.DownloadError, match=r"broke off after 100000 of \d+ bytes"):
        download.download("16khz")
    release.limit = 1 << 30
    seen = []
    path = download.download("16khz", progress=lambda done, total: seen.append((done, total)))
    assert RangeHandler.requests == [0, 100_000]
    assert path.read_bytes() == (release.folder / "0.0.5" / "weights_16khz.pth").read_bytes()
    assert seen[-1][0] == seen[-1][1] == path.stat().st_size
    assert dac_fast.load("16khz").name == "16khz"
    assert len(RangeHandler.requests) == 2


def test_damaged_and_wrong_downloads_are_not_kept(release, monkeypatch, tmp_path):
    file = release.folder / "0.0.5" / "weights_16khz.pth"
    good = bytearray(file.read_bytes())
    damaged = good.copy()
    damaged[len(good) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(download.DownloadError, match="damaged and was removed"):
        download.download("16khz")
    file.write_bytes(good)
    monkeypatch.setitem(PRESETS, "16khz", dac_fast.Config())
    with pytest.raises(download.DownloadError, match="that of 16khz is 64"):
        download.download("16khz")
    assert not list((tmp_path / "cache").iterdir())


def test_download_from_a_folder_and_without_a_network(release, monkeypatch):
    monkeypatch.setenv("DAC_FAST_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(
        download.DownloadError, match="cannot get 16khz from http://127.0.0.1:9/0.0.5"
    ) as caught:
        download.download("16khz")
    assert "\n" not in str(caught.value)
    assert download.download("16khz", mirror=str(release.folder)).exists()


def test_hugging_face_names_cover_the_whole_model(codec):
    names = set(hugging_face._published_names(codec.config).values())
    modules = {
        key.rsplit(".", 1)[0] for key in codec.state_dict() if not key.startswith("quantizer.")
    }
    assert modules == names

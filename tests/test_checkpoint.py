"""Checkpoints: every format there and back, damaged and hostile ones, the download of weights."""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

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
    torch.save({"step": 1}, "step_1.pt")
    save_file(state, "bare.safetensors")
    save_file({k: v for k, v in state.items() if k != name}, "lacks.safetensors", config)
    save_file({**state, "more": torch.zeros(1)}, "more.safetensors", config)
    save_file({**state, name: torch.zeros(3)}, "shape.safetensors", config)
    save_file(state, "config.safetensors", {"dac_fast": '{"encoder_dim": "eight"}'})
    save_file(state, "key.safetensors", {"dac_fast": '{"encodr_dim": 8}'})
    messages = {
        "cut.safetensors": "not a readable checkpoint",
        "cut.pth": "not a checkpoint, or a damaged one: .*; accepted: .safetensors, or what",
        "empty.pth": "not a checkpoint, or a damaged one: File is not a zip file",
        "text.safetensors": "not a readable checkpoint",
        "hostile.pth": "not a checkpoint, or a damaged one: File is not a zip file",
        "step_1.pt": "the state of a training run; accepted: best.safetensors or codec.safetensors",
        "hostile2.pth": "not a readable checkpoint: it holds more than tensors and plain values",
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


def published_file(path, codec, state=(), **kwargs):
    """A .pth checkpoint with another state or configuration in places."""
    values = codec.config.to_dict() | kwargs
    del values["activation"]
    content = {"state_dict": codec.state_dict() | dict(state), "metadata": {"kwargs": values}}
    torch.save(content, path)


@pytest.mark.parametrize("format", ["a.safetensors", "a.pth", "a"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_dim": 10**9}, "encoder_dim is 1000000000; accepted: numbers up to 1048576"),
        ({"encoder_dim": 2**15}, "the number of channels is 262144; accepted: up to 65536"),
        ({"encoder_dim": 4096}, r"expected \[(4096|8192)"),
        ({"n_codebooks": 10**5}, "n_codebooks is 100000; accepted: up to 1024"),
        ({"n_codebooks": 99}, "lacks quantizer.quantizers.10.codebook.weight"),
        ({"encoder_rates": [2] * 10**5}, r"encoder_rates is \[2, 2.*up to 1024 of them"),
        (
            {"encoder_rates": [2] * 17, "decoder_rates": [2] * 17, "decoder_dim": 2**17},
            "the number of rates is 17; accepted: up to 16",
        ),
        ({"sample_rate": 10**8}, "sample_rate is 100000000"),
    ],
)
def test_a_configuration_that_its_tensors_do_not_have(codec, tmp_path, format, changes, message):
    """Nothing is built of what a few bytes claim, which would take tens of GB, or minutes."""
    path = tmp_path / format
    codec.save(path)
    # The latent's width follows from the encoder's where nothing is said.
    changes = {"latent_dim": codec.config.latent_dim} | changes
    if format == "a.pth":
        published_file(path, codec, **changes)
    elif format == "a":
        names = hugging_face.VALUES | {
            "latent_dim": "hidden_size",
            "decoder_rates": "upsampling_ratios",
        }
        config = json.loads((path / "config.json").read_text())
        config |= {names[name]: value for name, value in changes.items()}
        (path / "config.json").write_text(json.dumps(config))
    else:
        config = codec.config.to_dict() | changes
        save_file(load_file(path), path, {"dac_fast": json.dumps(config)})
    with pytest.raises(CheckpointError, match=message):
        DAC.load(path)


class Scripted:
    """Pickles as a call of that function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_tensors_that_are_none(codec, tmp_path):
    path, name = tmp_path / "a.pth", "encoder.block.0.bias"
    odd = {"encoder.block.0.weight": torch.zeros(1).expand(10**6, 10**5)}
    for state, message in [
        (odd, "a tensor of 100000000000 elements in a storage of 1"),
        ({"a.weight": torch.zeros(1)[0]}, r"a.weight is of shape \[\]"),
        ({name: torch.zeros(0)}, "a tensor of 0 elements"),
        ({name: 7}, f"{name} is a int; accepted: a tensor"),
        ({name: {"a": 1}}, f"{name} is a dict; accepted: a tensor"),
        ({name: torch.zeros(8, dtype=torch.int64)}, "the name 'torch LongStorage'"),
        ({name: torch.zeros(8).to_sparse()}, "the name 'torch._utils _rebuild_sparse_tensor'"),
        ({5: torch.zeros(8)}, "a key that is no text"),
        ({(1, 2): torch.zeros(8)}, "a key that is no text"),
        ({"a\n\x1b[31m": torch.zeros(8)}, r"has an unexpected a\\n\\x1b\[31m"),
        ({name: 1 << 2000}, "a number of more than 64 bits"),
        ({name: Scripted(bytearray, 10**12)}, "the name '(builtins|__builtin__) bytearray'"),
        ({name: torch.full((8,), torch.nan)}, f"{name} holds a value that is not finite"),
        (
            {name: torch.full((8,), 1e300, dtype=torch.float64)},
            f"{name} holds a value that is not finite",
        ),
        ({"encoder.block.0.weight_v": torch.zeros(8, 1, 7)}, "has a row of zeros"),
        ({"encoder.block.0.weight": torch.zeros(8, 1, 7)}, "is stored twice"),
    ]:
        published_file(path, codec, state)
        with pytest.raises(CheckpointError, match=message) as caught:
            DAC.load(path)
        assert "\n" not in str(caught.value)
    pickled = b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"K\x01s."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
    with pytest.raises(CheckpointError, match="a key that is no text"):
        DAC.load(path)


def test_views_of_one_storage_become_tensors_of_their_own(codec, tmp_path):
    """What a checkpoint stores once for two tensors, training must not change in both."""
    state = dict(codec.state_dict())
    name, other = "encoder.block.0.bias", "encoder.block.1.block.0.block.1.bias"
    state[other] = state[name]
    published_file(tmp_path / "a.pth", codec, state)
    again = DAC.load(tmp_path / "a.pth").state_dict()
    again[name].zero_()
    assert torch.equal(again[other], codec.state_dict()[name])
    assert again[name].data_ptr() != again[other].data_ptr()


def test_a_filter_of_zeros_stays_one(codec, tmp_path):
    """Folded, it has no direction: normed anew, it must not become NaN."""
    codec.fold_weight_norm()
    codec.encoder.block[0].weight[3] = 0
    codec.save(tmp_path / "a.safetensors")
    again = DAC.load(tmp_path / "a.safetensors")
    torch.testing.assert_close(
        again.encoder.block[0].normed_weight(), codec.encoder.block[0].weight, rtol=1e-6, atol=0
    )


def test_archives_that_torch_does_not_write(codec, golden, tmp_path):
    """Compressed records could hold a thousand times the file; encrypted ones are read as plain."""
    path = tmp_path / "a.pth"
    data = bytearray((golden / "weights_even.pth").read_bytes())
    with zipfile.ZipFile(golden / "weights_even.pth") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
        damaged = archive.getinfo("weights_even/data/7").header_offset + 200
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        DAC.load(path)
    encrypted = data.copy()
    entry = encrypted.index(b"PK\x01\x02")
    encrypted[entry + 8] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        DAC.load(path)
    # The name before a record goes on for 4 kB, and would be quoted.
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    named = bytearray(path.read_bytes())
    start = named.index(b"weights_even/data.pkl")
    named[start - 4 : start - 2] = b"\xff\x0f"
    path.write_bytes(named)
    with pytest.raises(CheckpointError, match="File name in directory") as caught:
        DAC.load(path)
    assert len(str(caught.value)) < 500
    data[damaged] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a checkpoint, or a damaged one"):
        DAC.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/.data/extern_modules", "torch")
        archive.writestr("package/DAC/model.pkl", b"")
    with pytest.raises(
        CheckpointError, match="a torch.package, which is a program; accepted: the weights"
    ):
        DAC.load(path)


def test_folders_of_the_published_training(codec, tmp_path):
    run = tmp_path / "run"
    for tag in ("best", "latest"):
        (run / tag / "dac").mkdir(parents=True)
        codec.save(run / tag / "dac" / "weights.pth")
    for folder in (run / "best" / "dac", run / "best"):
        assert DAC.load(folder).config == codec.config
    with pytest.raises(
        CheckpointError, match="2 checkpoints; accepted: best/dac/weights.pth, latest/"
    ):
        DAC.load(run)
    with pytest.raises(CheckpointError, match="not a checkpoint: a folder without config.json"):
        DAC.load(tmp_path)
    # Ours has both in one folder.
    codec.save(tmp_path / "codec.safetensors")
    assert DAC.load(tmp_path).config == codec.config


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_only_regular_files_are_opened(codec, tmp_path):
    codec.save(tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(CheckpointError, match="config.json is not a regular file"):
        DAC.load(tmp_path / "a")
    config.unlink()
    config.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="config.json is not a regular file"):
        DAC.load(tmp_path / "a")
    for name in ("b.pth", "b.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name} is missing or not a regular file"):
            DAC.load(tmp_path / name)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits")
def test_a_full_disk_leaves_what_was_there(codec, tmp_path):
    """In a process of its own, which cannot write more than 100 kB to a file."""
    targets = [str(tmp_path / name) for name in ("a.safetensors", "a.pth", "a")]
    for target in targets:
        codec.save(target)
    before = contents(tmp_path)
    program = """if True:
        import resource, signal, sys
        import dac_fast
        from dac_fast.files import OutputError
        codec = dac_fast.load(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for target in sys.argv[1:]:
            try:
                codec.save(target)
            except OutputError as error:
                print(error)
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-c", program, *targets],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    assert all(f"{target}" in line for target, line in zip(targets, lines))
    assert contents(tmp_path) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_hugging_face_folder_is_replaced_whole(codec, tmp_path):
    """Other files in it stay; and transformers finds its feature extractor."""
    auto = pytest.importorskip("transformers", reason="needs the extra `parity`")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text("mine")
    codec.save(tmp_path / "a")
    codec.save(tmp_path / "a")
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(os.listdir(tmp_path / "a")) == files
    assert os.listdir(tmp_path) == ["a"]
    for loader in (auto.AutoFeatureExtractor, auto.AutoProcessor):
        extractor = loader.from_pretrained(tmp_path / "a")
        assert (extractor.sampling_rate, extractor.hop_length) == (44100, codec.hop_length)
        audio = [0.5] * 1000
        padded = extractor(audio, sampling_rate=44100, return_tensors="pt")["input_values"]
        assert padded.shape == (1, 1, -(-1000 // codec.hop_length) * codec.hop_length)


def test_bundled_model_and_unknown_names():
    codec = dac_fast.load("tiny")
    assert codec.name == "tiny"
    assert codec.config.decoder_dim == PRESETS["tiny"].decoder_dim
    with pytest.raises(ValueError, match="unknown model '96khz'; accepted: 44khz"):
        dac_fast.load("96khz")
    half = dac_fast.load("tiny", dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that knows byte ranges, as the published releases' does."""

    requests: list = []  # noqa: RUF012 (shared by a test's server)

    def do_GET(self):
        file = self.server.folder / self.path.lstrip("/")
        if not file.exists():
            self.send_error(404)
            return
        data = file.read_bytes()
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
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
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
    assert str(caught.value).endswith(
        "accepted without it: the path of a checkpoint (--model PATH), or a mirror that has "
        "0.0.5/weights_16khz.pth (DAC_FAST_MIRROR, or dac-fast download --mirror)"
    )
    assert download.download("16khz", mirror=str(release.folder)).exists()


def test_hugging_face_names_cover_the_whole_model(codec):
    names = set(hugging_face._published_names(codec.config).values())
    modules = {
        key.rsplit(".", 1)[0] for key in codec.state_dict() if not key.startswith("quantizer.")
    }
    assert modules == names


def test_a_published_hash_is_checked_and_kept(release, tmp_path):
    beside = release.folder / "0.0.5" / "weights_16khz.pth.sha256"
    beside.write_text("0" * 64 + "  weights_16khz.pth\n")
    with pytest.raises(download.DownloadError, match=r"that of .*\.sha256 is 0000"):
        download.download("16khz")
    assert not list((tmp_path / "cache").iterdir())
    data = (release.folder / "0.0.5" / "weights_16khz.pth").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    beside.write_text(f"{digest}  weights_16khz.pth\n")
    path = download.download("16khz")
    assert path.with_name("16khz.pth.sha256").read_text() == f"{digest}  16khz.pth\n"


@pytest.mark.parametrize("size", [1000, 10**6])
def test_what_was_left_of_another_file_is_fetched_anew(release, tmp_path, size):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "16khz.pth.part").write_bytes(b"another file" * size)
    path = download.download("16khz")
    assert path.read_bytes() == (release.folder / "0.0.5" / "weights_16khz.pth").read_bytes()


def test_many_at_once_fetch_once(release, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: download.download("16khz"), range(8)))
    assert len(set(paths)) == 1
    assert RangeHandler.requests == [0]
    assert sorted(os.listdir(tmp_path / "cache")) == ["16khz.pth", "16khz.pth.sha256"]


@pytest.mark.parametrize(
    ("begins", "message"),
    [
        (b"", "no answer within 0.4 s"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n", "less than 1000 bytes a second"),
    ],
)
def test_a_source_that_sends_a_byte_now_and_then(release, monkeypatch, begins, message):
    """Each byte comes before a timeout of the connection would end it."""
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    stop = threading.Event()

    def serve(server):
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(begins)
            while not stop.wait(0.01):
                connection.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        try:
            with pytest.raises(download.DownloadError, match=message):
                download.download("16khz", f"http://127.0.0.1:{server.getsockname()[1]}")
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense",
        b"HTTP/1.0 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 99999999999\r\n\r\nPK",
        b"HTTP/1.0 404 \x1b[31mred\r\n\r\n",
        b"HTTP/1.0 301 Moved\r\nLocation: http://[\r\n\r\n",
        b"",
    ],
)
def test_answers_that_are_none(release, answer):
    def serve(server):
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        with pytest.raises(download.DownloadError, match="cannot get 16khz from") as caught:
            download.download("16khz", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert str(caught.value).isprintable()
        thread.join()

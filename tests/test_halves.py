"""Half a codec gives what the whole gives in its direction; what needs the other half says so."""

import pytest
import torch

import dac_fast
from dac_fast import StreamingDecoder, StreamingEncoder
from dac_fast.audio import writing
from dac_fast.inference import export
from dac_fast.model.halves import MissingPartError

SAMPLES = 6000
NEEDS = {"encoder": "this needs the decoder, which", "decoder": "this needs the encoder, which"}


@pytest.fixture(scope="module")
def checkpoint(golden):
    """Of even strides, so that every format holds it."""
    return golden / "weights_even.pth"


@pytest.fixture(scope="module")
def whole(checkpoint):
    return dac_fast.load(checkpoint)


@pytest.fixture(scope="module")
def audio():
    return torch.randn(2, 1, SAMPLES, generator=torch.manual_seed(0)) / 4


@pytest.mark.parametrize("name", ["ours.safetensors", "published.pth", "hugging_face"])
def test_a_half_has_its_own_weights_alone(whole, name, tmp_path):
    checkpoint = tmp_path / name
    whole.save(checkpoint)
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        half = dac_fast.load(checkpoint, parts=part)
        assert half.parts == part
        expected = {key for key in whole.state_dict() if not key.startswith(f"{other}.")}
        assert half.state_dict().keys() == expected
        assert not any(parameter.is_meta for parameter in half.parameters())


@pytest.mark.parametrize("damaged", ["encoder.block.0.bias", "decoder.model.0.bias"])
def test_the_other_half_is_not_read(whole, tmp_path, damaged):
    """A value that no codec can have is found by whoever reads it."""
    broken = {key: value.clone() for key, value in whole.state_dict().items()}
    broken[damaged][0] = torch.nan
    codec = dac_fast.DAC(**whole.config.to_dict())
    codec.load_state_dict(broken)
    present = damaged.split(".")[0]
    for name in ("a.safetensors", "a.pth", "a"):
        codec.save(tmp_path / name)
        with pytest.raises(ValueError, match="not finite"):
            dac_fast.load(tmp_path / name, parts=present)
        other = "decoder" if present == "encoder" else "encoder"
        dac_fast.load(tmp_path / name, parts=other)


@torch.no_grad()
@pytest.mark.parametrize("engine", [False, True])
def test_halves_give_what_the_whole_gives(whole, checkpoint, audio, engine, tmp_path):
    expected = whole.encode(audio)
    encoder, decoder = (
        dac_fast.load(checkpoint, parts=part, engine=engine) for part in ("encoder", "decoder")
    )
    codes = encoder.encode(audio).codes
    assert torch.equal(codes, expected.codes)
    restored = whole.decode_codes(codes)
    torch.testing.assert_close(decoder.decode_codes(codes), restored, rtol=0, atol=1e-4)
    torch.testing.assert_close(decoder.decode(expected.z), restored, rtol=0, atol=1e-4)
    pieces = StreamingEncoder(encoder), StreamingDecoder(decoder)
    streamed = torch.cat([pieces[0].push(audio), pieces[0].flush()], 2)
    assert torch.equal(streamed, codes)
    streamed = torch.cat([pieces[1].push(codes), pieces[1].flush()], 2)
    torch.testing.assert_close(streamed, restored, rtol=0, atol=1e-4)
    for padding in (True, False):
        recording = audio[0].numpy(), whole.sample_rate
        file = encoder.compress(recording, chunk_seconds=0.05, padding=padding)
        assert torch.equal(
            file.codes, whole.compress(recording, chunk_seconds=0.05, padding=padding).codes
        )
        file.save(tmp_path / f"{padding}.dac")
        ours, rate = decoder.decompress(tmp_path / f"{padding}.dac")
        assert rate == whole.sample_rate
        torch.testing.assert_close(
            torch.from_numpy(ours), torch.from_numpy(whole.decompress(file)[0]), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("engine", [False, True])
def test_what_needs_the_other_half_says_so(whole, checkpoint, audio, engine, tmp_path):
    encoder, decoder = (
        dac_fast.load(checkpoint, parts=part, engine=engine) for part in ("encoder", "decoder")
    )
    codes = torch.zeros(1, 1, 9, dtype=torch.int64)
    file = whole.compress((audio[0].numpy(), whole.sample_rate))
    z = torch.zeros(1, whole.config.latent_dim, 9)
    for call in (
        lambda: encoder.decode_codes(codes),
        lambda: encoder.decode(z),
        lambda: encoder.decoder(z),
        lambda: encoder(audio),
        lambda: encoder.decompress(file),
        lambda: StreamingDecoder(encoder),
        lambda: export(encoder, "decoder"),
        lambda: encoder.save(tmp_path / "half.safetensors"),
    ):
        with pytest.raises(MissingPartError, match=NEEDS["encoder"]):
            call()
    for call in (
        lambda: decoder.encode(audio),
        lambda: decoder.encoder(audio),
        lambda: decoder(audio),
        lambda: decoder.compress("of a file that is not there.wav"),
        lambda: StreamingEncoder(decoder),
        lambda: export(decoder, "encoder"),
    ):
        with pytest.raises(MissingPartError, match=NEEDS["decoder"]):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="precision is 'fp32' for 'encode'; .* for decode$"):
        decoder.optimize(precision={"encode": "fp32"})
    with pytest.raises(ValueError, match="parts is 'both'; accepted: 'encoder', 'decoder', or"):
        dac_fast.load("44khz", parts="both")


def test_programs_of_a_half(dac_fast_cli, checkpoint, tmp_path):
    decoder = dac_fast.load(checkpoint, parts="decoder")
    codes = torch.zeros(2, 2, 9, dtype=torch.int64)
    program = export(decoder, "decoder", n_quantizers=2).module()
    torch.testing.assert_close(program(codes), decoder.decode_codes(codes), rtol=0, atol=1e-4)
    half = ("--model", checkpoint, "--parts", "encoder", "--format", "pt2")
    assert dac_fast_cli("export", tmp_path, *half)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt2"]
    (tmp_path / "encoder.pt2").write_bytes(b"kept")
    rest = ("--model", checkpoint, "--format", "pt2", "--existing", "skip")
    code, out, _ = dac_fast_cli("export", tmp_path, *rest)
    assert (code, out) == (0, f"wrote {tmp_path}/decoder.pt2\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.pt2", "encoder.pt2"]
    assert (tmp_path / "encoder.pt2").read_bytes() == b"kept"


def test_the_commands_load_what_they_need(dac_fast_cli, whole, checkpoint, tmp_path, monkeypatch):
    loaded = []
    load = dac_fast.DAC.load

    def watched(path, parts=None):
        loaded.append(parts)
        return load(path, parts)

    monkeypatch.setattr(dac_fast.DAC, "load", watched)
    clip, codes, model = tmp_path / "a.wav", tmp_path / "a.dac", ("--model", checkpoint)
    writing.write(clip, torch.zeros(1, SAMPLES).numpy(), whole.sample_rate)
    assert dac_fast_cli("encode", clip, "-o", codes, *model)[0] == 0
    assert dac_fast_cli("decode", codes, "-o", tmp_path / "b.wav", *model)[0] == 0
    assert loaded == ["encoder", "decoder"]


@pytest.mark.parametrize("parts", ["encoder", "decoder"])
def test_a_server_of_half_a_codec(whole, checkpoint, parts):
    pytest.importorskip("fastapi")
    from served import noise, serving

    from dac_fast.serving import ServerError

    audio = noise(0.1, rate=whole.sample_rate), whole.sample_rate
    file = whole.compress(audio)
    codec = dac_fast.load(checkpoint, parts=parts, engine=True)
    with serving(codec) as served, served.client() as client:
        assert client.models()[0]["parts"] == parts
        requests = {"encoder": lambda: client.encode(audio), "decoder": lambda: client.decode(file)}
        requests.pop(parts)()
        for refused in (*requests.values(), lambda: client.reconstruct(audio)):
            with pytest.raises(ServerError, match=f"501.*{NEEDS[parts]}"):
                refused()
        streams = {"encoder": client.encode_stream, "decoder": client.decode_stream}
        with streams.pop(parts)() as stream:
            stream.finish()
            list(stream)
        (refused,) = streams.values()
        with pytest.raises(ServerError, match=f"1003.*{NEEDS[parts]}"), refused():
            pass

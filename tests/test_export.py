"""Exported programs and models give what the codec gives, at any batch and length."""

import copy

import pytest
import torch

from dac_fast import DAC
from dac_fast.inference import Decode, Encode, export, export_onnx, write_aoti, write_onnx
from dac_fast.streaming import EncodeStep
from dac_fast.streaming.export import STEPS

SHAPES = [(1, 1), (1, 700), (3, 333), (2, 10)]


def small(**changes):
    """An odd stride and codebooks of several sizes; small, since tracing takes its time."""
    sizes = {"encoder_dim": 8, "encoder_rates": [5], "decoder_dim": 16, "decoder_rates": [5]}
    sizes |= {"n_codebooks": 2, "codebook_size": 32, "codebook_dim": [2, 3], "sample_rate": 8000}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = DAC(**(sizes | changes)).eval()
        # What leaks in from outside of a signal shows by the biases.
        for name, parameter in codec.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, 0, 0.05)
        return codec


@pytest.fixture(scope="module")
def codec():
    return small()


def random_audio(batch, samples):
    return 0.3 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(samples))


def decibels(signal, other):
    return 10 * torch.log10(signal.square().mean() / (signal - other).square().mean()).item()


def session(path):
    """A model in ONNX Runtime, called with tensors in order."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    made = runtime.InferenceSession(path, options)
    names = [given.name for given in made.get_inputs()]

    def run(*tensors):
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors)}
        return [torch.from_numpy(result) for result in made.run(None, given)]

    return made, run


@torch.inference_mode()
def test_programs_give_what_codec_and_engine_give(codec, tmp_path):
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    encoder, decoder = (
        export(codec, "encoder", n_quantizers=1),
        export(codec, "decoder", n_quantizers=1),
    )
    torch.export.save(decoder, tmp_path / "decoder.pt2")
    decoder = torch.export.load(tmp_path / "decoder.pt2")
    fused = copy.deepcopy(codec).optimize()
    for batch, samples in SHAPES:
        audio = random_audio(batch, samples)
        expected = codec.encode(audio, n_quantizers=1).codes
        # a single frame runs only without PyTorch's guards
        guards = expected.shape[2] > 1
        codes = encoder.module(check_guards=guards)(audio)
        assert torch.equal(codes, expected)
        assert torch.equal(codes, fused.encode(audio, n_quantizers=1).codes)
        restored = decoder.module(check_guards=guards)(expected)
        for runner in (codec, fused):
            torch.testing.assert_close(restored, runner.decode_codes(codes), rtol=0, atol=1e-5)
    assert before.keys() == codec.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in codec.state_dict().items())


@torch.inference_mode()
def test_onnx_models_give_what_the_codec_gives(codec, tmp_path):
    pytest.importorskip("onnxscript")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "encoder.onnx").write_bytes(b"of old")
    paths = export_onnx(codec, tmp_path / "models")
    assert sorted(paths) == sorted((tmp_path / "models").iterdir())
    (encoder, encode), (decoder, decode) = (session(path) for path in paths)
    audio_face, codes_face = ["batch", 1, "samples"], ["batch", 2, "frames"]
    assert encoder.get_inputs()[0].shape == decoder.get_outputs()[0].shape == audio_face
    assert decoder.get_inputs()[0].shape == encoder.get_outputs()[0].shape == codes_face
    assert encoder.get_modelmeta().custom_metadata_map == {"sample_rate": "8000", "hop_length": "5"}
    for batch, samples in SHAPES:
        audio = random_audio(batch, samples)
        expected = codec.encode(audio).codes
        assert torch.equal(encode(audio)[0], expected)
        (restored,) = decode(expected)
        torch.testing.assert_close(restored, codec.decode_codes(expected), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_half_precision(codec, tmp_path):
    """The encoder as a module: it chooses other entries for few frames of the first codebook."""
    pytest.importorskip("onnxscript")
    audio = random_audio(2, 2000)
    codes = codec.encode(audio).codes
    assert (Encode(codec, precision="fp16")(audio) == codes)[:, 0].float().mean() > 0.95
    write_onnx(Decode(codec, precision="fp16"), tmp_path / "decoder.onnx")
    _, decode = session(tmp_path / "decoder.onnx")
    audio = decode(codes)[0]
    assert decibels(codec.decode_codes(codes), audio) > 40
    # The audio itself is not rounded to half precision.
    assert (audio != audio.half().float()).any()


def in_steps(run, step, pieces):
    """What a step gives for pieces of whole signals, from the first frame to the last."""
    batch, state_size = pieces[0].shape[0], step.inputs[3].shape[1]
    per_frame = step.hop_length if isinstance(step, EncodeStep) else 1
    total = sum(piece.shape[2] for piece in pieces) // per_frame
    anything = pieces[0][..., :1].expand(-1, -1, per_frame)
    state, frames, outputs = torch.zeros(batch, state_size), 0, []
    for piece in [*pieces, *[anything] * step.numbers["delay"]]:
        length = total if frames >= total else 2**40
        result, state = run(piece, *torch.tensor([[frames], [length]]).expand(2, batch), state)
        outputs.append(result)
        frames += piece.shape[2] // per_frame
    lag = step.numbers["lag"]
    positions = total * (1 if per_frame > 1 else step.hop_length)
    return torch.cat(outputs, dim=2)[..., lag : lag + positions]


@torch.inference_mode()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_rates": [2, 4], "decoder_rates": [4, 2]},
        {"channels": 2, "bottleneck": "vae", "latent_dim": 6},
    ],
    ids=["odd", "even", "stereo and continuous"],
)
def test_steps_joined_give_the_whole(changes):
    codec = small(**changes)
    hop = codec.hop_length
    audio = random_audio(2, 20 * hop).expand(-1, codec.config.channels, -1)
    kept = Encode(codec)(audio)
    restored = Decode(codec)(kept)
    encoder, decoder = (make(codec) for make in STEPS.values())
    for sizes in ([20], [1] * 20, [5, 1, 11, 3]):
        pieces = audio.split([size * hop for size in sizes], dim=2)
        torch.testing.assert_close(in_steps(encoder, encoder, pieces), kept, rtol=0, atol=2e-5)
        pieces = kept.split(sizes, dim=2)
        torch.testing.assert_close(in_steps(decoder, decoder, pieces), restored, rtol=0, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("part", STEPS)
def test_a_step_in_onnx_runtime(codec, tmp_path, part):
    """Of one stream and of several, by frames and by several at once."""
    pytest.importorskip("onnxscript")
    step, path = STEPS[part](codec), tmp_path / "step.onnx"
    write_onnx(step, path)
    made, run = session(path)
    assert made.get_modelmeta().custom_metadata_map == {
        name: str(number) for name, number in step.numbers.items()
    }
    for batch, sizes in ((1, [1] * 21), (2, [4, 1, 15, 1])):
        audio = random_audio(batch, 21 * codec.hop_length)
        codes = codec.encode(audio).codes
        if part == "encoder":
            pieces = audio.split([size * codec.hop_length for size in sizes], dim=2)
            assert torch.equal(in_steps(run, step, pieces), codes)
        else:
            restored = in_steps(run, step, codes.split(sizes, dim=2))
            torch.testing.assert_close(restored, codec.decode_codes(codes), rtol=0, atol=2e-5)


@torch.inference_mode()
def test_streams_begin_and_end_on_their_own(codec):
    """In one batch of steps: one stream ends meanwhile, and another begins in its place."""
    decoder = STEPS["decoder"](codec)
    lag, hop, frames = decoder.numbers["lag"], codec.hop_length, 30
    signals = codec.encode(random_audio(3, frames * hop)).codes
    lengths = [30, 7, 5]
    state = torch.zeros(2, decoder.inputs[3].shape[1])
    # The stream in each row, and its first frame; the second row's first one has all come by 24.
    begun = [(0, 0), (1, 0)]
    heard = [[], [], []]
    for now in range(frames + decoder.numbers["delay"]):
        if now == 24:
            begun[1] = (2, now)
            state[1] = 0
        ages = [now - start for _, start in begun]
        block = torch.stack(
            [signals[stream, :, min(age, frames - 1)] for (stream, _), age in zip(begun, ages)]
        )
        known = torch.tensor([lengths[stream] for stream, _ in begun])
        audio, state = decoder(block.unsqueeze(2), torch.tensor(ages), known, state)
        for row, (stream, _) in enumerate(begun):
            heard[stream].append(audio[row])
    for codes, length, pieces in zip(signals, lengths, heard):
        restored = torch.cat(pieces, dim=1)[:, lag:][:, : length * hop]
        expected = codec.decode_codes(codes[None, :, :length])[0]
        torch.testing.assert_close(restored, expected, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_a_compiled_package(codec, tmp_path):
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    decoder = Decode(codec, n_quantizers=1)
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        write_aoti(decoder, tmp_path / "decoder.pt2")
    assert not (tmp_path / "decoder.pt2").exists()
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("there is no C++ compiler")
    write_aoti(decoder, tmp_path / "decoder.pt2")
    decode = torch._inductor.aoti_load_package(str(tmp_path / "decoder.pt2"))
    for batch, frames in ((1, 1), (2, 3), (3, 50)):
        codes = torch.randint(32, (batch, 1, frames))
        torch.testing.assert_close(decode(codes), codec.decode_codes(codes), rtol=0, atol=1e-5)


def test_what_cannot_be_exported(codec):
    with pytest.raises(ValueError, match="part is 'codec'; accepted: encoder or decoder"):
        export(codec, "codec")
    with pytest.raises(ValueError, match="9 codebooks; accepted: 1 to 2"):
        export(codec, "encoder", n_quantizers=9)
    with pytest.raises(ValueError, match="precision is 'bf16'; accepted: fp32 or fp16"):
        Encode(codec, precision="bf16")

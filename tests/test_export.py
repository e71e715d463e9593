"""Exported programs and ONNX models give what the codec gives, at any batch and length."""

import numpy as np
import pytest
import torch

import dac_fast
from dac_fast.inference import export, export_onnx

SHAPES = [(1, 1), (1, 700), (3, 333), (2, 10)]


@pytest.fixture(scope="module")
def codec(golden):
    """Odd strides and mixed codebook dims."""
    return dac_fast.load(golden / "weights_odd.pth")


def random_audio(batch, samples):
    return 0.3 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(samples))


@torch.inference_mode()
def test_programs_give_what_the_codec_gives(codec, tmp_path):
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    encoder, decoder = (
        export(codec, "encoder", n_quantizers=3),
        export(codec, "decoder", n_quantizers=3),
    )
    torch.export.save(decoder, tmp_path / "decoder.pt2")
    decoder = torch.export.load(tmp_path / "decoder.pt2")
    for batch, samples in SHAPES:
        audio = random_audio(batch, samples)
        expected = codec.encode(audio, n_quantizers=3).codes
        # a single frame runs only without PyTorch's guards
        guards = expected.shape[2] > 1
        assert torch.equal(encoder.module(check_guards=guards)(audio), expected)
        restored = decoder.module(check_guards=guards)(expected)
        torch.testing.assert_close(restored, codec.decode_codes(expected), rtol=0, atol=1e-5)
    assert before.keys() == codec.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in codec.state_dict().items())


@torch.inference_mode()
def test_onnx_models_give_what_the_codec_gives(codec, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "encoder.onnx").write_bytes(b"of old")
    paths = export_onnx(codec, tmp_path / "models")
    assert sorted(paths) == sorted((tmp_path / "models").iterdir())
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    encoder, decoder = (runtime.InferenceSession(path, options) for path in paths)
    assert (
        encoder.get_inputs()[0].shape == decoder.get_outputs()[0].shape == ["batch", 1, "samples"]
    )
    assert decoder.get_inputs()[0].shape == encoder.get_outputs()[0].shape == ["batch", 4, "frames"]
    assert encoder.get_modelmeta().custom_metadata_map == {
        "sample_rate": "16000",
        "hop_length": "10",
    }
    for batch, samples in SHAPES:
        audio = random_audio(batch, samples)
        expected = codec.encode(audio).codes
        assert np.array_equal(encoder.run(["codes"], {"audio": audio.numpy()})[0], expected)
        (restored,) = decoder.run(["audio"], {"codes": expected.numpy()})
        np.testing.assert_allclose(restored, codec.decode_codes(expected), rtol=0, atol=1e-5)


def test_what_cannot_be_exported(codec):
    with pytest.raises(ValueError, match="part is 'codec'; accepted: encoder or decoder"):
        export(codec, "codec")
    with pytest.raises(ValueError, match="9 codebooks; accepted: 1 to 4"):
        export(codec, "encoder", n_quantizers=9)

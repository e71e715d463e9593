"""The engine: the same codec, fused, in every precision; and its CUDA graphs, on the CPU too."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from device import DEVICE

import dac_fast
from dac_fast import DAC, PRESETS, ops, use_backend
from dac_fast.inference import plan as plans
from dac_fast.inference.buckets import Graphs
from dac_fast.inference.engine import PRECISIONS, Engine, PrecisionError
from dac_fast.model import channels_last, folded
from dac_fast.model.layers import zero_past

HALVES = ("encoder", "decoder")


def small(**changes) -> DAC:
    """A random codec with few channels; some errors vanish under the initial alphas and biases."""
    torch.manual_seed(0)
    codec = DAC(
        **{"encoder_dim": 4, "decoder_dim": 32, "n_codebooks": 3, "codebook_size": 32, **changes}
    )
    for name, parameter in codec.named_parameters():
        if name.endswith(("alpha", "bias")):
            torch.nn.init.uniform_(
                parameter, 0.5, 1.5
            ) if "alpha" in name else torch.nn.init.normal_(parameter, 0, 0.1)
    return codec.eval()


def scaled_down(preset: str) -> DAC:
    config = PRESETS[preset]
    latent = 12 if preset == "44khz_16kbps" else None
    return small(
        encoder_rates=config.encoder_rates, decoder_rates=config.decoder_rates, latent_dim=latent
    )


def noise(*shape) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def decibels(actual, exact) -> float:
    """Signal to noise ratio of `actual`."""
    exact = exact.double().cpu()
    return float(
        10 * torch.log10(exact.square().sum() / (actual.double().cpu() - exact).square().sum())
    )


def skip_without_kernels(dtype) -> None:
    """Skips the test where the processor does not multiply that dtype."""
    ones = torch.ones(2, 2, 1, dtype=dtype)
    if reason := plans.native.conv1d_unsupported(ones, ones, ones[:, 0, 0]):
        pytest.skip(reason)


def assert_same(actual, expected, tolerance=1e-5):
    """Two `Encoded`, or two tensors, up to rounding."""
    if isinstance(actual, torch.Tensor):
        actual, expected = [actual], [expected]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("preset", ["44khz", "44khz_16kbps", "24khz", "16khz"])
@torch.no_grad()
def test_a_plan_is_the_module(preset):
    """In float64, where no order of additions matters: whole, ragged, and without padding."""
    codec, hop = scaled_down(preset).double(), PRESETS[preset].hop_length
    encoder, decoder = (
        plans.Plan(f"{s}r", getattr(codec, f"{s}r"), torch.float64) for s in ("encode", "decode")
    )
    frames = torch.tensor([5, 1, 3])
    for lengths in (None, frames):
        audio = noise(3, 1, 5 * hop).double()
        samples = None if lengths is None else lengths * hop
        masked = audio if lengths is None else zero_past(audio, samples)
        z = codec.encoder(masked, samples)
        assert_same(encoder(audio, samples), z, 1e-10)
        restored = decoder(z, lengths)
        published = codec.decoder(z, lengths)
        assert restored.shape == (3, 1, 5 * hop)
        assert_same(restored[..., : published.shape[2]], published, 1e-10)
        assert not restored[..., published.shape[2] :].any()
        assert encoder(audio, samples).stride(1) == 1
        # What lies past the lengths, and samples that fill no frame, change nothing.
        shorter = None if lengths is None else samples - hop + 1
        cut = audio[..., : 4 * hop + 1]
        filled = torch.nn.functional.pad(cut, (0, hop - 1))
        if lengths is not None:
            filled = zero_past(filled, shorter)
            cut = torch.where(filled[..., : cut.shape[2]] == 0, torch.nan, cut)
        assert_same(encoder(cut, shorter), codec.encoder(filled, samples), 1e-10)
        unmasked = z if lengths is None else z + torch.where(zero_past(z + 1, lengths) == 0, 9, 0)
        assert_same(decoder(unmasked, lengths), restored, 1e-10)
    audio = noise(1, 1, 60 * hop).double()
    z = codec.encoder(audio, padded=False)
    assert_same(encoder(audio, padded=False), z, 1e-10)
    assert_same(decoder(z, padded=False), codec.decoder(z, padded=False), 1e-10)


@pytest.mark.parametrize("name", ["even", "odd"])
@torch.no_grad()
def test_fp32_gives_the_published_codes(golden, name):
    expected = {k: torch.from_numpy(v) for k, v in np.load(golden / f"model_{name}.npz").items()}
    codec = dac_fast.load(golden / f"weights_{name}.pth", engine=True)
    assert codec.engine.precision == {"encode": "fp32", "decode": "fp32"}
    encoded = codec.encode(expected["audio_in"])
    assert torch.equal(encoded.codes, expected["codes"])
    assert torch.equal(
        codec.encode(expected["audio_in"], n_quantizers=2).codes, expected["codes_nq2"]
    )
    assert_same(encoded.commitment_loss, expected["commitment_loss"], 1e-4)
    assert_same(codec(expected["audio_in"])["audio"], expected["audio_out"], 1e-4)


LEAST_SNR = {"fp32": 90, "tf32": 50, "fp16": 40, "bf16": 25}


@pytest.mark.parametrize(
    ("precision", "device"),
    [(name, "cpu") for name in LEAST_SNR if name != "tf32"]
    + [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in LEAST_SNR],
)
@pytest.mark.parametrize("name", ["even", "odd", "tiny"])
@torch.no_grad()
def test_signal_to_noise_ratio(golden, name, precision, device):
    """Audio of the same codes, against float64."""
    codec = dac_fast.load(name if name == "tiny" else golden / f"weights_{name}.pth")
    exact = copy.deepcopy(codec).double()
    codes = exact.encode(noise(2, 1, codec.hop_length * 20).double()).codes
    codec = codec.to(device).optimize(precision)
    audio = codec.decode_codes(codes.to(device))
    assert audio.dtype == torch.float32
    assert decibels(audio, exact.decode_codes(codes)) >= LEAST_SNR[precision]
    # Audio is not rounded to the precision of layers, which is heard where it is quiet.
    assert all((audio != audio.to(half).float()).any() for half in (torch.float16, torch.bfloat16))


@pytest.mark.triton
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@torch.no_grad()
def test_the_fused_kernels_are_the_same_codec(precision):
    """A small codec with ragged items and odd strides, by Triton (on the CPU: interpreted)."""
    codec = small(
        encoder_rates=[2, 5], decoder_rates=[5, 2], decoder_dim=24, n_codebooks=2, codebook_size=16
    )
    audio, lengths = noise(2, 1, 30), torch.tensor([29, 11])
    expected = codec.encode(audio, lengths)
    restored = codec.decode_codes(expected.codes, expected.lengths)
    unpadded = codec.encoder(noise(1, 1, 300), padded=False)
    codec = codec.to(DEVICE).optimize(precision)
    with use_backend("triton"):
        found = codec.encode(audio.to(DEVICE), lengths)
        again = codec.decode_codes(expected.codes.to(DEVICE), expected.lengths)
        assert codec.encode(noise(1, 1, 300).to(DEVICE), padded=False).z.shape == unpadded.shape
    if precision == "fp32":
        assert torch.equal(found.codes.cpu(), expected.codes)
    assert decibels(again, restored) > {"fp32": 90, "fp16": 40}[precision]
    assert not again[1, :, 20:].any()


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "fp32"), ("cpu", {"decode": "bf16"})]
    + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in PRECISIONS],
)
@torch.no_grad()
def test_invariant_items_have_their_bits_in_any_company(monkeypatch, device, precision):
    """Alone, in batches, ragged, in the middle of a longer item, and by graphs of several sizes."""
    # What is fastest at one size must not be asked.
    monkeypatch.setattr("dac_fast.inference.choices._milliseconds", None)
    if device == "cpu":
        skip_without_kernels(torch.float32 if precision == "fp32" else torch.bfloat16)
    codec, size = dac_fast.load("tiny").to(device), 48
    audio, hop = noise(3, 1, size * codec.hop_length).to(device), codec.hop_length
    codes = torch.randint(0, 1024, (3, 9, size), generator=torch.Generator().manual_seed(2))
    codes, lengths = codes.to(device), torch.tensor([size, 17, 29], device=device)
    shapes = [(), [(1, 32), (4, 48)]]
    for timed in shapes:
        codec.optimize(precision, timed, invariant=True)
        assert (
            str(codec.engine).partition("\n")[0].endswith(f" on {codec.engine.device}, invariant")
        )
        z, _ = codec.engine.features(audio), codec.encode(audio)
        together, restored = codec.encode(audio, lengths * hop), codec.decode_codes(codes, lengths)
        if timed == shapes[0]:
            expected = z, together.codes, restored
        found = z, together.codes, restored
        assert all(map(torch.equal, found, expected))
        for i, frames in enumerate(lengths.tolist()):
            alone = audio[i : i + 1, :, : frames * hop]
            assert torch.equal(codec.encode(alone).codes, together.codes[i : i + 1, :, :frames])
            ours = codec.decode_codes(codes[i : i + 1, :, :frames])
            assert torch.equal(ours, restored[i : i + 1, :, : frames * hop])
    # What reaches no end of the piece.
    inside = slice(12, 20)
    piece = codec.engine.features(audio[:1, :, 8 * hop : 40 * hop])
    assert torch.equal(piece[..., inside], z[:1, :, 8:40][..., inside])
    plan = codec.engine.plans["decode"]
    whole, piece = plan(z), plan(z[:2, :, 8:40])
    samples = slice(12 * hop, 20 * hop)
    assert torch.equal(piece[..., samples], whole[:2, :, 8 * hop : 40 * hop][..., samples])


def test_invariance_needs_a_kernel_for_every_layer():
    skip_without_kernels(torch.bfloat16)
    codec = small(decoder_dim=16)
    with pytest.raises(ops.BackendError, match="whatever the batch: .*1 channels; accepted in bf"):
        codec.optimize({"decode": "bf16"}, invariant=True)
    assert codec.engine is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantizer": "unprojected"}, "'unprojected' whatever the batch; accepted: 'factorized'"),
        ({"codebook_dim": (8, 4, 8)}, "accepted: one for all stages"),
    ],
)
def test_invariance_needs_a_kernel_for_the_quantizer(changes, reason):
    codec = small(**changes).cuda()
    with pytest.raises(ops.BackendError, match=reason):
        codec.optimize(invariant=True)
    assert codec.engine is None


def test_the_fastest_way_is_taken_and_named(monkeypatch):
    choices = plans.Choices()
    ways = {"library": lambda: "l", "triton": lambda: "t"}
    small_input, large_input = torch.zeros(1, 4, 10), torch.zeros(1, 4, 1000)
    # nothing is timed: the first one
    assert choices.run("conv", small_input, ways) == "l"
    milliseconds = iter([2.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(
        "dac_fast.inference.choices._milliseconds",
        lambda ways, on_cuda: {name: next(milliseconds) for name in ways},
    )
    choices.timing = True
    assert choices.run("conv", small_input, ways) == "t"
    assert choices.run("conv", large_input, ways) == "l"
    choices.timing = False
    assert choices.run("conv", torch.zeros(2, 4, 7), ways) == "t"
    assert choices.run("conv", torch.zeros(1, 4, 5000), ways) == "l"
    first, second = choices.table("fp16")
    assert "1 × 4 × 10" in first
    assert first.endswith("triton 1.0000 ms, library 2.0000 ms")
    assert second.endswith("library 3.0000 ms, triton 4.0000 ms")


@torch.no_grad()
def test_the_library_multiplies_and_convolves_what_lies_there():
    """Its two ways agree, and both read input and weights with channels innermost, uncopied."""
    codec = small(encoder_rates=[2, 3], decoder_rates=[3, 2], decoder_dim=12).fold_weight_norm()
    plan_of = {name: plans.Plan(name, getattr(codec, name), torch.float64) for name in HALVES}
    layers = [layer for name in HALVES for layer in plan_of[name].layers]
    parts = [(each.first, each.second) if hasattr(each, "first") else (each,) for each in layers]
    products = []
    for layer in sum(parts, ()):
        channels = layer.weight.shape[0 if layer.transposed else 1]
        x = torch.randn(2, 40, channels, dtype=torch.float64).transpose(1, 2)
        ways = [
            layer._by_library(by, x, layer.padding, None, None) for by in (folded, channels_last)
        ]
        for product, convolution in zip(*ways):
            if product is not None:
                torch.testing.assert_close(product, convolution, rtol=1e-12, atol=1e-12)
        for tensor in (x, layer.weight):
            image = tensor.unsqueeze(2)
            assert image.is_contiguous(memory_format=torch.channels_last)
            assert channels_last.innermost(image).data_ptr() == tensor.data_ptr()
        products.append(layer._products)
    # The dilated one of each of twelve units, and three at the ends.
    assert products.count(False) == 12 + 3


@torch.no_grad()
def test_layers_choose_on_a_cpu_too(golden):
    """Each in its own way of those that the processor has; and untimed, in memory used again."""
    codec = dac_fast.load(golden / "weights_even.pth")
    codes = torch.zeros(1, codec.config.n_codebooks, 4, dtype=torch.int64)
    expected = codec.decode_codes(codes)
    rows = str(codec.optimize(shapes={"decode": [(1, 4)]}).engine).splitlines()
    timed = [row for row in rows if row.startswith("decoder.model")]
    assert len(timed) > 10
    assert all("library" in row or "two layers" in row for row in timed)
    assert not codec.engine.graphs.buckets
    assert_same(codec.decode_codes(codes), expected, 1e-4)
    codec.optimize()
    first, second = codec.decode_codes(codes), codec.decode_codes((codes + 1) % 16)
    assert_same(first, expected, 1e-4)
    assert not torch.equal(first, second)
    (memory,) = codec.engine.plans["decode"]._scratch._idle
    size = memory.size
    codec.decode_codes(codes)
    assert memory.size == size


def test_torchs_threads_are_set_and_put_back():
    native, before = plans.native, torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with native.torch_on_one_thread(), native.torch_on_one_thread():
            assert (torch.get_num_threads(), native.threads.count()) == (1, 3)
            with native.torch_on_all_threads():
                assert (torch.get_num_threads(), native.threads.count()) == (3, 3)
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == native.threads.count() == 3
    finally:
        torch.set_num_threads(before)


def test_torchs_switches_are_set_and_put_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    with plans.float32_products(tf32=True):
        assert [switch.fp32_precision for switch in switches] == ["tf32", "tf32"]
        with plans.float32_products(tf32=False):
            assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
        assert [switch.fp32_precision for switch in switches] == ["tf32", "tf32"]
    assert [switch.fp32_precision for switch in switches] == before


def with_graphs(codec: DAC, shapes, memory=1 << 30, precision=None) -> DAC:
    engine = codec.optimize(precision).engine
    engine.graphs = Graphs(engine.device, memory)
    engine._warm_up({"encode": shapes, "decode": shapes})
    return codec


@pytest.mark.parametrize("name", ["even", "odd"])
@torch.no_grad()
def test_requests_of_any_size_are_exact_in_a_bucket(golden, name, pretend_graphs):
    eager = dac_fast.load(golden / f"weights_{name}.pth").fold_weight_norm()
    codec = with_graphs(dac_fast.load(golden / f"weights_{name}.pth"), [(4, 12), (2, 6), (1, 6)])
    hop, engine = codec.hop_length, codec.engine
    requests = [
        (1, 6 * hop, None),
        (2, 6 * hop - 1, None),
        (3, 11 * hop + 1, [11 * hop, 7, hop]),
        (4, 12 * hop, None),
    ]
    for hits, (batch, samples, lengths) in enumerate(requests):
        audio = noise(batch, 1, samples)
        expected = eager.encode(audio, lengths)
        restored = eager.decode_codes(expected.codes, expected.lengths if lengths else None)
        found = codec.encode(audio, lengths)
        assert torch.equal(found.codes, expected.codes)
        assert_same(found, expected, 1e-4)
        assert_same(
            codec.decode_codes(found.codes, found.lengths if lengths else None), restored, 1e-4
        )
        assert engine.hits == 2 * (hits + 1)
    # what one request leaves in a bucket is not seen by the next one
    assert_same(codec.encode(noise(1, 1, 6 * hop)), eager.encode(noise(1, 1, 6 * hop)), 1e-4)
    assert engine.misses == 0
    assert "graphs of decode (items × frames): 1 × 6, 2 × 6, 4 × 12" in str(engine)


@torch.no_grad()
def test_which_requests_no_bucket_serves(pretend_graphs):
    codec = with_graphs(small(encoder_rates=[2, 2], decoder_rates=[2, 2]), [(2, 8)])
    engine, codes = codec.engine, torch.zeros(2, 3, 8, dtype=torch.int64)
    # too long, too many, fewer codebooks, mostly padding
    requests = (
        torch.zeros(1, 3, 9).long(),
        torch.zeros(3, 3, 4).long(),
        codes[:, :2],
        codes[:1, :, :7],
    )
    for misses, request in enumerate(requests, start=1):
        codec.decode_codes(request)
        assert (engine.hits, engine.misses) == (0, misses)
    codec.decode_codes(codes[:1])
    assert engine.hits == 1
    with pytest.raises(ValueError, match="code 32; accepted: 0 to 31"):
        codec.decode_codes(codes + 32)


def test_graphs_beyond_the_memory_are_left_out_and_said(pretend_graphs):
    codec = with_graphs(
        small(encoder_rates=[2, 2], decoder_rates=[2, 2]), [(2, 8), (4, 1000)], memory=1000
    )
    assert [(b.batch, b.frames) for b in codec.engine.graphs.buckets["encode"]] == [(2, 8)]
    assert "not captured: encode of 4 × 1000, which needs" in str(codec.engine)


@torch.no_grad()
def test_recordings_go_through_the_engine(golden):
    plain = dac_fast.load(golden / "weights_even.pth").fold_weight_norm()
    codec = dac_fast.load(golden / "weights_even.pth", engine={"precision": {"decode": "fp16"}})
    recording = (noise(2, 30000).numpy(), codec.sample_rate)
    for padding in (True, False):
        file = codec.compress(recording, chunk_seconds=0.2, padding=padding)
        assert torch.equal(
            file.codes, plain.compress(recording, chunk_seconds=0.2, padding=padding).codes
        )
        expected = torch.from_numpy(plain.decompress(file)[0])
        assert 40 <= decibels(torch.from_numpy(codec.decompress(file)[0]), expected) <= 90


def test_a_codec_with_an_engine_stays_a_codec():
    codec = small(encoder_rates=[2, 2], decoder_rates=[2, 2])
    audio = noise(1, 1, 16)
    state = {k: v.clone() for k, v in copy.deepcopy(codec).fold_weight_norm().state_dict().items()}
    assert codec.optimize("fp16") is codec
    assert codec.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in codec.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in codec.parameters())
    assert copy.deepcopy(codec).engine is None
    assert not codec.encode(audio).z.requires_grad
    # gradients are the modules' business
    needs_gradient = audio.clone().requires_grad_()
    codec(needs_gradient)["audio"].sum().backward()
    assert needs_gradient.grad.any()
    for change, what in (
        (lambda: codec.double(), "moved or converted"),
        (lambda: codec.load_state_dict(state), "given other weights"),
        (lambda: codec.train().eval(), "in training"),
    ):
        codec.float().optimize().float().encode(audio)
        change()
        with pytest.raises(RuntimeError, match=f"the codec was {what} after optimize"):
            codec.encode(audio)
    codec.engine = None
    codec.float().encode(audio)


def test_an_engine_for_recordings_goes_with_them():
    codec = small(encoder_rates=[2, 2], decoder_rates=[2, 2])
    with codec._engine_for_now():
        assert isinstance(codec.engine, Engine)
    assert not any(isinstance(value, Engine) for value in vars(codec).values())


def test_an_engine_may_end_at_any_moment():
    """Another thread may end it between any two reads."""
    codec = small(encoder_rates=[2, 2], decoder_rates=[2, 2])
    ends: list = []

    class Ending(DAC):
        engine = property(lambda self: ends.pop() if ends else None, lambda self, value: None)

    engine, state = codec.optimize().engine, codec.state_dict()
    codec.__class__ = Ending
    for call in (codec.engine_for, codec.double, lambda: codec.load_state_dict(state), codec.train):
        ends.append(engine)
        call()
        assert not ends


def test_what_optimize_refuses():
    codec = small(encoder_rates=[2, 2], decoder_rates=[2, 2])
    engine = codec.optimize().engine
    for arguments, message in (
        (
            {"precision": "fp8"},
            "precision is 'fp8' for 'encode'; accepted: fp32, tf32x3, tf32, fp16, bf16",
        ),
        ({"precision": {"train": "fp16"}}, "precision is 'fp16' for 'train'"),
        (
            {"shapes": [(1, 0)]},
            r"shapes has \(1, 0\) for 'encode'; accepted: pairs of positive integers",
        ),
        ({"shapes": {"train": [(1, 2)]}}, r"shapes has \(1, 2\) for 'train'"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.optimize(**arguments)
    assert codec.engine is engine
    with pytest.raises(ValueError, match=r"parameters are torch.float16; accepted: torch.float32"):
        copy.deepcopy(codec).half().optimize()
    with pytest.raises(
        ValueError, match="activation is 'leaky_relu'; accepted by the engine: 'snake'"
    ):
        DAC(**{**dataclasses.asdict(codec.config), "activation": "leaky_relu"}).optimize()


@torch.no_grad()
def test_a_precision_without_the_range_is_found_at_the_first_call(pretend_graphs):
    codec = small(encoder_rates=[2, 2], decoder_rates=[2, 2])
    codec.decoder.model[1].block[1].bias[0] = 1e5
    codes = torch.zeros(1, 3, 4, dtype=torch.int64)
    codec.optimize({"decode": "bf16"}).decode_codes(codes)
    with_graphs(codec, [(1, 4)], precision={"decode": "fp16"})
    layer = "decoder.model.1.block.1"
    with pytest.raises(
        PrecisionError,
        match=f"decode in fp16: {layer} gives infinity or NaN; try precision bf16 or",
    ):
        codec.decode_codes(codes)
    # what lies past the lengths is none of the input
    codec.optimize({"encode": "fp16"})
    audio = noise(1, 1, 16)
    audio[..., 8:] = torch.nan
    codec.encode(audio, torch.tensor([8]))
    assert codec.engine._proven == {"encode"}
    # an input that is not finite is no fault of the precision
    codec.optimize({"encode": "fp16"}).encode(torch.full((1, 1, 16), torch.nan))
    assert codec.encode(noise(1, 1, 16)).z.isfinite().all()


@pytest.mark.gpu
@torch.no_grad()
def test_replays_are_what_eager_gives():
    plain = dac_fast.load("tiny")
    frames = 20
    codec = dac_fast.load("tiny", device="cuda", engine={"shapes": [(4, frames), (1, frames)]})
    eager = dac_fast.load("tiny", device="cuda", engine=True)
    hop = codec.hop_length
    requests = [
        (1, frames * hop, None),
        (4, frames * hop, None),
        (3, 19 * hop, [19 * hop, 7, hop]),
        (1, 15 * hop - 3, None),
    ]
    for _ in range(2):
        for batch, samples, lengths in requests:
            audio = noise(batch, 1, samples)
            found, expected = (
                codec.encode(audio.cuda(), lengths),
                eager.encode(audio.cuda(), lengths),
            )
            reference = plain.encode(audio, lengths)
            assert (found.codes.cpu() == reference.codes).float().mean() > 0.998
            assert_same(found.commitment_loss, expected.commitment_loss, 1e-3)
            assert torch.equal(found.lengths, expected.lengths)
            valid = None if lengths is None else found.lengths
            codes = reference.codes.cuda()
            restored = codec.decode_codes(codes, valid)
            assert decibels(restored, eager.decode_codes(codes, valid)) > 45
            assert (
                decibels(
                    restored,
                    plain.decode_codes(reference.codes, reference.lengths if lengths else None),
                )
                > 40
            )
    assert (codec.engine.hits, codec.engine.misses) == (4 * len(requests), 0)
    assert codec.engine.graphs.used > 0
    assert "decoder.model" in str(codec.engine)
    # results outlive the next request
    first = codec.decode_codes(codes)
    kept = first.clone()
    codec.decode_codes((codes + 1) % 1024)
    assert torch.equal(first, kept)


@pytest.mark.gpu
@torch.no_grad()
def test_graph_memory_is_bounded():
    with use_backend("reference"):
        # nothing to compile and to time
        codec = dac_fast.load(
            "tiny", device="cuda", engine={"shapes": [(1, 10), (16, 800)], "memory": 256 << 20}
        )
    graphs = codec.engine.graphs
    assert [bucket.frames for bucket in graphs.buckets["decode"]] == [10]
    assert 0 < graphs.used <= 256 << 20
    assert "not captured: decode of 16 × 800" in str(codec.engine)


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_serve_threads_and_streams():
    with use_backend("reference"):
        codec = dac_fast.load("tiny", device="cuda", engine={"shapes": [(1, 20)]})
    codes = torch.arange(4 * 9 * 20, device="cuda").view(4, 1, 9, 20) % 1024
    codec.decode_codes(codes[0])
    expected = [codec.decode_codes(c) for c in codes]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in codes]
    found = []
    for stream, c in zip(streams * 5, [*codes] * 5):
        with torch.cuda.stream(stream):
            found.append(codec.decode_codes(c))
    torch.cuda.synchronize()
    for i, audio in enumerate(found):
        assert torch.equal(audio, expected[i % 4])


@pytest.mark.gpu
@torch.no_grad()
def test_fp32_is_strict_whatever_the_switches_say():
    """And it leaves them as they were."""
    exact = dac_fast.load("tiny").double()
    codes = torch.arange(9 * 40).view(1, 9, 40) % 1024
    expected = exact.decode_codes(codes)
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        found = {
            precision: decibels(
                dac_fast.load("tiny", device="cuda", engine={"precision": precision}).decode_codes(
                    codes.cuda()
                ),
                expected,
            )
            for precision in PRECISIONS
        }
        assert [switch.fp32_precision for switch in switches] == ["tf32", "tf32"]
    finally:
        for switch, value in zip(switches, before):
            switch.fp32_precision = value
    assert found["fp32"] > 90 > found["tf32"] > 50
    assert found["fp16"] > 40


@pytest.mark.gpu
@torch.no_grad()
def test_layers_that_are_products_are_timed_as_convolutions_too():
    codec = dac_fast.load("tiny", device="cuda", engine={"shapes": [(1, 20)]})
    for direction in ("encode", "decode"):
        layers = codec.engine.plans[direction].choices.times.values()
        ways = [set(times) for shapes in layers for times in shapes.values()]
        assert {"library", "conv2d", "triton"} in ways


@pytest.mark.gpu
@pytest.mark.filterwarnings("error")
@torch.no_grad()
def test_cudnn_with_the_rest_fused_is_timed_too():
    pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    codec = dac_fast.load("tiny", device="cuda", engine={"shapes": [(1, 20)]})
    layers = codec.engine.plans["decode"].choices.times.values()
    assert any("cudnn-fused" in times for shapes in layers for times in shapes.values())

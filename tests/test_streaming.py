"""Streams give what the whole signal gives: any pieces, any slots.

Mostly in float64, where nothing is a near tie.
"""

import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_good_as

import dac_fast
from dac_fast import DAC, PRESETS
from dac_fast.streaming import DecoderStreams, EncoderStreams, StreamingDecoder, StreamingEncoder
from dac_fast.streaming.layers import Span

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pieces = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), max_size=12)


def load(golden, name, fold=True, device="cpu", dtype=torch.float64) -> DAC:
    """Even strides; odd strides and mixed codebook dims."""
    codec = dac_fast.load(golden / f"weights_{name}.pth", device=device, dtype=dtype)
    return codec.fold_weight_norm() if fold else codec


@pytest.fixture(scope="module", params=["even", "odd"])
def codec(request, golden):
    return load(golden, request.param)


def random_codes(codec, batch, frames, seed=0):
    shape, generator = (
        (batch, codec.config.n_codebooks, frames),
        torch.Generator().manual_seed(seed),
    )
    return torch.randint(0, codec.config.codebook_size, shape, generator=generator).to(
        device(codec)
    )


def random_audio(codec, batch, samples, seed=0):
    parameter = next(codec.parameters())
    return 0.3 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed)).to(
        parameter
    )


def device(codec):
    return next(codec.parameters()).device


@torch.inference_mode()
def assert_pieces_give_the_whole(codec, sizes, batch, unit, tolerance=1e-10):
    """`sizes` of pieces: of codes in frames, of audio in `unit` samples and a few more."""
    decoder, encoder = StreamingDecoder(codec), StreamingEncoder(codec)
    codes = random_codes(codec, batch, sum(sizes))
    streamed = torch.cat([*map(decoder.push, codes.split(sizes, dim=2)), decoder.flush()], dim=2)
    whole = codec.decode_codes(codes) if sum(sizes) else streamed[..., :0]
    assert streamed.shape == whole.shape
    torch.testing.assert_close(streamed, whole, rtol=0, atol=tolerance)

    sizes = [size * unit + size % 3 for size in sizes]
    audio = random_audio(codec, batch, sum(sizes))
    streamed = torch.cat([*map(encoder.push, audio.split(sizes, dim=2)), encoder.flush()], dim=2)
    assert torch.equal(streamed, codec.encode(audio).codes if sum(sizes) else streamed[..., :0])


@given(sizes=pieces.filter(bool), batch=st.integers(1, 3), unit=st.sampled_from([1, 7, 64]))
@settings(max_examples=25, deadline=None)
def test_any_pieces_give_the_whole(codec, sizes, batch, unit):
    assert_pieces_give_the_whole(codec, sizes, batch, unit)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["even", "odd"])
def test_single_frames_give_the_whole(golden, name, fold, device):
    codec = load(golden, name, fold, device)
    assert_pieces_give_the_whole(codec, [1] * 40, 2, codec.hop_length)


def test_other_forms_of_the_codec():
    """A stride of 1, whose encoder gives a frame more; LeakyReLU; codebooks without projections."""
    torch.manual_seed(0)
    rates = {"encoder_rates": [1, 3], "decoder_rates": [3, 1]}
    options = {
        "activation": "leaky_relu",
        "quantizer": "unprojected",
        "codebook_size": 16,
        "n_codebooks": 2,
    }
    codec = DAC(encoder_dim=4, decoder_dim=16, **rates, **options).double().eval()
    assert_pieces_give_the_whole(codec, [1, 0, 30, 5, 1, 60], 2, 3)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["even", "odd"])
def test_streams_are_as_exact_as_the_whole(golden, name, dtype):
    codec, exact = load(golden, name, dtype=dtype), load(golden, name)
    codes = random_codes(codec, 1, 50)
    decoder = StreamingDecoder(codec)
    streamed = torch.cat([*map(decoder.push, codes.split(3, dim=2)), decoder.flush()], dim=2)
    assert streamed.dtype == dtype
    assert_as_good_as(streamed, codec.decode_codes(codes), exact.decode_codes(codes))
    encoder = StreamingEncoder(codec, n_quantizers=2)
    audio = random_audio(codec, 1, 2000)
    streamed = torch.cat([*map(encoder.push, audio.split(77, dim=2)), encoder.flush()], dim=2)
    assert (streamed == codec.encode(audio, n_quantizers=2).codes).float().mean() > (
        0.99 if dtype == torch.float32 else 0.5
    )


@torch.inference_mode()
def test_output_comes_when_it_is_determined(codec):
    """The look-ahead is what the model sees, no sample more."""
    hop, decoder, encoder = codec.hop_length, StreamingDecoder(codec), StreamingEncoder(codec)
    codes, samples = random_codes(codec, 1, 40), 0
    for frames in range(1, 41):
        samples += decoder.push(codes[..., frames - 1 : frames]).shape[2]
        assert samples == max(frames * hop - decoder.look_ahead, 0)
    z = codec.quantizer.from_codes(codes)[0]
    changed = z.clone()
    changed[..., 30] += 1
    difference = (codec.decode(changed) - codec.decode(z))[0, 0]
    assert int(difference.nonzero().min()) == 30 * hop - decoder.look_ahead

    audio, frames = random_audio(codec, 1, 40 * hop), 0
    for samples in range(1, 40 * hop + 1):
        frames += encoder.push(audio[..., samples - 1 : samples]).shape[2]
        assert frames == max((samples - encoder.look_ahead) // hop, 0)
    changed = audio.clone()
    last_seen = 20 * hop + hop - 1 + encoder.look_ahead
    changed[..., last_seen] += 1
    difference = (codec.encoder(changed) - codec.encoder(audio)).abs().amax(1)[0]
    assert int(difference.nonzero().min()) == 20


def test_look_ahead_of_the_presets():
    for name, decoder, encoder in [("44khz", 4757, 3733), ("16khz", 3141, 2493)]:
        with torch.device("meta"):
            codec = DAC(**PRESETS[name].to_dict())
        assert (StreamingDecoder(codec).look_ahead, StreamingEncoder(codec).look_ahead) == (
            decoder,
            encoder,
        )


def run_slots(streams, signals, unit, lag, seed):
    """Signals through slots that they join, pause in and leave at random.

    Returns all outputs of each signal. `unit`: positions of a signal per frame; `lag`: frames until
    the rest of an ended signal is out.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting, outputs = list(range(len(signals))), [[] for _ in signals]
    # Each slot in use, by its number: the signal, and the frames left of it, down to -lag.
    slots = {}
    while waiting or slots:
        for i in range(streams.batch):
            if i not in slots and waiting:
                slots[i] = (waiting[-1], signals[waiting.pop()].shape[2] // unit)
                streams.reset([i])
        frames = int(torch.randint(1, 6, (), generator=generator))
        chosen = (torch.rand(streams.batch, generator=generator) < 0.7).tolist()
        # a signal may end between two pushes only
        active = [
            chosen[i] and (i not in slots or not 0 < slots[i][1] < frames)
            for i in range(streams.batch)
        ]
        # what is pushed where no signal is must not matter
        block = signals[0].new_ones(streams.batch, signals[0].shape[1], frames * unit)
        for i, (signal, left) in slots.items():
            if active[i] and left > 0:
                begin = signals[signal].shape[2] - left * unit
                block[i] = signals[signal][0, :, begin : begin + frames * unit]
            elif active[i]:
                streams.end([i])
        y = streams.push(block, active)
        assert not y[[i for i in range(streams.batch) if not active[i]]].any()
        for i, (signal, left) in list(slots.items()):
            if active[i]:
                outputs[signal].append(y[i : i + 1])
                slots[i] = (signal, left - frames)
                if left - frames <= -lag:
                    del slots[i]
    return [torch.cat(parts, dim=2) for parts in outputs]


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_streams_join_pause_and_leave(codec, seed):
    hop, lengths = codec.hop_length, (37, 1, 60, 5, 22)
    codes = [random_codes(codec, 1, frames, frames) for frames in lengths]
    streams = DecoderStreams(codec, batch=3)
    outputs = run_slots(streams, codes, 1, -(-streams.look_ahead // hop), seed)
    for signal, output in zip(codes, outputs):
        assert not output[..., : streams.look_ahead].any()
        expected = codec.decode_codes(signal)
        output = output[..., streams.look_ahead :]
        torch.testing.assert_close(output[..., : expected.shape[2]], expected, rtol=0, atol=1e-10)
        assert not output[..., expected.shape[2] :].any()

    audio = [random_audio(codec, 1, frames * hop, frames) for frames in lengths]
    streams = EncoderStreams(codec, batch=3)
    outputs = run_slots(streams, audio, hop, streams.delay, seed)
    for signal, output in zip(audio, outputs):
        expected = codec.encode(signal).codes
        assert not output[..., : streams.delay].any()
        output = output[..., streams.delay :]
        assert torch.equal(output[..., : expected.shape[2]], expected)
        assert not output[..., expected.shape[2] :].any()


@pytest.mark.parametrize("optimized", [False, True])
def test_idle_streams_give_zeros_and_stay(golden, optimized):
    codec = load(golden, "even", dtype=torch.float32)
    if optimized:
        codec.optimize()
    codes, audio = random_codes(codec, 2, 3), random_audio(codec, 2, 3 * codec.hop_length)
    for streams, block in ((DecoderStreams(codec, 2), codes), (EncoderStreams(codec, 2), audio)):
        expected = torch.zeros_like(streams.push(block))
        before = state(streams)
        assert torch.equal(streams.push(block, [False, False]), expected)
        torch.testing.assert_close(state(streams), before, rtol=0, atol=0)


def test_steady_state_is_one_fixed_computation(codec, monkeypatch):
    """Past a signal's beginning nothing is masked, and the states stay in their memory."""
    for streams, block in (
        (DecoderStreams(codec, 2), random_codes(codec, 2, 1)),
        (EncoderStreams(codec, 2), random_audio(codec, 2, codec.hop_length)),
    ):
        for _ in range(20):
            streams.push(block)
        states = [tail.data_ptr() for tail in streams._chain.tails]
        with monkeypatch.context() as patch:
            patch.setattr(Span, "mask", None)
            streams.push(block)
            streams.end([0])
            with pytest.raises(TypeError):
                streams.push(block)
        assert [tail.data_ptr() for tail in streams._chain.tails] == states


@torch.inference_mode()
def test_captured_pushes_give_the_same(codec, pretend_graphs):
    """Slots at random, and single signals; what a graph cannot do runs without it."""
    hop, lengths = codec.hop_length, (150, 1, 120)
    codes = [random_codes(codec, 1, frames, frames) for frames in lengths]
    audio = [random_audio(codec, 1, frames * hop, frames) for frames in lengths]
    outputs = []
    for capture in (False, True):
        decoders, encoders = DecoderStreams(codec, batch=2), EncoderStreams(codec, batch=2)
        for frames in (1, 3) if capture else ():
            decoders.capture(frames)
            encoders.capture(frames)
        lag = -(-decoders.look_ahead // hop)
        outputs.append(
            run_slots(decoders, codes, 1, lag, 0)
            + run_slots(encoders, audio, hop, encoders.delay, 0)
        )
    for plain, captured in zip(*outputs):
        torch.testing.assert_close(captured, plain, rtol=0, atol=1e-12)
    assert pretend_graphs.replays > 10

    decoder, encoder = StreamingDecoder(codec), StreamingEncoder(codec)
    decoder.capture(1, batch=2)
    encoder.capture(2, batch=2)
    for _ in range(2):
        before = pretend_graphs.replays
        codes, audio = random_codes(codec, 2, 60), random_audio(codec, 2, 60 * hop)
        restored = torch.cat([*map(decoder.push, codes.split(1, dim=2)), decoder.flush()], dim=2)
        torch.testing.assert_close(restored, codec.decode_codes(codes), rtol=0, atol=1e-10)
        encoded = torch.cat(
            [*map(encoder.push, audio.split(2 * hop + 1, dim=2)), encoder.flush()], dim=2
        )
        assert torch.equal(encoded, codec.encode(audio).codes)
        assert pretend_graphs.replays > before + 20


def test_capture_says_where_it_can(codec):
    for streams in (DecoderStreams(codec, 1), StreamingEncoder(codec)):
        with pytest.raises(ValueError, match="the codec is on cpu; accepted: a CUDA device"):
            streams.capture(1)
    with pytest.raises(ValueError, match="frames is 0; accepted: a positive integer"):
        EncoderStreams(codec, 1).capture(0)
    with pytest.raises(ValueError, match="99 codebooks; accepted: 1 to"):
        DecoderStreams(codec, 1).capture(1, n_quantizers=99)


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["even", "odd"])
def test_streams_run_the_engines_layers(golden, pretend_graphs, name, precision):
    """In its precision, with the quantizer in float32, captured where a graph can serve."""
    codec, exact = load(golden, name, dtype=torch.float32).optimize(precision), load(golden, name)
    codes, audio = random_codes(codec, 2, 60), random_audio(codec, 2, 2000)
    decoder, encoder = StreamingDecoder(codec), StreamingEncoder(codec)
    decoder.capture(2, batch=2)
    encoder.capture(2, batch=2)
    assert {kept.dtype for kept in decoder._of(2)._chain.tails} == {
        codec.engine.plans["decode"].dtype
    }
    streamed = torch.cat([*map(decoder.push, codes.split(2, dim=2)), decoder.flush()], dim=2)
    assert streamed.dtype == torch.float32
    whole, truth = codec.decode_codes(codes), exact.decode_codes(codes)
    assert snr(streamed, truth) > snr(whole, truth) - 3
    streamed = torch.cat([*map(encoder.push, audio.split(77, dim=2)), encoder.flush()], dim=2)
    whole, truth = codec.encode(audio).codes, exact.encode(audio.double()).codes
    assert (streamed == truth).double().mean() > (whole == truth).double().mean() - 0.05
    assert pretend_graphs.replays > 10


@pytest.mark.triton
@torch.inference_mode()
def test_streams_run_on_the_fused_kernels(golden):
    """In a batch: the kernels see inputs that lie apart in memory."""
    codec = load(golden, "even", device=DEVICE, dtype=torch.float32).optimize("fp32")
    codes, audio = random_codes(codec, 2, 4), random_audio(codec, 2, 2 * codec.hop_length)
    results = []
    for backend in ("triton", "reference"):
        decoder, encoder = DecoderStreams(codec, 2), EncoderStreams(codec, 2)
        with dac_fast.use_backend(backend):
            # as in the steady state
            audios = [decoder._compute(block, None) for block in codes.split(2, dim=2)]
            encoded = [
                encoder._chain(block, None, None)[0]
                for block in audio.split(codec.hop_length, dim=2)
            ]
        results.append((torch.cat(audios, dim=2), torch.cat(encoded, dim=2)))
    for fused, expected in zip(*results):
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)


def snr(actual, exact):
    return (
        10 * torch.log10(exact.square().mean() / (actual.double() - exact).square().mean()).item()
    )


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("precision", [None, "fp16", "fp32"])
def test_graphs_replay_what_runs_without_them(golden, precision):
    """Modules, and the engine's layers."""
    codec = load(golden, "even", device="cuda", dtype=torch.float32)
    if precision:
        codec.optimize(precision)
    hop, lengths = codec.hop_length, (60, 1, 45)
    codes = [random_codes(codec, 1, frames, frames) for frames in lengths]
    audio = [random_audio(codec, 1, frames * hop, frames) for frames in lengths]
    outputs = []
    for capture in (False, True):
        decoders, encoders = DecoderStreams(codec, 2), EncoderStreams(codec, 2)
        for frames in (1, 3) if capture else ():
            decoders.capture(frames)
            encoders.capture(frames)
        lag = -(-decoders.look_ahead // hop)
        outputs.append(
            (
                run_slots(decoders, codes, 1, lag, 0),
                run_slots(encoders, audio, hop, encoders.delay, 0),
            )
        )
    for plain, captured in zip(*(decoded for decoded, _ in outputs)):
        # other kernels may be chosen for a recording, or by it
        assert snr(captured, plain.double()) > (50 if precision == "fp16" else 80)
    same = [(a == b).double().mean() for a, b in zip(*(encoded for _, encoded in outputs))]
    assert min(same) > 0.9


def test_a_flush_ends_a_signal(codec):
    """The next push begins another one, of any batch; nothing gives nothing."""
    decoder, encoder = StreamingDecoder(codec), StreamingEncoder(codec)
    assert decoder.flush().shape == (1, 1, 0)
    assert encoder.flush().shape[2] == 0
    for batch in (2, 3):
        codes, audio = random_codes(codec, batch, 30), random_audio(codec, batch, 301)
        with torch.inference_mode():
            restored = torch.cat([decoder.push(codes), decoder.flush()], dim=2)
            torch.testing.assert_close(restored, codec.decode_codes(codes), rtol=0, atol=1e-10)
            assert torch.equal(
                torch.cat([encoder.push(audio), encoder.flush()], dim=2), codec.encode(audio).codes
            )


def test_a_reset_begins_a_new_signal(codec):
    """Whatever of the old one was pushed, and of another batch."""
    decoder, encoder = StreamingDecoder(codec), StreamingEncoder(codec)
    decoder.reset()
    encoder.reset()
    for batch in (2, 3, 2):
        decoder.push(random_codes(codec, batch, 30, seed=1))
        encoder.push(random_audio(codec, batch, 301, seed=1))
        decoder.reset()
        encoder.reset()
        codes, audio = random_codes(codec, 2, 30), random_audio(codec, 2, 301)
        with torch.inference_mode():
            restored = torch.cat([decoder.push(codes), decoder.flush()], dim=2)
            torch.testing.assert_close(restored, codec.decode_codes(codes), rtol=0, atol=1e-10)
            encoded = torch.cat([encoder.push(audio), encoder.flush()], dim=2)
            assert torch.equal(encoded, codec.encode(audio).codes)


def state(streams):
    """All that a push depends on."""
    tensors = [*streams._chain.tails, getattr(streams, "_pending", torch.zeros(()))]
    return [tensor.clone() for tensor in tensors], list(streams._frames), list(streams._ends)


def test_what_is_refused_changes_no_stream(codec):
    """A slot that is not there, and a code that is not in its codebook."""
    codes, size = random_codes(codec, 3, 40), codec.config.codebook_size
    decoders, encoders = DecoderStreams(codec, 3), EncoderStreams(codec, 3)
    decoders.push(codes)
    encoders.push(random_audio(codec, 3, 40 * codec.hop_length))
    for streams in (decoders, encoders):
        before = state(streams)
        for *good, bad in ([0, 3], [1, -1], [2, 1.0], [True]):
            for call in (streams.reset, streams.end):
                with pytest.raises(ValueError, match=f"slot is {bad}; accepted: 0 to 2"):
                    call(iter([*good, bad]))
        torch.testing.assert_close(state(streams), before, rtol=0, atol=0)

    before, wrong = state(decoders), codes.clone()
    wrong[2, 1, 7] = size
    with pytest.raises(ValueError, match=f"slot 2: code {size}; accepted: 0 to {size - 1}"):
        decoders.push(wrong)
    torch.testing.assert_close(state(decoders), before, rtol=0, atol=0)
    # Nobody looks at the codes of a stream that is not active.
    active = [True, True, False]
    twin = DecoderStreams(codec, 3)
    twin.push(codes)
    torch.testing.assert_close(
        decoders.push(wrong, active), twin.push(codes, active), rtol=0, atol=0
    )


def test_bad_arguments_say_what_is_accepted(codec):
    decoder, encoder = StreamingDecoder(codec), StreamingEncoder(codec)
    codes, audio = random_codes(codec, 2, 3), random_audio(codec, 2, 3)
    decoder.push(codes)
    encoder.push(audio)
    cases = {
        r"codes of shape \[1, \d, 3\]; accepted: \[2, 1 to": lambda: decoder.push(codes[:1]),
        "codes of shape": lambda: StreamingDecoder(codec).push(codes[0]),
        "code -1; accepted: 0 to": lambda: decoder.push(codes - codes.amin() - 1),
        r"audio of shape \[2, 2, 3\]; accepted: \[2, 1, T\]": lambda: encoder.push(
            audio.repeat(1, 2, 1)
        ),
        "0 codebooks; accepted: 1 to": lambda: StreamingEncoder(codec, n_quantizers=0),
        r"accepted: \[2, 1, a multiple of": lambda: EncoderStreams(codec, 2).push(audio),
        "batch is 0": lambda: DecoderStreams(codec, 0),
        r"active is \[True\]; accepted: 2 booleans": lambda: DecoderStreams(codec, 2).push(
            codes, [True]
        ),
        "active is": lambda: DecoderStreams(codec, 2).push(codes, torch.tensor([0, 1])),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()

"""One step of a live stream at 44.1 kHz: a frame is pushed and its result awaited.

Peers: `modules`, ours, folded; `engine-PRECISION`, the layers of `codec.optimize`; `-graph`, the
step as a CUDA graph. The check: of a frame that repeats for ever, every step gives the same, which
is what float64 gives in the middle of a long signal.
"""

import copy
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Outputs, Peer, Prepared, Run, Settings
from bench.checks.codec import agreement, assert_snr, decibels
from bench.checks.random_codec import convolution_flops, random_codec
from bench.document import Json
from bench.peers.codecs import PRECISIONS
from dac_fast import ops
from dac_fast.codec import DAC
from dac_fast.config import PRESETS
from dac_fast.streaming import DecoderStreams, EncoderStreams

# After this many steps the newest output no longer depends on the beginning of the stream.
STEPS = 32


def cases(device: str, quick: bool) -> list[Case]:
    """One stream, and on CUDA 16 in a batch."""
    preset = "tiny" if quick else "44khz"
    found = []
    for direction in ("decode", "encode"):
        for batch in (1, 16) if device == "cuda" else (1,):
            run = partial(prepare, preset, batch, direction)
            priority = -2 if (direction, batch) == ("decode", 1) else 1
            shape = f"{preset}-{batch}x1frame"
            found.append(
                Case("stream", direction, device, "float32", shape, run, priority, requests=True)
            )
    return found


def prepare(preset: str, batch: int, direction: str, settings: Settings) -> Prepared:
    """Model, the repeated frame, peers and check."""
    config = PRESETS[preset]
    codec = copy.deepcopy(random_codec(preset, settings.device)).fold_weight_norm()
    frame = _frame(codec, direction, settings.device)
    truth = _truth(codec, frame.to(settings.device), direction)

    def check(outputs: Outputs, precision: str) -> Json:
        (output,) = outputs
        if direction == "decode":
            value = decibels(output, truth.expand_as(output))
            assert_snr(value, precision)
            return {"snr_db": value}
        share = agreement(output, truth.expand_as(output))
        # One frame is too little to judge the other precisions: a near tie would decide all of it.
        assert precision != "float32" or share == 1, f"{share:.0%} of the codes are float64's"
        return {"agreement": share}

    block = frame.expand(batch, -1, -1).contiguous()
    on_gpu = settings.device == "cuda"
    peers: dict[str, Peer] = {"modules": partial(_start, codec, direction, block, None, False)}
    for precision in ("fp16", "fp32", "tf32") if on_gpu else ("fp32", "bf16"):
        for captured in (False, True) if on_gpu else (False,):
            name = f"engine-{precision}{'-graph' if captured else ''}"
            peers[name] = partial(_start, codec, direction, block, precision, captured)
    seconds = batch * config.hop_length / config.sample_rate
    # A frame's share of a long signal's flops, so that the signal's ends do not count.
    flops = batch * convolution_flops(config, direction, 1000) // 1000
    return Prepared(peers, check, bytes_moved=None, flops=flops, audio_seconds=seconds)


def _frame(codec: DAC, direction: str, device: str) -> Tensor:
    """The frame: codes [1, N, 1] for decoding, else audio [1, 1, hop]."""
    generator = torch.Generator().manual_seed(1)
    if direction == "decode":
        # On the CPU, where the codes' range is checked without waiting for the GPU.
        shape = (1, codec.config.n_codebooks, 1)
        return torch.randint(codec.config.codebook_size, shape, generator=generator)
    return 0.1 * torch.randn(1, 1, codec.hop_length, generator=generator).to(device)


def _truth(codec: DAC, frame: Tensor, direction: str) -> Tensor:
    """The result of float64 for a frame in the middle of a signal that repeats it."""
    exact = copy.deepcopy(codec).double()
    middle = STEPS * 2 // 3
    with torch.no_grad(), ops.use_backend("reference"):
        if direction == "encode":
            codes = exact.encode(frame.double().repeat(1, 1, STEPS)).codes
            return codes[..., middle : middle + 1]
        begin = middle * codec.hop_length - DecoderStreams(codec, 1).look_ahead
        return exact.decode_codes(frame.repeat(1, 1, STEPS))[..., begin : begin + codec.hop_length]


def _start(codec: DAC, direction: str, block: Tensor, precision: str | None, captured: bool) -> Run:
    if precision:
        codec = copy.deepcopy(codec).optimize(precision)
    streams = (DecoderStreams if direction == "decode" else EncoderStreams)(codec, block.shape[0])
    if captured:
        streams.capture(1)
    for _ in range(STEPS):
        streams.push(block)
    return Run(torch.no_grad()(lambda: (streams.push(block),)), PRECISIONS[precision or "fp32"])

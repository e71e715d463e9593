"""One step of a live stream at 44.1 kHz: one frame pushed, in the steady state, and its result waited for.

Providers: our modules, folded; `engine-PRECISION` the layers of `codec.optimize`; `-graph`: the step as a CUDA graph.
The check: a stream of one frame repeated gives the same in every step, which float64 gives in the middle of a signal.
"""

import copy
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Prepared, Settings
from bench.checks.codec import LEAST_SNR, agreement, decibels
from bench.checks.random_codec import convolution_flops, random_codec
from bench.peers.codecs import PRECISIONS, Run
from dac_fast import ops
from dac_fast.codec import DAC
from dac_fast.config import PRESETS
from dac_fast.streaming import DecoderStreams, EncoderStreams

# Steps until the beginning of a stream is out of sight of its newest output.
STEPS = 32


def cases(device: str, quick: bool) -> list[Case]:
    """One stream, and 16 in a batch on CUDA."""
    preset = "tiny" if quick else "44khz"
    return [
        Case(
            "stream", direction, device, "float32", f"{preset}-{batch}x1frame",
            partial(prepare, preset, batch, direction), -2 if (direction, batch) == ("decode", 1) else 1, requests=True,
        )
        for direction in ("decode", "encode")
        for batch in ((1, 16) if device == "cuda" else (1,))
    ]  # fmt: skip


def prepare(preset: str, batch: int, direction: str, settings: Settings) -> Prepared:
    """Model, the repeated frame, providers and check."""
    config = PRESETS[preset]
    codec = copy.deepcopy(random_codec(preset, settings.device)).fold_weight_norm()
    generator = torch.Generator().manual_seed(1)
    if direction == "decode":
        # from where they are checked without waiting for the GPU
        frame = torch.randint(config.codebook_size, (1, config.n_codebooks, 1), generator=generator)
    else:
        frame = 0.1 * torch.randn(1, 1, config.hop_length, generator=generator).to(settings.device)
    truth = _truth(codec, frame.to(settings.device), direction)

    def check(outputs, precision):
        (output,) = outputs
        if direction == "decode":
            value = decibels(output, truth.expand_as(output))
            assert value >= LEAST_SNR[precision], (
                f"{value:.1f} dB, at least {LEAST_SNR[precision]} expected"
            )
            return {"snr_db": value}
        share = agreement(output, truth.expand_as(output))
        # of one frame only: in the other precisions a near tie would decide all of it
        assert precision != "float32" or share == 1, f"{share:.0%} of the codes are float64's"
        return {"agreement": share}

    block = frame.expand(batch, -1, -1).contiguous()
    precisions = ("fp32",) if settings.device == "cpu" else ("fp16", "fp32", "tf32")
    providers = {"modules": partial(_start, codec, direction, block, None, False)}
    for precision in precisions:
        for captured in (False, True) if settings.device == "cuda" else (False,):
            name = f"engine-{precision}{'-graph' if captured else ''}"
            providers[name] = partial(_start, codec, direction, block, precision, captured)
    seconds = batch * config.hop_length / config.sample_rate
    # in the middle of a signal: the whole of a long one over its frames
    flops = batch * convolution_flops(config, direction, 1000) // 1000
    return Prepared(providers, check, bytes_moved=None, flops=flops, audio_seconds=seconds)


def _truth(codec: DAC, frame: Tensor, direction: str) -> Tensor:
    """What float64 gives for a frame in the middle of a signal that repeats it."""
    exact, middle = copy.deepcopy(codec).double(), STEPS * 2 // 3
    with torch.no_grad(), ops.use_backend("reference"):
        if direction == "encode":
            return exact.encode(frame.double().repeat(1, 1, STEPS)).codes[..., middle : middle + 1]
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
    return Run(lambda: (streams.push(block),), PRECISIONS[precision or "fp32"])

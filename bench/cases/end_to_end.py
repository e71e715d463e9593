"""The whole codec, 44.1 kHz preset: encode, decode, and both in turn, as a user calls it and waits for the result.

Audio goes in as float32 and comes out of `decode` from codes. Providers, all with the same weights:

    published             descript-audio-codec in a process of its own (given `--published-python`)
    published-equivalent  on CUDA: the same computation by our reference ops: weight norm at every call, TorchScript's
                          Snake, PyTorch's default switches
    transformers          Hugging Face's DacModel; `-compiled`: torch.compile of it
    reference-…           on the CPU: our modules with the reference ops, weight norm folded or not
    auto-folded           on the CPU: our modules, folded, with the ops that the backend `auto` chooses
    recipe                bench/recipe.py
    engine-PRECISION      `codec.optimize`, each layer run in the way that was fastest; `-graph`: as a CUDA graph
    engine                its default: float32 for encode, so that codes are the reference's, float16 for decode

What runs convolutions in TF32, as PyTorch does by default, counts as precision "tf32".
"""

import copy
import math
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Prepared, Settings
from bench.checks.codec import Truth
from bench.checks.random_codec import convolution_flops, random_codec
from bench.peers import Peer, codecs
from dac_fast.codec import DAC
from dac_fast.config import PRESETS

SIZES = ((16, 10.0), (1, 1.0), (1, 100.0), (1, 10.0), (16, 1.0), (1, 0.1))
# The targets are about these.
FIRST = {("both", 16, 10.0), ("decode", 1, 1.0)}
# Sizes at which every provider runs; elsewhere those that say most.
FULL = ((16, 10.0), (1, 1.0))
# Seconds of audio from which on one provider at most keeps a graph, for the memory.
LARGE = 50
GRAPH_BYTES = 40 << 30


def cases(device: str, quick: bool) -> list[Case]:
    """On CUDA all sizes, on the CPU two seconds; `both` first, since it is the number that counts."""
    preset = "tiny" if quick else "44khz"
    sizes = [(1, 0.2)] if quick else SIZES if device == "cuda" else [(1, 2.0)]
    found = []
    for direction in ("both", "decode", "encode"):
        for batch, seconds in sizes:
            first = (direction, batch, seconds) in FIRST
            priority = -3 if first else -1 if direction == "both" else 1
            run = partial(prepare, preset, batch, seconds, direction)
            shape = f"{preset}-{batch}x{seconds:g}s"
            found.append(
                Case("codec", direction, device, "float32", shape, run, priority, requests=True)
            )
    return found


def prepare(
    preset: str, batch: int, seconds: float, direction: str, settings: Settings
) -> Prepared:
    """Model, input, providers and check."""
    config = PRESETS[preset]
    codec = random_codec(preset, settings.device)
    frames = math.ceil(seconds * config.sample_rate / config.hop_length)
    generator = torch.Generator().manual_seed(1)
    audio = 0.1 * torch.randn(batch, 1, frames * config.hop_length, generator=generator).to(
        settings.device
    )
    codes = torch.randint(
        config.codebook_size, (batch, config.n_codebooks, frames), generator=generator
    )
    source = codes.to(settings.device) if direction == "decode" else audio
    truth = Truth(codec, audio)

    def check(outputs: tuple[Tensor, ...], precision: str) -> dict:
        encode, _, decode = precision.partition("/")
        facts = {} if direction == "decode" else truth.check_codes(outputs[0], encode)
        if direction != "encode":
            of = source if direction == "decode" else outputs[0]
            facts |= truth.check_audio(of, outputs[-1], decode or encode)
        return facts

    make = {"cpu": _cpu_providers, "cuda": _cuda_providers}[settings.device]
    providers = {"published": _published(codec, direction, source, settings)}
    providers |= make(codec, direction, source, (batch, seconds, frames))
    flops = batch * convolution_flops(config, direction, frames)
    audio_seconds = audio.shape[0] * audio.shape[2] / config.sample_rate
    return Prepared(providers, check, bytes_moved=None, flops=flops, audio_seconds=audio_seconds)


def _published(codec: DAC, direction: str, source: Tensor, settings: Settings):
    if not settings.published_python:
        return "no --published-python was given"
    # Its constructor knows no choice of activation or quantizer.
    kwargs = {
        key: value
        for key, value in codec.config.to_dict().items()
        if key not in ("activation", "quantizer")
    }
    kwargs["quantizer_dropout"] = bool(kwargs["quantizer_dropout"])
    state = {key: tensor.cpu() for key, tensor in codec.state_dict().items()}
    job = {
        "kwargs": kwargs,
        "state": state,
        "direction": direction,
        "input": source.cpu(),
        "device": settings.device,
    }
    precision = "tf32" if settings.device == "cuda" else "float32"
    return partial(Peer, settings.published_python, job, precision)


def _cpu_providers(codec: DAC, direction: str, source: Tensor, _size) -> dict:
    folded = copy.deepcopy(codec).fold_weight_norm()
    return {
        "reference-unfolded": partial(codecs.modules, codec, direction, source, "reference"),
        "reference-folded": partial(codecs.modules, folded, direction, source, "reference"),
        "auto-folded": partial(codecs.modules, folded, direction, source, "auto"),
        "transformers": partial(codecs.transformers, codec, direction, source),
        "engine": partial(codecs.engine, codec, direction, source),
    }


def _cuda_providers(
    codec: DAC, direction: str, source: Tensor, size: tuple[int, float, int]
) -> dict:
    """The baseline first, then what matters most: a case may run out of time."""
    batch, seconds, frames = size
    start = {
        name: partial(getattr(codecs, name), codec, direction, source)
        for name in ("published_equivalent", "transformers", "recipe", "engine")
    }
    full, shapes = direction == "both" and (batch, seconds) in FULL, ((batch, frames),)
    captured = partial(start["engine"], shapes=shapes, memory=GRAPH_BYTES)
    uncaptured = partial(start["engine"], shapes=shapes, memory=0)
    found = {
        "published-equivalent": start["published_equivalent"],
        "transformers": start["transformers"],
    }
    # Compilation takes a minute or so.
    if direction == "both" or (direction, batch, seconds) in FIRST:
        found["recipe"] = start["recipe"]
    found["engine-fp16-graph"] = partial(captured, "fp16")
    found["engine"] = partial(uncaptured, None)
    found["engine-fp32"] = partial(uncaptured, "fp32")
    if direction == "both":
        for precision in ("fp16", "tf32", "bf16"):
            found[f"engine-{precision}"] = partial(uncaptured, precision)
    if full and batch * seconds < LARGE:
        for precision in ("fp32", "tf32", "bf16"):
            found[f"engine-{precision}-graph"] = partial(captured, precision)
    if full:
        found["transformers-compiled"] = partial(start["transformers"], compiled=True)
    return found

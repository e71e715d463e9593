"""The whole codec at 44.1 kHz, as a user calls it and waits for the result.

Audio goes in as float32; `decode` makes it from codes; `both` is one after the other. All peers
have the same weights:

    published             descript-audio-codec in a process of its own (given `--published-python`)
    …-accelerated         on the CPU: that, or transformers, after `dac_fast.accelerate(model)`
    published-equivalent  on CUDA: the same computation by our reference ops: weight norm at every
                          call, TorchScript's Snake, PyTorch's default switches
    transformers          Hugging Face's DacModel; `-compiled`: torch.compile of it
    reference-…           on the CPU: our modules with the reference ops, weight norm folded or not
    auto-folded           on the CPU: our modules, folded, with the ops that `auto` chooses
    torch-frozen          on the CPU: torch.compile of our folded modules, weights as constants
    onnxruntime, openvino on the CPU: our ONNX export; `-bf16`: OpenVINO in bfloat16
    fast-dacvae           on CUDA: its recipe as its authors run it, see peers/compiled.py; `-sine`:
                          the same with Snake's sine
    engine-PRECISION      `codec.optimize`, each layer run in the way that was fastest; `-graph`: as
                          a CUDA graph
    engine                its default: float32 for encode, so that codes are the reference's,
                          float16 for decode on CUDA, float32 on the CPU; `-bf16`: bfloat16 for both

A peer that runs convolutions in TF32, as PyTorch does by default, has the precision "tf32".
"""

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Outputs, Peer, Prepared, Settings
from bench.checks.codec import Truth
from bench.checks.random_codec import convolution_flops, random_codec
from bench.document import ROOT, Json
from bench.peers import codecs, exported
from bench.peers.process import RemoteRun
from dac_fast.codec import DAC
from dac_fast.config import PRESETS

# Items and seconds.
SIZES = ((16, 10.0), (1, 1.0), (1, 100.0), (1, 10.0), (16, 1.0), (1, 0.1))
# The README's headline sizes; run first.
FIRST = {("both", 16, 10.0), ("decode", 1, 1.0)}
# Sizes at which every peer runs; at the others only those that say most do.
FULL = ((16, 10.0), (1, 1.0))
# Seconds of audio from which on one peer at most keeps a graph, for the memory.
LARGE = 50
GRAPH_BYTES = 40 << 30
REPOSITORY = (str(ROOT), str(ROOT / "kernels"))


def cases(device: str, quick: bool) -> list[Case]:
    """On CUDA all sizes, on the CPU two seconds; the README's come first, single layers next."""
    sizes = [("44khz", *size) for size in SIZES]
    if quick:
        sizes = [("tiny", 1, 0.2)]
    elif device == "cpu":
        sizes = [("44khz", 1, 2.0), ("tiny", 1, 2.0)]
    found = []
    for direction in ("both", "decode", "encode"):
        for preset, batch, seconds in sizes:
            first = (direction, batch, seconds) in FIRST
            priority = -3 if first else -1 if (batch, seconds) == FULL[-1] else 3
            run = partial(prepare, preset, batch, seconds, direction)
            shape = f"{preset}-{batch}x{seconds:g}s"
            found.append(
                Case("codec", direction, device, "float32", shape, run, priority, requests=True)
            )
    return found


def prepare(
    preset: str, batch: int, seconds: float, direction: str, settings: Settings
) -> Prepared:
    """Model, input, peers and check."""
    config = PRESETS[preset]
    codec = random_codec(preset, settings.device)
    frames = math.ceil(seconds * config.sample_rate / config.hop_length)
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(batch, 1, frames * config.hop_length, generator=generator)
    audio = 0.1 * samples.to(settings.device)
    shape = (batch, config.n_codebooks, frames)
    codes = torch.randint(config.codebook_size, shape, generator=generator)
    source = codes.to(settings.device) if direction == "decode" else audio
    truth = Truth(codec, audio)

    def check(outputs: Outputs, precision: str) -> Json:
        encode, _, decode = precision.partition("/")
        found = {} if direction == "decode" else truth.check_codes(outputs[0], encode)
        if direction != "encode":
            decoded = source if direction == "decode" else outputs[0]
            found |= truth.check_audio(decoded, outputs[-1], decode or encode)
        return found

    peers = {"published": published(codec, direction, source, settings)}
    if settings.device == "cpu":
        peers["published-accelerated"] = published(codec, direction, source, settings, REPOSITORY)
    ours_and_others = cpu_peers if settings.device == "cpu" else cuda_peers
    peers |= ours_and_others(codec, direction, source, seconds)
    flops = batch * convolution_flops(config, direction, frames)
    audio_seconds = audio.shape[0] * audio.shape[2] / config.sample_rate
    return Prepared(peers, check, bytes_moved=None, flops=flops, audio_seconds=audio_seconds)


def published(
    codec: DAC,
    direction: str,
    source: Tensor,
    settings: Settings,
    accelerated_by: Sequence[str] = (),
) -> Peer:
    """The published package; `accelerated_by`: see `worker.py`."""
    if not settings.published_python:
        return "no --published-python was given"
    # The published constructor knows no choice of activation or quantizer.
    unknown = ("activation", "quantizer")
    config = codec.config.to_dict().items()
    kwargs = {key: value for key, value in config if key not in unknown}
    kwargs["quantizer_dropout"] = bool(kwargs["quantizer_dropout"])
    job = {
        "kwargs": kwargs,
        "state": {key: tensor.cpu() for key, tensor in codec.state_dict().items()},
        "direction": direction,
        "input": source.cpu(),
        "device": settings.device,
        "accelerated_by": list(accelerated_by),
    }
    precision = "tf32" if settings.device == "cuda" else "float32"
    return partial(RemoteRun, settings.published_python, job, precision)


def cpu_peers(codec: DAC, direction: str, source: Tensor, _seconds: float) -> dict[str, Peer]:
    """The peers on the CPU, the baseline first; they are the same at every size."""
    folded = copy.deepcopy(codec).fold_weight_norm()
    return {
        "reference-unfolded": partial(codecs.modules, codec, direction, source, "reference"),
        "reference-folded": partial(codecs.modules, folded, direction, source, "reference"),
        "auto-folded": partial(codecs.modules, folded, direction, source, "auto"),
        "transformers": partial(codecs.transformers, codec, direction, source),
        "transformers-accelerated": partial(
            codecs.transformers, codec, direction, source, accelerated=True
        ),
        "torch-frozen": partial(codecs.frozen, codec, direction, source),
        "onnxruntime": partial(exported.onnx_runtime, codec, direction, source),
        "openvino": partial(exported.openvino, codec, direction, source),
        "openvino-bf16": partial(exported.openvino, codec, direction, source, "bfloat16"),
        "engine": partial(codecs.engine, codec, direction, source),
        "engine-bf16": partial(codecs.engine, codec, direction, source, "bf16"),
    }


def cuda_peers(codec: DAC, direction: str, source: Tensor, seconds: float) -> dict[str, Peer]:
    """The peers on CUDA, the baseline first, then by interest, since a case may run out of time."""
    batch = source.shape[0]
    frames = source.shape[2] if direction == "decode" else source.shape[2] // codec.hop_length
    full = direction == "both" and (batch, seconds) in FULL
    weights = (codec, direction, source)
    transformers = partial(codecs.transformers, *weights)
    engine = partial(codecs.engine, *weights, shapes=((batch, frames),))
    captured = partial(engine, memory=GRAPH_BYTES)

    found: dict[str, Peer] = {
        "published-equivalent": partial(codecs.published_equivalent, *weights),
        "transformers": transformers,
        "engine-fp16-graph": partial(captured, precision="fp16"),
        "engine": engine,
    }
    # Compilation takes a minute or so.
    if direction == "both" or (direction, batch, seconds) in FIRST:
        found["fast-dacvae"] = partial(codecs.fast_dacvae, *weights, polynomial=True)
    found["engine-fp32"] = partial(engine, precision="fp32")
    if direction == "encode":
        found["engine-fp32-invariant"] = partial(engine, precision="fp32", invariant=True)
        found["engine-tf32x3"] = partial(engine, precision="tf32x3")
    if direction == "both":
        for precision in ("fp16", "tf32", "bf16"):
            found[f"engine-{precision}"] = partial(engine, precision=precision)
    if full and batch * seconds < LARGE:
        for precision in ("fp32", "tf32", "bf16"):
            found[f"engine-{precision}-graph"] = partial(captured, precision=precision)
    if full:
        found["fast-dacvae-sine"] = partial(codecs.fast_dacvae, *weights, polynomial=False)
        found["transformers-compiled"] = partial(transformers, compiled=True)
    return found

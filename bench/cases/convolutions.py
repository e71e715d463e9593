"""Convolutions of the 44.1 kHz model with what surrounds them, layer by layer, for one second of audio, in float16.

The residual units appear as one op up to the width that has one, beyond as their two convolutions, at dilation 9.
Bytes: every input, weight and output once. Flops: the convolutions'. The baseline is PyTorch's best way to run the
layer: folded weights, channels innermost, cuDNN or cuBLAS, one pass for Snake, one for the addition.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Prepared, Settings
from bench.checks import ops as checks
from bench.peers import ops as peers
from dac_fast import ops
from dac_fast.config import PRESETS, Config
from dac_fast.model import folded
from dac_fast.ops import reference

DILATION = 9
# The widest residual unit that is one op.
FUSED = 192


@dataclass(frozen=True)
class Layer:
    """One convolution, or residual unit, of a model; `hop` samples of audio per position of its input."""

    kind: str
    hop: int
    channels: int
    out: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    op: str = "conv1d"
    snake: bool = True
    keep: bool = True
    residual: bool = False
    tanh: bool = False


def units(place: str, hop: int, channels: int) -> list[Layer]:
    """A residual unit of that width."""
    seven = Layer(
        f"{place}-conv7", hop, channels, channels, 7, 1, 3 * DILATION, DILATION, keep=False
    )
    if channels > FUSED:
        return [seven, Layer(f"{place}-conv1", hop, channels, channels, 1, residual=True)]
    return [
        Layer(
            f"{place}-unit",
            hop,
            channels,
            channels,
            7,
            1,
            3 * DILATION,
            DILATION,
            op="residual_unit",
        )
    ]


def layers(config: Config) -> list[Layer]:
    """Every distinct layer of a model."""
    channels, hop = config.encoder_dim, 1
    found = [Layer("encoder-first", 1, 1, channels, 7, padding=3)]
    for rate in config.encoder_rates:
        found += units("encoder", hop, channels)
        found.append(
            Layer("encoder-down", hop, channels, 2 * channels, 2 * rate, rate, -(-rate // 2))
        )
        channels, hop = 2 * channels, hop * rate
    found.append(Layer("encoder-last", hop, channels, config.latent_dim, 3, padding=1, snake=False))
    channels = config.decoder_dim
    found.append(Layer("decoder-first", hop, config.latent_dim, channels, 7, padding=3, keep=False))
    for rate in config.decoder_rates:
        shape = (hop, channels, channels // 2, 2 * rate, rate, -(-rate // 2))
        found.append(Layer("decoder-up", *shape, op="conv_transpose1d"))
        channels, hop = channels // 2, hop // rate
        found += units("decoder", hop, channels)
    found.append(Layer("decoder-last", hop, channels, 1, 7, padding=3, snake=False, tanh=True))
    return found


def cases(device: str, quick: bool) -> list[Case]:
    """One item and 16 of one second, on CUDA only."""
    if device == "cpu":
        return []
    config = PRESETS["tiny" if quick else "44khz"]
    frames = math.ceil((0.05 if quick else 1) * config.sample_rate / config.hop_length)
    found = []
    for layer in layers(config):
        for batch in (1, 16):
            size = frames * config.hop_length // layer.hop
            name = f"{layer.kind}-{batch}x{layer.channels}x{size}"
            run = partial(prepare, layer, batch, size)
            found.append(Case(layer.op, "forward", device, "float16", name, run, priority=2))
    return found


def prepare(layer: Layer, batch: int, size: int, settings: Settings) -> Prepared:
    """Inputs, providers and check of one layer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(settings.device, torch.float16)

    def innermost(items, channels, positions, scale=1.0):
        return normal(items, positions, channels, scale=scale).transpose(1, 2)

    x = innermost(batch, layer.channels, size)
    bias, alpha = normal(layer.out), normal(1, layer.out, 1).abs() + 0.1
    options = {"alpha": alpha if layer.snake else None, "keep": layer.keep}
    scale = (layer.channels * (2 if layer.op == "conv_transpose1d" else layer.kernel)) ** -0.5
    flops = 2 * batch * layer.channels * layer.out * layer.kernel
    if layer.op == "residual_unit":
        weight2 = innermost(layer.out, layer.channels, 1, layer.channels**-0.5)
        weights = [innermost(layer.out, layer.channels, 7, scale), bias, alpha, weight2, bias]
        args = [x, reference.snake(x, alpha), *weights, layer.dilation, layer.padding]
        flops = flops * size * 8 // 7
    elif layer.op == "conv_transpose1d":
        args = [
            x,
            innermost(layer.channels, layer.out, layer.kernel, scale),
            bias,
            layer.stride,
            layer.padding,
        ]
        flops *= size
    else:
        weight = innermost(layer.out, layer.channels, layer.kernel, scale)
        args = [x, weight, bias, layer.stride, layer.padding, layer.dilation]
        options |= {"tanh": layer.tanh, "residual": x if layer.residual else None}
        flops *= size // layer.stride

    same = wanted(getattr(reference, layer.op)(*args, **options))
    check = checks.as_good_as(
        same, wanted(getattr(reference, layer.op)(*doubles(args), **doubles(options)))
    )
    tensors = [value for value in (*args, *options.values(), *same) if isinstance(value, Tensor)]
    # The residual is x itself: what is listed twice is read once.
    memory = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return Prepared(
        peers.forward(functions(layer.op, args, options)), check, sum(memory.values()), flops
    )


def functions(op: str, args: list, options: dict) -> dict:
    """PyTorch's way layer by layer, torch.compile of it, and ours; without arguments."""
    module = ops.IMPLEMENTATIONS[op]["triton"]
    unfused = {
        "conv1d": conv1d,
        "conv_transpose1d": conv_transpose1d,
        "residual_unit": residual_unit,
    }[op]
    compiled = torch.compile(unfused, dynamic=False)
    return {
        "cudnn": lambda: wanted(unfused(ops.snake, *args, **options)),
        "compiled": lambda: wanted(compiled(reference.snake, *args, **options)),
        "triton": getattr(module, f"{op}_unsupported")(*args, **options)
        or (lambda: wanted(getattr(module, op)(*args, **options))),
    }


def wanted(outputs) -> list[Tensor]:
    """The outputs that there are."""
    return [output for output in outputs if output is not None]


def doubles(values):
    """Arguments, a list or by name, with float64 in place of floats."""
    if isinstance(values, dict):
        return dict(zip(values, doubles(list(values.values())), strict=True))
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def conv1d(
    snake, x, weight, bias, stride, padding, dilation, *, alpha, keep, residual=None, tanh=False
):
    """`ops.conv1d`, a pass for each step."""
    y = folded.conv1d(x, weight, bias, stride, padding, dilation)
    y = y.tanh() if tanh else y
    y = y if residual is None else y + residual
    return y if keep else None, None if alpha is None else snake(y, alpha)


def conv_transpose1d(snake, x, weight, bias, stride, padding, *, alpha, keep):
    """`ops.conv_transpose1d`, a pass for each step."""
    y = folded.conv_transpose1d(x, weight, bias, stride, padding)
    return y if keep else None, None if alpha is None else snake(y, alpha)


def residual_unit(
    snake, x, snaked, weight1, bias1, alpha1, weight2, bias2, dilation, padding, *, alpha, keep
):
    """`ops.residual_unit`, a pass for each step."""
    hidden = conv1d(snake, snaked, weight1, bias1, 1, padding, dilation, alpha=alpha1, keep=False)[
        1
    ]
    return conv1d(snake, hidden, weight2, bias2, 1, 0, 1, alpha=alpha, keep=keep, residual=x)

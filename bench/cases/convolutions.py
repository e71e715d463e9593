"""Convolutions of the 44.1 kHz model with what surrounds them, layer by layer, in float16.

The residual units appear as one op up to the width that has one, beyond as their two convolutions,
at dilation 9. Bytes: every input, weight and output once. Flops: the convolutions'. Peers:

    library      the engine's way of that name: folded weights, channels innermost, matrix products
                 where there are, else cuDNN; one pass for Snake, one for the addition
    conv2d       the same by cuDNN where that takes products, as fast-dacvae does it
    cudnn-fused  cuDNN with Snake and the addition fused, the engine's way of that name
    compiled     torch.compile of `library`
    hopper       residual units of 64 and 96 channels by csrc/hopper
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Prepared, Settings
from bench.checks import ops as checks
from bench.peers import cudnn_graph, hopper
from bench.peers import ops as peers
from dac_fast import ops
from dac_fast.config import PRESETS, Config
from dac_fast.inference.choices import Result
from dac_fast.model import channels_last, folded
from dac_fast.ops import reference

DILATION = 9
# The widest residual unit that is one op.
FUSED = 192

Snake = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """A convolution or residual unit of a model.

    Attributes:
        kind: its place in the model.
        hop: samples of audio per position of its input.
        channels: of its input.
        out: channels of its output.
        kernel, stride, padding, dilation: of the convolution; of a residual unit's first.
        op: name in `dac_fast.ops`.
        snake, keep: whether Snake of the output, and the output itself, are needed.
        residual: whether the input is added.
        tanh: whether it ends in tanh.
    """

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


def layers(config: Config) -> list[Layer]:
    """Every distinct layer of a model, from the audio to the latent and back."""
    width, latent = config.encoder_dim, config.latent_dim
    hop = 1
    found = [Layer("encoder-first", hop, 1, width, 7, padding=3)]
    for rate in config.encoder_rates:
        found += units("encoder", hop, width)
        half = -(-rate // 2)
        found.append(Layer("encoder-down", hop, width, 2 * width, 2 * rate, rate, half))
        width, hop = 2 * width, hop * rate
    found.append(Layer("encoder-last", hop, width, latent, 3, padding=1, snake=False))

    width = config.decoder_dim
    found.append(Layer("decoder-first", hop, latent, width, 7, padding=3, keep=False))
    for rate in config.decoder_rates:
        shape = (hop, width, width // 2, 2 * rate, rate, -(-rate // 2))
        found.append(Layer("decoder-up", *shape, op="conv_transpose1d"))
        width, hop = width // 2, hop // rate
        found += units("decoder", hop, width)
    return [*found, Layer("decoder-last", hop, width, 1, 7, padding=3, snake=False, tanh=True)]


def units(place: str, hop: int, width: int) -> list[Layer]:
    """A residual unit as one layer, or as two where it is too wide."""
    padding = 3 * DILATION
    if width <= FUSED:
        unit = Layer(f"{place}-unit", hop, width, width, 7, 1, padding, DILATION, "residual_unit")
        return [unit]
    return [
        Layer(f"{place}-conv7", hop, width, width, 7, 1, padding, DILATION, keep=False),
        Layer(f"{place}-conv1", hop, width, width, 1, residual=True),
    ]


def prepare(layer: Layer, batch: int, size: int, settings: Settings) -> Prepared:
    """Inputs, peers and check of one layer."""
    args, options = inputs(layer, batch, size, settings.device)
    run = getattr(reference, layer.op)
    same = wanted(run(*args, **options))
    exact_args, exact_options = checks.doubles((args, options))
    check = checks.as_good_as(same, wanted(run(*exact_args, **exact_options)), args[0].dtype)
    tensors = [value for value in (*args, *options.values(), *same) if isinstance(value, Tensor)]
    # By address, since a residual that is x itself is read only once.
    memory = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    functions = ways(layer.op, args, options)
    return Prepared(
        peers.forward(functions), check, sum(memory.values()), flops(layer, batch, size)
    )


def inputs(layer: Layer, batch: int, size: int, device: str) -> tuple[list[Any], dict[str, Any]]:
    """Random arguments and options of the layer's op, for x [batch, channels, size]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, torch.float16)

    def innermost(items: int, channels: int, positions: int, scale: float = 1.0) -> Tensor:
        return normal(items, positions, channels, scale=scale).transpose(1, 2)

    x = innermost(batch, layer.channels, size)
    bias, alpha = normal(layer.out), normal(1, layer.out, 1).abs() + 0.1
    options: dict[str, Any] = {"alpha": alpha if layer.snake else None, "keep": layer.keep}
    terms = layer.channels * (2 if layer.op == "conv_transpose1d" else layer.kernel)
    scale = terms**-0.5
    if layer.op == "residual_unit":
        weight2 = innermost(layer.out, layer.channels, 1, layer.channels**-0.5)
        weight1 = innermost(layer.out, layer.channels, 7, scale)
        weights = [weight1, bias, alpha, weight2, bias]
        return [x, reference.snake(x, alpha), *weights, layer.dilation, layer.padding], options
    if layer.op == "conv_transpose1d":
        weight = innermost(layer.channels, layer.out, layer.kernel, scale)
        return [x, weight, bias, layer.stride, layer.padding], options
    weight = innermost(layer.out, layer.channels, layer.kernel, scale)
    options |= {"tanh": layer.tanh, "residual": x if layer.residual else None}
    return [x, weight, bias, layer.stride, layer.padding, layer.dilation], options


def flops(layer: Layer, batch: int, size: int) -> int:
    """The flops of the layer's convolutions, for an input of that many positions."""
    each = 2 * batch * layer.channels * layer.out * layer.kernel
    if layer.op == "residual_unit":
        # Its second convolution has a kernel of 1 beside the first one's 7.
        return each * size * 8 // 7
    return each * (size if layer.op == "conv_transpose1d" else size // layer.stride)


def ways(op: str, args: list[Any], options: dict[str, Any]) -> dict[str, peers.Function]:
    """The libraries' ways pass by pass and compiled, cuDNN's fused one, and ours."""

    def in_passes(by: ModuleType, snake: Snake) -> peers.Op:
        convolve = partial(conv1d, by, snake)
        found: dict[str, peers.Op] = {
            "conv1d": convolve,
            "conv_transpose1d": partial(conv_transpose1d, by, snake),
            "residual_unit": partial(residual_unit, convolve),
        }
        return found[op]

    def compilable(*args: Any, **options: Any) -> Result:
        pair: Result = in_passes(folded, reference.snake)(*args, **options)
        return pair

    found: dict[str, peers.Function] = {"library": in_passes(folded, ops.snake)}
    if op != "conv1d" or folded.is_product(args[1], args[3], args[5]):
        found["conv2d"] = in_passes(channels_last, ops.snake)
    fused = cudnn_graph.Fused().conv1d
    if op != "conv_transpose1d":
        found["cudnn-fused"] = fused if op == "conv1d" else partial(residual_unit, fused)
    found["compiled"] = torch.compile(compilable, dynamic=False)
    found |= peers.implementations(op, *args, **options)
    # The last, since it might not come to its end.
    if op == "residual_unit" and args[0].shape[1] in hopper.CHANNELS:
        found["hopper"] = hopper.ResidualUnit()
    return {
        name: f if isinstance(f, str) else partial(run_wanted, f, args, options)
        for name, f in found.items()
    }


def run_wanted(function: peers.Op, args: list[Any], options: dict[str, Any]) -> list[Tensor]:
    """The outputs of a way that are not None."""
    return wanted(function(*args, **options))


def wanted(outputs: Iterable[Tensor | None]) -> list[Tensor]:
    """The outputs that are not None."""
    return [output for output in outputs if output is not None]


def conv1d(
    by: ModuleType,
    snake: Snake,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    *,
    alpha: Tensor | None,
    keep: bool,
    residual: Tensor | None = None,
    tanh: bool = False,
) -> Result:
    """`ops.conv1d`, a pass for each step; `by`: `folded` or `channels_last`."""
    y = by.conv1d(x, weight, bias, stride, padding, dilation)
    y = y.tanh() if tanh else y
    y = y if residual is None else y + residual
    return y if keep else None, None if alpha is None else snake(y, alpha)


def conv_transpose1d(
    by: ModuleType,
    snake: Snake,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    *,
    alpha: Tensor | None,
    keep: bool,
) -> Result:
    """`ops.conv_transpose1d`, a pass for each step."""
    y = by.conv_transpose1d(x, weight, bias, stride, padding)
    return y if keep else None, None if alpha is None else snake(y, alpha)


def residual_unit(
    convolve: Callable[..., Result],
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    dilation: int,
    padding: int,
    *,
    alpha: Tensor | None,
    keep: bool,
) -> Result:
    """`ops.residual_unit` as two `ops.conv1d`."""
    first = (weight1, bias1, 1, padding, dilation)
    _, hidden = convolve(snaked, *first, alpha=alpha1, keep=False)
    return convolve(hidden, weight2, bias2, 1, 0, 1, alpha=alpha, keep=keep, residual=x)

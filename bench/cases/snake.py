"""Snake at the shapes of every layer of the 44.1 kHz encoder and decoder.

Bytes: the forward pass reads x and writes y; the backward pass reads x and dy and writes dx.
"""

import math
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Prepared, Settings
from bench.checks import ops as checks
from bench.peers import ops as peers
from dac_fast.config import PRESETS, Config
from dac_fast.ops import reference


def layers(config: Config) -> list[tuple[str, int, int]]:
    """Where a codec applies Snake, the widest first.

    Returns:
        "encoder" or "decoder", the channels, and the samples of audio per position.
    """
    shapes = []
    channels, hop = config.encoder_dim, 1
    for rate in (*config.encoder_rates, None):
        shapes.append(("encoder", channels, hop))
        if rate:
            channels, hop = 2 * channels, hop * rate
    channels = config.decoder_dim
    for rate in (*config.decoder_rates, None):
        shapes.append(("decoder", channels, hop))
        if rate:
            channels, hop = channels // 2, hop // rate
    return sorted(shapes, key=lambda shape: (shape[2], shape[0]))


def cases(device: str, quick: bool) -> list[Case]:
    """A training batch of 72 x 0.38 s and one item of 10 s; on the CPU the item only."""
    config = PRESETS["tiny" if quick else "44khz"]

    def frames(seconds: float) -> int:
        return math.ceil(seconds * config.sample_rate / config.hop_length)

    training = (72, frames(0.38))
    single = (1, frames(0.05 if quick else 10))
    on_gpu = device != "cpu"
    # Most elements are in the decoder's last two blocks, which are timed in both precisions.
    widest = [layer for layer in layers(config) if layer[0] == "decoder"][:2]
    found = []
    for layer in layers(config):
        place, channels, hop = layer
        dtypes = ["float32"] if not on_gpu else ["float16"]
        if on_gpu and layer in widest:
            dtypes.append("float32")
        for dtype in dtypes:
            for size in [training, single] if on_gpu else [single]:
                directions = ["forward"]
                if size == training or (not on_gpu and layer in widest):
                    directions.append("backward")
                for direction in directions:
                    shape = (size[0], channels, size[1] * config.hop_length // hop)
                    name = f"{place}-{'x'.join(map(str, shape))}"
                    run = partial(prepare, shape, dtype, direction)
                    priority = 0 if layer in widest else 2
                    found.append(Case("snake", direction, device, dtype, name, run, priority))
    return found


def prepare(
    shape: tuple[int, int, int], dtype: str, direction: str, settings: Settings
) -> Prepared:
    """Inputs, peers and check for a shape [B, C, T]."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=settings.device).to(getattr(torch, dtype))
    alpha = torch.randn(1, shape[1], 1, device=settings.device).mul(0.5).exp().to(x.dtype)
    functions = peers.functions("snake", x, alpha, scripted=x.is_cuda)
    size = x.numel() * x.element_size()
    if direction == "forward":
        exact = reference.snake(x.double(), alpha.double())
        check = checks.as_good_as([reference.snake(x, alpha)], [exact])
        return Prepared(peers.forward(functions, x, alpha), check, bytes_moved=2 * size)

    gradient = torch.randn_like(x)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, alpha)]
        return torch.autograd.grad(reference.snake(*leaves), leaves, gradient.to(dtype))

    check = checks.as_good_as(gradients(x.dtype), gradients(torch.float64))
    leaves = [x.requires_grad_(), alpha.requires_grad_()]
    backward = peers.backward(functions, leaves, leaves, [gradient])
    return Prepared(backward, check, bytes_moved=3 * size)

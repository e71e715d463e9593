"""Snake at the shapes of every layer of the 44.1 kHz encoder and decoder.

Bytes: forward reads x and writes y; backward reads x and the gradient and writes dx.
"""

import math
from functools import partial

import torch

from bench.case import Case, Prepared, Settings
from bench.checks import ops as checks
from bench.peers import ops as peers
from dac_fast.config import PRESETS, Config
from dac_fast.ops import reference


def layers(config: Config) -> list[tuple[str, int, int]]:
    """Where a codec applies Snake, the widest first: (encoder or decoder, channels, samples per position)."""
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
    """On CUDA a training batch of 72 x 0.38 s and one item of 10 s; on the CPU one item of 10 s."""
    config = PRESETS["tiny" if quick else "44khz"]

    def frames(seconds):
        return math.ceil(seconds * config.sample_rate / config.hop_length)

    training, single = (72, frames(0.38)), (1, frames(0.05 if quick else 10))
    # The decoder's last two blocks hold most of the elements; in half precision every layer is timed, in single these.
    widest = [layer for layer in layers(config) if layer[0] == "decoder"][:2]
    found = []
    for layer in layers(config):
        place, channels, hop = layer
        dtypes = (
            ["float32"]
            if device == "cpu"
            else ["float16", "float32"]
            if layer in widest
            else ["float16"]
        )
        for dtype in dtypes:
            for batch, latent_frames in [single] if device == "cpu" else [training, single]:
                directions = ["forward"]
                if (batch, latent_frames) == training or (device == "cpu" and layer in widest):
                    directions.append("backward")
                for direction in directions:
                    shape = (batch, channels, latent_frames * config.hop_length // hop)
                    found.append(
                        Case(
                            "snake", direction, device, dtype, f"{place}-{'x'.join(map(str, shape))}",
                            partial(prepare, shape, dtype, direction), priority=0 if layer in widest else 2,
                        )
                    )  # fmt: skip
    return found


def prepare(
    shape: tuple[int, int, int], dtype: str, direction: str, settings: Settings
) -> Prepared:
    """Inputs, providers and check for one shape [B, C, T]."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=settings.device).to(getattr(torch, dtype))
    alpha = torch.randn(1, shape[1], 1, device=settings.device).mul(0.5).exp().to(x.dtype)
    functions = peers.functions("snake", x, alpha, scripted=x.is_cuda)
    size = x.numel() * x.element_size()
    if direction == "forward":
        check = checks.as_good_as(
            [reference.snake(x, alpha)], [reference.snake(x.double(), alpha.double())]
        )
        return Prepared(peers.forward(functions, x, alpha), check, bytes_moved=2 * size)

    gradient = torch.randn_like(x)

    def gradients(dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, alpha)]
        return torch.autograd.grad(reference.snake(*leaves), leaves, gradient.to(dtype))

    check = checks.as_good_as(gradients(x.dtype), gradients(torch.float64))
    leaves = [x.requires_grad_(), alpha.requires_grad_()]
    return Prepared(
        peers.backward(functions, leaves, leaves, [gradient]), check, bytes_moved=3 * size
    )

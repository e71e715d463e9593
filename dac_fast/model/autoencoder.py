"""The convolutional encoder and decoder (paper, section 3.1 and appendix A), as published.

Both shift with their input: one more frame in front moves the output by one frame. Where a stride
is odd, the decoder's output ends a few samples before frames times hop (8 at 24 and 16 kHz).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dac_fast.model.layers import (
    Block,
    Chain,
    Conv1d,
    ConvTranspose1d,
    Layer,
    Length,
    activation,
    residual_units,
)
from dac_fast.spectral import full_precision

# Autocast leaves that many of the decoder's blocks, those nearest to the audio, in float32: the 8
# bits of bfloat16 would put a floor of noise under the audio, which training would fight in place
# of what is quiet.
FULL_PRECISION_BLOCKS = 2


def encoder_block(channels: int, stride: int, act: str) -> Block:
    """[B, channels, T] to [B, 2 channels, T / stride]."""
    return Block(
        *residual_units(channels, act),
        activation(act, channels),
        Conv1d(channels, 2 * channels, 2 * stride, stride, padding=-(-stride // 2)),
    )


def decoder_block(channels: int, stride: int, act: str) -> Block:
    """[B, channels, T] to [B, channels / 2, T stride], one less where the stride is odd."""
    return Block(
        activation(act, channels),
        ConvTranspose1d(channels, channels // 2, stride, padding=-(-stride // 2)),
        *residual_units(channels // 2, act),
    )


class Encoder(Block):
    """Audio [B, channels, T], T a multiple of the hop, to the latent [B, latent_dim, T / hop]."""

    def __init__(
        self,
        dim: int,
        rates: Sequence[int],
        latent_dim: int,
        act: str = "snake",
        channels: int = 1,
    ) -> None:
        widths = [dim * 2**i for i in range(len(rates) + 1)]
        super().__init__(
            Conv1d(channels, dim, kernel_size=7, padding=3),
            *(encoder_block(width, rate, act) for width, rate in zip(widths, rates, strict=False)),
            activation(act, widths[-1]),
            Conv1d(widths[-1], latent_dim, kernel_size=3, padding=1),
        )


class Decoder(Layer):
    """Latent [B, latent_dim, F] to audio [B, channels, about F hop] in [-1, 1]."""

    def __init__(
        self,
        latent_dim: int,
        dim: int,
        rates: Sequence[int],
        act: str = "snake",
        channels: int = 1,
    ) -> None:
        super().__init__()
        widths = [dim // 2**i for i in range(len(rates) + 1)]
        self.model = Chain(
            Conv1d(latent_dim, dim, kernel_size=7, padding=3),
            *(decoder_block(width, rate, act) for width, rate in zip(widths, rates, strict=False)),
            activation(act, widths[-1]),
            Conv1d(widths[-1], channels, kernel_size=7, padding=3),
            nn.Tanh(),
        )

    def output_length(self, length: Length, padded: bool = True) -> Length:  # noqa: D102
        return self.model.output_length(length, padded)

    def forward(  # noqa: D102
        self, x: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor:
        device = x.device.type
        if x.is_meta or not torch.is_autocast_enabled(device):
            return self.model(x, lengths, padded)
        layers = list(self.model)
        begin = len(layers) - FULL_PRECISION_BLOCKS - 3
        first, last = Chain(*layers[:begin]), Chain(*layers[begin:])
        x = first(x, lengths, padded)
        if lengths is not None:
            lengths = first.output_length(lengths, padded)
        with torch.autocast(device, enabled=False):
            return last(full_precision(x), lengths, padded)

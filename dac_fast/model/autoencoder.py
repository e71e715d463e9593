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

# Autocast leaves the layers nearest to the audio in float32: the 8 bits of bfloat16 would put a
# floor of noise under it, which the encoder takes for sound, and which training fights in place of
# what is quiet. So many blocks, beside the convolution next to the audio, let none of it through.
ENCODER_FULL_BLOCKS = 1
DECODER_FULL_BLOCKS = 2


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

    def near_audio(self) -> Chain:
        """The layers that autocast leaves in float32."""
        return Chain(*list(self.block)[: 1 + ENCODER_FULL_BLOCKS])

    def forward(  # noqa: D102
        self, x: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor:
        if not autocasts(x):
            return super().forward(x, lengths, padded)
        near = self.near_audio()
        x, lengths = in_full_precision(near, x, lengths, padded)
        # Autocast itself would leave the sums of residual units in float32.
        x = x.to(torch.get_autocast_dtype(x.device.type))
        return Chain(*list(self.block)[len(near) :])(x, lengths, padded)


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

    def near_audio(self) -> Chain:
        """The layers that autocast leaves in float32; activation, convolution and tanh are last."""
        return Chain(*list(self.model)[-3 - DECODER_FULL_BLOCKS :])

    def forward(  # noqa: D102
        self, x: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor:
        if not autocasts(x):
            return self.model(x, lengths, padded)
        near = self.near_audio()
        far = Chain(*list(self.model)[: -len(near)])
        x = far(x, lengths, padded)
        if lengths is not None:
            lengths = far.output_length(lengths, padded)
        return in_full_precision(near, x, lengths, padded)[0]


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def in_full_precision(
    layers: Chain, x: Tensor, lengths: Tensor | None, padded: bool
) -> tuple[Tensor, Tensor | None]:
    """x through the layers, not under autocast, and the lengths of what comes out."""
    with torch.autocast(x.device.type, enabled=False):
        x = layers(full_precision(x), lengths, padded)
    return x, None if lengths is None else layers.output_length(lengths, padded)

"""The convolutional encoder and decoder (paper, section 3.1 and appendix A), as published.

Both shift with their input: a frame more in front moves the output by a frame. Where a stride is odd the decoder's
output is shorter than frames times hop (8 samples at 24 and 16 kHz), all of it missing at the end.
"""

from torch import nn

from dac_fast.model.layers import Block, Chain, Conv1d, ConvTranspose1d, activation, residual_units


def encoder_block(channels: int, stride: int, act: str) -> Block:
    """[B, channels, T] to [B, 2 channels, T / stride]."""
    return Block(
        *residual_units(channels, act),
        activation(act, channels),
        Conv1d(
            channels, 2 * channels, kernel_size=2 * stride, stride=stride, padding=-(-stride // 2)
        ),
    )


def decoder_block(channels: int, stride: int, act: str) -> Block:
    """[B, channels, T] to [B, channels / 2, T stride], one less where the stride is odd."""
    return Block(
        activation(act, channels),
        ConvTranspose1d(channels, channels // 2, stride, padding=-(-stride // 2)),
        *residual_units(channels // 2, act),
    )


class Encoder(Block):
    """Audio [B, 1, T], T a multiple of the hop, to the latent [B, latent_dim, T / hop]."""

    def __init__(self, dim: int, rates, latent_dim: int, act: str = "snake"):
        widths = [dim * 2**i for i in range(len(rates) + 1)]
        super().__init__(
            Conv1d(1, dim, kernel_size=7, padding=3),
            *(encoder_block(width, rate, act) for width, rate in zip(widths, rates, strict=False)),
            activation(act, widths[-1]),
            Conv1d(widths[-1], latent_dim, kernel_size=3, padding=1),
        )


class Decoder(nn.Module):
    """Latent [B, latent_dim, F] to audio [B, 1, about F hop] in [-1, 1]."""

    def __init__(self, latent_dim: int, dim: int, rates, act: str = "snake"):
        super().__init__()
        widths = [dim // 2**i for i in range(len(rates) + 1)]
        self.model = Chain(
            Conv1d(latent_dim, dim, kernel_size=7, padding=3),
            *(decoder_block(width, rate, act) for width, rate in zip(widths, rates, strict=False)),
            activation(act, widths[-1]),
            Conv1d(widths[-1], 1, kernel_size=7, padding=3),
            nn.Tanh(),
        )

    def output_length(self, length, padded=True):
        """Samples that come out of `length` frames (an int or an int tensor)."""
        return self.model.output_length(length, padded)

    def forward(self, z, lengths=None, padded=True):  # noqa: D102
        return self.model(z, lengths, padded)

"""The published codec and discriminator in plain PyTorch, as `published_step.py` trains them.

Time is innermost in memory, weight norm is applied in every forward pass, and the quantizer's
stages run one after another. Modules bear the published names, in the order of `dac_fast`'s, so
that a checkpoint of either goes on in the other.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast.config import Config
from dac_fast.spectral import full_precision
from dac_fast.training.recipe import DiscriminatorConfig


class Conv(nn.Module):
    """A weight-normed convolution.

    Args:
        shape: of its weight.
        channels: of its output.
        function: of (x, weight, bias) and `arguments`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int,
        function: Callable[..., Tensor] = F.conv1d,
        **arguments: int | tuple[int, ...],
    ):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(shape[0], *[1] * (len(shape) - 1)))
        self.weight_v = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(channels))
        self.function = function
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return self.function(x, weight, self.bias, **self.arguments)


def conv(inputs: int, outputs: int, kernel: int, **arguments: int) -> Conv:
    """One of the codec's convolutions."""
    return Conv((outputs, inputs, kernel), outputs, **arguments)


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """The activation, see `dac_fast.ops.reference.snake`."""
    return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)


@functools.cache
def scripted_snake() -> Callable[[Tensor, Tensor], Tensor]:
    """Snake, scripted: TorchScript fuses it on a GPU."""
    with warnings.catch_warnings():
        # TorchScript is deprecated, and still part of the published package.
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted: Callable[[Tensor, Tensor], Tensor] = torch.jit.script(snake)
        return scripted


class Snake(nn.Module):
    """Snake with its parameter, one alpha per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # torch.compile has its own fusion, and does not look into TorchScript.
        return (snake if torch.compiler.is_compiling() else scripted_snake())(x, self.alpha)


class Block(nn.Module):
    """Layers in a row, under the name `block`."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


class ResidualUnit(Block):
    """A block whose input is added to its output."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def residual_units(channels: int) -> list[nn.Module]:
    """The three units of a block, with dilations 1, 3 and 9."""
    return [
        ResidualUnit(
            Snake(channels),
            conv(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            Snake(channels),
            conv(channels, channels, 1),
        )
        for dilation in (1, 3, 9)
    ]


class Stage(nn.Module):
    """A codebook, and the projections into and out of its space."""

    def __init__(self, latent: int, dim: int, size: int):
        super().__init__()
        self.in_proj = conv(latent, dim, 1)
        self.out_proj = conv(dim, latent, 1)
        self.codebook = nn.Embedding(size, dim)

    def forward(self, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of [B, D, F]: the quantised part, codes [B, F], and the two losses of every item [B]."""
        latent = self.in_proj(residual)
        rows = F.normalize(latent.transpose(1, 2).flatten(0, 1))
        entries = F.normalize(self.codebook.weight)
        distance = rows.pow(2).sum(1, keepdim=True) - 2 * rows @ entries.t() + entries.pow(2).sum(1)
        codes = (-distance).max(1)[1].view(len(residual), -1)
        entry = F.embedding(codes, self.codebook.weight).transpose(1, 2)
        commitment = F.mse_loss(latent, entry.detach(), reduction="none").mean((1, 2))
        codebook = F.mse_loss(entry, latent.detach(), reduction="none").mean((1, 2))
        return self.out_proj(latent + (entry - latent).detach()), codes, commitment, codebook


class Quantizer(nn.Module):
    """Residual vector quantisation, stage by stage (paper, section 3.2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.dropout = config.quantizer_dropout
        self.quantizers = nn.ModuleList(
            Stage(config.latent_dim, dim, config.codebook_size) for dim in config.codebook_dims
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of z [B, D, F]: its quantised version, codes [B, N, F], commitment and codebook loss."""
        count = len(self.quantizers)
        stages = torch.full((len(z),), count + 1, device=z.device)
        dropped = int(len(z) * self.dropout)
        stages[:dropped] = torch.randint(1, count + 1, (dropped,), device=z.device)
        residual = z
        quantised = torch.zeros_like(z)
        commitment = codebook = torch.zeros((), device=z.device)
        codes = []
        for i, stage in enumerate(self.quantizers):
            keep = i < stages
            part, chosen, stage_commitment, stage_codebook = stage(residual)
            commitment = commitment + (stage_commitment * keep).mean()
            codebook = codebook + (stage_codebook * keep).mean()
            quantised = quantised + part * keep[:, None, None]
            residual = residual - part
            codes.append(chosen)
        return quantised, torch.stack(codes, 1), commitment, codebook


class Codec(nn.Module):
    """Encoder, quantizer and decoder."""

    def __init__(self, config: Config):
        super().__init__()
        self.hop = math.prod(config.encoder_rates)
        width = config.encoder_dim
        layers: list[nn.Module] = [conv(1, width, 7, padding=3)]
        for stride in config.encoder_rates:
            down = conv(width, 2 * width, 2 * stride, stride=stride, padding=math.ceil(stride / 2))
            layers.append(Block(*residual_units(width), Snake(width), down))
            width *= 2
        self.encoder = Block(*layers, Snake(width), conv(width, config.latent_dim, 3, padding=1))
        self.quantizer = Quantizer(config)

        width = config.decoder_dim
        layers = [conv(config.latent_dim, width, 7, padding=3)]
        for stride in config.decoder_rates:
            shape = (width, width // 2, 2 * stride)
            padding = math.ceil(stride / 2)
            up = Conv(shape, width // 2, F.conv_transpose1d, stride=stride, padding=padding)
            layers.append(Block(Snake(width), up, *residual_units(width // 2)))
            width //= 2
        self.decoder = nn.Module()
        self.decoder.model = nn.Sequential(
            *layers, Snake(width), conv(width, 1, 7, padding=3), nn.Tanh()
        )

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of audio [B, 1, T]: its reconstruction, codes, commitment loss and codebook loss."""
        z = self.encoder(F.pad(audio, (0, -audio.shape[-1] % self.hop)))
        with torch.autocast(z.device.type, enabled=False):
            z, *others = self.quantizer(full_precision(z))
        return self.decoder.model(z)[..., : audio.shape[-1]], *others


class PeriodDiscriminator(nn.Module):
    """A discriminator of the waveform in rows of a period."""

    def __init__(self, period: int):
        super().__init__()
        self.period = period
        channels = (1, 32, 128, 512, 1024, 1024)
        self.convs = nn.ModuleList()
        for inputs, outputs, stride in zip(channels, channels[1:], (3, 3, 3, 3, 1), strict=False):
            shape = (outputs, inputs, 5, 1)
            layer = Conv(shape, outputs, F.conv2d, stride=(stride, 1), padding=(2, 0))
            self.convs.append(nn.Sequential(layer, nn.LeakyReLU(0.1)))
        self.conv_post = Conv((1, 1024, 3, 1), 1, F.conv2d, padding=(1, 0))

    def inputs(self, audio: Tensor) -> Tensor:
        """The rows [B, 1, rows, period] of audio [B, 1, T]."""
        padded = F.pad(audio, (0, self.period - audio.shape[-1] % self.period), mode="reflect")
        return padded.view(len(audio), 1, -1, self.period)

    def forward(self, x: Tensor) -> list[Tensor]:
        """All feature maps of `inputs`."""
        maps = []
        for layer in self.convs:
            x = layer(x)
            maps.append(x)
        return [*maps, self.conv_post(x)]


class ResolutionDiscriminator(nn.Module):
    """A discriminator of the complex spectrogram in bands."""

    def __init__(self, window: int, bands: Sequence[tuple[float, float]]):
        super().__init__()
        self.window = window
        bins = window // 2 + 1
        self.bands = [(int(low * bins), int(high * bins)) for low, high in bands]
        shapes = ((2, (3, 9), (1, 1)), *[(32, (3, 9), (1, 2))] * 3, (32, (3, 3), (1, 1)))

        def stack() -> Iterator[nn.Module]:
            for inputs, kernel, stride in shapes:
                padding = (1, kernel[1] // 2)
                layer = Conv((32, inputs, *kernel), 32, F.conv2d, stride=stride, padding=padding)
                yield nn.Sequential(layer, nn.LeakyReLU(0.1))

        self.band_convs = nn.ModuleList(nn.ModuleList(stack()) for _ in bands)
        self.conv_post = Conv((1, 32, 3, 3), 1, F.conv2d, padding=(1, 1))

    def inputs(self, audio: Tensor) -> Tensor:
        """The spectrogram [B, 2, frames, bins] of audio [B, 1, T]."""
        hop = self.window // 4
        side = (self.window - hop) // 2
        padded = F.pad(audio, (side, side + -audio.shape[-1] % hop), mode="reflect")
        hann = torch.hann_window(self.window, dtype=audio.dtype, device=audio.device)
        spectrum = torch.stft(
            padded[:, 0], self.window, hop, window=hann, center=True, return_complex=True
        )
        # The two frames at each end see nothing but padding.
        return torch.view_as_real(spectrum[..., 2:-2]).permute(0, 3, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """All feature maps of `inputs`."""
        maps, last = [], []
        for (low, high), layers in zip(self.bands, self.band_convs, strict=True):
            band = x[..., low:high]
            for layer in layers:
                band = layer(band)
                maps.append(band)
            last.append(band)
        return [*maps, self.conv_post(torch.cat(last, -1))]


class Discriminator(nn.Module):
    """All discriminators of one signal."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        if config.rates:
            rates = list(config.rates)
            raise ValueError(f"discriminator.rates is {rates}; accepted: none, as published")
        self.discriminators = nn.ModuleList(
            [
                *(PeriodDiscriminator(period) for period in config.periods),
                *(ResolutionDiscriminator(window, config.bands) for window in config.fft_sizes),
            ]
        )

    def inputs(self, audio: Tensor) -> list[Tensor]:
        """The input of each discriminator, of audio [B, 1, T]."""
        audio = audio - audio.mean(-1, keepdim=True)
        audio = 0.8 * audio / (audio.abs().amax(-1, keepdim=True) + 1e-9)
        return [each.inputs(audio) for each in self.discriminators]

    def forward(self, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        """The feature maps of `inputs`, per discriminator."""
        return [each(x) for each, x in zip(self.discriminators, inputs, strict=True)]

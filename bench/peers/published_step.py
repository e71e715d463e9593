"""The published training step, composed of plain PyTorch: what the fast one is measured and checked against.

As in the published trainer: time innermost in memory; weight norm in every forward pass; the quantizer's stages one
after another; the discriminator run on generated and real audio separately, for its own step and once more for the
generator's (with a graph of the real audio too); spectrograms computed each time they are looked at; AdamW without
fusion; every loss fetched from the device in every step. Left out: what its trainer computes for the log alone.

Modules bear the published names, in the order of `dac_fast`'s, so that a checkpoint of either goes on in the other.
"""

import functools
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast.config import Config
from dac_fast.spectral import full_precision, mel_filters
from dac_fast.training.recipe import DiscriminatorConfig, Recipe


class Conv(nn.Module):
    """A weight-normed convolution, or another function of (x, weight, bias), with a weight of that shape."""

    def __init__(self, shape, channels: int, function: Callable = F.conv1d, **arguments):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(shape[0], *[1] * (len(shape) - 1)))
        self.weight_v = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(channels))
        self.function, self.arguments = function, arguments

    def forward(self, x):
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return self.function(x, weight, self.bias, **self.arguments)


def conv(inputs: int, outputs: int, kernel: int, **arguments) -> Conv:
    """One of the codec's convolutions."""
    return Conv((outputs, inputs, kernel), outputs, **arguments)


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """The activation, see `dac_fast.ops.reference.snake`."""
    return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)


@functools.cache
def scripted_snake() -> Callable:
    """It, as TorchScript, which fuses it on a GPU."""
    with warnings.catch_warnings():
        # That TorchScript is deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(snake)


class Snake(nn.Module):
    """It, with its parameter."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, channels, 1))

    def forward(self, x):
        # torch.compile has its own fusion, and does not look into TorchScript.
        return (snake if torch.compiler.is_compiling() else scripted_snake())(x, self.alpha)


class Block(nn.Module):
    """Layers in a row under the name `block`."""

    def __init__(self, *layers):
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x):
        return self.block(x)


class ResidualUnit(Block):
    """Adds its input to what its layers make of it."""

    def forward(self, x):
        return x + self.block(x)


def residual_units(channels: int) -> list[nn.Module]:
    """The three of a block."""
    return [
        ResidualUnit(
            Snake(channels),
            conv(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            Snake(channels),
            conv(channels, channels, 1),
        )
        for dilation in (1, 3, 9)
    ]


class Quantizer(nn.Module):
    """Residual vector quantisation, stage by stage (paper, section 3.2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.dropout = config.quantizer_dropout
        self.quantizers = nn.ModuleList()
        for dim in config.codebook_dims:
            stage = nn.Module()
            stage.in_proj, stage.out_proj = (
                conv(config.latent_dim, dim, 1),
                conv(dim, config.latent_dim, 1),
            )
            stage.codebook = nn.Embedding(config.codebook_size, dim)
            self.quantizers.append(stage)

    def forward(self, z):
        """Quantised z, codes, commitment loss, codebook loss."""
        count = len(self.quantizers)
        stages = torch.full((len(z),), count + 1, device=z.device)
        dropped = int(len(z) * self.dropout)
        stages[:dropped] = torch.randint(1, count + 1, (dropped,), device=z.device)
        residual, quantised, commitment, codebook, codes = z, 0, 0, 0, []
        for i, stage in enumerate(self.quantizers):
            keep = i < stages
            latent = stage.in_proj(residual)
            rows, entries = (
                F.normalize(latent.transpose(1, 2).flatten(0, 1)),
                F.normalize(stage.codebook.weight),
            )
            distance = (
                rows.pow(2).sum(1, keepdim=True) - 2 * rows @ entries.t() + entries.pow(2).sum(1)
            )
            code = (-distance).max(1)[1].view(len(z), -1)
            entry = F.embedding(code, stage.codebook.weight).transpose(1, 2)
            commitment = (
                commitment
                + (F.mse_loss(latent, entry.detach(), reduction="none").mean((1, 2)) * keep).mean()
            )
            codebook = (
                codebook
                + (F.mse_loss(entry, latent.detach(), reduction="none").mean((1, 2)) * keep).mean()
            )
            output = stage.out_proj(latent + (entry - latent).detach())
            quantised = quantised + output * keep[:, None, None]
            residual = residual - output
            codes.append(code)
        return quantised, torch.stack(codes, 1), commitment, codebook


class Codec(nn.Module):
    """Encoder, quantizer and decoder."""

    def __init__(self, config: Config):
        super().__init__()
        self.hop = math.prod(config.encoder_rates)
        width, layers = config.encoder_dim, [conv(1, config.encoder_dim, 7, padding=3)]
        for stride in config.encoder_rates:
            down = conv(width, 2 * width, 2 * stride, stride=stride, padding=math.ceil(stride / 2))
            layers.append(Block(*residual_units(width), Snake(width), down))
            width *= 2
        self.encoder = Block(*layers, Snake(width), conv(width, config.latent_dim, 3, padding=1))
        self.quantizer = Quantizer(config)

        width, layers = (
            config.decoder_dim,
            [conv(config.latent_dim, config.decoder_dim, 7, padding=3)],
        )
        for stride in config.decoder_rates:
            shape, padding = (width, width // 2, 2 * stride), math.ceil(stride / 2)
            up = Conv(shape, width // 2, F.conv_transpose1d, stride=stride, padding=padding)
            layers.append(Block(Snake(width), up, *residual_units(width // 2)))
            width //= 2
        self.decoder = nn.Module()
        self.decoder.model = nn.Sequential(
            *layers, Snake(width), conv(width, 1, 7, padding=3), nn.Tanh()
        )

    def forward(self, audio):
        """Audio [B, 1, T] restored, codes, commitment loss, codebook loss."""
        z = self.encoder(F.pad(audio, (0, -audio.shape[-1] % self.hop)))
        with torch.autocast(z.device.type, enabled=False):
            z, *others = self.quantizer(full_precision(z))
        return self.decoder.model(z)[..., : audio.shape[-1]], *others


class PeriodDiscriminator(nn.Module):
    """Sees the waveform in rows of a period."""

    def __init__(self, period: int):
        super().__init__()
        self.period = period
        channels, layers = (1, 32, 128, 512, 1024, 1024), []
        for inputs, outputs, stride in zip(channels, channels[1:], (3, 3, 3, 3, 1), strict=False):
            layer = Conv(
                (outputs, inputs, 5, 1), outputs, F.conv2d, stride=(stride, 1), padding=(2, 0)
            )
            layers.append(nn.Sequential(layer, nn.LeakyReLU(0.1)))
        self.convs = nn.ModuleList(layers)
        self.conv_post = Conv((1, 1024, 3, 1), 1, F.conv2d, padding=(1, 0))

    def inputs(self, audio):
        """The rows, [B, 1, rows, period]."""
        padded = F.pad(audio, (0, self.period - audio.shape[-1] % self.period), mode="reflect")
        return padded.view(len(audio), 1, -1, self.period)

    def forward(self, x):
        """All feature maps of `inputs`."""
        maps = []
        for layer in self.convs:
            x = layer(x)
            maps.append(x)
        return [*maps, self.conv_post(x)]


class ResolutionDiscriminator(nn.Module):
    """Sees the complex spectrogram in bands."""

    def __init__(self, window: int, bands):
        super().__init__()
        self.window = window
        bins = window // 2 + 1
        self.bands = [(int(low * bins), int(high * bins)) for low, high in bands]
        shapes = ((2, (3, 9), (1, 1)), *[(32, (3, 9), (1, 2))] * 3, (32, (3, 3), (1, 1)))

        def stack():
            for inputs, kernel, stride in shapes:
                padding = (1, kernel[1] // 2)
                layer = Conv((32, inputs, *kernel), 32, F.conv2d, stride=stride, padding=padding)
                yield nn.Sequential(layer, nn.LeakyReLU(0.1))

        self.band_convs = nn.ModuleList(nn.ModuleList(stack()) for _ in bands)
        self.conv_post = Conv((1, 32, 3, 3), 1, F.conv2d, padding=(1, 1))

    def inputs(self, audio):
        """The spectrogram, [B, 2, frames, bins]."""
        hop = self.window // 4
        side = (self.window - hop) // 2
        padded = F.pad(audio, (side, side + -audio.shape[-1] % hop), mode="reflect")
        hann = torch.hann_window(self.window, dtype=audio.dtype, device=audio.device)
        spectrum = torch.stft(
            padded[:, 0], self.window, hop, window=hann, center=True, return_complex=True
        )
        # The two frames at each end see nothing but padding.
        return torch.view_as_real(spectrum[..., 2:-2]).permute(0, 3, 2, 1)

    def forward(self, x):
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
    """All of them on one signal."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        if config.rates:
            raise ValueError(
                f"discriminator.rates is {list(config.rates)}; accepted: none, as published"
            )
        self.discriminators = nn.ModuleList(
            [
                *(PeriodDiscriminator(period) for period in config.periods),
                *(ResolutionDiscriminator(window, config.bands) for window in config.fft_sizes),
            ]
        )

    def inputs(self, audio):
        """What each of them looks at."""
        audio = audio - audio.mean(-1, keepdim=True)
        audio = 0.8 * audio / (audio.abs().amax(-1, keepdim=True) + 1e-9)
        return [d.inputs(audio) for d in self.discriminators]

    def forward(self, inputs):
        """Feature maps of `inputs`, per discriminator."""
        return [d(x) for d, x in zip(self.discriminators, inputs, strict=True)]


class PublishedStep:
    """The step; called as `dac_fast.training.step.TrainingStep` is, with the same names for the same losses.

    Args:
        recipe: without MSD, moving average or warm-up, which the published trainer does not have.
        device: to train on.
        precision: "fp32", or "bf16": autocast in the networks.
    """

    def __init__(self, recipe: Recipe, device: torch.device, precision: str = "fp32"):
        self.recipe, self.device, self.precision = recipe, device, precision
        self.codec = Codec(recipe.model).to(device).train()
        self.discriminator = Discriminator(recipe.discriminator).to(device)
        self.networks = {"generator": self.codec, "discriminator": self.discriminator}
        settings = {"betas": recipe.optimizer.betas, "weight_decay": recipe.optimizer.weight_decay}
        self.optimizers = {
            name: torch.optim.AdamW(
                network.parameters(), lr=recipe.optimizer.learning_rate, **settings
            )
            for name, network in self.networks.items()
        }
        # Replaced by `compile`.
        self.run_codec, self.run_discriminator, self.run_mel_loss = (
            self.codec,
            self.discriminator,
            self.mel_loss,
        )
        rate, losses = recipe.model.sample_rate, recipe.losses
        scales = zip(losses.mel_windows, losses.mel_bins, strict=True)
        self.filters = {
            window: mel_filters(rate, window, bins).to(device) for window, bins in scales
        }
        # Told each part of the step as it begins.
        self.mark = lambda part: None

    def compile(self):
        """Let torch.compile make what it can of both networks and of the mel loss."""
        self.run_codec, self.run_discriminator, self.run_mel_loss = (
            torch.compile(f, dynamic=False) for f in (self.codec, self.discriminator, self.mel_loss)
        )

    def load_state_dict(self, state: dict):
        """Start from `TrainingStep.state_dict()`."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
            optimizer = self.optimizers[name]
            optimizer.load_state_dict(
                optimizer.state_dict() | {"state": state["optimizers"][name]["state"]}
            )

    def state_dict(self) -> dict:
        """The part of `TrainingStep.state_dict()` that this step knows."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {
                name: optimizer.state_dict() for name, optimizer in self.optimizers.items()
            },
        }

    def mel_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """Distance of the logarithmic mel spectrograms, summed over scales."""

        def log_mel(x, window, filters):
            hann = torch.hann_window(window, dtype=x.dtype, device=x.device)
            spectrum = torch.stft(
                x[:, 0], window, window // 4, window=hann, center=True, return_complex=True
            )
            return (filters.to(x.dtype) @ spectrum.abs()).clamp(1e-5).log10()

        return sum(
            F.l1_loss(log_mel(fake, *scale), log_mel(real, *scale))
            for scale in self.filters.items()
        )

    def run_both(self, fake: Tensor, real: Tensor):
        """The discriminator's maps of generated and of real audio, from the waveforms on."""
        self.mark("spectrograms")
        inputs = [self.discriminator.inputs(audio) for audio in (fake, real)]
        self.mark("discriminator forward")
        with self.autocast():
            return [self.run_discriminator(x) for x in inputs]

    def update(self, name: str, loss: Tensor) -> Tensor:
        """Backward pass, clipping and optimizer step of a network; returns the norm of its gradients."""
        self.mark(f"{name} backward")
        self.optimizers[name].zero_grad()
        loss.backward()
        self.mark("optimizers")
        clip = getattr(self.recipe.optimizer, f"clip_{name}")
        norm = nn.utils.clip_grad_norm_(self.networks[name].parameters(), clip)
        self.optimizers[name].step()
        return norm

    def __call__(self, audio: Tensor, step: int) -> dict[str, float]:
        """Step number `step` (from 0) on audio [B, 1, T]: every loss before its weight, and the gradient norms."""
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = (
                self.recipe.optimizer.learning_rate * self.recipe.optimizer.decay**step
            )
        self.mark("generator forward")
        with self.autocast():
            fake, _, commitment, codebook = self.run_codec(audio)
        fake = full_precision(fake)

        fakes, reals = self.run_both(fake.clone().detach(), audio)
        scores = [[full_precision(maps[-1]) for maps in signal] for signal in (fakes, reals)]
        loss = sum(f.pow(2).mean() + (1 - r).pow(2).mean() for f, r in zip(*scores, strict=True))
        values = {
            "discriminator": loss,
            "grad_norm/discriminator": self.update("discriminator", loss),
        }
        del fakes, reals, scores

        fakes, reals = self.run_both(fake, audio)
        values["adversarial"] = sum((1 - full_precision(maps[-1])).pow(2).mean() for maps in fakes)
        values["feature"] = sum(
            F.l1_loss(f, r.detach())
            for fake_maps, real_maps in zip(fakes, reals, strict=True)
            for f, r in zip(fake_maps[:-1], real_maps[:-1], strict=True)
        )
        self.mark("losses")
        values["mel"] = self.run_mel_loss(fake, audio)
        values |= {"commitment": commitment, "codebook": codebook}
        weights = vars(self.recipe.losses)
        names = ("mel", "adversarial", "feature", "codebook", "commitment")
        values["loss"] = sum(weights[name] * values[name] for name in names)
        values["grad_norm/generator"] = self.update("generator", values["loss"])
        self.mark("log")
        return {name: value.item() for name, value in values.items()}

    def autocast(self):
        """Half precision inside, where asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

"""The published training step in plain PyTorch: what ours is measured and checked against.

As in the published trainer, the discriminator runs on generated and real audio separately, for its
own update and once more for the generator's (with a graph of the real audio too); spectrograms are
computed each time they are looked at; AdamW is not fused; and every loss is fetched from the device
in every step. Losses that the published trainer computes for its log alone are left out.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.document import Json
from bench.peers.published_networks import Codec, Discriminator
from dac_fast.spectral import full_precision, mel_filters
from dac_fast.training.recipe import Recipe

# The feature maps of a signal: per discriminator one of each layer, its score last.
Maps = list[list[Tensor]]


class PublishedStep:
    """The step; it is called as `dac_fast.training.step.TrainingStep` is, and names losses alike.

    Args:
        recipe: without MSD, moving average or warm-up, which the published trainer does not have.
        device: to train on.
        precision: "fp32", or "bf16": autocast in the networks.
    Attributes:
        mark: called with the name of each part of the step as it begins, for a clock.
    """

    def __init__(self, recipe: Recipe, device: torch.device, precision: str = "fp32"):
        self.recipe = recipe
        self.device = device
        self.precision = precision
        self.mark: Callable[[str], None] = lambda part: None
        self.codec = Codec(recipe.model).to(device).train()
        self.discriminator = Discriminator(recipe.discriminator).to(device)
        self.networks = {"generator": self.codec, "discriminator": self.discriminator}
        self.optimizers = {
            name: torch.optim.AdamW(
                network.parameters(),
                lr=recipe.optimizer.learning_rate,
                betas=recipe.optimizer.betas,
                weight_decay=recipe.optimizer.weight_decay,
            )
            for name, network in self.networks.items()
        }
        scales = zip(recipe.losses.mel_windows, recipe.losses.mel_bins, strict=True)
        self.filters = {
            window: mel_filters(recipe.model.sample_rate, window, bins).to(device)
            for window, bins in scales
        }
        self.run_codec: Callable[..., tuple[Tensor, ...]] = self.codec
        self.run_discriminator: Callable[..., Maps] = self.discriminator
        self.run_mel_loss: Callable[..., Tensor] = self.mel_loss

    def compile(self) -> None:
        """Has torch.compile make what it can of both networks and of the mel loss."""
        self.run_codec = torch.compile(self.codec, dynamic=False)
        self.run_discriminator = torch.compile(self.discriminator, dynamic=False)
        self.run_mel_loss = torch.compile(self.mel_loss, dynamic=False)

    def __call__(self, audio: Tensor, step: int) -> dict[str, float]:
        """Makes a step on audio [B, 1, T].

        Args:
            audio: the batch.
            step: its number, from 0.
        Returns:
            every loss before it is weighted, their weighted sum, and the gradients' norms.
        """
        self.set_learning_rate(step)
        self.mark("generator forward")
        with self.autocast():
            fake, _, commitment, codebook = self.run_codec(audio)
        fake = full_precision(fake)
        values = self.update_discriminator(fake.clone().detach(), audio)

        fakes, reals = self.run_both(fake, audio)
        values["adversarial"] = total([(1 - score(maps)).pow(2).mean() for maps in fakes])
        values["feature"] = total(
            [
                F.l1_loss(f, r.detach())
                for fake_maps, real_maps in zip(fakes, reals, strict=True)
                for f, r in zip(fake_maps[:-1], real_maps[:-1], strict=True)
            ]
        )
        self.mark("losses")
        values["mel"] = self.run_mel_loss(fake, audio)
        values |= {"commitment": commitment, "codebook": codebook}
        weights = vars(self.recipe.losses)
        names = ("mel", "adversarial", "feature", "codebook", "commitment")
        values["loss"] = total([weights[name] * values[name] for name in names])
        values["grad_norm/generator"] = self.update("generator", values["loss"])
        self.mark("log")
        return {name: value.item() for name, value in values.items()}

    def update_discriminator(self, fake: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Updates the discriminator; returns its loss and the norm of its gradients."""
        fakes, reals = self.run_both(fake, real)
        loss = total(
            [
                score(f).pow(2).mean() + (1 - score(r)).pow(2).mean()
                for f, r in zip(fakes, reals, strict=True)
            ]
        )
        norm = self.update("discriminator", loss)
        return {"discriminator": loss, "grad_norm/discriminator": norm}

    def run_both(self, fake: Tensor, real: Tensor) -> list[Maps]:
        """The discriminator's maps of generated and of real audio, from the waveforms on."""
        self.mark("spectrograms")
        inputs = [self.discriminator.inputs(audio) for audio in (fake, real)]
        self.mark("discriminator forward")
        with self.autocast():
            return [self.run_discriminator(x) for x in inputs]

    def mel_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """The distance of the logarithmic mel spectrograms, summed over scales."""

        def log_mel(x: Tensor, window: int, filters: Tensor) -> Tensor:
            hann = torch.hann_window(window, dtype=x.dtype, device=x.device)
            spectrum = torch.stft(
                x[:, 0], window, window // 4, window=hann, center=True, return_complex=True
            )
            return (filters.to(x.dtype) @ spectrum.abs()).clamp(1e-5).log10()

        scales = self.filters.items()
        return total([F.l1_loss(log_mel(fake, *scale), log_mel(real, *scale)) for scale in scales])

    def update(self, name: str, loss: Tensor) -> Tensor:
        """Backward pass, clipping and optimizer step of a network; returns its gradients' norm."""
        self.mark(f"{name} backward")
        self.optimizers[name].zero_grad()
        loss.backward()
        self.mark("optimizers")
        clip = getattr(self.recipe.optimizer, f"clip_{name}")
        norm = nn.utils.clip_grad_norm_(self.networks[name].parameters(), clip)
        self.optimizers[name].step()
        return norm

    def set_learning_rate(self, step: int) -> None:
        """Gives both optimizers the rate of that step, which decays with every one."""
        rate = self.recipe.optimizer.learning_rate * self.recipe.optimizer.decay**step
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = rate

    def autocast(self) -> torch.autocast:
        """Half precision inside, where it is asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def state_dict(self) -> Json:
        """The part of `TrainingStep.state_dict()` that this step knows."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
        }

    def load_state_dict(self, state: Json) -> None:
        """Starts from `TrainingStep.state_dict()`."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
            optimizer = self.optimizers[name]
            own = optimizer.state_dict()
            optimizer.load_state_dict(own | {"state": state["optimizers"][name]["state"]})


def score(maps: list[Tensor]) -> Tensor:
    """A discriminator's score of a signal, in float32."""
    return full_precision(maps[-1])


def total(losses: list[Tensor]) -> Tensor:
    """The sum of losses, one after another."""
    return sum(losses[1:], start=losses[0])

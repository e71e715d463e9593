"""One training step: first the discriminator's update, then the generator's (paper, sections 3.4 and 3.5).

Nothing here waits for the GPU: losses stay tensors, and a step whose gradients are not finite is skipped on the device.
"""

import contextlib
import copy
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dac_fast.discriminators import Discriminator
from dac_fast.losses import GANLoss, L1Loss, MelSpectrogramLoss, MultiScaleSTFTLoss
from dac_fast.model import DAC
from dac_fast.training.config import OptimizerConfig, Recipe


class TrainingStep:
    """Both networks with their optimizers; called with a batch, it updates them.

    Args:
        recipe: what to train and how.
        device: to train on.
        precision: "fp32", or "bf16": autocast in the networks; losses and the quantizer stay in float32.

    Attributes:
        codec, discriminator: the networks (discriminator: None where its losses have no weight).
        ema: moving average of the codec, or None.
        skipped: int64 scalars: "total" steps skipped for gradients that were not finite, and the "longest" row of them.
        code_counts: int64 [N, K], how often each code was used since somebody zeroed it.
    """

    def __init__(self, recipe: Recipe, device: torch.device, precision: str = "fp32"):
        self.recipe, self.device, self.precision = recipe, device, precision
        losses, model = recipe.losses, recipe.model
        torch.manual_seed(recipe.trainer.seed)
        self.codec = DAC(**vars(model)).to(device)
        self.discriminator = None
        if losses.adversarial or losses.feature:
            self.discriminator = Discriminator(**vars(recipe.discriminator), sample_rate=model.sample_rate).to(device)
        self.ema = copy.deepcopy(self.codec).requires_grad_(False).eval() if recipe.trainer.ema else None

        self.mel_loss = MelSpectrogramLoss(
            losses.mel_bins, losses.mel_windows, pow=1.0, mag_weight=0.0, sample_rate=model.sample_rate
        ).to(device)
        self.stft_loss = MultiScaleSTFTLoss().to(device)
        self.waveform_loss = L1Loss()

        # What is called in the forward pass: the same networks, their gradients averaged over processes.
        self._codec, self._discriminator = self.codec, self.discriminator
        if dist.is_initialized():
            self._codec = distributed(self.codec)
            self._discriminator = self.discriminator and distributed(self.discriminator)
        self.optimizers = {"generator": adamw(self.codec, recipe.optimizer)}
        if self.discriminator:
            self.optimizers["discriminator"] = adamw(self.discriminator, recipe.optimizer)
        self.skipped = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("total", "row", "longest")}
        self.code_counts = torch.zeros(model.n_codebooks, model.codebook_size, dtype=torch.int64, device=device)

    def __call__(self, audio: Tensor, step: int) -> dict[str, Tensor]:
        """Step number `step` (from 0) on audio [B, 1, T]: every loss before its weight, and the gradient norms."""
        self.codec.train()
        self.set_learning_rate(step)
        warming_up = self.discriminator is not None and step < self.recipe.trainer.discriminator_warmup
        with self.autocast(), torch.no_grad() if warming_up else contextlib.nullcontext():
            out = self._codec(audio)

        values, fake, real = {}, None, None
        if self.discriminator:
            # Every spectrogram is computed once and serves both networks' steps.
            with self.autocast():
                fake, real = (self.discriminator.spectra(x) for x in (out["audio"].float(), audio))
            values.update(self.discriminator_step(fake, real))
        if not warming_up:
            values.update(self.generator_step(out, audio, fake, real))
            if self.ema:
                self.update_ema(step)
            codes = out["codes"].transpose(0, 1).flatten(1)
            self.code_counts.scatter_add_(1, codes, torch.ones_like(codes))
        self.count_skipped(values)
        return {name: value.detach() for name, value in values.items()}

    def discriminator_step(self, fake, real) -> dict[str, Tensor]:
        """Updates the discriminator on what its `spectra` gave for the generator's output and the real audio."""
        with self.autocast():
            loss = GANLoss(self._scored(self._discriminator)).discriminator_loss(fake, real)
        norm = self.update("discriminator", self.discriminator, loss)
        return {"discriminator": loss, "grad_norm/discriminator": norm}

    def generator_step(self, out: dict[str, Tensor], audio: Tensor, fake, real) -> dict[str, Tensor]:
        """Updates the generator, from what it returned for the audio and the discriminator's `spectra` of both."""
        values = self.generator_losses(out, audio, fake, real)
        values["loss"] = sum(weight * values[name] for name, weight in self.weights().items())
        values["grad_norm/generator"] = self.update("generator", self.codec, values["loss"])
        return values

    def generator_losses(self, out: dict[str, Tensor], audio: Tensor, fake, real) -> dict[str, Tensor]:
        """The generator's losses by their name in `LossConfig`, those without weight left out (mel always there)."""
        weights = self.weights()
        reconstruction = out["audio"].float()
        values = {"mel": self.mel_loss(reconstruction, audio)}
        if "waveform" in weights:
            values["waveform"] = self.waveform_loss(reconstruction, audio)
        if "stft" in weights:
            values["stft"] = self.stft_loss(reconstruction, audio)
        if self.discriminator:
            # Its own gradients would not be used, and should not be averaged over processes.
            self.discriminator.requires_grad_(False)
            with self.autocast():
                loss = GANLoss(self._scored(self.discriminator)).generator_loss(fake, real)
            self.discriminator.requires_grad_(True)
            values["adversarial"], values["feature"] = loss
        values["commitment"], values["codebook"] = out["vq/commitment_loss"], out["vq/codebook_loss"]
        return values

    def weights(self) -> dict[str, float]:
        """The generator's losses that are summed, and their weights."""
        names = ("mel", "adversarial", "feature", "codebook", "commitment", "waveform", "stft")
        weights = {name: getattr(self.recipe.losses, name) for name in names}
        # The quantizer's stay, so that every parameter has a gradient, which averaging over processes waits for.
        return {name: weight for name, weight in weights.items() if weight or name in ("codebook", "commitment")}

    def update(self, name: str, network: nn.Module, loss: Tensor) -> Tensor:
        """Backward pass, clipping and optimizer step of a network; returns the norm of its gradients, unclipped."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for p in network.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, getattr(self.recipe.optimizer, f"clip_{name}"))
        # How loss scaling tells a fused optimizer, on the device, to leave everything as it is.
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        optimizer.step()
        return norm

    def set_learning_rate(self, step: int):
        """That of step number `step`, which decays with every one."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.optimizer.learning_rate * self.recipe.optimizer.decay**step

    def count_skipped(self, values: dict[str, Tensor]):
        """Counts the step as skipped if a gradient norm is not finite."""
        norms = torch.stack([norm for name, norm in values.items() if name.startswith("grad_norm/")])
        failed = ~norms.isfinite().all()
        self.skipped["total"] += failed
        self.skipped["row"].add_(1).mul_(failed)
        self.skipped["longest"].copy_(torch.maximum(self.skipped["longest"], self.skipped["row"]))

    @torch.no_grad()
    def update_ema(self, step: int):
        """Moves the average towards the codec, faster in the first steps, while it is still its initialisation."""
        decay = min(self.recipe.trainer.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.codec.parameters()), 1 - decay)
        for average, current in zip(self.ema.buffers(), self.codec.buffers(), strict=True):
            average.copy_(current)

    def autocast(self):
        """Half precision inside, where the run asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def best_codec(self) -> DAC:
        """The codec to validate and to keep: the average where there is one."""
        return self.ema or self.codec

    @staticmethod
    def _scored(discriminator):
        """The discriminator with scores in float32: their squares are summed to the loss."""
        return lambda x: [[*maps[:-1], maps[-1].float()] for maps in discriminator(x)]

    def state_dict(self) -> dict:
        """All that a run needs to go on, as tensors and plain values."""
        networks = {"generator": self.codec, "discriminator": self.discriminator, "ema": self.ema}
        return {
            "networks": {name: network.state_dict() for name, network in networks.items() if network},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "skipped": self.skipped,
            "code_counts": self.code_counts,
        }

    def load_state_dict(self, state: dict):
        """The inverse of `state_dict`."""
        networks, optimizers = state["networks"], state["optimizers"]
        self.codec.load_state_dict(networks["generator"])
        # What was switched on between two parts of a run starts from here.
        if self.discriminator and "discriminator" in networks:
            self.discriminator.load_state_dict(networks["discriminator"])
        if self.ema:
            self.ema.load_state_dict(networks.get("ema", networks["generator"]))
        for name in self.optimizers.keys() & optimizers.keys():
            self.optimizers[name].load_state_dict(optimizers[name])
        for name, count in state["skipped"].items():
            self.skipped[name].copy_(count)
        self.code_counts.copy_(state["code_counts"])


def adamw(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of a network."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def distributed(network: nn.Module) -> DistributedDataParallel:
    """The network with gradients averaged over processes. Buffers agree by themselves (see `EMACodebook`)."""
    with warnings.catch_warnings():
        # PyTorch 2.13 has another name for broadcast_buffers, which 2.10 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)

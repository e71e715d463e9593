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

from dac_fast.codec import DAC
from dac_fast.discriminators import Discriminator
from dac_fast.losses import GANLoss, L1Loss, MelSpectrogramLoss, MultiScaleSTFTLoss
from dac_fast.model.channels_last import set_channels_last
from dac_fast.model.layers import Block, weights_kept
from dac_fast.ops.cuda_graph import GraphedStep
from dac_fast.spectral import full_precision
from dac_fast.training.recipe import OptimizerConfig, Recipe, RecipeError


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
        mark: called with the name of each part of the step as it begins; does nothing, for a clock to be put there.
    """

    def __init__(self, recipe: Recipe, device: torch.device, precision: str = "fp32"):
        self.recipe, self.device, self.precision = recipe, device, precision
        losses, model = recipe.losses, recipe.model
        torch.manual_seed(recipe.trainer.seed)
        self.codec = DAC(**vars(model)).to(device)
        self.discriminator = None
        if losses.adversarial or losses.feature:
            self.discriminator = Discriminator(
                **vars(recipe.discriminator), sample_rate=model.sample_rate
            ).to(device)
        self.ema = (
            copy.deepcopy(self.codec).requires_grad_(False).eval() if recipe.trainer.ema else None
        )
        if device.type == "cuda":
            for network in filter(None, (self.codec, self.discriminator)):
                set_channels_last(network)
        for module in self.codec.modules():
            # The blocks of encoder and decoder, not what they are made of.
            if type(module) is Block:
                module.checkpointed = recipe.trainer.gradient_checkpointing

        self.mel_loss = MelSpectrogramLoss(
            losses.mel_bins,
            losses.mel_windows,
            pow=1.0,
            mag_weight=0.0,
            sample_rate=model.sample_rate,
        ).to(device)
        self.stft_loss = MultiScaleSTFTLoss().to(device)
        self.waveform_loss = L1Loss()

        # What is called in the forward pass: the same networks, their gradients averaged over processes.
        self._codec, self._discriminator = self.codec, self.discriminator
        if dist.is_initialized():
            self._codec = distributed(self.codec)
            self._discriminator = self.discriminator and distributed(self.discriminator)
        graphed = recipe.trainer.cuda_graph
        if graphed and (device.type != "cuda" or dist.is_initialized()):
            raise RecipeError(
                f"trainer.cuda_graph is true on {device}; accepted: on one CUDA device, in one process"
            )
        self.optimizers = {"generator": adamw(self.codec, recipe.optimizer, graphed)}
        if self.discriminator:
            self.optimizers["discriminator"] = adamw(self.discriminator, recipe.optimizer, graphed)
        self._graphed = GraphedStep(self.update_networks) if graphed else None
        self.skipped = {
            name: torch.zeros((), dtype=torch.int64, device=device)
            for name in ("total", "row", "longest")
        }
        self.code_counts = torch.zeros(
            model.n_codebooks, model.codebook_size, dtype=torch.int64, device=device
        )
        self.mark = lambda part: None

    def __call__(self, audio: Tensor, step: int) -> dict[str, Tensor]:
        """Step number `step` (from 0) on audio [B, 1, T]: every loss before its weight, and the gradient norms.

        With `trainer.cuda_graph` the tensors are the same in every step, and their values those of the last.
        """
        self.codec.train()
        self.set_learning_rate(step)
        if self.discriminator and step < self.recipe.trainer.discriminator_warmup:
            return self.update_networks(audio, warming_up=True)
        values = (self._graphed or self.update_networks)(audio)
        if self.ema:
            self.update_ema(step)
        return values

    def update_networks(self, audio: Tensor, warming_up: bool = False) -> dict[str, Tensor]:
        """The whole step, but for what changes with its number; warming up, of the discriminator only."""
        self.mark("generator forward")
        with self.autocast(), torch.no_grad() if warming_up else contextlib.nullcontext():
            out = self._codec(audio)

        values, fake, real = {}, None, None
        if self.discriminator:
            self.mark("spectrograms")
            # Every spectrogram is computed once and serves both networks' steps.
            with self.autocast():
                fake, real = (
                    self.discriminator.spectra(x) for x in (full_precision(out["audio"]), audio)
                )
            values.update(self.discriminator_step(fake, real))
        if not warming_up:
            values.update(self.generator_step(out, audio, fake, real))
            codes = out["codes"].transpose(0, 1).flatten(1)
            self.code_counts.scatter_add_(1, codes, torch.ones_like(codes))
        self.count_skipped(values)
        return {name: value.detach() for name, value in values.items()}

    def discriminator_step(self, fake, real) -> dict[str, Tensor]:
        """Updates the discriminator on what its `spectra` gave for the generator's output and the real audio."""
        self.mark("discriminator forward")
        loss = GANLoss(self._scored(self._discriminator)).discriminator_loss(fake, real)
        norm = self.update("discriminator", self.discriminator, loss)
        return {"discriminator": loss, "grad_norm/discriminator": norm}

    def generator_step(
        self, out: dict[str, Tensor], audio: Tensor, fake, real
    ) -> dict[str, Tensor]:
        """Updates the generator, from what it returned for the audio and the discriminator's `spectra` of both."""
        values = self.generator_losses(out, audio, fake, real)
        values["loss"] = sum(weight * values[name] for name, weight in self.weights().items())
        values["grad_norm/generator"] = self.update("generator", self.codec, values["loss"])
        return values

    def generator_losses(
        self, out: dict[str, Tensor], audio: Tensor, fake, real
    ) -> dict[str, Tensor]:
        """The generator's losses by their name in `LossConfig`, those without weight left out (mel always there)."""
        values, weights = {}, self.weights()
        if self.discriminator:
            self.mark("discriminator forward")
            # Its own gradients would not be used, and should not be averaged over processes.
            self.discriminator.requires_grad_(False)
            with weights_kept(self.discriminator):
                loss = GANLoss(self._scored(self.discriminator)).generator_loss(fake, real)
            self.discriminator.requires_grad_(True)
            values["adversarial"], values["feature"] = loss
        self.mark("losses")
        reconstruction = full_precision(out["audio"])
        values["mel"] = self.mel_loss(reconstruction, audio)
        if "waveform" in weights:
            values["waveform"] = self.waveform_loss(reconstruction, audio)
        if "stft" in weights:
            values["stft"] = self.stft_loss(reconstruction, audio)
        values["commitment"], values["codebook"] = (
            out["vq/commitment_loss"],
            out["vq/codebook_loss"],
        )
        return values

    def weights(self) -> dict[str, float]:
        """The generator's losses that are summed, and their weights."""
        names = ("mel", "adversarial", "feature", "codebook", "commitment", "waveform", "stft")
        weights = {name: getattr(self.recipe.losses, name) for name in names}
        # The quantizer's stay, so that every parameter has a gradient, which averaging over processes waits for.
        return {
            name: weight
            for name, weight in weights.items()
            if weight or name in ("codebook", "commitment")
        }

    def update(self, name: str, network: nn.Module, loss: Tensor) -> Tensor:
        """Backward pass, clipping and optimizer step of a network; returns the norm of its gradients, unclipped."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        self.mark(f"{name} backward")
        loss.backward()
        self.mark("optimizers")
        parameters = [p for p in network.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, getattr(self.recipe.optimizer, f"clip_{name}"))
        # How loss scaling tells a fused optimizer, on the device, to leave everything as it is.
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        optimizer.step()
        return norm

    def set_learning_rate(self, step: int):
        """That of step number `step`, which decays with every one."""
        rate = self.recipe.optimizer.learning_rate * self.recipe.optimizer.decay**step
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def count_skipped(self, values: dict[str, Tensor]):
        """Counts the step as skipped if a gradient norm is not finite."""
        norms = torch.stack(
            [norm for name, norm in values.items() if name.startswith("grad_norm/")]
        )
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

    def _scored(self, discriminator):
        """The discriminator under autocast, with scores in float32: their squares are summed to the loss."""

        def run(x):
            with self.autocast():
                return [[*maps[:-1], full_precision(maps[-1])] for maps in discriminator(x)]

        return run

    def state_dict(self) -> dict:
        """All that a run needs to go on, as tensors and plain values."""
        networks = {"generator": self.codec, "discriminator": self.discriminator, "ema": self.ema}
        return {
            "networks": {
                name: network.state_dict() for name, network in networks.items() if network
            },
            "optimizers": {
                name: optimizer.state_dict() for name, optimizer in self.optimizers.items()
            },
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
            # Its settings are the recipe's.
            own = self.optimizers[name].state_dict()
            self.optimizers[name].load_state_dict(own | {"state": optimizers[name]["state"]})
        for name, count in state["skipped"].items():
            self.skipped[name].copy_(count)
        self.code_counts.copy_(state["code_counts"])


def adamw(network: nn.Module, config: OptimizerConfig, graphed: bool = False) -> torch.optim.AdamW:
    """The optimizer of a network; its learning rate is a tensor where its steps are to be captured in a CUDA graph."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    rate = (
        torch.tensor(config.learning_rate, device=parameters[0].device)
        if graphed
        else config.learning_rate
    )
    optimizer = torch.optim.AdamW(
        parameters,
        lr=rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
        capturable=graphed,
    )
    # That the first steps, before the capture, are slower than they could be.
    optimizer._warned_capturable_if_run_uncaptured = True
    return optimizer


def distributed(network: nn.Module) -> DistributedDataParallel:
    """The network with gradients averaged over processes. Buffers agree by themselves (see `EMACodebook`)."""
    with warnings.catch_warnings():
        # PyTorch 2.13 has another name for broadcast_buffers, which 2.10 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            network, broadcast_buffers=False, gradient_as_bucket_view=True
        )

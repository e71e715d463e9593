"""A training step: the discriminator's update, then the generator's (paper, sections 3.4, 3.5).

Nothing here waits for the GPU: losses stay tensors, and a step whose gradients are not finite is
skipped on the device.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from dac_kernels import native
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dac_fast.codec import DAC
from dac_fast.discriminators import Discriminator
from dac_fast.losses import (
    L1Loss,
    MelSpectrogramLoss,
    MultiScaleSTFTLoss,
    discriminator_loss,
    feature_matching,
    generator_loss,
    halves,
    total,
)
from dac_fast.model.channels_last import set_channels_last
from dac_fast.model.layers import Block, set_gradients, weights_kept
from dac_fast.ops.cuda_graph import GraphedStep
from dac_fast.spectral import Spectrograms, full_precision
from dac_fast.training.recipe import LossConfig, OptimizerConfig, Recipe, RecipeError

# Of `DAC.forward`'s values, by the names of their weights.
BOTTLENECK_LOSSES = {
    "commitment": "vq/commitment_loss",
    "codebook": "vq/codebook_loss",
    "kl": "vae/kl_loss",
}


class TrainingStep:
    """Both networks with their optimizers; called with a batch, it updates them.

    Args:
        recipe: what to train and how.
        device: to train on.
        precision: "fp32", or "bf16": autocast in the networks. Losses, the quantizer and the
            layers nearest to the audio stay in float32, the gradients of the latter's convolutions
            in bfloat16.

    Attributes:
        codec, discriminator: the networks; no discriminator (None) where its losses have no weight.
        ema: moving average of the codec, or None.
        optimizers: of the "generator" and the "discriminator".
        weights: of the generator's losses.
        skipped: int64 scalars: "total" steps skipped for gradients that were not finite, the
            current "row" of them and the "longest".
        code_counts: int64 [N, K], uses of each code since somebody zeroed it.
        mark: called with the name of each part of the step as it begins; for a clock.
    """

    def __init__(self, recipe: Recipe, device: torch.device, precision: str = "fp32") -> None:
        self.recipe = recipe
        self.device = device
        self.precision = precision
        model = recipe.model
        torch.manual_seed(recipe.trainer.seed)
        self.codec = DAC(**vars(model)).to(device)
        self.discriminator: Discriminator | None = None
        if recipe.losses.adversarial or recipe.losses.feature:
            self.discriminator = Discriminator(
                **vars(recipe.discriminator), sample_rate=model.sample_rate
            ).to(device)
        self.ema: DAC | None = None
        if recipe.trainer.ema:
            self.ema = copy.deepcopy(self.codec).requires_grad_(False).eval()
        self.networks: dict[str, nn.Module] = {"generator": self.codec}
        if self.discriminator:
            self.networks["discriminator"] = self.discriminator
        # In float32 on a CPU this layout is faster by the codec's own weight gradients alone.
        if device.type == "cuda" or precision == "bf16" or native.extension is not None:
            for network in self.networks.values():
                set_channels_last(network)
        if precision == "bf16":
            # Not the decoder's last convolution: in the audio's gradient loud and quiet bands
            # differ most, and what rounding adds there would drown the gradients of other layers.
            *decoder, _convolution, _tanh = self.codec.decoder.near_audio()
            for part in (self.codec.encoder.near_audio(), *decoder):
                set_gradients(part, torch.bfloat16)
        elif device.type == "cpu":
            set_gradients(self.codec, torch.float32)
        for module in self.codec.modules():
            # The blocks of encoder and decoder, not their subclasses, which are parts of blocks.
            if type(module) is Block:
                module.checkpointed = recipe.trainer.gradient_checkpointing

        self.weights = loss_weights(recipe.losses)
        self.mel_loss = MelSpectrogramLoss(
            recipe.losses.mel_bins,
            recipe.losses.mel_windows,
            pow=1.0,
            mag_weight=0.0,
            sample_rate=model.sample_rate,
        ).to(device)
        self.stft_loss = MultiScaleSTFTLoss().to(device)
        self.waveform_loss = L1Loss()

        # The networks to call in a forward pass whose gradients are averaged over processes.
        self.averaged = self.networks
        if dist.is_initialized():
            self.averaged = {name: distributed(n) for name, n in self.networks.items()}
        graphed = recipe.trainer.cuda_graph
        if graphed and (device.type != "cuda" or dist.is_initialized()):
            raise RecipeError(
                f"trainer.cuda_graph is true on {device}; "
                "accepted: on one CUDA device, in one process"
            )
        self.optimizers = {
            name: adamw(network, recipe.optimizer, graphed)
            for name, network in self.networks.items()
        }
        self._graphed = GraphedStep(self.update_networks) if graphed else None

        names = ("total", "row", "longest")
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = {name: zero.clone() for name in names}
        self.code_counts = zero.repeat(model.n_codebooks, model.codebook_size)
        self.mark: Callable[[str], None] = lambda part: None

    def __call__(self, audio: Tensor, step: int) -> dict[str, Tensor]:
        """Step number `step` (from 0): every loss before its weight, and the gradient norms.

        With `trainer.cuda_graph` every step returns the same tensors, with new values.

        Args:
            audio: [B, C, T].
        """
        self.codec.train()
        self.set_learning_rate(step)
        trainer = self.recipe.trainer
        if self.discriminator and step < trainer.discriminator_warmup:
            return self.update_networks(audio, warming_up=True)
        if self.discriminator and step < trainer.discriminator_start:
            values = self.update_networks(audio, alone=True)
        else:
            values = (self._graphed or self.update_networks)(audio)
        if self.ema:
            self.update_ema(self.ema, step)
        return values

    def update_networks(
        self, audio: Tensor, warming_up: bool = False, alone: bool = False
    ) -> dict[str, Tensor]:
        """All of a step that does not depend on its number.

        Warming up, without the generator's update; alone, without the discriminator.
        """
        discriminator = None if alone else self.discriminator
        values: dict[str, Tensor] = {}
        self.mark("generator forward")
        with self.autocast(), torch.set_grad_enabled(not warming_up):
            out = self.averaged["generator"](audio)
        restored = full_precision(out["audio"])

        if discriminator:
            # Each signal is analysed once, for the updates of both networks.
            self.mark("spectrograms")
            with self.autocast():
                fake, real = (discriminator.spectra(one_by_one(x)) for x in (restored, audio))

            self.mark("discriminator forward")
            with self.autocast():
                both = self.averaged["discriminator"](fake.detach().joined(real))
            values["discriminator"] = loss = discriminator_loss(*halves(both))
            del both  # So that the backward pass frees the feature maps as it goes.
            values["grad_norm/discriminator"] = self.update("discriminator", loss)

        if not warming_up:
            if discriminator:
                self.mark("discriminator forward")
                with self.autocast(), frozen(discriminator):
                    fakes = discriminator(fake)
                    with torch.no_grad():
                        reals = discriminator(real)
                values["adversarial"] = generator_loss(fakes)
                values["feature"] = feature_matching(fakes, reals)
                del fakes, reals

            self.mark("losses")
            spectrograms = Spectrograms(restored), Spectrograms(audio)
            values["mel"] = self.mel_loss(*spectrograms)
            if "waveform" in self.weights:
                values["waveform"] = self.waveform_loss(restored, audio)
            if "stft" in self.weights:
                values["stft"] = self.stft_loss(*spectrograms)
            values |= {name: out[key] for name, key in BOTTLENECK_LOSSES.items() if key in out}
            values["loss"] = total(
                weight * values[name] for name, weight in self.weights.items() if name in values
            )
            values["grad_norm/generator"] = self.update("generator", values["loss"])

            if "codes" in out:
                codes = out["codes"].transpose(0, 1).flatten(1)
                self.code_counts.scatter_add_(1, codes, torch.ones_like(codes))
        self.count_skipped(values)
        return {name: value.detach() for name, value in values.items()}

    def update(self, name: str, loss: Tensor) -> Tensor:
        """Backward pass, clipping and optimizer step of a network.

        Returns:
            the norm of the gradients before clipping.
        """
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        self.mark(f"{name} backward")
        loss.backward()
        self.mark("optimizers")
        (group,) = optimizer.param_groups
        limit = getattr(self.recipe.optimizer, f"clip_{name}")
        norm = nn.utils.clip_grad_norm_(group["params"], limit)
        # As a gradient scaler would, this tells a fused optimizer, on the device, to change nothing
        # where the gradients are not finite.
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
        return norm

    def set_learning_rate(self, step: int) -> None:
        """Sets the learning rate of step number `step`."""
        rate = self.recipe.optimizer.learning_rate * self.recipe.optimizer.decay**step
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def count_skipped(self, values: dict[str, Tensor]) -> None:
        """Counts the step as skipped if a gradient norm is not finite."""
        norms = [norm for name, norm in values.items() if name.startswith("grad_norm/")]
        failed = ~torch.stack(norms).isfinite().all()
        self.skipped["total"] += failed
        self.skipped["row"].add_(1).mul_(failed)
        self.skipped["longest"].copy_(torch.maximum(self.skipped["longest"], self.skipped["row"]))

    @torch.no_grad()
    def update_ema(self, ema: DAC, step: int) -> None:
        """Moves the average towards the codec, faster in the first steps: it starts untrained."""
        decay = min(self.recipe.trainer.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(self.codec.parameters()), 1 - decay)
        for average, current in zip(ema.buffers(), self.codec.buffers(), strict=True):
            average.copy_(current)

    def autocast(self) -> torch.autocast:
        """Half precision inside, where the run asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def best_codec(self) -> DAC:
        """The codec to validate and to keep: the average where there is one."""
        return self.ema or self.codec

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on, as tensors and plain values."""
        networks = self.networks | ({"ema": self.ema} if self.ema else {})
        return {
            "networks": {name: network.state_dict() for name, network in networks.items()},
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "skipped": self.skipped,
            "code_counts": self.code_counts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`.

        A network that was switched on between two parts of a run starts as it is, the average as
        the codec.
        """
        networks, optimizers = state["networks"], state["optimizers"]
        for name in self.networks.keys() & networks.keys():
            self.networks[name].load_state_dict(networks[name])
        if self.ema:
            self.ema.load_state_dict(networks.get("ema", networks["generator"]))
        for name in self.optimizers.keys() & optimizers.keys():
            # The settings of an optimizer are the recipe's.
            own = self.optimizers[name].state_dict()
            self.optimizers[name].load_state_dict(own | {"state": optimizers[name]["state"]})
        for name, count in state["skipped"].items():
            self.skipped[name].copy_(count)
        self.code_counts.copy_(state["code_counts"])


def one_by_one(audio: Tensor) -> Tensor:
    """Audio [B, C, T] with every channel as an item [B C, 1, T], as discriminators take it."""
    return audio.flatten(0, 1)[:, None]


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside, the network's weights get no gradients, and are normed only once."""
    network.requires_grad_(False)
    try:
        with weights_kept(network):
            yield
    finally:
        network.requires_grad_(True)


def loss_weights(losses: LossConfig) -> dict[str, float]:
    """The weights of the generator's losses, without those that are 0.

    The quantizer's losses stay: they give every parameter a gradient, which averaging over
    processes waits for.
    """
    names = ("mel", "adversarial", "feature", "codebook", "commitment", "waveform", "stft", "kl")
    weights = {name: float(getattr(losses, name)) for name in names}
    kept = ("codebook", "commitment")
    return {name: weight for name, weight in weights.items() if weight or name in kept}


def adamw(network: nn.Module, config: OptimizerConfig, graphed: bool) -> torch.optim.AdamW:
    """The optimizer of a network; graphed: its steps can be captured in a CUDA graph."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    rate: float | Tensor = config.learning_rate
    if graphed:
        # A captured step reads the learning rate from this tensor.
        rate = torch.tensor(rate, device=parameters[0].device)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
        capturable=graphed,
    )
    # PyTorch would warn that the first steps, before the capture, could be faster.
    optimizer._warned_capturable_if_run_uncaptured = True
    return optimizer


def distributed(network: nn.Module) -> nn.Module:
    """The network, with its gradients averaged over processes.

    Buffers need no averaging, see `EMACodebook`.
    """
    with warnings.catch_warnings():
        # PyTorch 2.13 has another name for broadcast_buffers, which 2.10 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            network, broadcast_buffers=False, gradient_as_bucket_view=True
        )

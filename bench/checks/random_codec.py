"""A codec with random weights that behaves like a trained one: signals keep their size, codes vary.

The weights of a fresh codec would do for timing, but hide errors: its signal fades from layer to
layer, its codebooks are far larger than what they quantise, and codes and audio hardly depend on
the input.
"""

import functools
import math

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dac_fast import ops
from dac_fast.codec import DAC
from dac_fast.config import PRESETS, Config
from dac_fast.model.layers import Conv1d, ConvTranspose1d, Snake, WeightNorm

# The size of a convolution's output relative to its input's: the residual paths neither fade nor
# take over.
GAIN = 0.75


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def random_codec(preset: str, device: str = "cpu") -> DAC:
    """The codec, in eval mode, its weights not folded.

    Every caller gets the same object: copy it before you change it.
    """
    config = PRESETS[preset]
    # Drawn on the CPU, the weights are the same for every device.
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    codec = DAC(**config.to_dict()).eval().to(device)
    for network in (codec.encoder, codec.decoder):
        for module in network.modules():
            if isinstance(module, (Conv1d, ConvTranspose1d)):
                weight = module.weight_v
                # An output of a transposed convolution depends on two positions.
                transposed = isinstance(module, ConvTranspose1d)
                terms = 2 * weight.shape[0] if transposed else weight[0].numel()
                _set_weight(module, normal(weight.shape) * GAIN / math.sqrt(terms))
                module.bias.copy_(0.01 * normal(module.bias.shape))
            elif isinstance(module, Snake):
                module.alpha.copy_((0.3 * normal(module.alpha.shape)).exp())
    z = codec.encoder(0.1 * normal((1, 1, 80 * config.hop_length)))
    _fit_quantizer(codec, z[0].t(), generator)
    # The last layer brings the audio to about 0.1 of full scale, whatever comes in.
    last = codec.decoder.model[-2]
    size = codec.decoder.model[:-1](codec.quantizer(z)[0]).square().mean().sqrt()
    _set_weight(last, last.normed_weight() * (0.1 / size))
    last.bias.zero_()
    return codec


def _fit_quantizer(codec: DAC, residual: Tensor, generator: torch.Generator) -> None:
    """Makes codebooks as large as the residual [frames, D], and fits the projections back to it."""
    for stage in codec.quantizer.quantizers:
        projection = stage.in_proj.normed_weight()[:, :, 0]
        latent = residual @ projection.t()
        chosen = torch.randint(len(latent), (len(stage.codebook.weight),), generator=generator)
        jitter = torch.randn(stage.codebook.weight.shape, generator=generator).to(residual.device)
        stage.codebook.weight.copy_(latent[chosen.to(latent.device)] + 0.3 * latent.std(0) * jitter)
        back = torch.linalg.lstsq(latent, residual).solution
        _set_weight(stage.out_proj, back.t()[:, :, None])
        for conv in (stage.in_proj, stage.out_proj):
            conv.bias.zero_()
        residual = residual - stage.codebook.weight[stage.search(latent.t()[None])[0]] @ back


def _set_weight(conv: WeightNorm, weight: Tensor) -> None:
    conv.weight_v.copy_(weight)
    conv.weight_g.copy_(weight.flatten(1).norm(dim=1).view(conv.weight_g.shape))


def convolution_flops(config: Config, direction: str, frames: int) -> int:
    """The flops of one item's convolutions in a direction, counted on a model without data."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), ops.use_backend("reference"), counter:
        codec = DAC(**config.to_dict())
        if direction != "decode":
            codec.encoder(torch.empty(1, 1, frames * config.hop_length))
        if direction != "encode":
            codec.decoder(torch.empty(1, config.latent_dim, frames))
    return counter.get_total_flops()

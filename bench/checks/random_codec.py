"""A codec with random weights that behaves like a trained one: signals keep their size, and codes depend on them.

Weights as they are initialised would do for timing, but hide errors: the signal fades from layer to layer, the
codebooks are far larger than what they quantise, and codes and audio hardly depend on the input.
"""

import functools
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from dac_fast import ops
from dac_fast.codec import DAC
from dac_fast.config import PRESETS, Config
from dac_fast.model.layers import Conv1d, ConvTranspose1d, Snake, WeightNorm

# Of each convolution, as a factor on the size of its input: so that the residual paths neither fade nor take over.
GAIN = 0.75


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def random_codec(preset: str, device: str = "cpu") -> DAC:
    """The codec, in eval mode, its weights not folded. Copy it before changing it: the next caller gets the same."""
    config, generator = PRESETS[preset], torch.Generator().manual_seed(0)

    def normal(shape):
        # drawn on the CPU: the same everywhere
        return torch.randn(shape, generator=generator).to(device)

    codec = DAC(**config.to_dict()).eval().to(device)
    for network in (codec.encoder, codec.decoder):
        for module in network.modules():
            if isinstance(module, (Conv1d, ConvTranspose1d)):
                weight = module.weight_v
                # a transposed convolution's output sees two taps
                terms = (
                    2 * weight.shape[0]
                    if isinstance(module, ConvTranspose1d)
                    else weight[0].numel()
                )
                _set_weight(module, normal(weight.shape) * GAIN / math.sqrt(terms))
                module.bias.copy_(0.01 * normal(module.bias.shape))
            elif isinstance(module, Snake):
                module.alpha.copy_((0.3 * normal(module.alpha.shape)).exp())
    # the last convolution's input is as large as it happens to be: about 0.1 of full scale comes out
    z = codec.encoder(0.1 * normal((1, 1, 80 * config.hop_length)))
    _fit_quantizer(codec, z[0].t(), generator)
    quantised = codec.quantizer(z)[0]
    last = codec.decoder.model[-2]
    size = codec.decoder.model[:-1](quantised).square().mean().sqrt()
    _set_weight(last, last.normed_weight() * (0.1 / size))
    last.bias.zero_()
    return codec


def _fit_quantizer(codec: DAC, residual: torch.Tensor, generator: torch.Generator):
    """Codebooks as large as what they quantise, and projections back that explain it best. residual: [frames, D]."""
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


def _set_weight(conv: WeightNorm, weight: torch.Tensor):
    conv.weight_v.copy_(weight)
    conv.weight_g.copy_(weight.flatten(1).norm(dim=1).view(conv.weight_g.shape))


def convolution_flops(config: Config, direction: str, frames: int) -> int:
    """Of one item's convolutions in encode, decode or both, counted on a model without data."""
    with (
        torch.device("meta"),
        ops.use_backend("reference"),
        FlopCounterMode(display=False) as counter,
    ):
        codec = DAC(**config.to_dict())
        if direction != "decode":
            codec.encoder(torch.empty(1, 1, frames * config.hop_length))
        if direction != "encode":
            codec.decoder(torch.empty(1, config.latent_dim, frames))
    return counter.get_total_flops()

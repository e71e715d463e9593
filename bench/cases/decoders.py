"""Decoders of other packages, as they are and by `accelerate_decoder`; on the CPU, random weights.

    xcodec        transformers' X-Codec: DAC's structure, 16 kHz
    snac          the package snac, 24 kHz: depthwise convolutions, noise off
    bigvgan       a residual block of BigVGAN in transformers: SnakeBeta between resamplers

A package that is not installed has no case.
"""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bench.case import Case, Prepared, Run, Settings
from bench.checks import ops as checks
from dac_fast.drop_in import accelerate_decoder


def xcodec(quick: bool) -> tuple[nn.Module, Tensor]:
    """The acoustic decoder, and a second of its input."""
    from transformers import XcodecConfig, XcodecModel

    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    semantic = {**sizes, "num_attention_heads": 2, "num_conv_pos_embeddings": 4}
    acoustic = {"decoder_hidden_size": 64} if quick else {}
    config = XcodecConfig(
        acoustic_model_config=acoustic,
        semantic_model_config={**semantic, "num_conv_pos_embedding_groups": 2},
    )
    return XcodecModel(config).acoustic_decoder, torch.randn(1, 256, 50)


def snac(quick: bool) -> tuple[nn.Module, Tensor]:
    """The decoder of the published 24 kHz model, and a second of its input."""
    from snac.layers import Decoder

    channels = 64 if quick else 1024
    decoder = Decoder(768, channels, [8, 8, 4, 2], depthwise=True, attn_window_size=None)
    return decoder, torch.randn(1, 768, 47)


def bigvgan(quick: bool) -> tuple[nn.Module, Tensor]:
    """A residual block of 192 channels, and a third of a second of its input at 24 kHz."""
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAMPBlock

    channels = 8 if quick else 192
    return Qwen2_5OmniAMPBlock(channels, 7, (1, 3, 5)), torch.randn(1, channels, 8000)


MODULES: dict[str, tuple[str, Callable[[bool], tuple[nn.Module, Tensor]]]] = {
    "xcodec": ("transformers", xcodec),
    "snac": ("snac", snac),
    "bigvgan": ("transformers", bigvgan),
}


def cases(device: str, quick: bool) -> list[Case]:
    """One for each module whose package is installed."""
    return [
        Case("decoder", "forward", device, "float32", name, partial(prepare, make, quick))
        for name, (package, make) in MODULES.items()
        if device == "cpu" and find_spec(package)
    ]


@torch.no_grad()
def prepare(
    make: Callable[[bool], tuple[nn.Module, Tensor]], quick: bool, settings: Settings
) -> Prepared:
    """A module, its accelerated copy, and a check against it in float64."""
    torch.manual_seed(0)
    module, x = make(quick)
    module.eval()
    for name, parameter in module.named_parameters():
        if name.endswith(("alpha", "beta")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    exact = copy.deepcopy(module).double()(x.double())
    accelerated = copy.deepcopy(module)

    def start() -> Run:
        accelerate_decoder(accelerated)
        return Run(torch.no_grad()(lambda: (accelerated(x),)))

    peers = {
        "module": lambda: Run(torch.no_grad()(lambda: (module(x),))),
        "accelerated": start,
    }
    return Prepared(peers, checks.as_good_as([module(x)], [exact]), bytes_moved=None)

"""Hugging Face's folders of a `DacModel`: their file names, configuration and names of modules."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from dac_fast.config import Config

Value = TypeVar("Value")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"

# Our name of a value to theirs, for those that a folder has to have.
VALUES = {
    "encoder_dim": "encoder_hidden_size",
    "encoder_rates": "downsampling_ratios",
    "decoder_dim": "decoder_hidden_size",
    "n_codebooks": "n_codebooks",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
    "sample_rate": "sampling_rate",
}


def values_of(theirs: object) -> dict[str, Any]:
    """The arguments of a `Config`, not yet checked, in the content of a config.json.

    Raises:
        ValueError: it is of another model, or lacks a value.
    """
    if not isinstance(theirs, dict):
        raise ValueError(f"{CONFIG} holds a {type(theirs).__name__}; accepted: keys and values")
    if theirs.get("model_type") != "dac":
        model = f"{theirs.get('model_type')!r:.80}"
        raise ValueError(f"{CONFIG} is of a {model} model; accepted: 'dac'")
    for name in VALUES.values():
        if name not in theirs:
            raise ValueError(f"{CONFIG} lacks {name}")
    values: dict[str, Any] = {ours: theirs[name] for ours, name in VALUES.items()}
    rates = values["encoder_rates"]
    backwards = rates[::-1] if isinstance(rates, list) else rates
    return values | {
        "latent_dim": theirs.get("hidden_size"),
        "decoder_rates": theirs.get("upsampling_ratios", backwards),
        "quantizer_dropout": theirs.get("quantizer_dropout", 0.0),
    }


def config_of(config: Config) -> dict[str, object]:
    """The content of config.json.

    Raises:
        ValueError: the format has no place for what the configuration says.
    """
    if config.latent_dim != config.encoder_dim * 2 ** len(config.encoder_rates):
        raise ValueError(f"latent_dim {config.latent_dim} has no place in Hugging Face's format")
    same_rates = config.decoder_rates == config.encoder_rates[::-1]
    if not same_rates or not isinstance(config.codebook_dim, int):
        raise ValueError("decoder_rates or codebook_dim have no place in Hugging Face's format")
    return {
        "architectures": ["DacModel"],
        "model_type": "dac",
        "encoder_hidden_size": config.encoder_dim,
        "downsampling_ratios": list(config.encoder_rates),
        "upsampling_ratios": list(config.decoder_rates),
        "hidden_size": config.latent_dim,
        "decoder_hidden_size": config.decoder_dim,
        "n_codebooks": config.n_codebooks,
        "codebook_size": config.codebook_size,
        "codebook_dim": config.codebook_dim,
        "quantizer_dropout": config.quantizer_dropout,
        "sampling_rate": config.sample_rate,
        "hop_length": config.hop_length,
    }


def preprocessor_of(config: Config) -> dict[str, object]:
    """The content of preprocessor_config.json, with which `AutoProcessor` loads the folder."""
    return {
        "feature_extractor_type": "DacFeatureExtractor",
        "feature_size": 1,
        "hop_length": config.hop_length,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": config.sample_rate,
    }


def published(state: Mapping[str, Value], config: Config) -> dict[str, Value]:
    """Their state dict under the published names; names that are not theirs stay."""
    names = _published_names(config)
    return {_renamed(key, lambda module: names.get(module, module)): v for key, v in state.items()}


def theirs(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """A state dict of published names under theirs."""
    names = {published: name for name, published in _published_names(config).items()}
    return {_renamed(key, lambda module: names[module]): tensor for key, tensor in state.items()}


def _published_names(config: Config) -> dict[str, str]:
    """Their name of every module outside the quantizer to the published one."""
    names = {}
    # An encoder block is three residual units, then activation and convolution.
    encoder = ("encoder.block", config.encoder_rates, range(3), {"snake1": 3, "conv1": 4})
    # A decoder block begins with activation and convolution.
    decoder = ("decoder.model", config.decoder_rates, range(2, 5), {"snake1": 0, "conv_t1": 1})
    for published, rates, units, ends in (encoder, decoder):
        side = published.partition(".")[0]
        names[f"{side}.conv1"] = f"{published}.0"
        for i in range(len(rates)):
            theirs, ours = f"{side}.block.{i}", f"{published}.{i + 1}.block"
            names |= {f"{theirs}.{part}": f"{ours}.{index}" for part, index in ends.items()}
            for number, unit in enumerate(units, start=1):
                for index, part in enumerate(("snake1", "conv1", "snake2", "conv2")):
                    names[f"{theirs}.res_unit{number}.{part}"] = f"{ours}.{unit}.block.{index}"
        names[f"{side}.snake1"] = f"{published}.{len(rates) + 1}"
        names[f"{side}.conv2"] = f"{published}.{len(rates) + 2}"
    return names


def _renamed(key: str, rename: Callable[[str], str]) -> str:
    """A tensor's key with its module renamed; the quantizer's have the same names everywhere."""
    parts = re.fullmatch(r"(.+?)\.((?:parametrizations\.weight\.)?\w+)", key)
    if parts is None or key.startswith("quantizer."):
        return key
    return f"{rename(parts[1])}.{parts[2]}"

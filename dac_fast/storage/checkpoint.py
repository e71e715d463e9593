"""Checkpoints: three formats read and written, none of which can run code; weights of the presets downloaded.

- `.safetensors`: ours; the configuration is JSON in the file's metadata, under "dac_fast".
- `.pth`: the published package's: {"state_dict": ..., "metadata": {"kwargs": ...}}, read with `weights_only=True`.
- a folder: Hugging Face's `DacModel` (config.json and model.safetensors), its names mapped to the published ones.

A weight may be stored normed (`weight_g`, `weight_v`), in the newer spelling of that
(`parametrizations.weight.original0`, `original1`), or folded (`weight`); the model always gets the first.
"""

import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dac_fast.config import Config
from dac_fast.files import atomic_path, write_bytes

HUGGING_FACE_FILE = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is not the model it should be."""


def read(path) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and state dict, under the published names, of a checkpoint file or folder.

    Raises:
        CheckpointError: it is missing, damaged, or no codec checkpoint.
    """
    path = Path(path)
    if path.name == HUGGING_FACE_FILE and (path.parent / "config.json").exists():
        path = path.parent
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if path.is_dir():
            return _read_hugging_face(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _read_published(path)
    except CheckpointError:
        raise
    # what the parsers raise on damaged input, which is of many types
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: not a readable checkpoint: {reason[0]}") from error


def restore(codec, state: dict[str, Tensor], path):
    """Load a state dict into a codec, whose weights may be stored in any of the three ways.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape.
    """
    state = unfolded(state)
    expected = codec.state_dict()
    for key in expected.keys() ^ state.keys():
        raise CheckpointError(
            f"{path}: {'lacks' if key in expected else 'has an unexpected'} {key}"
        )
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{path}: {key} is {list(tensor.shape)}, expected {list(expected[key].shape)}"
            )
    codec.load_state_dict(state)


def save(codec, path):
    """Write a checkpoint atomically; its format follows from the path: .safetensors, .pth, or a folder (no suffix).

    Raises:
        CheckpointError: another suffix, or a configuration that the format cannot hold.
        OSError: the path cannot be written.
    """
    path = Path(path)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in codec.state_dict().items()}
    if path.suffix == ".safetensors":
        metadata = {"dac_fast": json.dumps({"name": codec.name, **codec.config.to_dict()})}
        _save_safetensors(state, path, metadata)
    elif path.suffix == ".pth":
        _require_published(codec.config, path)
        kwargs = codec.config.to_dict()
        del kwargs["activation"]
        with atomic_path(path) as temporary:
            torch.save({"state_dict": unfolded(state), "metadata": {"kwargs": kwargs}}, temporary)
    elif path.suffix == "":
        config = _hugging_face_config(codec.config, path)
        path.mkdir(parents=True, exist_ok=True)
        names = {
            published: theirs for theirs, published in _hugging_face_names(codec.config).items()
        }
        state = {
            _renamed(key, lambda module: names[module]): tensor
            for key, tensor in folded(state).items()
        }
        _save_safetensors(state, path / HUGGING_FACE_FILE, {"format": "pt"})
        with atomic_path(path / "config.json") as temporary:
            Path(temporary).write_text(json.dumps(config, indent=2) + "\n")
    else:
        raise CheckpointError(
            f"{path}: unknown checkpoint format; accepted: .safetensors, .pth, a folder (no suffix)"
        )


def unfolded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with every convolution's as `weight_g` and `weight_v`."""
    spellings = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    result = {}
    for key, tensor in state.items():
        for theirs, ours in spellings.items():
            key = key.replace(theirs, ours)
        if key.endswith(".weight") and not key.endswith("codebook.weight"):
            magnitude = tensor.float().flatten(1).norm(dim=1).view(-1, *[1] * (tensor.dim() - 1))
            result[f"{key}_g"], result[f"{key}_v"] = magnitude.to(tensor.dtype), tensor
        else:
            result[key] = tensor
    return result


def folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with every convolution's as one `weight`."""
    result = {
        key: tensor for key, tensor in state.items() if not key.endswith(("weight_g", "weight_v"))
    }
    for key, direction in state.items():
        if key.endswith("weight_v"):
            result[key[:-2]] = torch._weight_norm(direction, state[key[:-1] + "g"], 0)
    return result


def _read_safetensors(path: Path) -> tuple[Config, dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "dac_fast" not in metadata:
            raise CheckpointError(f"{path}: no configuration inside, and no config.json beside it")
        values = json.loads(metadata["dac_fast"])
        values.pop("name", None)
        return Config.from_dict(values), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _save_safetensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str]):
    from safetensors.torch import save as to_bytes

    # not `save_file`, whose files are private to the user, whatever the umask says
    write_bytes(path, to_bytes(state, metadata))


def _read_published(path: Path) -> tuple[Config, dict[str, Tensor]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    # whose message advises to switch the protection off
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: no checkpoint, or it holds more than tensors and plain values"
        ) from error
    try:
        state, kwargs = dict(content["state_dict"]), dict(content["metadata"]["kwargs"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: lacks state_dict or metadata.kwargs of a published checkpoint"
        ) from error
    return Config.from_dict(kwargs), state


def _read_hugging_face(path: Path) -> tuple[Config, dict[str, Tensor]]:
    from safetensors.torch import load_file

    theirs = json.loads((path / "config.json").read_text())
    if theirs.get("model_type") != "dac":
        raise CheckpointError(
            f"{path}: config.json is of a {theirs.get('model_type')!r} model; accepted: 'dac'"
        )
    config = Config(
        encoder_dim=theirs["encoder_hidden_size"],
        encoder_rates=theirs["downsampling_ratios"],
        latent_dim=theirs.get("hidden_size"),
        decoder_dim=theirs["decoder_hidden_size"],
        decoder_rates=theirs.get("upsampling_ratios", theirs["downsampling_ratios"][::-1]),
        n_codebooks=theirs["n_codebooks"],
        codebook_size=theirs["codebook_size"],
        codebook_dim=theirs["codebook_dim"],
        quantizer_dropout=theirs.get("quantizer_dropout", 0.0),
        sample_rate=theirs["sampling_rate"],
    )
    names = _hugging_face_names(config)
    state = load_file(path / HUGGING_FACE_FILE)
    return config, {
        _renamed(key, lambda module: names.get(module, module)): value
        for key, value in state.items()
    }


def _hugging_face_config(config: Config, path: Path) -> dict:
    _require_published(config, path)
    if config.latent_dim != config.encoder_dim * 2 ** len(config.encoder_rates):
        raise CheckpointError(
            f"{path}: latent_dim {config.latent_dim} has no place in Hugging Face's format"
        )
    if config.decoder_rates != config.encoder_rates[::-1] or not isinstance(
        config.codebook_dim, int
    ):
        raise CheckpointError(
            f"{path}: decoder_rates or codebook_dim have no place in Hugging Face's format"
        )
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


def _require_published(config: Config, path: Path):
    for name, value in (("activation", "snake"), ("quantizer", "factorized")):
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{path}: {name} {getattr(config, name)!r} fits a .safetensors checkpoint only"
            )


def _hugging_face_names(config: Config) -> dict[str, str]:
    """Hugging Face's name of every module outside the quantizer to the published one."""
    names = {}
    unit_parts = ("snake1", "conv1", "snake2", "conv2")
    for side, published, rates in (
        ("encoder", "encoder.block", config.encoder_rates),
        ("decoder", "decoder.model", config.decoder_rates),
    ):
        # an encoder block is three residual units, then activation and convolution; a decoder block begins with those
        units, ends = (
            (range(3), {"snake1": 3, "conv1": 4}) if side == "encoder" else (range(2, 5), None)
        )
        ends = ends or {"snake1": 0, "conv_t1": 1}
        names[f"{side}.conv1"] = f"{published}.0"
        for i in range(len(rates)):
            block = f"{published}.{i + 1}.block"
            names.update(
                {f"{side}.block.{i}.{part}": f"{block}.{index}" for part, index in ends.items()}
            )
            for number, unit in enumerate(units, start=1):
                for index, part in enumerate(unit_parts):
                    names[f"{side}.block.{i}.res_unit{number}.{part}"] = (
                        f"{block}.{unit}.block.{index}"
                    )
        names[f"{side}.snake1"] = f"{published}.{len(rates) + 1}"
        names[f"{side}.conv2"] = f"{published}.{len(rates) + 2}"
    return names


def _renamed(key: str, rename: Callable[[str], str]) -> str:
    """A tensor's key with its module renamed; the quantizer's modules have the same names everywhere."""
    if key.startswith("quantizer."):
        return key
    module, parameter = re.fullmatch(r"(.+?)\.((?:parametrizations\.weight\.)?\w+)", key).groups()
    return f"{rename(module)}.{parameter}"

"""Checkpoints: three formats read and written, none of which can run code.

- `.safetensors`: ours; the configuration is JSON in the file's metadata, under "dac_fast".
- `.pth`: the published package's, {"state_dict": ..., "metadata": {"kwargs": ...}} by `torch.save`.
- a folder: Hugging Face's `DacModel`, its names mapped to the published ones; the folders that
  training leaves, here or with the published package, are read too.

A weight may be stored normed (`weight_g`, `weight_v`), in the newer spelling of that
(`parametrizations.weight.original0`, `original1`), or folded (`weight`); the first is what `read`
returns.

What a file says is checked before time or memory goes into it: the configuration against limits,
the tensors against the file's size, and their shapes against a codec that has no memory yet.
"""

import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dac_fast.config import LATER_FIELDS, MOST_CODEBOOKS, Config
from dac_fast.files import write_bytes, write_folder
from dac_fast.storage import hugging_face, torch_archive
from dac_fast.storage.pickled import RefusedError

# As `MOST_CODEBOOKS`, far beyond any codec's.
MOST_RATES = 16
MOST_CHANNELS = 2**16
MOST_NUMBER = 2**20  # sample rate and hop length, too
MOST_CONFIG_BYTES = 2**20

# Of the tensors that are read; boolean is the state of a codebook of moving averages.
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool}

# What training leaves in a run's folder, and in those below it: the published package's, and ours.
PUBLISHED_WEIGHTS = ("weights.pth", "dac/weights.pth", "*/dac/weights.pth")
OUR_WEIGHTS = ("best.safetensors", "codec.safetensors")


# Of a tensor's key, whether to read the tensor.
Wanted = Callable[[str], bool]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is not the model it should be."""


class Codec(Protocol):
    """What is saved and restored of a `dac_fast.codec.DAC`."""

    config: Config
    name: str

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by their published names."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> object:
        """Takes the tensors' values; with `assign`, the tensors themselves."""


def everything(key: str) -> bool:
    """Wants every tensor."""
    return True


def read(
    path: str | os.PathLike[str], wanted: Wanted = everything
) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and state dict, under the published names, of a checkpoint file or folder.

    Args:
        path: of the checkpoint.
        wanted: says by its key whether a tensor is read.
    Raises:
        CheckpointError: it is missing, damaged, or no codec checkpoint.
    """
    path = Path(path)
    try:
        file = _weights_file(path)
        if file.name == hugging_face.WEIGHTS and _config_beside(file).exists():
            config, state = _read_hugging_face(file, wanted)
        elif file.suffix == ".safetensors":
            config, state = _read_safetensors(file, wanted)
        else:
            config, state = _read_published(file, wanted)
        return config, _finite(unfolded(_owned(state, file.stat().st_size)))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    # Parsers raise errors of many types on damaged input.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        shown = printable(reason[0])
        raise CheckpointError(f"{path}: not a readable checkpoint: {shown}") from error


def restore(codec: Codec, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load a state dict, as `read` returns it, into a codec.

    A codec on the meta device takes the tensors themselves, any other one their values.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape.
    """
    expected = codec.state_dict()
    for key in sorted(expected.keys() ^ state.keys()):
        wrong = "lacks" if key in expected else "has an unexpected"
        raise CheckpointError(f"{path}: {wrong} {printable(key)}")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{path}: {key} is {list(tensor.shape)}, expected {list(expected[key].shape)}"
            )
        if tensor.is_floating_point() != expected[key].is_floating_point():
            raise CheckpointError(f"{path}: {key} is {tensor.dtype}, not {expected[key].dtype}")
    codec.load_state_dict(state, assign=any(tensor.is_meta for tensor in expected.values()))


def save(codec: Codec, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint, whole or not at all.

    Its format follows from the path: .safetensors, .pth, or a folder (no suffix).

    Raises:
        CheckpointError: another suffix, or a configuration that the format cannot hold.
        OutputError: the path cannot be written.
    """
    path = Path(path)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in codec.state_dict().items()}
    try:
        if path.suffix == ".safetensors":
            values = {"name": codec.name, **codec.config.to_dict()}
            write_bytes(path, _safetensors(state, {"dac_fast": json.dumps(values)}))
        elif path.suffix == ".pth":
            write_bytes(path, _published(state, codec.config))
        elif path.suffix == "":
            write_folder(path, _hugging_face(state, codec.config))
        else:
            accepted = ".safetensors, .pth, a folder (no suffix)"
            raise CheckpointError(f"unknown checkpoint format; accepted: {accepted}")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def unfolded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with every convolution's as `weight_g` and `weight_v`."""
    spellings = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for theirs, ours in spellings.items():
            key = key.replace(theirs, ours)
        parts = {key: tensor}
        if key.endswith(".weight") and not key.endswith("codebook.weight"):
            magnitude = _row_norms(tensor)
            # A row of zeros has no direction; with magnitude 0, any other will do.
            direction = tensor.masked_fill(magnitude == 0, 1)
            parts = {f"{key}_g": magnitude.to(tensor.dtype), f"{key}_v": direction}
        if result.keys() & parts.keys():
            raise CheckpointError(f"{printable(key)} is stored twice")
        result |= parts
    return result


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with every convolution's as one `weight`."""
    result = {
        key: tensor for key, tensor in state.items() if not key.endswith(("weight_g", "weight_v"))
    }
    for key, direction in state.items():
        if key.endswith("weight_v"):
            result[key[:-2]] = torch._weight_norm(direction, state[key[:-1] + "g"], 0)
    return result


def _row_norms(weight: Tensor) -> Tensor:
    """The norm of each row, an index of the first axis, in the shape of `weight_g`."""
    norms: Tensor = weight.float().reshape(len(weight), -1).norm(dim=1)
    return norms.view(-1, *[1] * (weight.dim() - 1))


def printable(text: str) -> str:
    """A file's own words for a message of one line: without control characters, and not long."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:200])[:200]


def _weights_file(path: Path) -> Path:
    """The file that holds the tensors of a checkpoint."""
    if not path.exists():
        raise CheckpointError("no such checkpoint")
    if path.is_dir() and _config_beside(path / hugging_face.WEIGHTS).exists():
        path /= hugging_face.WEIGHTS
    elif path.is_dir():
        patterns = (*PUBLISHED_WEIGHTS, *OUR_WEIGHTS)
        found = sorted(file for pattern in patterns for file in path.glob(pattern))
        if not found:
            accepted = (
                f"{hugging_face.CONFIG} (Hugging Face), weights.pth (published package) or "
                f"{OUR_WEIGHTS[0]} (a training run)"
            )
            raise CheckpointError(f"not a checkpoint: a folder without {accepted}")
        if len(found) > 1:
            names = ", ".join(str(file.relative_to(path)) for file in found)
            raise CheckpointError(f"a folder of {len(found)} checkpoints; accepted: {names}")
        path = found[0]
    elif re.fullmatch(r"step_\d+\.pt", path.name):
        accepted = f"{' or '.join(OUR_WEIGHTS)} beside it"
        state = "not a checkpoint but the state of a training run"
        raise CheckpointError(f"{state}; accepted: {accepted}")
    if not path.is_file():
        raise CheckpointError(f"not a checkpoint: {path.name} is missing or not a regular file")
    return path


def _config_beside(file: Path) -> Path:
    return file.with_name(hugging_face.CONFIG)


def _config(values: object) -> Config:
    """The configuration of these values, if a codec can be described with it at little cost."""
    if not isinstance(values, dict):
        raise CheckpointError(f"its configuration is a {type(values).__name__}")
    for name, value in values.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        # Python's True is a 1; the published package says False for a dropout of 0.
        if name != "quantizer_dropout" and any(isinstance(number, bool) for number in numbers):
            raise CheckpointError(f"{name} is {value!r:.80}; accepted: numbers")
        big = any(isinstance(number, int) and abs(number) > MOST_NUMBER for number in numbers)
        if big or len(numbers) > MOST_CODEBOOKS:
            accepted = f"numbers up to {MOST_NUMBER}, and up to {MOST_CODEBOOKS} of them"
            raise CheckpointError(f"{name} is {value!r:.80}; accepted: {accepted}")
    config = Config.from_dict(values)
    rates = max(len(config.encoder_rates), len(config.decoder_rates))
    latent = config.latent_dim or 0
    widest = max(config.encoder_dim << rates, config.decoder_dim, latent, *config.codebook_dims)
    for what, found, most in (
        ("the number of rates", rates, MOST_RATES),
        ("the number of channels", widest, MOST_CHANNELS),
        ("hop_length", config.hop_length, MOST_NUMBER),
    ):
        if found > most:
            raise CheckpointError(f"{what} is {found}; accepted: up to {most}")
    return config


def _owned(state: Mapping[str, object], size: int) -> dict[str, Tensor]:
    """The tensors as float32 in memory of their own, if a file of that many bytes can hold them."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        shown = printable(key)
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{shown} is a {type(tensor).__name__}; accepted: a tensor")
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{shown} is of {tensor.dtype}; accepted: floats")
        if tensor.dtype != torch.bool and (tensor.dim() == 0 or tensor.numel() == 0):
            raise CheckpointError(f"{shown} is of shape {list(tensor.shape)}; accepted: none of 0")
        tensors[key] = tensor
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > size:
        raise CheckpointError(f"its tensors claim {claimed} bytes of the file's {size}")
    for key, tensor in tensors.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        tensors[key] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return tensors


def _finite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict, if its weights can be computed with."""
    for key, tensor in state.items():
        numbers = _row_norms(tensor) if key.endswith("weight_v") else tensor
        if not numbers.isfinite().all():
            raise CheckpointError(f"{printable(key)} holds a value that is not finite")
        if key.endswith("weight_v") and not numbers.all():
            raise CheckpointError(f"{printable(key)} has a row of zeros, which has no direction")
    return state


def _read_safetensors(file: Path, wanted: Wanted) -> tuple[Config, Mapping[str, object]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        metadata = content.metadata() or {}
        if "dac_fast" not in metadata:
            beside = f"no {hugging_face.CONFIG} beside it"
            raise CheckpointError(f"no configuration inside, and {beside}")
        values = json.loads(metadata["dac_fast"])
        if isinstance(values, dict):
            values.pop("name", None)
        keys = filter(wanted, content.keys())
        return _config(values), {key: content.get_tensor(key) for key in keys}


def _read_hugging_face(file: Path, wanted: Wanted) -> tuple[Config, Mapping[str, object]]:
    from safetensors import safe_open

    beside = _config_beside(file)
    if not beside.is_file() or beside.stat().st_size > MOST_CONFIG_BYTES:
        accepted = f"a regular file of up to {MOST_CONFIG_BYTES} bytes"
        raise CheckpointError(f"{beside.name} is not {accepted}")
    config = _config(hugging_face.values_of(json.loads(beside.read_text(encoding="utf-8"))))
    with safe_open(file, framework="pt") as content:
        keys = content.keys()
        names = hugging_face.published(dict(zip(keys, keys, strict=True)), config)
        return config, {
            ours: content.get_tensor(key) for ours, key in names.items() if wanted(ours)
        }


def _read_published(file: Path, wanted: Wanted) -> tuple[Config, Mapping[str, object]]:
    try:
        content = torch_archive.load(file, wanted)
    except zipfile.BadZipFile as error:
        reason = f"{printable(str(error))}; accepted: .safetensors, or what torch.save writes"
        raise CheckpointError(f"not a checkpoint, or a damaged one: {reason}") from error
    except RefusedError as error:
        refused = "it holds more than tensors and plain values"
        reason = f"{refused} ({printable(str(error))})"
        raise CheckpointError(f"not a readable checkpoint: {reason}") from error
    match content:
        case {"state_dict": dict(state), "metadata": {"kwargs": kwargs}}:
            return _config(kwargs), state
    raise CheckpointError("lacks state_dict or metadata.kwargs of a published checkpoint")


def _safetensors(state: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save as to_bytes

    # Not `save_file`, whose files are private to the user, whatever the umask says.
    data: bytes = to_bytes(state, metadata)
    return data


def _published(state: dict[str, Tensor], config: Config) -> bytes:
    """A .pth checkpoint as the published package writes it."""
    _require_published(config)
    kwargs = config.to_dict()
    del kwargs["activation"]
    buffer = io.BytesIO()
    torch.save({"state_dict": unfolded(state), "metadata": {"kwargs": kwargs}}, buffer)
    return buffer.getvalue()


def _hugging_face(state: dict[str, Tensor], config: Config) -> dict[str, bytes]:
    """The files of a Hugging Face folder, by their names."""
    _require_published(config)
    texts = {
        hugging_face.CONFIG: hugging_face.config_of(config),
        hugging_face.PREPROCESSOR: hugging_face.preprocessor_of(config),
    }
    weights = hugging_face.theirs(folded(state), config)
    return {
        hugging_face.WEIGHTS: _safetensors(weights, {"format": "pt"}),
        **{name: f"{json.dumps(values, indent=2)}\n".encode() for name, values in texts.items()},
    }


def _require_published(config: Config) -> None:
    for name, value in {"activation": "snake", **LATER_FIELDS}.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} {getattr(config, name)!r} fits a .safetensors checkpoint only"
            )

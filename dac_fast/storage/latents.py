"""`.latents` files: a recording's latents of a continuous codec, and what gives the audio back.

They are .safetensors files, which other libraries read too: the tensors "latents" and "gains", and
under "latents" in the metadata, as JSON, the other attributes of `LatentFile`.
"""

import json
import os
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dac_fast.files import write_bytes

KEY = "latents"
MOST_NUMBER = 2**48


class LatentFileError(ValueError):
    """A file of latents that cannot be read, or values that are none; one line that says why."""


@dataclass(frozen=True, eq=False)
class LatentFile:
    """The latents of a recording and what belongs to them; checked when it is made.

    Attributes:
        latents: means, float32 [I, D, F]: items, channels of the latent, frames. An item is a
            channel of the recording, or two of a stereo codec's.
        gains: float32 [C], what each channel was multiplied by before encoding.
        original_length: samples per channel of the recording, at `sample_rate`.
        sample_rate: of the recording, Hz.
        model_sample_rate: of the codec, Hz.
        hop_length: of the codec, samples per frame.
        model: the codec's name, "" where it has none.

    Raises:
        LatentFileError: a value of another type, shape or range.
    """

    latents: Tensor
    gains: Tensor
    original_length: int
    sample_rate: int
    model_sample_rate: int
    hop_length: int
    model: str = ""

    def __post_init__(self) -> None:
        for name, axes in (("latents", 3), ("gains", 1)):
            tensor = getattr(self, name)
            fits = isinstance(tensor, Tensor) and tensor.dim() == axes and tensor.numel() > 0
            if not fits or tensor.dtype != torch.float32 or not tensor.isfinite().all():
                found = f"{list(tensor.shape)} {tensor.dtype}" if fits else type(tensor).__name__
                raise LatentFileError(
                    f"{name} are {found}; accepted: finite float32 of {axes} axes, none of them 0"
                )
        if not (self.gains > 0).all():
            raise LatentFileError(f"gains are {self.gains.tolist()!s:.80}; accepted: positive ones")
        for name in ("original_length", "sample_rate", "model_sample_rate", "hop_length"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MOST_NUMBER:
                raise LatentFileError(f"{name} is {value!r:.80}; accepted: 1 to {MOST_NUMBER}")
        longest = -(-(self.latents.shape[2] + 1) * self.hop_length * self.sample_rate)
        longest = longest // self.model_sample_rate + 1
        if self.original_length > longest:
            raise LatentFileError(
                f"original_length is {self.original_length}; accepted: up to {longest}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, complete or not at all.

        Raises:
            OutputError: it cannot be written there.
        """
        from safetensors.torch import save as to_bytes

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: values.pop(name).contiguous() for name in ("latents", "gains")}
        write_bytes(path, to_bytes(tensors, {KEY: json.dumps(values)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatentFile":
        """Reads a file.

        Raises:
            LatentFileError: no such file, no file of latents, or damaged.
        """
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as content:
                values = json.loads(content.metadata()[KEY])
                tensors = {name: content.get_tensor(name) for name in ("latents", "gains")}
            return cls(**tensors, **values)
        # Parsers raise errors of many types on damaged input.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise LatentFileError(f"{path}: no file of latents: {reason:.200}") from error

"""Half a codec: the encoder or the decoder, with the quantizer, which both of them need."""

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

from dac_fast.model.autoencoder import Decoder, Encoder
from dac_fast.model.interface import Codec
from dac_fast.model.layers import Layer, Length

Direction: TypeAlias = Literal["encode", "decode"]

# By direction, the part that it needs; the halves of a codec are named after the parts.
DIRECTIONS: dict[Direction, str] = {"encode": "encoder", "decode": "decoder"}
PARTS = tuple(DIRECTIONS.values())


class MissingPartError(ValueError):
    """A part is needed that was not loaded."""


class Absent(Layer):
    """The place of the part that was not loaded: it knows its sizes, and refuses to run.

    Args:
        parts: the half that was loaded.
        name: of the part.
        sizes: the part itself, on the meta device.
    """

    sizes: Encoder | Decoder

    def __init__(self, parts: str, name: str, sizes: Encoder | Decoder) -> None:
        super().__init__()
        self.parts, self.name = parts, name
        # No submodule, since its tensors are none of the codec's.
        object.__setattr__(self, "sizes", sizes)

    def output_length(self, length: Length, padded: bool = True) -> Length:  # noqa: D102
        return self.sizes.output_length(length, padded)

    def forward(self, x: Tensor, lengths: Tensor | None = None, padded: bool = True) -> Tensor:
        """Raises MissingPartError."""
        raise self.missing()

    def missing(self) -> MissingPartError:
        """The error of a caller who needs the part."""
        return MissingPartError(
            f"this needs the {self.name}, which was not loaded (parts={self.parts!r}); "
            f"accepted: parts={self.name!r}, or None for both"
        )


def check_parts(parts: str | None) -> None:
    """Raises ValueError where `parts` is neither a half nor None."""
    if parts not in (None, *PARTS):
        raise ValueError(f"parts is {parts!r}; accepted: 'encoder', 'decoder', or None for both")


def directions_of(codec: Codec) -> list[Direction]:
    """The directions that the loaded parts of a codec serve."""
    return [name for name, part in DIRECTIONS.items() if codec.parts in (None, part)]


def key_filter(parts: str | None) -> Callable[[str], bool]:
    """A function that says whether the tensor of that key belongs to the half."""
    others = tuple(f"{part}." for part in PARTS if parts not in (None, part))
    return lambda key: not key.startswith(others)


def keep_half(codec: Codec, parts: str | None) -> None:
    """Leaves the half of a codec on the meta device; None: all of it."""
    codec.parts = parts
    for name in PARTS:
        if parts not in (None, name):
            setattr(codec, name, Absent(parts, name, getattr(codec, name)))


def require(codec: Codec, *names: str) -> None:
    """Raises MissingPartError where one of these parts of the codec was not loaded."""
    for name in names:
        part = getattr(codec, name)
        if isinstance(part, Absent):
            raise part.missing()

"""What the rooms below `dac_fast.codec` use of a codec, so that none of them imports it."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from dac_fast.config import Config
from dac_fast.model.autoencoder import Decoder, Encoder
from dac_fast.model.bottleneck import Bottleneck, Latents
from dac_fast.model.quantize import Encoded


class Codec(Protocol):
    """The face of `dac_fast.codec.DAC`, which documents each of these."""

    config: Config
    sample_rate: int
    hop_length: int
    name: str
    parts: str | None
    encoder: Encoder
    quantizer: Bottleneck
    decoder: Decoder

    def encode(  # noqa: D102
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        n_quantizers: int | None = None,
        padded: bool = True,
    ) -> Encoded: ...

    def encode_latents(  # noqa: D102
        self, audio: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Latents: ...

    def decode(  # noqa: D102
        self, z: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor: ...

    def decode_codes(  # noqa: D102
        self, codes: Tensor, lengths: Tensor | None = None, padded: bool = True
    ) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102

    def eval(self) -> object: ...  # noqa: D102

    def fold_weight_norm(self) -> object: ...  # noqa: D102

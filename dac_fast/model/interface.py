"""What the rooms below `dac_fast.codec` use of a codec, so that none of them imports it."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from dac_fast.config import Config
from dac_fast.model.autoencoder import Decoder, Encoder
from dac_fast.model.quantize import Encoded, ResidualVectorQuantizer


class Codec(Protocol):
    """The face of `dac_fast.codec.DAC`, which documents each of these."""

    config: Config
    sample_rate: int
    hop_length: int
    name: str
    encoder: Encoder
    quantizer: ResidualVectorQuantizer
    decoder: Decoder

    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102

    def encode(  # noqa: D102
        self, audio: Tensor, lengths: Tensor | None = None, n_quantizers: int | None = None
    ) -> Encoded: ...

    def decode_codes(  # noqa: D102
        self, codes: Tensor, lengths: Tensor | None = None
    ) -> Tensor: ...

    def run_encoder(self, x: Tensor, padded: bool = True) -> Tensor: ...  # noqa: D102

    def run_decoder(self, z: Tensor, padded: bool = True) -> Tensor: ...  # noqa: D102

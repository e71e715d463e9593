"""What the rooms below `dac_fast.codec` use of a codec, so that none of them imports it."""

from typing import Protocol

from dac_fast.config import Config
from dac_fast.model.autoencoder import Decoder, Encoder
from dac_fast.model.quantize import ResidualVectorQuantizer


class Codec(Protocol):
    """The face of `dac_fast.codec.DAC`, which documents each of these."""

    config: Config
    sample_rate: int
    hop_length: int
    name: str
    encoder: Encoder
    quantizer: ResidualVectorQuantizer
    decoder: Decoder

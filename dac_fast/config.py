"""What defines a codec: its configuration, and the published presets."""

import math
from dataclasses import asdict, dataclass, fields

ACTIVATIONS = ("snake", "leaky_relu")
QUANTIZERS = ("factorized", "unnormalized", "unprojected", "ema")


@dataclass(frozen=True)
class Config:
    """Constructor arguments of `DAC`, under their published names.

    Attributes:
        encoder_dim: channels of the first encoder block; each block doubles them.
        encoder_rates: downsampling factor (stride) of each encoder block.
        latent_dim: channels of the latent; None: encoder_dim * 2 ** len(encoder_rates).
        decoder_dim: channels of the first decoder block; each block halves them.
        decoder_rates: upsampling factor of each decoder block.
        n_codebooks: stages of the residual quantizer.
        codebook_size: entries per codebook.
        codebook_dim: dimensions of an entry, one number or one per codebook.
        quantizer_dropout: share of a training batch that keeps a random number of codebooks only.
        sample_rate: in Hz.
        activation: "snake", or "leaky_relu" (the paper's ablation).
        quantizer: "factorized", or one of the forms that it is compared with (paper, section 4.4): "unnormalized"
            searches by plain distance; "unprojected" and "ema" have codebooks of latent_dim dimensions, whatever
            codebook_dim says, and those of "ema" are moving averages of what was assigned to them.
    """

    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    latent_dim: int | None = None
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    n_codebooks: int = 9
    codebook_size: int = 1024
    codebook_dim: int | tuple[int, ...] = 8
    quantizer_dropout: float = 0.0
    sample_rate: int = 44100
    activation: str = "snake"
    quantizer: str = "factorized"

    def __post_init__(self):
        def fill(name, value):
            object.__setattr__(self, name, value)

        fill("encoder_rates", tuple(self.encoder_rates))
        fill("decoder_rates", tuple(self.decoder_rates))
        fill("quantizer_dropout", float(self.quantizer_dropout))
        if self.latent_dim is None:
            fill("latent_dim", self.encoder_dim * 2 ** len(self.encoder_rates))
        if not isinstance(self.codebook_dim, int):
            fill("codebook_dim", tuple(self.codebook_dim))

        for name in (
            "encoder_dim",
            "latent_dim",
            "decoder_dim",
            "n_codebooks",
            "codebook_size",
            "sample_rate",
        ):
            _require(
                isinstance(getattr(self, name), int) and getattr(self, name) > 0,
                name,
                self,
                "a positive integer",
            )
        for name in ("encoder_rates", "decoder_rates", "codebook_dims"):
            values = getattr(self, name)
            _require(
                values and all(isinstance(v, int) and v > 0 for v in values),
                name,
                self,
                "positive integers",
            )
        _require(self.codebook_size <= 65536, "codebook_size", self, "at most 65536")
        _require(
            self.decoder_dim % 2 ** len(self.decoder_rates) == 0,
            "decoder_dim",
            self,
            "halved once per rate",
        )
        _require(
            math.prod(self.encoder_rates) == math.prod(self.decoder_rates),
            "decoder_rates", self, f"the same product as encoder_rates {self.encoder_rates}",
        )  # fmt: skip
        _require(
            len(self.codebook_dims) == self.n_codebooks,
            "codebook_dim",
            self,
            "one number, or one per codebook",
        )
        _require(0 <= self.quantizer_dropout <= 1, "quantizer_dropout", self, "between 0 and 1")
        _require(self.activation in ACTIVATIONS, "activation", self, " or ".join(ACTIVATIONS))
        _require(self.quantizer in QUANTIZERS, "quantizer", self, ", ".join(QUANTIZERS))

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.encoder_rates)

    @property
    def codebook_dims(self) -> tuple[int, ...]:
        """Dimensions of each codebook's entries."""
        dim = (
            self.codebook_dim
            if self.quantizer in ("factorized", "unnormalized")
            else self.latent_dim
        )
        return (dim,) * self.n_codebooks if isinstance(dim, int) else dim

    @property
    def bitrate(self) -> float:
        """Bits per second and channel with all codebooks, at whole bits per code."""
        return (
            self.sample_rate
            / self.hop_length
            * self.n_codebooks
            * math.ceil(math.log2(self.codebook_size))
        )

    def to_dict(self) -> dict:
        """Plain values, as JSON has them; without the quantizer's form where that is the published one."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        # The published package, and files from before this field, do not know it.
        if self.quantizer == "factorized":
            del values["quantizer"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key or value that is none of a configuration's.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"unknown configuration key {key!r}; accepted: {', '.join(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a codec configuration: {error}") from error


def _require(holds: bool, name: str, config: Config, accepted: str):
    if not holds:
        raise ValueError(f"{name} is {getattr(config, name)!r}; accepted: {accepted}")


PRESETS = {
    "44khz": Config(quantizer_dropout=0.5),
    "44khz_16kbps": Config(latent_dim=128, n_codebooks=18, quantizer_dropout=0.5),
    "24khz": Config(
        encoder_rates=(2, 4, 5, 8),
        decoder_rates=(8, 5, 4, 2),
        n_codebooks=32,
        quantizer_dropout=0.5,
        sample_rate=24000,
    ),
    "16khz": Config(
        encoder_rates=(2, 4, 5, 8),
        decoder_rates=(8, 5, 4, 2),
        n_codebooks=12,
        quantizer_dropout=0.5,
        sample_rate=16000,
    ),
    "tiny": Config(encoder_dim=16, decoder_dim=192, quantizer_dropout=0.5),
}


def codebook_count(wanted: int | None, available: int) -> int:
    """How many codebooks to use: the first that many of those that are available; None: all.

    Raises:
        ValueError: there are not so many, or fewer than one are wanted.
    """
    if wanted is None:
        return available
    if not 1 <= wanted <= available:
        raise ValueError(f"{wanted} codebooks; accepted: 1 to {available}")
    return wanted

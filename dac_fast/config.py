"""The configuration of a codec, and the published presets."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ACTIVATIONS = ("snake", "leaky_relu")
BOTTLENECKS = ("rvq", "vae")
QUANTIZERS = ("factorized", "unnormalized", "unprojected", "ema")


# That do not matter to a continuous codec.
QUANTIZER_FIELDS = (
    "n_codebooks",
    "codebook_size",
    "codebook_dim",
    "quantizer_dropout",
    "quantizer",
)
# What the published package does not know, and the value that stands for what it does.
LATER_FIELDS = {"quantizer": "factorized", "channels": 1, "bottleneck": "rvq"}

# Far beyond any codec's, and still quickly built on the meta device.
MOST_CODEBOOKS = 1024


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
        quantizer: "factorized", or one of the forms that the paper compares it with (section 4.4):
            "unnormalized" searches by plain distance; "unprojected" and "ema" have codebooks of
            latent_dim dimensions, whatever codebook_dim says; entries of "ema" are moving averages
            of the latents assigned to them.
        channels: of the audio: 1, or 2, which are then encoded together (stereo).
        bottleneck: "rvq", a residual vector quantizer; or "vae", continuous latents of latent_dim
            channels, to which the fields of codebooks and quantizer do not matter.
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
    channels: int = 1
    bottleneck: str = "rvq"

    def __post_init__(self) -> None:
        def fill(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        fill("encoder_rates", tuple(self.encoder_rates))
        fill("decoder_rates", tuple(self.decoder_rates))
        fill("quantizer_dropout", float(self.quantizer_dropout))
        if self.latent_dim is None:
            fill("latent_dim", self.encoder_dim * 2 ** len(self.encoder_rates))
        if not isinstance(self.codebook_dim, int):
            fill("codebook_dim", tuple(self.codebook_dim))
        self._check()

    def _check(self) -> None:
        """Raises ValueError where a value is out of range."""

        def require(name: str, holds: bool, accepted: str) -> None:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}; accepted: {accepted}")

        sizes = ("encoder_dim", "latent_dim", "decoder_dim", "n_codebooks", "codebook_size")
        for name in (*sizes, "sample_rate"):
            require(name, _positive(getattr(self, name)), "a positive integer")
        require("n_codebooks", self.n_codebooks <= MOST_CODEBOOKS, f"up to {MOST_CODEBOOKS}")
        for name in ("encoder_rates", "decoder_rates", "codebook_dims"):
            values = getattr(self, name)
            require(name, bool(values) and all(map(_positive, values)), "positive integers")
        require("codebook_size", self.codebook_size <= 65536, "at most 65536")
        halvings = 2 ** len(self.decoder_rates)
        require("decoder_dim", self.decoder_dim % halvings == 0, "halved once per rate")
        same_product = f"the same product as encoder_rates {self.encoder_rates}"
        require("decoder_rates", self.hop_length == math.prod(self.decoder_rates), same_product)
        per_codebook = len(self.codebook_dims) == self.n_codebooks
        require("codebook_dim", per_codebook, "one number, or one per codebook")
        require("quantizer_dropout", 0 <= self.quantizer_dropout <= 1, "between 0 and 1")
        require("bottleneck", self.bottleneck in BOTTLENECKS, " or ".join(BOTTLENECKS))
        require("channels", self.channels in (1, 2), "1 or 2")
        require("activation", self.activation in ACTIVATIONS, " or ".join(ACTIVATIONS))
        require("quantizer", self.quantizer in QUANTIZERS, ", ".join(QUANTIZERS))

    @property
    def continuous(self) -> bool:
        """Whether the codec has continuous latents in place of codes."""
        return self.bottleneck == "vae"

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.encoder_rates)

    @property
    def codebook_dims(self) -> tuple[int, ...]:
        """Dimensions of each codebook's entries."""
        projected = self.quantizer in ("factorized", "unnormalized")
        dim = self.codebook_dim if projected else self.latent_dim
        assert dim is not None
        return dim if isinstance(dim, tuple) else (dim,) * self.n_codebooks

    @property
    def bitrate(self) -> float:
        """Bits per second with all codebooks, at whole bits per code; of each channel if mono."""
        bits_per_frame = self.n_codebooks * math.ceil(math.log2(self.codebook_size))
        return self.sample_rate / self.hop_length * bits_per_frame

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them; without the later fields where they are as published.

        The published package, and files from before these fields, do not know them.
        """
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        for name, published in LATER_FIELDS.items():
            if values[name] == published:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key or value is not one of a configuration's.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                accepted = ", ".join(known)
                raise ValueError(f"unknown configuration key {key!r:.80}; accepted: {accepted}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a codec configuration: {error}") from error


def _positive(value: object) -> bool:
    return isinstance(value, int) and value > 0


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

# Nobody has published weights of these: the recipes of their names train some.
UNTRAINED = {
    "48khz": Config(
        encoder_rates=(2, 4, 10, 12),
        decoder_rates=(12, 10, 4, 2),
        n_codebooks=16,
        quantizer_dropout=0.5,
        sample_rate=48000,
    ),
    "24khz_12hz": Config(
        encoder_rates=(4, 6, 8, 10),
        decoder_rates=(10, 8, 6, 4),
        n_codebooks=32,
        quantizer_dropout=0.5,
        sample_rate=24000,
    ),
    "44khz_stereo": Config(n_codebooks=12, quantizer_dropout=0.5, channels=2),
    "44khz_stereo_vae": Config(
        encoder_rates=(2, 4, 4, 8, 8),
        latent_dim=64,
        decoder_dim=2048,
        decoder_rates=(8, 8, 4, 4, 2),
        channels=2,
        bottleneck="vae",
    ),
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

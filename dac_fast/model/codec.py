"""The codec: encoder, quantizer and decoder in one module, with the published state-dict keys."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast import checkpoint
from dac_fast.config import Config
from dac_fast.model import recordings
from dac_fast.model.autoencoder import Decoder, Encoder
from dac_fast.model.layers import WeightNorm, zero_past
from dac_fast.model.quantize import ResidualVectorQuantizer


class Encoded(NamedTuple):
    """What `DAC.encode` returns, for B items, N codebooks, D latent channels and F frames.

    Attributes:
        z: quantised latent [B, D, F].
        codes: int64 [B, N, F].
        latents: projections before quantisation [B, sum of codebook dims, F].
        commitment_loss, codebook_loss: scalars.
        lengths: int64 [B], frames of each item; past them z, codes and latents are zero.
    """

    z: Tensor
    codes: Tensor
    latents: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    lengths: Tensor


class DAC(nn.Module):
    """Descript Audio Codec. Arguments: those of `dac_fast.config.Config`, under their published names.

    Attributes:
        config: the `Config`.
        sample_rate: in Hz.
        hop_length: samples per latent frame.
        name: preset name where the weights came by one ("44khz"), else "".
    """

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.config = c = Config(*args, **kwargs)
        self.sample_rate, self.hop_length, self.name = c.sample_rate, c.hop_length, ""
        self.encoder = Encoder(c.encoder_dim, c.encoder_rates, c.latent_dim, c.activation)
        self.quantizer = ResidualVectorQuantizer(
            c.latent_dim, c.codebook_size, c.codebook_dims, c.quantizer_dropout, c.quantizer
        )
        self.decoder = Decoder(c.latent_dim, c.decoder_dim, c.decoder_rates, c.activation)

    def encode(self, audio: Tensor, lengths: Tensor | None = None, n_quantizers: int | None = None) -> Encoded:
        """Audio to codes. Each item gets what it would get alone, without the padding after its length.

        Args:
            audio: [B, 1, T] in [-1, 1] at `sample_rate`; zero-padded here to a multiple of `hop_length`.
            lengths: samples of each item, B integers; None: T for all.
            n_quantizers: use the first that many codebooks; None: all.
        Raises:
            ValueError: the shape, a length or n_quantizers is out of range.
        """
        _check_shape("audio", audio, channels=1)
        samples = audio.shape[-1]
        audio = F.pad(audio, (0, -samples % self.hop_length))
        if lengths is None:
            z, frames = self.encoder(audio), None
        else:
            lengths = _checked_lengths(lengths, audio.shape[0], samples, audio.device)
            frames = -(-lengths // self.hop_length)
            z = self.encoder(zero_past(audio, lengths), frames * self.hop_length)
        outputs = self.quantizer(z, n_quantizers, frames)
        if frames is None:
            frames = torch.full((z.shape[0],), z.shape[-1], device=z.device)
        return Encoded(*outputs, frames)

    def decode(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Quantised latent [B, D, F] to audio [B, 1, F hop_length].

        Where a stride is odd, the published decoder stops a few samples short of the last frame's end (8 at 24 and
        16 kHz); those samples are zeros here, all before them are as published.

        Args:
            z: the latent.
            lengths: frames of each item, B integers; an item's audio is zero past its last frame.
        Raises:
            ValueError: the shape or a length is out of range.
        """
        _check_shape("latent", z, channels=self.config.latent_dim)
        if lengths is not None:
            lengths = _checked_lengths(lengths, z.shape[0], z.shape[-1], z.device)
            z = zero_past(z, lengths)
        audio = self.decoder(z, lengths)
        return F.pad(audio, (0, z.shape[-1] * self.hop_length - audio.shape[-1]))

    def decode_codes(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes [B, N, F] of the first N codebooks to audio [B, 1, F hop_length], see `decode`.

        Raises:
            ValueError: the shape, a code or a length is out of range.
        """
        _check_shape("codes", codes)
        low, high = (int(v) for v in codes.aminmax())
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(f"code {low if low < 0 else high}; accepted: 0 to {self.config.codebook_size - 1}")
        return self.decode(self.quantizer.from_codes(codes)[0], lengths)

    def forward(self, audio: Tensor, n_quantizers: int | None = None) -> dict[str, Tensor]:
        """Audio [B, 1, T] through the whole codec.

        Returns:
            "audio" [B, 1, T], "z", "codes", "latents", "vq/commitment_loss", "vq/codebook_loss" (see `Encoded`).
        """
        encoded = self.encode(audio, n_quantizers=n_quantizers)
        return {
            "audio": self.decode(encoded.z)[..., : audio.shape[-1]],
            "z": encoded.z,
            "codes": encoded.codes,
            "latents": encoded.latents,
            "vq/commitment_loss": encoded.commitment_loss,
            "vq/codebook_loss": encoded.codebook_loss,
        }

    def fold_weight_norm(self) -> "DAC":
        """Store every weight as one tensor, for inference: quicker, and not for training. Returns self."""
        for module in self.modules():
            if isinstance(module, WeightNorm):
                module.fold()
        return self

    def compress(self, source, chunk_seconds=None, n_quantizers=None, normalize_db=-16.0, padding=True):
        """A recording to a `DACFile`, in constant memory; see `dac_fast.model.recordings.compress`."""
        return recordings.compress(self, source, chunk_seconds, n_quantizers, normalize_db, padding)

    def decompress(self, file):
        """A `DACFile` or its path to (float32 array [C, T], rate); see `dac_fast.model.recordings.decompress`."""
        return recordings.decompress(self, file)

    def save(self, path):
        """Write a checkpoint, see `dac_fast.checkpoint.save`."""
        checkpoint.save(self, path)

    @classmethod
    def load(cls, path) -> "DAC":
        """Read a checkpoint in any of the formats of `dac_fast.checkpoint.read`; in eval mode.

        Raises:
            CheckpointError: it is no codec checkpoint, or damaged.
        """
        config, state = checkpoint.read(path)
        codec = cls(**config.to_dict())
        checkpoint.restore(codec, state, path)
        return codec.eval()


def _check_shape(name: str, x: Tensor, channels: int | None = None):
    expected = ("B", "N" if channels is None else channels, "T")
    fits = x.dim() == 3 and min(x.shape) > 0 and channels in (None, x.shape[1])
    if not fits:
        raise ValueError(
            f"{name} of shape {list(x.shape)}; accepted: [{', '.join(map(str, expected))}], none of them 0"
        )


def _checked_lengths(lengths, items: int, longest: int, device) -> Tensor:
    lengths = torch.as_tensor(lengths, dtype=torch.int64, device=device)
    if lengths.shape != (items,) or int(lengths.min()) < 1 or int(lengths.max()) > longest:
        raise ValueError(f"lengths are {lengths.tolist()}; accepted: {items} numbers from 1 to {longest}")
    return lengths

"""The residual vector quantizer with factorised, L2-normalised codes (paper, section 3.2).

`ops.rvq_encode` runs that form. The other forms of `Config.quantizer`, which the paper compares it with, run stage by
stage in plain PyTorch, each from the stage's own `search`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast import ops
from dac_fast.config import codebook_count
from dac_fast.model.ema_codebook import EMACodebook, nearest_row
from dac_fast.model.layers import Conv1d
from dac_fast.ops.reference import nearest_code, valid_mask


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


class VectorQuantizer(nn.Module):
    """One stage: projections to and from the codebook's few dimensions (not in every form), and the codebook."""

    def __init__(
        self, latent_dim: int, codebook_size: int, codebook_dim: int, form: str = "factorized"
    ):
        super().__init__()
        projected = form in ("factorized", "unnormalized")
        self.normalized = form in ("factorized", "unprojected")
        self.in_proj = (
            Conv1d(latent_dim, codebook_dim, kernel_size=1) if projected else nn.Identity()
        )
        self.out_proj = (
            Conv1d(codebook_dim, latent_dim, kernel_size=1) if projected else nn.Identity()
        )
        self.codebook = (EMACodebook if form == "ema" else nn.Embedding)(
            codebook_size, codebook_dim
        )

    def search(self, latent: Tensor) -> Tensor:
        """Index of the entry that each position of latent [B, d, F] is nearest to: int64 [B, F]."""
        if self.normalized:
            return nearest_code(latent, self.codebook.weight)
        rows = latent.transpose(1, 2).flatten(0, 1)
        return nearest_row(rows, self.codebook.weight).view(latent.shape[0], latent.shape[2])


class ResidualVectorQuantizer(nn.Module):
    """Stages that each quantise what the ones before left over.

    Args:
        latent_dim: channels D of the latent.
        codebook_size: entries K of each codebook.
        codebook_dims: dimensions of each codebook's entries, one per stage.
        dropout: in training mode, the first `int(B dropout)` items keep a uniformly random number of stages.
        form: see `Config.quantizer`.
    """

    def __init__(
        self, latent_dim: int, codebook_size: int, codebook_dims, dropout=0.0, form="factorized"
    ):
        super().__init__()
        self.dropout, self.form = dropout, form
        self.quantizers = nn.ModuleList(
            VectorQuantizer(latent_dim, codebook_size, dim, form) for dim in codebook_dims
        )

    def _decode_weights(self, n: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        stages = self.quantizers[:n]
        return (
            [q.codebook.weight for q in stages],
            [q.out_proj.normed_weight().squeeze(2) for q in stages],
            [q.out_proj.bias for q in stages],
        )

    def forward(
        self,
        z: Tensor,
        n_quantizers: int | None = None,
        lengths: Tensor | None = None,
        counts: Tensor | None = None,
    ):
        """Quantise z [B, D, F] with the first `n_quantizers` stages (None: all); see `ops.rvq_encode`.

        counts: stages that each item keeps, int64 [B]; None: all, in training mode drawn at random (see `dropout`).

        Returns:
            quantised z [B, D, F], codes int64 [B, N, F], latents [B, sum d, F], commitment loss, codebook loss.
        Raises:
            ValueError: n_quantizers is not between 1 and the number of stages.
        """
        n = codebook_count(n_quantizers, len(self.quantizers))
        if counts is None and self.training and self.dropout and n_quantizers is None:
            counts = torch.full((z.shape[0],), n, device=z.device)
            dropped = int(z.shape[0] * self.dropout)
            counts[:dropped] = torch.randint(1, n + 1, (dropped,), device=z.device)
        # Small differences decide a search, so it is no place for autocast's half precision.
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.quantizers[0].codebook.weight.dtype)
            if self.form != "factorized":
                return self._encode_stages(z, n, counts, lengths)
            in_weights = [q.in_proj.normed_weight().squeeze(2) for q in self.quantizers[:n]]
            in_biases = [q.in_proj.bias for q in self.quantizers[:n]]
            return ops.rvq_encode(
                z, in_weights, in_biases, *self._decode_weights(n), counts, lengths
            )

    def _encode_stages(self, z: Tensor, n: int, counts: Tensor | None, lengths: Tensor | None):
        """What `ops.rvq_encode` returns, for the forms that it does not know."""
        lengths = (
            torch.full((z.shape[0],), z.shape[2], device=z.device) if lengths is None else lengths
        )
        counts = torch.full_like(lengths, n) if counts is None else counts
        valid = valid_mask(lengths, z.shape[2])
        residual, quantised, codes, latents = z, torch.zeros_like(z), [], []
        commitment = codebook_loss = z.new_zeros(())
        for i, stage in enumerate(self.quantizers[:n]):
            latent = stage.in_proj(residual)
            keep = (counts > i).to(z.dtype)
            if self.training and isinstance(stage.codebook, EMACodebook):
                stage.codebook.update(latent.detach().transpose(1, 2)[valid[:, 0]])
            code = stage.search(latent)
            entry = F.embedding(code, stage.codebook.weight).transpose(1, 2)
            output = stage.out_proj(latent + (entry - latent).detach())
            residual = residual - output
            quantised = quantised + output * keep[:, None, None]
            scale = keep / (lengths * latent.shape[1] * z.shape[0])
            commitment = (
                commitment
                + (((latent - entry.detach()).square() * valid).sum((1, 2)) * scale).sum()
            )
            codebook_loss = (
                codebook_loss
                + (((entry - latent.detach()).square() * valid).sum((1, 2)) * scale).sum()
            )
            codes.append(code * valid[:, 0])
            latents.append(latent * valid)
        return (
            quantised * valid,
            torch.stack(codes, 1),
            torch.cat(latents, 1),
            commitment,
            codebook_loss,
        )

    def from_codes(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, N, F] to (quantised z [B, D, F], the codebook entries [B, sum d, F], the codes).

        Raises:
            ValueError: more codes per frame than stages.
        """
        entries = self._entries(codes)
        return self.decode(codes), torch.cat(entries, dim=1), codes

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, N, F] of the first N stages to quantised z [B, D, F].

        Raises:
            ValueError: more codes per frame than stages.
        """
        n = codebook_count(codes.shape[1], len(self.quantizers))
        if self.form in ("unprojected", "ema"):
            return sum(self._entries(codes))
        return ops.rvq_decode(codes, *self._decode_weights(n))

    def _entries(self, codes: Tensor) -> list[Tensor]:
        """The codebook entries [B, d, F] of codes [B, N, F], stage by stage."""
        n = codebook_count(codes.shape[1], len(self.quantizers))
        return [
            F.embedding(codes[:, i], self.quantizers[i].codebook.weight).transpose(1, 2)
            for i in range(n)
        ]

    def from_latents(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unquantised latents [B, sum d, F] to (quantised z [B, D, F], entries [B, sum d, F], codes [B, N, F]).

        Raises:
            ValueError: the channels are not those of the first stages, whole.
        """
        dims = [q.codebook.embedding_dim for q in self.quantizers]
        n = next((i for i in range(1, len(dims) + 1) if sum(dims[:i]) == latents.shape[1]), None)
        if n is None:
            raise ValueError(
                f"{latents.shape[1]} latent channels; accepted: the sum of the first of {dims}"
            )
        parts = latents.split(dims[:n], dim=1)
        codes = [q.search(part) for part, q in zip(parts, self.quantizers, strict=False)]
        return self.from_codes(torch.stack(codes, dim=1))

"""The residual vector quantizer with factorised, L2-normalised codes (paper, section 3.2).

`ops.rvq_encode` runs this form. The other forms of `Config.quantizer`, which the paper compares it
with, run stage by stage in plain PyTorch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast import ops
from dac_fast.config import codebook_count
from dac_fast.model.bottleneck import Bottleneck
from dac_fast.model.ema_codebook import EMACodebook, nearest_row
from dac_fast.model.layers import Conv1d, zero_past
from dac_fast.ops.reference import nearest_code, valid_mask

# Quantised z [B, D, F], codes int64 [B, N, F], latents [B, sum d, F], commitment and codebook loss.
Quantized: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# Of each stage: projections in with their biases, codebooks, projections out with their biases.
Weights: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class Encoded(NamedTuple):
    """The result of `DAC.encode`, for B items, N codebooks, D latent channels and F frames.

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
    """One stage: a codebook, in most forms between projections to and from its few dimensions."""

    def __init__(
        self, latent_dim: int, codebook_size: int, codebook_dim: int, form: str = "factorized"
    ) -> None:
        super().__init__()
        self.normalized = form in ("factorized", "unprojected")
        self.in_proj: nn.Module = nn.Identity()
        self.out_proj: nn.Module = nn.Identity()
        if form in ("factorized", "unnormalized"):
            self.in_proj = Conv1d(latent_dim, codebook_dim, kernel_size=1)
            self.out_proj = Conv1d(codebook_dim, latent_dim, kernel_size=1)
        self.codebook: EMACodebook | nn.Embedding
        if form == "ema":
            self.codebook = EMACodebook(codebook_size, codebook_dim)
        else:
            entries = torch.empty(codebook_size, codebook_dim)
            if not entries.is_meta:
                entries.normal_()
            self.codebook = nn.Embedding.from_pretrained(entries, freeze=False)

    def search(self, latent: Tensor) -> Tensor:
        """Index of the entry that each position of latent [B, d, F] is nearest to: int64 [B, F]."""
        if self.normalized:
            return nearest_code(latent, self.codebook.weight)
        rows = latent.transpose(1, 2).flatten(0, 1)
        return nearest_row(rows, self.codebook.weight).view(latent.shape[0], latent.shape[2])

    def entries(self, code: Tensor) -> Tensor:
        """The entries [B, d, F] of a code [B, F]."""
        return F.embedding(code, self.codebook.weight).transpose(1, 2)


class ResidualVectorQuantizer(Bottleneck):
    """Stages that each quantise the residual of the ones before.

    Args:
        latent_dim: channels D of the latent.
        codebook_size: entries K of each codebook.
        codebook_dims: dimensions of each codebook's entries, one per stage.
        dropout: in training mode, the first `int(B dropout)` items keep a uniformly random number
            of stages.
        form: see `Config.quantizer`.
    """

    __call__: Callable[..., Quantized]
    kept_dtype = torch.int64

    def __init__(
        self,
        latent_dim: int,
        codebook_size: int,
        codebook_dims: Sequence[int],
        dropout: float = 0.0,
        form: str = "factorized",
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.form = form
        self.quantizers = nn.ModuleList(
            VectorQuantizer(latent_dim, codebook_size, dim, form) for dim in codebook_dims
        )

    def stages(self, n: int) -> list[VectorQuantizer]:
        """The first n stages."""
        return cast(list[VectorQuantizer], list(self.quantizers)[:n])

    def _encode_weights(self, n: int) -> tuple[list[Tensor], list[Tensor]]:
        """Weights [d, D] and biases [d] of the first n stages' projections to the codebook."""
        projections = [_matrix(stage.in_proj) for stage in self.stages(n)]
        return [weight for weight, _ in projections], [bias for _, bias in projections]

    def _decode_weights(self, n: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Codebooks [K, d], and weights [D, d] and biases [D] of the projections from them."""
        projections = [_matrix(stage.out_proj) for stage in self.stages(n)]
        return (
            [stage.codebook.weight for stage in self.stages(n)],
            [weight for weight, _ in projections],
            [bias for _, bias in projections],
        )

    def weights(self, n: int) -> Weights:
        """The weights of the first n stages, in the order in which `ops.rvq_encode` takes them."""
        return (*self._encode_weights(n), *self._decode_weights(n))

    def forward(
        self,
        z: Tensor,
        n_quantizers: int | None = None,
        lengths: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Quantized:
        """Quantises z with the first `n_quantizers` stages; see `ops.rvq_encode`.

        Args:
            z: [B, D, F].
            n_quantizers: None: all stages.
            lengths: int64 [B], valid frames of each item; None: all.
            counts: int64 [B], stages that each item keeps; None: all of them, but in training mode
                drawn at random (see `dropout`).
        Returns:
            quantised z [B, D, F], codes int64 [B, N, F], latents [B, sum d, F], commitment loss,
            codebook loss.
        Raises:
            ValueError: n_quantizers is not between 1 and the number of stages.
        """
        n = codebook_count(n_quantizers, len(self.quantizers))
        if counts is None and self.training and self.dropout and n_quantizers is None:
            counts = torch.full((z.shape[0],), n, device=z.device)
            dropped = int(z.shape[0] * self.dropout)
            counts[:dropped] = torch.randint(1, n + 1, (dropped,), device=z.device)
        # Small differences decide a search, too small for autocast's half precision.
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.stages(1)[0].codebook.weight.dtype)
            if self.form != "factorized":
                return self._encode_stages(z, n, counts, lengths)
            return ops.rvq_encode(z, *self.weights(n), counts, lengths)

    def rows(self, n_quantizers: int | None = None) -> int:
        """N, the number of codebooks in use."""
        return codebook_count(n_quantizers, len(self.quantizers))

    def encode(self, features: Tensor, n_quantizers: int | None = None) -> Tensor:
        """The codes that `forward` gives."""
        return self(features, n_quantizers)[1]

    def _encode_stages(
        self, z: Tensor, n: int, counts: Tensor | None, lengths: Tensor | None
    ) -> Quantized:
        """The result of `ops.rvq_encode`, for the forms that the op does not know."""
        items, frames = z.shape[0], z.shape[2]
        if lengths is None:
            lengths = torch.full((items,), frames, device=z.device)
        if counts is None:
            counts = torch.full_like(lengths, n)
        valid = valid_mask(lengths, frames)
        residual = z
        quantised = torch.zeros_like(z)
        commitment = codebook_loss = z.new_zeros(())
        codes = []
        latents = []
        for i, stage in enumerate(self.stages(n)):
            latent = stage.in_proj(residual)
            if self.training and isinstance(stage.codebook, EMACodebook):
                stage.codebook.update(latent.detach().transpose(1, 2)[valid[:, 0]])
            code = stage.search(latent)
            entry = stage.entries(code)
            # The straight-through estimator: forward the entry, backward the latent.
            output = stage.out_proj(latent + (entry - latent).detach())
            residual = residual - output

            keep = (counts > i).to(z.dtype)
            quantised = quantised + output * keep[:, None, None]
            # Each item's mean over its valid positions, and the mean over items.
            scale = keep / (lengths * latent.shape[1] * items)
            to_entry = ((latent - entry.detach()).square() * valid).sum((1, 2))
            to_latent = ((entry - latent.detach()).square() * valid).sum((1, 2))
            commitment = commitment + (to_entry * scale).sum()
            codebook_loss = codebook_loss + (to_latent * scale).sum()
            codes.append(code * valid[:, 0])
            latents.append(latent * valid)
        all_codes, all_latents = torch.stack(codes, 1), torch.cat(latents, 1)
        return quantised * valid, all_codes, all_latents, commitment, codebook_loss

    def from_codes(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, N, F] to (quantised z [B, D, F], codebook entries [B, sum d, F], the codes).

        Raises:
            ValueError: there are more codes per frame than stages.
        """
        return self.decode(codes), torch.cat(self._entries(codes), dim=1), codes

    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes [B, N, F] of the first N stages to quantised z [B, D, F], zero past the lengths.

        Raises:
            ValueError: there are more codes per frame than stages.
        """
        n = codebook_count(codes.shape[1], len(self.quantizers))
        if self.form in ("unprojected", "ema"):
            first, *others = self._entries(codes)
            z = sum(others, start=first)
            return z if lengths is None else zero_past(z, lengths)
        return ops.rvq_decode(codes, *self._decode_weights(n), lengths)

    def _entries(self, codes: Tensor) -> list[Tensor]:
        """The codebook entries [B, d, F] of codes [B, N, F], stage by stage."""
        stages = self.stages(codebook_count(codes.shape[1], len(self.quantizers)))
        return [stage.entries(codes[:, i]) for i, stage in enumerate(stages)]

    def from_latents(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unquantised latents to (quantised z [B, D, F], entries [B, sum d, F], codes [B, N, F]).

        Args:
            latents: [B, sum d, F], of the first N stages.
        Raises:
            ValueError: the channels are not those of the first stages, whole.
        """
        dims = [stage.codebook.embedding_dim for stage in self.stages(len(self.quantizers))]
        n = next((i for i in range(1, len(dims) + 1) if sum(dims[:i]) == latents.shape[1]), None)
        if n is None:
            raise ValueError(
                f"{latents.shape[1]} latent channels; accepted: the sum of the first of {dims}"
            )
        parts = latents.split(dims[:n], dim=1)
        codes = [stage.search(part) for part, stage in zip(parts, self.stages(n), strict=True)]
        return self.from_codes(torch.stack(codes, dim=1))


def _matrix(projection: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of a projection."""
    assert isinstance(projection, Conv1d)
    return projection.normed_weight().squeeze(2), projection.bias

"""The residual vector quantizer with factorised, L2-normalised codes (paper, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast import ops
from dac_fast.model.layers import Conv1d
from dac_fast.ops.reference import nearest_code


class VectorQuantizer(nn.Module):
    """The parameters of one stage: projections to and from the codebook's few dimensions, and the codebook."""

    def __init__(self, latent_dim: int, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.in_proj = Conv1d(latent_dim, codebook_dim, kernel_size=1)
        self.out_proj = Conv1d(codebook_dim, latent_dim, kernel_size=1)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)


class ResidualVectorQuantizer(nn.Module):
    """Stages that each quantise what the ones before left over.

    Args:
        latent_dim: channels D of the latent.
        codebook_size: entries K of each codebook.
        codebook_dims: dimensions of each codebook's entries, one per stage.
        dropout: in training mode, the first `int(B dropout)` items keep a uniformly random number of stages.
    """

    def __init__(self, latent_dim: int, codebook_size: int, codebook_dims, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.quantizers = nn.ModuleList(VectorQuantizer(latent_dim, codebook_size, dim) for dim in codebook_dims)

    def _decode_weights(self, n: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        stages = self.quantizers[:n]
        return (
            [q.codebook.weight for q in stages],
            [q.out_proj.normed_weight().squeeze(2) for q in stages],
            [q.out_proj.bias for q in stages],
        )

    def forward(self, z: Tensor, n_quantizers: int | None = None, lengths: Tensor | None = None):
        """Quantise z [B, D, F] with the first `n_quantizers` stages (None: all); see `ops.rvq_encode`.

        Returns:
            quantised z [B, D, F], codes int64 [B, N, F], latents [B, sum d, F], commitment loss, codebook loss.
        Raises:
            ValueError: n_quantizers is not between 1 and the number of stages.
        """
        n = self._checked_count(n_quantizers)
        counts = None
        if self.training and self.dropout and n_quantizers is None:
            counts = torch.full((z.shape[0],), n, device=z.device)
            dropped = int(z.shape[0] * self.dropout)
            counts[:dropped] = torch.randint(1, n + 1, (dropped,), device=z.device)
        in_weights = [q.in_proj.normed_weight().squeeze(2) for q in self.quantizers[:n]]
        in_biases = [q.in_proj.bias for q in self.quantizers[:n]]
        return ops.rvq_encode(z, in_weights, in_biases, *self._decode_weights(n), counts, lengths)

    def from_codes(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, N, F] to (quantised z [B, D, F], the codebook entries [B, sum d, F], the codes).

        Raises:
            ValueError: more codes per frame than stages.
        """
        n = self._checked_count(codes.shape[1])
        codebooks, out_weights, out_biases = self._decode_weights(n)
        entries = [F.embedding(codes[:, i], codebooks[i]).transpose(1, 2) for i in range(n)]
        return ops.rvq_decode(codes, codebooks, out_weights, out_biases), torch.cat(entries, dim=1), codes

    def from_latents(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unquantised latents [B, sum d, F] to (quantised z [B, D, F], entries [B, sum d, F], codes [B, N, F]).

        Raises:
            ValueError: the channels are not those of the first stages, whole.
        """
        dims = [q.codebook.embedding_dim for q in self.quantizers]
        n = next((i for i in range(1, len(dims) + 1) if sum(dims[:i]) == latents.shape[1]), None)
        if n is None:
            raise ValueError(f"{latents.shape[1]} latent channels; accepted: the sum of the first of {dims}")
        parts = latents.split(dims[:n], dim=1)
        codes = [nearest_code(part, q.codebook.weight) for part, q in zip(parts, self.quantizers, strict=False)]
        return self.from_codes(torch.stack(codes, dim=1))

    def _checked_count(self, n_quantizers: int | None) -> int:
        available = len(self.quantizers)
        if n_quantizers is None:
            return available
        if not 1 <= n_quantizers <= available:
            raise ValueError(f"{n_quantizers} codebooks; accepted: 1 to {available}")
        return n_quantizers

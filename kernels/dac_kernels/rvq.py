"""Residual vector quantisation with factorised codes, in Triton (arXiv 2306.06546, section 3.2).

The residual of stage i is r_i = z - sum_{j<i} (W_out,j q_j + b_out,j). A stage needs only d numbers
of it, W_in,i r_i + b_in,i, and these follow from the stages before without ever forming r_i:

    latent_i = P_i - sum_{j<i} M_ij q_j
    P_i      = W_in,i z + b_in,i - sum_{j<i} W_in,i b_out,j      one GEMM for all stages
    M_ij     = W_in,i W_out,j                                    d x d, once per set of weights

so one kernel, which holds a block of frames, runs all N searches. The quantised output is one GEMM
over the chosen entries. Everything that decides a code is fp32 arithmetic of our own kernels: a
GEMM of torch's would follow the user's TF32 switches, whose rounding changes codes.

Backward: the latents solve the block-triangular system (I + L) latent = P, where L are the blocks
M_ij, j < i. Each chosen entry passes its gradient straight to its latent, so the gradient of P is
one solve with (I + L)^T; everything else are GEMMs on [N d, B F].

Shapes: B items, F frames, N stages of K entries with d dimensions, D latent channels; R = N d.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dac_kernels.launch import DTYPES, device_unsupported
from dac_kernels.per_version import PerVersion
from dac_kernels.rvq_kernels import decode, earlier_stages, gather, project, search, valid_mask

MAX_DIM, MAX_SIZE = 32, 4096


@dataclass(frozen=True)
class _DecodeTables:
    codebooks: Tensor  # [N, K, d]
    out_weight: Tensor  # [D, R]
    out_bias: Tensor  # [N, D]
    bias_sums: Tensor  # [N, D], of the biases up to each stage's


@dataclass(frozen=True)
class _EncodeTables:
    decode: _DecodeTables
    in_weight: Tensor  # [R, D]
    bias: Tensor  # [R], of the projections
    columns: Tensor  # [D, R + N], of the output: the weights, then a bias per stage
    cross: Tensor  # [R, R], the M_ij
    units: Tensor  # [N, d, K]
    half_norms: Tensor  # [N, K]


def _build_decode_tables(
    codebooks: Sequence[Tensor], out_weights: Sequence[Tensor], out_biases: Sequence[Tensor]
) -> _DecodeTables:
    out_bias = torch.stack(list(out_biases)).float()
    return _DecodeTables(
        torch.stack(list(codebooks)).float(),
        torch.cat(list(out_weights), dim=1).float(),
        out_bias,
        out_bias.cumsum(0),
    )


def _build_encode_tables(
    in_weights: Sequence[Tensor],
    in_biases: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    out_weights: Sequence[Tensor],
    out_biases: Sequence[Tensor],
) -> _EncodeTables:
    tables = _build_decode_tables(codebooks, out_weights, out_biases)
    stages, _, dim = tables.codebooks.shape
    in_weight = torch.cat(list(in_weights)).float()
    # W_in applied to every column of W_out and to every output bias.
    columns = torch.cat([tables.out_weight, tables.out_bias.t()], dim=1)
    products = project(in_weight, columns[None], in_weight.new_zeros(in_weight.shape[0]))[0]
    cross, shifts = products.split([stages * dim, stages], dim=1)
    earlier = earlier_stages(stages, dim, cross.device)[:, ::dim]
    bias = torch.cat(list(in_biases)).float() - (shifts * earlier).sum(1)
    unit = F.normalize(tables.codebooks.detach(), dim=2)
    return _EncodeTables(
        decode=tables,
        in_weight=in_weight,
        bias=bias,
        columns=columns,
        cross=cross.contiguous(),
        units=unit.transpose(1, 2).contiguous(),
        half_norms=0.5 * unit.square().sum(2),
    )


_decode_tables = PerVersion(_build_decode_tables)
_encode_tables = PerVersion(_build_encode_tables)


def _weights_unsupported(x: Tensor, depth: int | None, *groups: Sequence[Tensor]) -> str | None:
    """Why codebooks, projections and biases do not fit one search, or None."""
    stages = len(groups[0])
    if not stages or groups[0][0].dim() != 2:
        return "there is no codebook [K, d]"
    size, dim = groups[0][0].shape
    depth = depth or groups[1][0].shape[0]
    if dim > MAX_DIM or size > MAX_SIZE:
        return (
            f"codebooks are {size} x {dim}; "
            f"accepted: up to {MAX_SIZE} entries of up to {MAX_DIM} dimensions"
        )
    names = ("codebooks", "out_weights", "out_biases", "in_weights", "in_biases")
    shapes = ((size, dim), (depth, dim), (depth,), (dim, depth), (dim,))
    for name, shape, group in zip(names, shapes, groups, strict=False):
        if len(group) != stages:
            return f"{len(group)} {name} for {stages} codebooks"
        for tensor in group:
            if tensor.shape != shape:
                return (
                    f"{name} of shape {tuple(tensor.shape)} and {shape} together; "
                    "accepted: one for all stages"
                )
            if tensor.dtype not in DTYPES:
                return f"{name} are {tensor.dtype}; accepted: float32, float16, bfloat16"
            if tensor.device != x.device:
                return f"{name} are on {tensor.device}, the input on {x.device}"
    return None


def rvq_encode_unsupported(
    z: Tensor,
    in_weights: Sequence[Tensor],
    in_biases: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    out_weights: Sequence[Tensor],
    out_biases: Sequence[Tensor],
    counts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> str | None:
    """Why `rvq_encode` cannot run on these arguments, or None."""
    if reason := device_unsupported(z):
        return reason
    if z.dtype not in DTYPES:
        return f"z is {z.dtype}; accepted: float32, float16, bfloat16"
    if z.dim() != 3 or not z.numel():
        return f"z has shape {tuple(z.shape)}; accepted: [B, D, F], none of them 0"
    return _weights_unsupported(
        z, z.shape[1], codebooks, out_weights, out_biases, in_weights, in_biases
    )


def rvq_encode(
    z: Tensor,
    in_weights: Sequence[Tensor],
    in_biases: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    out_weights: Sequence[Tensor],
    out_biases: Sequence[Tensor],
    counts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Residual vector quantisation; gradients pass each search straight through.

    Args:
        z: [B, D, F], float32, float16 or bfloat16. The search always computes in float32.
        in_weights, in_biases: per stage [d, D] and [d].
        codebooks: per stage [K, d], with K <= 4096 and d <= 32 the same for all.
        out_weights, out_biases: per stage [D, d] and [D].
        counts: int64 [B], codebooks each item keeps; None: all. The others still lower the
            residual.
        lengths: int64 [B], valid frames of each item; None: all. Past them outputs are zero and
            losses see nothing.
    Returns:
        quantised z [B, D, F]; codes int64 [B, N, F], the first of equally near entries; latents
        [B, N d, F]; commitment loss and codebook loss, scalars: per item the mean squared error
        over (d, F), mean over the batch, summed over the kept stages. All but the codes have z's
        dtype.
    Raises:
        ValueError: `rvq_encode_unsupported` has a reason.
    """
    weights = (in_weights, in_biases, codebooks, out_weights, out_biases)
    if reason := rvq_encode_unsupported(z, *weights, counts, lengths):
        raise ValueError(reason)
    encoding = _encode_tables(*weights)
    decoding = encoding.decode
    items, _, size = z.shape
    stages, _, dim = decoding.codebooks.shape

    projections = project(encoding.in_weight, z, encoding.bias)
    latents, entries, codes = search(
        projections,
        encoding.cross,
        decoding.codebooks.detach(),
        encoding.units,
        encoding.half_norms,
        lengths,
    )

    # Each item's and stage's share in the losses.
    share = z.new_full((items, stages), 1 / (items * dim), dtype=torch.float32)
    share = share / (size if lengths is None else lengths[:, None])
    if counts is None:
        kept, keep = entries, torch.ones_like(share)
    else:
        keep = (torch.arange(stages, device=z.device) < counts[:, None]).float()
        share = share * keep
        kept = entries * keep.repeat_interleave(dim, 1)[:, :, None]
    share = share.repeat_interleave(dim, 1)[:, :, None]

    # Biases are factors of 1 or 0, so that a frame's sum has one order with counts or without.
    rows = torch.cat([kept, keep[:, :, None].expand(-1, -1, size)], dim=1)
    quantised = project(encoding.columns, rows, rows.new_zeros(z.shape[1]))
    if lengths is not None:
        quantised = quantised * valid_mask(lengths, size)

    commitment = ((latents - entries.detach()).square() * share).sum()
    if torch.is_grad_enabled() and decoding.codebooks.requires_grad:
        rows = gather(codes, decoding.codebooks)
        rows = rows if lengths is None else rows * valid_mask(lengths, size)
        codebook_loss = ((rows - latents.detach()).square() * share).sum()
    else:
        codebook_loss = commitment.detach().clone()
    return (
        quantised.to(z.dtype),
        codes,
        latents.to(z.dtype),
        commitment.to(z.dtype),
        codebook_loss.to(z.dtype),
    )


def rvq_decode_unsupported(
    codes: Tensor,
    codebooks: Sequence[Tensor],
    out_weights: Sequence[Tensor],
    out_biases: Sequence[Tensor],
    lengths: Tensor | None = None,
) -> str | None:
    """Why `rvq_decode` cannot run on these arguments, or None."""
    if reason := device_unsupported(codes):
        return reason
    if codes.dtype != torch.int64 or codes.dim() != 3:
        return f"codes are {codes.dtype} of shape {tuple(codes.shape)}; accepted: int64 [B, N, F]"
    if not 1 <= codes.shape[1] <= len(codebooks):
        return f"codes of {codes.shape[1]} codebooks; accepted: 1 to {len(codebooks)}"
    return _weights_unsupported(codes, None, codebooks, out_weights, out_biases)


def rvq_decode(
    codes: Tensor,
    codebooks: Sequence[Tensor],
    out_weights: Sequence[Tensor],
    out_biases: Sequence[Tensor],
    lengths: Tensor | None = None,
) -> Tensor:
    """Codes back to the quantised latent: the sum, in fp32, of every stage's projected entry.

    Args:
        codes: int64 [B, N, F]; of more codebooks than N the first N are used. A code outside its
            codebook gives NaN.
        codebooks, out_weights, out_biases: per stage [K, d], [D, d] and [D], as for `rvq_encode`.
        lengths: int64 [B], valid frames of each item; None: all.
    Returns:
        [B, D, F], of the codebooks' dtype; zero past the lengths.
    Raises:
        ValueError: `rvq_decode_unsupported` has a reason.
    """
    if reason := rvq_decode_unsupported(codes, codebooks, out_weights, out_biases):
        raise ValueError(reason)
    tables = _decode_tables(codebooks, out_weights, out_biases)
    stages, dim = codes.shape[1], tables.codebooks.shape[2]
    weight, bias = tables.out_weight[:, : stages * dim], tables.bias_sums[stages - 1]
    z: Tensor = decode(
        codes.contiguous(), tables.codebooks[:stages], weight, bias, lengths, codebooks[0].dtype
    )
    return z


def warmup(
    shapes: Sequence[tuple[int, int, int]],
    stages: int,
    size: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cuda",
) -> None:
    """Compile and tune `rvq_encode` and `rvq_decode`, before a CUDA graph's capture.

    Args:
        shapes: of the latents z, [B, D, F].
    """
    for items, depth, frames in shapes:
        in_weights, in_biases, codebooks, out_weights, out_biases = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(stages)]
            for shape in ((dim, depth), (dim,), (size, dim), (depth, dim), (depth,))
        )
        z = torch.zeros((items, depth, frames), dtype=dtype, device=device)
        full = torch.full((items,), frames, device=device)
        for lengths in (None, full):
            _, codes, *_ = rvq_encode(
                z, in_weights, in_biases, codebooks, out_weights, out_biases, lengths=lengths
            )
            rvq_decode(codes, codebooks, out_weights, out_biases, lengths)

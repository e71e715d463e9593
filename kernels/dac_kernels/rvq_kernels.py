# ruff: noqa: N803 (sizes of a kernel are named as in its formulas)
"""The Triton kernels of residual vector quantisation, and their registered ops.

They are `project`, `search` and `decode`; `rvq.py` has the formulas and puts them together.
"""

# Strings as annotations: without Triton, `tl.constexpr` must not be looked up.
from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

from dac_kernels.launch import Config, jit, launch, tl, tuned
from dac_kernels.tiles import dense

# Channels that one program of `project` sums: a few frames then keep many SMs busy. It is the same
# for every batch, and so are the bits.
DEPTH = 128


@jit
@no_type_check
def _project_kernel(
    weight, x, bias, y, R, D, frames, size, stride_x_batch, stride_x_depth, stride_x_frame,
    DEPTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # y [D / DEPTH, B, R, F]: weight [R, D] x [B, D, F], of DEPTH channels each, and bias [R] added
    # to the first, in fp32; `frames` is B F, `size` is F.
    blocks = tl.cdiv(R, BLOCK_R)
    pieces = tl.cdiv(D, DEPTH)
    pid = tl.program_id(0).to(tl.int64)
    row = pid % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    piece = pid // blocks % pieces
    frame = pid // (blocks * pieces) * BLOCK_F + tl.arange(0, BLOCK_F)
    item, time = frame // size, frame % size
    row_known, frame_known = (row < R)[:, None], (frame < frames)[None, :]
    x_at = (x + item * stride_x_batch + time * stride_x_frame)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for start in range(0, DEPTH, BLOCK_D):
        d = piece * DEPTH + start + tl.arange(0, BLOCK_D)
        w_at = weight + row[:, None] * D + d[None, :]
        w = tl.load(w_at, mask=row_known & (d < D)[None, :], other=0.0)
        v_at = x_at + d[:, None] * stride_x_depth
        v = tl.load(v_at, mask=(d < D)[:, None] & frame_known, other=0.0).to(tl.float32)
        total = tl.dot(w, v, total, input_precision="ieee")
    if piece == 0:
        total += tl.load(bias + row, mask=row < R, other=0.0)[:, None]
    y_at = y + piece * R * frames + (item[None, :] * R + row[:, None]) * size + time[None, :]
    tl.store(y_at, total, mask=row_known & frame_known)


@jit
@no_type_check
def _sum_kernel(parts, y, size, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    # y [size], the sum of parts [PIECES, size] in their order.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for piece in tl.static_range(PIECES):
        total += tl.load(parts + piece * tl.cast(size, tl.int64) + at, mask=at < size, other=0.0)
    tl.store(y + at, total, mask=at < size)


@jit
@no_type_check
def _search_kernel(
    projections, cross, codebooks, units, half_norms, lengths, codes, latents, entries,
    N, K, frames, size,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, RAGGED: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # projections, latents, entries [B, N, DIM, F]; codes [B, N, F]; cross [N, DIM, N, DIM];
    # codebooks [N, K, DIM]; units [N, DIM, K], the entries normalised; half_norms [N, K], half
    # their squared lengths (of 1 or 0).
    frame = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = frame < frames
    item, time = frame // size, frame % size
    valid = inside
    if RAGGED:
        valid &= time < tl.load(lengths + item, mask=inside, other=0)
    dim = tl.arange(0, DIM_PADDED)
    used = (dim < DIM)[None, :]
    at = (item * N * DIM * size + time)[:, None] + dim.to(tl.int64)[None, :] * size
    codes_at = codes + item * N * size + time
    # In int64, like every product with a stride.
    stage = tl.full((), DIM, tl.int64) * size

    for i in range(N):
        latent = tl.load(projections + at + i * stage, mask=inside[:, None] & used, other=0.0)
        for j in range(i):
            # Written by this very program, some barrier ago.
            code = tl.load(codes_at + j * size, mask=inside, other=0)
            for k in tl.static_range(DIM):
                entry = tl.load(codebooks + (j * K + code) * DIM + k)
                column_at = cross + ((i * DIM + dim) * N + j) * DIM + k
                column = tl.load(column_at, mask=dim < DIM, other=0.0)
                latent = tl.fma(-column[None, :], entry[:, None], latent)

        # The smallest squared distance of unit vectors a and e is the largest a e - |e|^2 / 2. With
        # one vector per dimension, held in registers, the search is plain fp32 multiply-adds, in an
        # order that does not depend on the tile.
        components = ()
        square = tl.zeros((BLOCK_F, 1), tl.float32)
        for k in tl.static_range(DIM):
            component = tl.sum(tl.where(dim[None, :] == k, latent, 0.0), axis=1)[:, None]
            # Triton knows no unpacking into a tuple.
            components = components + (component,)  # noqa: RUF005
            square = tl.fma(component, component, square)
        length = tl.maximum(tl.sqrt(square), 1e-12)
        unit = ()
        for k in tl.static_range(DIM):
            unit = unit + (components[k] / length,)  # noqa: RUF005
        column = tl.arange(0, BLOCK_K)
        best = tl.full((BLOCK_F, BLOCK_K), float("-inf"), tl.float32)
        index = tl.zeros((BLOCK_F, BLOCK_K), tl.int32) + column[None, :]
        for start in range(0, K, BLOCK_K):
            entry = start + column
            known = entry < K
            norm = tl.load(half_norms + i * K + entry, mask=known, other=float("inf"))
            score = tl.zeros_like(best) - norm[None, :]
            for k in tl.static_range(DIM):
                part = tl.load(units + (i * DIM + k) * K + entry, mask=known, other=0.0)
                score = tl.fma(unit[k], part[None, :], score)
            # Strictly better only: the first of equals stays, and so it does in every column.
            better = score > best
            best = tl.where(better, score, best)
            index = tl.where(better, entry[None, :], index)
        top = tl.max(best, axis=1)
        code = tl.min(tl.where(best == top[:, None], index, K), axis=1)

        chosen_at = codebooks + (i * K + code)[:, None] * DIM + dim[None, :]
        chosen = tl.load(chosen_at, mask=used, other=0.0)
        mask = inside[:, None] & used
        tl.store(codes_at + i * size, tl.where(valid, code, 0).to(tl.int64), mask=inside)
        tl.store(latents + at + i * stage, tl.where(valid[:, None], latent, 0.0), mask=mask)
        tl.store(entries + at + i * stage, tl.where(valid[:, None], chosen, 0.0), mask=mask)
        tl.debug_barrier()


@jit
@no_type_check
def _decode_kernel(
    codes, codebooks, weight, bias, lengths, y, N, K, D, frames, size, stride_weight_row,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # y [B, F, D] = weight [D, N DIM] entries(codes) + bias [D]; codes [B, N, F], codebooks
    # [N, K, DIM]; zero past each item's length.
    blocks = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    d = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    frame = pid // blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    item, time = frame // size, frame % size
    d_known, frame_known = (d < D)[:, None], (frame < frames)[None, :]
    total = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    for start in range(0, N * DIM, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        stage = (r // DIM)[:, None]
        inside = (r < N * DIM)[:, None] & frame_known
        code_at = codes + (item[None, :] * N + stage) * size + time[None, :]
        code = tl.load(code_at, mask=inside, other=0)
        # A code that does not exist must be seen, not read from somewhere else.
        known = (code >= 0) & (code < K)
        entry_at = codebooks + (stage * K + code) * DIM + (r % DIM)[:, None]
        entry = tl.load(entry_at, mask=inside & known, other=0.0)
        entry = tl.where(known, entry, float("nan"))
        w_at = weight + d[:, None] * stride_weight_row + r[None, :]
        w = tl.load(w_at, mask=d_known & (r < N * DIM)[None, :], other=0.0)
        total = tl.dot(w, entry, total, input_precision="ieee")
    total += tl.load(bias + d, mask=d < D, other=0.0)[:, None]
    if lengths is not None:
        length = tl.load(lengths + item, mask=frame < frames, other=0)
        total = tl.where((time < length)[None, :], total, 0.0)
    y_at = y + frame[None, :] * D + d[:, None]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=d_known & frame_known)


@torch.library.custom_op("dac_kernels::rvq_project", mutates_args=())
def project(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """fp32 [B, R, F] = weight [R, D] x [B, D, F] + bias [R], whatever torch's TF32 switches say."""
    rows, depth = weight.shape
    items, _, size = x.shape
    frames, pieces = items * size, -(-depth // DEPTH)
    parts = x.new_empty((pieces, items, rows, size), dtype=torch.float32)
    programs = -(-rows // 32) * pieces * -(-frames // 32)
    integers = (rows, depth, frames, size, *x.stride())
    blocks = {"DEPTH": DEPTH, "BLOCK_R": 32, "BLOCK_F": 32, "BLOCK_D": 32}
    launch(_project_kernel, programs, weight, x, bias, parts, *integers, **blocks, num_warps=4)
    if pieces == 1:
        return parts[0]
    y = torch.empty_like(parts[0])
    total, block = y.numel(), 1024
    programs = -(-total // block)
    launch(_sum_kernel, programs, parts, y, total, PIECES=pieces, BLOCK=block, num_warps=4)
    return y


@project.register_fake
def _(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], x.shape[2]), dtype=torch.float32)


def _save_project(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _project_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    weight, x = ctx.saved_tensors
    d_weight = torch.matmul(_flat(g), _flat(x.float()).t()) if ctx.needs_input_grad[0] else None
    d_x = torch.matmul(weight.t(), g).to(x.dtype) if ctx.needs_input_grad[1] else None
    return d_weight, d_x, g.sum((0, 2))


project.register_autograd(_project_gradients, setup_context=_save_project)


def _flat(x: Tensor) -> Tensor:
    """[B, R, F] to [R, B F]."""
    return x.transpose(0, 1).flatten(1)


def earlier_stages(stages: int, dim: int, device: torch.device) -> Tensor:
    """[N d, N d] booleans: True where the column's stage lies before the row's."""
    stage = torch.arange(stages, device=device).repeat_interleave(dim)
    return stage[:, None] > stage


@torch.library.custom_op("dac_kernels::rvq_search", mutates_args=())
def search(
    projections: Tensor,
    cross: Tensor,
    codebooks: Tensor,
    units: Tensor,
    half_norms: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All N searches of every frame. Past an item's length everything is zero.

    Args:
        projections: [B, R, F], like all but lengths fp32.
        cross: [R, R], of which the blocks below the diagonal count.
        codebooks: [N, K, d].
        units: [N, d, K], the entries normalised.
        half_norms: [N, K], half the squared lengths of the units.
        lengths: int64 [B], or None: all frames are valid.
    Returns:
        latents [B, R, F] and chosen entries [B, R, F], fp32, the latter straight-through; codes
        int64 [B, N, F].
    """
    items, _, size = projections.shape
    stages, entries, dim = codebooks.shape
    latents, chosen = torch.empty_like(projections), torch.empty_like(projections)
    codes = projections.new_empty((items, stages, size), dtype=torch.int64)
    frames = items * size
    ragged = codes if lengths is None else lengths.contiguous()
    tensors = (projections, cross, codebooks, units, half_norms, ragged, codes, latents, chosen)
    integers = (stages, entries, frames, size)
    constants = {
        "DIM": dim,
        "DIM_PADDED": 1 << (dim - 1).bit_length(),
        "RAGGED": lengths is not None,
    }

    def run(config: Config) -> None:
        programs = -(-frames // config["BLOCK_F"])
        launch(_search_kernel, programs, *tensors, *integers, **constants, **config)

    shape = stages, entries, dim, frames.bit_length()
    run(tuned("rvq_search", projections, shape, search_configs(dim), run))
    return latents, chosen, codes


def search_configs(dim: int) -> list[Config]:
    """The rows that a thread holds cost `dim` registers each, so wide codes take few.

    Few frames want programs of few frames each, which then share a search among more threads.
    """
    sizes = (
        ((16, 128), (32, 64), (4, 256), (2, 512)) if dim <= 8 else ((8 if dim <= 16 else 4, 64),)
    )
    return [{"BLOCK_F": f, "BLOCK_K": k, "num_warps": 4} for f, k in sizes]


@search.register_fake
def _(
    projections: Tensor,
    cross: Tensor,
    codebooks: Tensor,
    units: Tensor,
    half_norms: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (projections.shape[0], codebooks.shape[0], projections.shape[2])
    codes = projections.new_empty(shape, dtype=torch.int64)
    return torch.empty_like(projections), torch.empty_like(projections), codes


def _save_search(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, cross, codebooks, _, _, lengths = inputs
    ctx.save_for_backward(cross, output[1], lengths)
    ctx.stages, _, ctx.dim = codebooks.shape


def _search_gradients(
    ctx: Any, g_latents: Tensor, g_entries: Tensor, _: None
) -> tuple[Tensor | None, ...]:
    cross, entries, lengths = ctx.saved_tensors
    g = g_latents + g_entries
    if lengths is not None:
        g = g * valid_mask(lengths, g.shape[2])
    lower = earlier_stages(ctx.stages, ctx.dim, g.device)
    # Strictly triangular, so the implied diagonal of ones makes it I + L^T.
    d_flat = torch.linalg.solve_triangular(
        (cross * lower).t(), _flat(g), upper=True, unitriangular=True
    )
    d_cross = -torch.matmul(d_flat, _flat(entries).t()) * lower
    d_projections = d_flat.view(g.shape[1], g.shape[0], g.shape[2]).transpose(0, 1)
    return d_projections, d_cross, None, None, None, None


search.register_autograd(_search_gradients, setup_context=_save_search)


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """[B, 1, F] booleans: True before each item's length."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None]


def gather(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Entries [B, N d, F] of codes [B, N, F] in codebooks [N, K, d]."""
    stages, size, dim = codebooks.shape
    rows = codes + torch.arange(stages, device=codes.device)[:, None] * size
    return F.embedding(rows, codebooks.reshape(-1, dim)).transpose(2, 3).flatten(1, 2)


@torch.library.custom_op("dac_kernels::rvq_decode", mutates_args=())
def decode(
    codes: Tensor,
    codebooks: Tensor,
    weight: Tensor,
    bias: Tensor,
    lengths: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[B, D, F] from codes [B, N, F] and, in fp32, codebooks [N, K, d], weight [D, N d], bias [D].

    The rows of the weight are contiguous. The result is zero past each item's length, int64 [B],
    and has its channels innermost in memory, as the decoder reads it.
    """
    items, stages, size = codes.shape
    _, entries, dim = codebooks.shape
    depth = weight.shape[0]
    y = codes.new_empty((items, size, depth), dtype=dtype).mT
    frames = items * size
    programs = -(-depth // 64) * -(-frames // 32)
    tensors = (codes, codebooks, weight, bias, dense(lengths), y)
    integers = (stages, entries, depth, frames, size, weight.stride(0))
    blocks = {"DIM": dim, "BLOCK_D": 64, "BLOCK_F": 32, "BLOCK_R": 16}
    launch(_decode_kernel, programs, *tensors, *integers, **blocks, num_warps=4)
    return y


@decode.register_fake
def _(
    codes: Tensor,
    codebooks: Tensor,
    weight: Tensor,
    bias: Tensor,
    lengths: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], codes.shape[2], weight.shape[0]), dtype=dtype).mT


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, codebooks, weight, _, lengths, _ = inputs
    ctx.save_for_backward(codes, codebooks, weight, lengths)


def _decode_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    codes, codebooks, weight, lengths = ctx.saved_tensors
    g = g.float()
    if lengths is not None:
        g = g * valid_mask(lengths, g.shape[2])
    stages, size, dim = codebooks.shape
    items, _, frames = g.shape
    d_weight = torch.matmul(_flat(g), _flat(gather(codes, codebooks)).t())
    d_entries = torch.matmul(weight.t(), g).view(items, stages, dim, frames).transpose(2, 3)
    rows = codes + torch.arange(stages, device=codes.device)[:, None] * size
    d_codebooks = torch.ops.aten.embedding_dense_backward(d_entries, rows, stages * size, -1, False)
    return None, d_codebooks.view(codebooks.shape), d_weight, g.sum((0, 2)), None, None


decode.register_autograd(_decode_gradients, setup_context=_save_decode)

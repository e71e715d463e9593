"""Residual vector quantisation at the 44.1 kHz size: 9 codebooks of 1024 x 8, latent of 1024.

Bytes: encoding reads the latent and writes its quantised version and the codes; decoding reads the
codes and writes the latent; the backward pass reads one gradient and writes the other. The weights
are small beside them. Flops: projections into and out of the codebooks, and the search.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Outputs, Prepared, Settings
from bench.checks import ops as checks
from bench.document import Json
from bench.peers import ops as peers
from dac_fast.config import PRESETS, Config
from dac_fast.ops import reference

# How much further than the nearest entry a chosen one may be, in squared distance of unit vectors
# (0 to 4), beyond twice the reference's own error in single precision.
REGRET_FLOOR = 1e-5

# Weights in the order that `rvq_encode` takes them: of each kind, a tensor per codebook.
Weights = tuple[list[Tensor], ...]


def cases(device: str, quick: bool) -> list[Case]:
    """On CUDA 72 x 33 frames (training) and 16 x 1725 (20 s); on the CPU one item of 862."""
    config = PRESETS["tiny" if quick else "44khz"]
    sizes = [(2, 5)] if quick else [(1, 862)] if device == "cpu" else [(72, 33), (16, 1725)]
    found = []

    def add(op: str, direction: str, size: tuple[int, int]) -> None:
        run = partial(PREPARE[op, direction], config, *size)
        shape = f"{size[0]}x{config.latent_dim}x{size[1]}"
        found.append(Case(op, direction, device, "float32", shape, run, priority=0))

    for size in sizes:
        add("rvq_encode", "forward", size)
        add("rvq_decode", "forward", size)
        if size == sizes[0]:
            add("rvq_encode", "backward", size)
    return found


def _inputs(config: Config, batch: int, frames: int, device: str) -> tuple[Tensor, Weights]:
    """A latent [B, D, F] and random weights."""
    torch.manual_seed(0)

    def tensors(*shape: int, scale: float = 1.0) -> list[Tensor]:
        return [scale * torch.randn(shape, device=device) for _ in range(config.n_codebooks)]

    latent, dim = config.latent_dim, config.codebook_dims[0]
    z = torch.randn(batch, latent, frames, device=device)
    weights = (
        tensors(dim, latent, scale=latent**-0.5),
        tensors(dim, scale=0.1),
        tensors(config.codebook_size, dim),
        tensors(latent, dim, scale=dim**-0.5),
        tensors(latent, scale=0.1),
    )
    return z, weights


def _decode_flops(config: Config, frames: int) -> int:
    """The flops of the projections out of the codebooks."""
    return 2 * frames * sum(config.codebook_dims) * config.latent_dim


def _encode_flops(config: Config, frames: int) -> int:
    """The flops of the projections into the codebooks and out of them, and of the search."""
    search = 2 * frames * sum(config.codebook_dims) * config.codebook_size
    return 2 * _decode_flops(config, frames) + search


def regret(
    codes: Tensor,
    z: Tensor,
    in_weights: list[Tensor],
    in_biases: list[Tensor],
    codebooks: list[Tensor],
    out_weights: list[Tensor],
    out_biases: list[Tensor],
) -> float:
    """How much further than the nearest entry the worst of `codes` [B, N, F] is.

    Random inputs have near ties, which rounding decides, so that codes themselves cannot be
    compared. Each stage is judged on the residual that the given codes before it leave. All
    arguments but the codes are in float64.
    """
    worst = 0.0
    residual = z
    for i, codebook in enumerate(codebooks):
        latent = F.conv1d(residual, in_weights[i].unsqueeze(2), in_biases[i])
        rows = F.normalize(latent.transpose(1, 2).flatten(0, 1))
        distance = 2 - 2 * rows @ F.normalize(codebook).t()
        chosen = distance.gather(1, codes[:, i].reshape(-1, 1)).squeeze(1)
        worst = max(worst, (chosen - distance.amin(1)).max().item())
        entry = F.embedding(codes[:, i], codebook).transpose(1, 2)
        residual = residual - F.conv1d(entry, out_weights[i].unsqueeze(2), out_biases[i])
    return worst


def prepare_encode(config: Config, batch: int, frames: int, settings: Settings) -> Prepared:
    """Encoding: codes are judged by their regret, the quantised latent by its codes."""
    z, weights = _inputs(config, batch, frames, settings.device)
    exact_z, exact_weights = z.double(), checks.doubles(weights)
    reference_codes = reference.rvq_encode(z, *weights)[1]
    allowed = 2 * regret(reference_codes, exact_z, *exact_weights) + REGRET_FLOOR

    def check(outputs: Outputs, precision: str) -> float | Json:
        quantised, codes = outputs[:2]
        found = regret(codes, exact_z, *exact_weights)
        assert found <= allowed, f"regret {found:.3g}, allowed {allowed:.3g}"
        same = reference.rvq_decode(codes, *weights[2:])
        truth = reference.rvq_decode(codes, *exact_weights[2:])
        return checks.as_good_as([same], [truth])([quantised], precision)

    functions = peers.functions("rvq_encode", z, *weights)
    bytes_moved = 2 * z.numel() * 4 + batch * frames * config.n_codebooks * 8
    flops = _encode_flops(config, batch * frames)
    return Prepared(peers.forward(functions, z, *weights), check, bytes_moved, flops)


def prepare_encode_backward(
    config: Config, batch: int, frames: int, settings: Settings
) -> Prepared:
    """Gradients of the latent and all weights, from the quantised latent and both losses."""
    z, weights = _inputs(config, batch, frames, settings.device)
    gradient = torch.randn_like(z)
    one = torch.ones((), device=z.device)

    def differentiable(encode: peers.Op, *args: Tensor | list[Tensor]) -> tuple[Tensor, ...]:
        quantised, _, _, commitment, codebook_loss = encode(*args)
        return quantised, commitment, codebook_loss

    functions = {
        name: f if isinstance(f, str) else partial(differentiable, f)
        for name, f in peers.functions("rvq_encode", z.requires_grad_(), *weights).items()
    }
    leaves = [z, *(tensor.requires_grad_() for group in weights for tensor in group)]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    n = config.n_codebooks
    exact_weights = [exact_leaves[1 + i * n : 1 + (i + 1) * n] for i in range(len(weights))]
    exact = torch.autograd.grad(
        differentiable(reference.rvq_encode, exact_leaves[0], *exact_weights),
        exact_leaves,
        [gradient.double(), one.double(), one.double()],
    )

    def check(outputs: Outputs, precision: str) -> float:
        # In the root mean square: a near tie decided differently changes a frame's gradient.
        pairs = zip(outputs, exact, strict=True)
        errors = [float((a.double() - e).norm() / e.norm()) for a, e in pairs]
        assert errors[0] <= 1e-3, f"gradient of z off by {errors[0]:.3g}, allowed 1e-3"
        assert max(errors) <= 5e-2, f"gradient of a weight off by {max(errors):.3g}, allowed 5e-2"
        return max(errors)

    backward = peers.backward(functions, (z, *weights), leaves, [gradient, one, one])
    return Prepared(backward, check, bytes_moved=2 * z.numel() * 4)


def prepare_decode(config: Config, batch: int, frames: int, settings: Settings) -> Prepared:
    """Decoding random codes."""
    z, weights = _inputs(config, batch, frames, settings.device)
    shape = (batch, config.n_codebooks, frames)
    codes = torch.randint(config.codebook_size, shape, device=settings.device)
    decode_weights = weights[2:]
    exact = reference.rvq_decode(codes, *checks.doubles(decode_weights))
    check = checks.as_good_as([reference.rvq_decode(codes, *decode_weights)], [exact])
    functions = peers.functions("rvq_decode", codes, *decode_weights)
    bytes_moved = codes.numel() * 8 + z.numel() * 4
    flops = _decode_flops(config, batch * frames)
    return Prepared(peers.forward(functions, codes, *decode_weights), check, bytes_moved, flops)


PREPARE = {
    ("rvq_encode", "forward"): prepare_encode,
    ("rvq_encode", "backward"): prepare_encode_backward,
    ("rvq_decode", "forward"): prepare_decode,
}

"""Residual vector quantisation at the 44.1 kHz model's size: 9 codebooks of 1024 x 8, latent of 1024 channels.

Bytes: encoding reads the latent and writes its quantised version and the codes; decoding reads the codes and writes
the latent; the backward pass reads one gradient and writes the other. The weights are small beside them. Flops:
projections into and out of the codebooks, and the search.
"""

from functools import partial

import torch
import torch.nn.functional as F

from bench.case import Case, Prepared, Settings
from bench.checks import ops as checks
from bench.peers import ops as peers
from dac_fast.config import PRESETS, Config
from dac_fast.ops import reference

# How much further than the nearest entry a chosen one may be, in squared distance of unit vectors (0 to 4), beyond
# twice what the reference in single precision misses by.
REGRET_FLOOR = 1e-5


def cases(device: str, quick: bool) -> list[Case]:
    """Batches of 72 x 33 frames (0.38 s, training) and 16 x 1725 (20 s, inference); on the CPU one item of 862."""
    config = PRESETS["tiny" if quick else "44khz"]
    sizes = [(2, 5)] if quick else [(1, 862)] if device == "cpu" else [(72, 33), (16, 1725)]
    found = []
    for size in sizes:
        todo = [("rvq_encode", "forward"), ("rvq_decode", "forward")]
        if size == sizes[0]:
            todo.append(("rvq_encode", "backward"))
        for op, direction in todo:
            found.append(
                Case(
                    op, direction, device, "float32", f"{size[0]}x{config.latent_dim}x{size[1]}",
                    partial(PREPARE[op, direction], config, *size), priority=0,
                )
            )  # fmt: skip
    return found


def _inputs(config: Config, batch: int, frames: int, device: str):
    """A latent, and the weights in the order that `rvq_encode` takes them."""
    torch.manual_seed(0)

    def tensors(*shape, scale=1.0):
        return [scale * torch.randn(shape, device=device) for _ in range(config.n_codebooks)]

    latent, d = config.latent_dim, config.codebook_dims[0]
    z = torch.randn(batch, latent, frames, device=device)
    weights = (
        tensors(d, latent, scale=latent**-0.5),
        tensors(d, scale=0.1),
        tensors(config.codebook_size, d),
        tensors(latent, d, scale=d**-0.5),
        tensors(latent, scale=0.1),
    )
    return z, weights


def _flops(config: Config, frames: int) -> tuple[int, int]:
    """Of encoding and decoding: projection, search and projection; the last alone."""
    d = sum(config.codebook_dims)
    return 2 * frames * d * (
        2 * config.latent_dim + config.codebook_size
    ), 2 * frames * d * config.latent_dim


def _doubles(weights):
    return tuple([tensor.double() for tensor in group] for group in weights)


def regret(codes, z, in_weights, in_biases, codebooks, out_weights, out_biases) -> float:
    """How much further than the nearest entry the worst of `codes` is, each stage judged after the given ones before.

    Random inputs have near ties, which rounding decides: codes themselves cannot be compared. All arguments but the
    codes in float64.
    """
    worst, residual = 0.0, z
    for i, codebook in enumerate(codebooks):
        latent = F.conv1d(residual, in_weights[i].unsqueeze(2), in_biases[i])
        rows, entries = F.normalize(latent.transpose(1, 2).flatten(0, 1)), F.normalize(codebook)
        distance = 2 - 2 * rows @ entries.t()
        chosen = distance.gather(1, codes[:, i].reshape(-1, 1)).squeeze(1)
        worst = max(worst, (chosen - distance.amin(1)).max().item())
        entry = F.embedding(codes[:, i], codebook).transpose(1, 2)
        residual = residual - F.conv1d(entry, out_weights[i].unsqueeze(2), out_biases[i])
    return worst


def prepare_encode(config: Config, batch: int, frames: int, settings: Settings) -> Prepared:
    """Encoding: codes are judged by their regret, the quantised latent by the codes it belongs to."""
    z, weights = _inputs(config, batch, frames, settings.device)
    exact = z.double(), *_doubles(weights)
    allowed = 2 * regret(reference.rvq_encode(z, *weights)[1], *exact) + REGRET_FLOOR

    def check(outputs, _precision=None):
        quantised, codes = outputs[:2]
        found = regret(codes, *exact)
        assert found <= allowed, f"regret {found:.3g}, allowed {allowed:.3g}"
        same = reference.rvq_decode(codes, *weights[2:])
        return checks.as_good_as([same], [reference.rvq_decode(codes, *exact[3:])])([quantised])

    functions = peers.functions("rvq_encode", z, *weights)
    bytes_moved = 2 * z.numel() * 4 + batch * frames * config.n_codebooks * 8
    return Prepared(
        peers.forward(functions, z, *weights), check, bytes_moved, _flops(config, batch * frames)[0]
    )


def prepare_encode_backward(
    config: Config, batch: int, frames: int, settings: Settings
) -> Prepared:
    """Gradients of the latent and every weight, for a random gradient of the quantised latent and both losses' own."""
    z, weights = _inputs(config, batch, frames, settings.device)
    gradient = torch.randn_like(z)

    def outputs_of(function, *args):
        quantised, _, _, commitment, codebook_loss = function(*args)
        return quantised, commitment, codebook_loss

    functions = {
        name: f if isinstance(f, str) else partial(outputs_of, f)
        for name, f in peers.functions("rvq_encode", z.requires_grad_(), *weights).items()
    }
    one = torch.ones((), device=z.device)
    leaves = [z, *(tensor.requires_grad_() for group in weights for tensor in group)]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    n = config.n_codebooks
    exact_weights = [exact_leaves[1 + i * n : 1 + (i + 1) * n] for i in range(len(weights))]
    exact = torch.autograd.grad(
        outputs_of(reference.rvq_encode, exact_leaves[0], *exact_weights),
        exact_leaves,
        [gradient.double(), one.double(), one.double()],
    )

    def check(outputs, _precision=None):
        # In the root mean square: a near tie that rounding decides the other way changes one frame's gradient.
        errors = [
            ((a.double() - e).norm() / e.norm()).item() for a, e in zip(outputs, exact, strict=True)
        ]
        assert errors[0] <= 1e-3, f"gradient of z off by {errors[0]:.3g}, allowed 1e-3"
        assert max(errors) <= 5e-2, f"gradient of a weight off by {max(errors):.3g}, allowed 5e-2"
        return max(errors)

    return Prepared(
        peers.backward(functions, (z, *weights), leaves, [gradient, one, one]),
        check,
        2 * z.numel() * 4,
    )


def prepare_decode(config: Config, batch: int, frames: int, settings: Settings) -> Prepared:
    """Decoding random codes."""
    z, weights = _inputs(config, batch, frames, settings.device)
    codes = torch.randint(
        config.codebook_size, (batch, config.n_codebooks, frames), device=settings.device
    )
    same = reference.rvq_decode(codes, *weights[2:])
    check = checks.as_good_as([same], [reference.rvq_decode(codes, *_doubles(weights)[2:])])
    functions = peers.functions("rvq_decode", codes, *weights[2:])
    return Prepared(
        peers.forward(functions, codes, *weights[2:]),
        check,
        codes.numel() * 8 + z.numel() * 4,
        _flops(config, batch * frames)[1],
    )


PREPARE = {
    ("rvq_encode", "forward"): prepare_encode,
    ("rvq_encode", "backward"): prepare_encode_backward,
    ("rvq_decode", "forward"): prepare_decode,
}

"""Every op of the codec in plain PyTorch: the specification that each backend is checked against.

Shapes: B items, C channels, T samples or time steps, N codebooks of K entries with d dimensions,
D latent channels, F latent frames. Everything here is differentiable by autograd.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dac_fast.ops.precision import float32_products

# Bands of the multi-resolution discriminator, as fractions of the spectrum (paper, section 3.4).
BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """Snake, `x + sin(alpha x)^2 / (alpha + 1e-9)` (arXiv 2006.08195; paper, section 3.1).

    Args:
        x: [B, C, T], any float dtype.
        alpha: [1, C, 1], one frequency per channel.
    Returns:
        of x's shape and dtype.
    """
    return (x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).square()).to(x.dtype)


def snake_beta(x: Tensor, alpha: Tensor, beta: Tensor, log_scale: bool = False) -> Tensor:
    """BigVGAN's Snake, `x + sin(alpha x)^2 / (beta + 1e-9)` (arXiv 2206.04658).

    Args:
        x: [B, C, T], any float dtype.
        alpha, beta: [1, C, 1].
        log_scale: alpha and beta hold logarithms.
    Returns:
        of x's shape and dtype.
    """
    if log_scale:
        alpha, beta = alpha.exp(), beta.exp()
    return (x + (beta + 1e-9).reciprocal() * torch.sin(alpha * x).square()).to(x.dtype)


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """Which positions lie before their item's length: booleans [B, 1, size].

    Args:
        lengths: int64 [B].
        size: positions of the batch.
    """
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None]


def _finish(
    c: Tensor,
    dtype: torch.dtype,
    bias: Tensor,
    alpha: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    tanh: bool,
    keep: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """All that follows a convolution c, in float32 at least; see `conv1d`."""
    c = c.transpose(1, 2).contiguous().transpose(1, 2).to(torch.promote_types(dtype, torch.float32))
    c = c + bias[:, None]
    if tanh:
        c = c.tanh()
    if lengths is not None:
        c = torch.where(valid_mask(lengths, c.shape[2]), c, 0)
    if residual is not None:
        c = c + residual
    snaked = None if alpha is None else snake(c, alpha.to(c)).to(dtype)
    return c.to(dtype) if keep else None, snaked


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    *,
    alpha: Tensor | None = None,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    tanh: bool = False,
    keep: bool = True,
    products: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """A convolution and what follows it: c = conv(x) + bias, tanh, mask, + residual.

    Args:
        x: [B, in, T], any float dtype; fast with channels innermost in memory.
        weight: [out, in, K], of x's dtype; fast with its input axis innermost.
        bias: [out], of x's dtype or float32.
        alpha: [1, out, 1], of x's dtype or float32: of the Snake that follows.
        residual: [B, out, T'], of x's dtype: added at the end.
        lengths: int64 [B], valid positions of each item in the output; c is zero past them.
        keep: whether c itself is wanted.
        products: of float32, on CUDA: "ieee", "tf32", or "tf32x3", which here is "ieee".
    Returns:
        c [B, out, T'], or None without `keep`; snake(c) of the unrounded c, or None without
        `alpha`. Both have x's dtype, and channels innermost in memory; with `tanh`, which makes
        audio, they are float32 at least, since in half precision quiet bands drown in rounding.
    """
    if tanh:
        x, weight = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, weight))
    with float32_products(tf32=products == "tf32"):
        c = F.conv1d(x, weight, None, stride, padding, dilation)
    return _finish(c, x.dtype, bias, alpha, residual, lengths, tanh, keep)


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int = 0,
    *,
    alpha: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: bool = True,
    products: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """A transposed convolution: c = conv_transpose(x) + bias, zero past lengths.

    Args:
        weight: [in, out, 2 stride], of x's dtype; the kernel is two strides long. It is fast with
            its input axis innermost.
        x, bias, alpha, lengths, keep, products: as for `conv1d`.
    Returns:
        c and snake(c), as for `conv1d`; T' = (T + 1) stride - 2 padding.
    """
    with float32_products(tf32=products == "tf32"):
        c = F.conv_transpose1d(x, weight, None, stride, padding)
    return _finish(c, x.dtype, bias, alpha, None, lengths, False, keep)


def residual_unit(
    x: Tensor,
    snaked: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    alpha1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    dilation: int,
    padding: int,
    *,
    alpha: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: bool = True,
    products: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """The residual unit (paper, appendix A), its first Snake excepted.

    c = conv1(snake(conv7(snaked))) + x, with a dilated convolution of 7 and one of 1.

    Args:
        x: [B, C, T].
        snaked: [B, C, T], Snake of x by the unit's first alpha, which the producer of x also made.
        weight1, bias1, alpha1: [C, C, 7], [C] and [1, C, 1].
        weight2, bias2: [C, C, 1] and [C].
        padding: 3 dilation, or 0. With 0 the result is shorter, and x is cropped on both sides.
        alpha: [1, C, 1], of the Snake that follows.
        lengths, keep, products: as for `conv1d`, and so are the dtypes. The Snake in the middle is
            rounded to x's dtype.
    Returns:
        c and snake(c), as for `conv1d`.
    """
    _, hidden = conv1d(
        snaked, weight1, bias1, 1, padding, dilation, alpha=alpha1, keep=False, products=products
    )
    assert hidden is not None
    crop = 3 * dilation - padding
    x = x[..., crop : x.shape[2] - crop]
    return conv1d(
        hidden,
        weight2,
        bias2,
        alpha=alpha,
        residual=x,
        lengths=lengths,
        keep=keep,
        products=products,
    )


def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """The codebook entry of least cosine distance, the first of several (paper, section 3.2).

    Args:
        latents: [B, d, F].
        codebook: [K, d].
    Returns:
        indices int64 [B, F].
    """
    rows = F.normalize(latents.transpose(1, 2).reshape(-1, latents.shape[1]))
    entries = F.normalize(codebook)
    distance = rows.square().sum(1, keepdim=True) - 2 * rows @ entries.t() + entries.square().sum(1)
    return distance.argmin(1).view(latents.shape[0], latents.shape[2])


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
    """Residual vector quantisation with factorised codes (paper, section 3.2).

    Stage i projects the residual down, picks the nearest entry, projects that entry back up and
    subtracts it. Gradients pass each search straight through. The residual always loses the full
    quantised value, even where an item's `counts` leave that stage out of the sum.

    Args:
        z: [B, D, F].
        in_weights, in_biases: per stage [d_i, D] and [d_i].
        codebooks: per stage [K_i, d_i].
        out_weights, out_biases: per stage [D, d_i] and [D].
        counts: int64 [B], codebooks each item keeps (quantizer dropout); None: all of them.
        lengths: int64 [B], valid frames of each item; None: all of them. Past its length an item's
            outputs are zero, and its losses see nothing.
    Returns:
        quantised z [B, D, F]; codes int64 [B, N, F]; latents [B, sum d_i, F]; commitment loss and
        codebook loss, scalars: per item the mean squared error over (d, F), of these the mean over
        the batch, summed over the kept stages.
    """
    residual = z
    quantised = torch.zeros_like(z)
    codes: list[Tensor] = []
    latents: list[Tensor] = []
    commitment = codebook_loss = z.new_zeros(())
    valid = None if lengths is None else valid_mask(lengths, z.shape[2])

    def mean_square(error: Tensor) -> Tensor:
        if valid is None or lengths is None:
            return error.square().mean((1, 2))
        return (error.square() * valid).sum((1, 2)) / (lengths * error.shape[1])

    for i, codebook in enumerate(codebooks):
        latent = F.conv1d(residual, in_weights[i].unsqueeze(2), in_biases[i])
        code = nearest_code(latent, codebook)
        entry = F.embedding(code, codebook).transpose(1, 2)
        straight_through = latent + (entry - latent).detach()
        output = F.conv1d(straight_through, out_weights[i].unsqueeze(2), out_biases[i])
        residual = residual - output

        keep = z.new_ones(z.shape[0]) if counts is None else (counts > i).to(z.dtype)
        quantised = quantised + output * keep[:, None, None]
        commitment = commitment + (mean_square(latent - entry.detach()) * keep).mean()
        codebook_loss = codebook_loss + (mean_square(entry - latent.detach()) * keep).mean()
        codes.append(code)
        latents.append(latent)

    all_codes, all_latents = torch.stack(codes, dim=1), torch.cat(latents, dim=1)
    if valid is not None:
        quantised = quantised * valid
        all_codes, all_latents = all_codes * valid, all_latents * valid
    return quantised, all_codes, all_latents, commitment, codebook_loss


def rvq_decode(
    codes: Tensor,
    codebooks: Sequence[Tensor],
    out_weights: Sequence[Tensor],
    out_biases: Sequence[Tensor],
    lengths: Tensor | None = None,
) -> Tensor:
    """Codes back to the quantised latent: the sum of every stage's projected entry.

    Args:
        codes: int64 [B, N, F]; of more codebooks than N the first N are used.
        codebooks, out_weights, out_biases: per stage [K_i, d_i], [D, d_i] and [D].
        lengths: int64 [B], valid frames of each item; None: all of them.
    Returns:
        [B, D, F]; zero past the lengths.
    """
    outputs = []
    for i in range(codes.shape[1]):
        entry = F.embedding(codes[:, i], codebooks[i]).transpose(1, 2)
        outputs.append(F.conv1d(entry, out_weights[i].unsqueeze(2), out_biases[i]))
    z = functools.reduce(torch.add, outputs)
    return z if lengths is None else torch.where(valid_mask(lengths, z.shape[2]), z, 0)


def disc_preprocess(x: Tensor) -> Tensor:
    """The discriminators' input: the mean over time removed, then the peak scaled to 0.8.

    Args:
        x: [..., T]; each leading index is a signal of its own.
    """
    x = x - x.mean(dim=-1, keepdim=True)
    return 0.8 * x / (x.abs().amax(dim=-1, keepdim=True) + 1e-9)


def band_edges(window: int, bands: Sequence[tuple[float, float]] = BANDS) -> list[tuple[int, int]]:
    """First and one-past-last FFT bin of each band, for a window of that many samples.

    Raises:
        ValueError: a band is not two numbers.
    """
    for band in bands:
        try:
            low, high = band
            numbers = math.isfinite(low) and math.isfinite(high)
        except (TypeError, ValueError):
            numbers = False
        if not numbers:
            raise ValueError(f"a band is {band!r}; accepted: two fractions of the spectrum")
    bins = window // 2 + 1
    return [(int(low * bins), int(high * bins)) for low, high in bands]


def minimum_length(samples: int, window: int) -> int:
    """Samples that a signal of about that length needs, so that `stft_bands` can reflect it."""
    hop = window // 4
    return 3 * hop // 2 + -samples % hop + 1


def stft_bands(
    x: Tensor,
    windows: Sequence[int],
    bands: Sequence[tuple[float, float]] = BANDS,
    layout: str = "channels_first",
    dtype: torch.dtype | None = None,
) -> list[list[Tensor]]:
    """Complex spectrograms in frequency bands: the multi-resolution discriminator's input.

    Hann windows, hop of a quarter window. Frame t starts at sample `t hop - 3 hop / 2`; there are
    ceil(T / hop) frames; everything outside the signal is its reflection.

    Args:
        x: [B, T] audio. No items give empty bands.
        windows: window lengths in samples.
        bands: (low, high) fractions of the spectrum.
        layout: "channels_first" (contiguous) or "channels_last" (strides of torch.channels_last).
        dtype: of the outputs; None: that of x.
    Returns:
        per window, per band: [B, 2, frames, bins], real part then imaginary part.
    Raises:
        ValueError: the signal is too short for a window's reflection, the layout is unknown, or a
            band is not two numbers.
    """
    memory_formats = {
        "channels_first": torch.contiguous_format,
        "channels_last": torch.channels_last,
    }
    if layout not in memory_formats:
        raise ValueError(f"layout is {layout!r}; accepted: {', '.join(memory_formats)}")
    if not x.shape[0]:
        # FFT libraries refuse an empty batch, so one silent item is transformed in its place.
        silent = stft_bands(F.pad(x, (0, 0, 0, 1)), windows, bands, layout, dtype)
        return [[band[:0] for band in spectrum] for spectrum in silent]
    outputs = []
    for window in windows:
        hop, samples = window // 4, x.shape[-1]
        if samples < minimum_length(samples, window):
            raise ValueError(
                f"{samples} samples are too few for a window of {window}: "
                f"at least {minimum_length(samples, window)}"
            )
        frames = math.ceil(samples / hop)
        padded = F.pad(
            x[:, None], (3 * hop // 2, 3 * hop // 2 + frames * hop - samples), mode="reflect"
        )[:, 0]
        hann = torch.hann_window(window, dtype=x.dtype, device=x.device)
        spectrum = torch.stft(padded, window, hop, window=hann, center=False, return_complex=True)
        spectrum = torch.view_as_real(spectrum).permute(0, 3, 2, 1)
        outputs.append(
            [
                spectrum[..., low:high]
                .to(dtype or x.dtype)
                .contiguous(memory_format=memory_formats[layout])
                for low, high in band_edges(window, bands)
            ]
        )
    return outputs

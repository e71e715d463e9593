"""What stands between encoder and decoder, and its continuous form.

A quantizer (`dac_fast.model.quantize`) keeps codes of the encoder's output. The continuous form is
that of a variational autoencoder (arXiv 1312.6114): the encoder's output says, position by
position, the mean and the spread of a normal distribution.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dac_fast.model.layers import zero_past

# The least standard deviation.
LEAST_SPREAD = 1e-4


class Bottleneck(nn.Module, ABC):
    """Turns the encoder's output into what is kept of it, and that into the decoder's input.

    Attributes:
        kept_dtype: of what is kept.
    """

    kept_dtype: torch.dtype

    @abstractmethod
    def rows(self, n_quantizers: int | None = None) -> int:
        """Rows of what is kept: N of codes, D of latents.

        Args:
            n_quantizers: use the first that many codebooks; None: all.
        Raises:
            ValueError: there are not so many.
        """

    @abstractmethod
    def encode(self, features: Tensor, n_quantizers: int | None = None) -> Tensor:
        """The encoder's output [B, E, F] to codes int64 [B, N, F], or to latents [B, D, F].

        n_quantizers, errors: those of `rows`.
        """

    @abstractmethod
    def decode(self, kept: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What `encode` gives, or only the first codes of it, to the decoder's input [B, D, F].

        It is zero past the lengths, int64 [B].
        """

    def blank(self, items: int, frames: int, n_quantizers: int | None = None) -> Tensor:
        """Zeros in the form of what `encode` gives, on the CPU."""
        return torch.zeros(items, self.rows(n_quantizers), frames, dtype=self.kept_dtype)


class Latents(NamedTuple):
    """The result of `DAC.encode_latents`, for B items, D latent channels and F frames.

    Attributes:
        mean: [B, D, F].
        log_variance: [B, D, F], natural logarithm.
        lengths: int64 [B], frames of each item; past them mean and log_variance are zero.
    """

    mean: Tensor
    log_variance: Tensor
    lengths: Tensor

    def sample(self) -> Tensor:
        """A draw of the distributions [B, D, F], by PyTorch's generator; zero past the lengths."""
        noise = torch.randn_like(self.mean)
        return zero_past(self.mean + (self.log_variance / 2).exp() * noise, self.lengths)

    def kl_loss(self) -> Tensor:
        """Divergence from the standard normal distribution in nats, a scalar.

        It is summed over channels; each item's mean over its frames, and the mean over items.
        """
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, log_variance = self.mean.to(dtype), self.log_variance.to(dtype)
        nats = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        return (nats.sum((1, 2)) / self.lengths).mean()


class VAE(Bottleneck):
    """The continuous form. The encoder's output is the means, then as many spreads.

    A standard deviation is the softplus of the spread (as in stable-audio-tools). The exponential
    of a log-variance, which others take, brought a loss of 4e4 by a single step at a learning rate
    of 1e-3.

    Args:
        latent_dim: channels D of the latent.
    """

    kept_dtype = torch.float32

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def latents(self, features: Tensor, lengths: Tensor | None) -> Latents:
        """The encoder's output [B, 2 D, F], and the frames of each item; None: all of them."""
        mean, spread = features.chunk(2, dim=1)
        log_variance = 2 * (F.softplus(spread) + LEAST_SPREAD).log()
        if lengths is None:
            lengths = torch.full((len(mean),), mean.shape[2], device=mean.device)
        else:
            log_variance = zero_past(log_variance, lengths)
        return Latents(mean, log_variance, lengths)

    def rows(self, n_quantizers: int | None = None) -> int:
        """D; there are no codebooks to choose from."""
        if n_quantizers is not None:
            raise ValueError(f"{n_quantizers} codebooks; accepted: None, of a continuous codec")
        return self.latent_dim

    def encode(self, features: Tensor, n_quantizers: int | None = None) -> Tensor:
        """The means [B, D, F] in the encoder's output [B, 2 D, F]."""
        return features[:, : self.rows(n_quantizers)]

    def decode(self, kept: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Latents, as they are, up to the lengths."""
        return kept if lengths is None else zero_past(kept, lengths)

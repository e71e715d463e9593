"""A codebook that follows what is assigned to it instead of a gradient (EnCodec, arXiv 2210.13438; VQ-VAE, 1711.00937).

It begins at the k-means centres of the first batch. Each entry then is the moving average of the vectors nearest to it;
one that hardly any vector is nearest to any more is replaced by a random vector of the batch. Under
`torch.distributed`, the batch is that of all processes, and their codebooks stay equal.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class EMACodebook(nn.Module):
    """`nn.Embedding` in all that the quantizer uses of it.

    Args:
        size: entries K.
        dim: dimensions d of each.
        decay: of the moving averages, per update.
        dead_below: an entry with fewer vectors per update, on average, is replaced.
        kmeans_iterations: of the initialisation.
    """

    def __init__(self, size: int, dim: int, decay=0.99, dead_below=2.0, kmeans_iterations=10):
        super().__init__()
        self.embedding_dim = dim
        self.decay, self.dead_below, self.kmeans_iterations = decay, dead_below, kmeans_iterations
        self.register_buffer("weight", nn.init.kaiming_uniform_(torch.empty(size, dim)))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("usage", torch.zeros(size))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def update(self, rows: Tensor):
        """Moves the entries towards the rows [n, d] of this batch that are nearest to them."""
        # One batch that went wrong must not end up in the averages.
        rows = torch.nan_to_num(rows.float(), 0.0, 0.0, 0.0)
        if not self.started:
            self.start(rows)
        counts, sums = self.assigned(rows)
        self.usage.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = self.usage < self.dead_below
        fresh = self.sample(rows)
        self.sums.copy_(torch.where(dead[:, None], fresh * self.dead_below, self.sums))
        self.usage.copy_(torch.where(dead, self.dead_below, self.usage))
        # Autograd may still hold the entries of this step's forward pass, hence not in place.
        self.weight = (self.sums / self.usage[:, None]).to(self.weight.dtype)

    def start(self, rows: Tensor):
        """Sets the entries to the k-means centres of rows [n, d]."""
        self.weight = self.sample(rows).to(self.weight.dtype)
        for _ in range(self.kmeans_iterations):
            counts, sums = self.assigned(rows)
            centres = sums / counts.clamp(min=1)[:, None]
            self.weight = torch.where(
                counts[:, None] > 0, centres.to(self.weight.dtype), self.weight
            )
        counts, _ = self.assigned(rows)
        self.usage.copy_(counts.clamp(min=self.dead_below))
        self.sums.copy_(self.weight * self.usage[:, None])
        self.started.fill_(True)

    def assigned(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """How many of all processes' rows [n, d] are nearest to each entry, float32 [K], and their sums [K, d]."""
        size, dim = self.weight.shape
        nearest = nearest_row(rows, self.weight.float())
        totals = rows.new_zeros(size, dim + 1).index_add_(
            0, nearest, F.pad(rows, (0, 1), value=1.0)
        )
        if dist.is_initialized():
            dist.all_reduce(totals)
        return totals[:, dim], totals[:, :dim]

    def sample(self, rows: Tensor) -> Tensor:
        """A random row of rows [n, d] for each entry, the same in all processes: [K, d]."""
        chosen = rows[torch.randint(len(rows), (len(self.weight),), device=rows.device)]
        if dist.is_initialized():
            dist.broadcast(chosen, src=0)
        return chosen


def nearest_row(rows: Tensor, entries: Tensor) -> Tensor:
    """Index of the entry of [K, d] with the least Euclidean distance to each row of [n, d]: int64 [n]."""
    return (entries.square().sum(1) - 2 * rows @ entries.t()).argmin(1)

"""A codebook that moves towards the vectors assigned to it, without a gradient.

The codebook starts as the k-means centres of the first batch. Each entry is then the moving average
of the vectors nearest to it (VQ-VAE, arXiv 1711.00937), and an entry that is hardly ever the
nearest one is replaced by a random vector of the batch (EnCodec, arXiv 2210.13438). Under
`torch.distributed` the batch is that of all processes, and their codebooks stay equal.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

DECAY = 0.99  # of the moving averages, per update
DEAD_BELOW = 2.0  # vectors per update, on average, below which an entry is replaced
KMEANS_ITERATIONS = 10


class EMACodebook(nn.Module):
    """A stand-in for `nn.Embedding` in the quantizer.

    Args:
        size: number of entries K.
        dim: dimensions d of an entry.
        decay: of the moving averages, per update.
    Attributes:
        weight: [K, d], the entries.
        sums: [K, d], moving average of the sum of the vectors assigned to each entry in an update.
        usage: [K], moving average of their number.
        started: whether the entries have been initialised.
    """

    weight: Tensor
    sums: Tensor
    usage: Tensor
    started: Tensor

    def __init__(self, size: int, dim: int, decay: float = DECAY) -> None:
        super().__init__()
        self.embedding_dim = dim
        self.decay = decay
        self.register_buffer("weight", nn.init.kaiming_uniform_(torch.empty(size, dim)))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("usage", torch.zeros(size))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Moves each entry towards the rows [n, d] of this batch that are nearest to it."""
        # A batch that is not finite must not end up in the averages.
        rows = torch.nan_to_num(rows.float(), 0.0, 0.0, 0.0)
        if not self.started:
            self.start(rows)
        counts, sums = self.assigned(rows)
        self.usage.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        dead = self.usage < DEAD_BELOW
        fresh = self.sample(rows)
        self.sums.copy_(torch.where(dead[:, None], fresh * DEAD_BELOW, self.sums))
        self.usage.copy_(torch.where(dead, DEAD_BELOW, self.usage))
        # Not in place: autograd may still hold the entries of this step's forward pass.
        self.weight = (self.sums / self.usage[:, None]).to(self.weight.dtype)

    def start(self, rows: Tensor) -> None:
        """Sets the entries to the k-means centres of rows [n, d]."""
        self.weight = self.sample(rows).to(self.weight.dtype)
        for _ in range(KMEANS_ITERATIONS):
            counts, sums = self.assigned(rows)
            centres = (sums / counts.clamp(min=1)[:, None]).to(self.weight.dtype)
            self.weight = torch.where(counts[:, None] > 0, centres, self.weight)
        counts, _ = self.assigned(rows)
        self.usage.copy_(counts.clamp(min=DEAD_BELOW))
        self.sums.copy_(self.weight * self.usage[:, None])
        self.started.fill_(True)

    def assigned(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """How many rows are nearest to each entry, float32 [K], and the sum of these rows [K, d].

        rows: [n, d], those of this process; the results are over all processes.
        """
        size, dim = self.weight.shape
        nearest = nearest_row(rows, self.weight.float())
        # A column of ones is summed to the counts.
        counted = F.pad(rows, (0, 1), value=1.0)
        totals = rows.new_zeros(size, dim + 1).index_add_(0, nearest, counted)
        if dist.is_initialized():
            dist.all_reduce(totals)
        return totals[:, dim], totals[:, :dim]

    def sample(self, rows: Tensor) -> Tensor:
        """One random row of rows [n, d] for each entry, the same in all processes: [K, d]."""
        chosen = rows[torch.randint(len(rows), (len(self.weight),), device=rows.device)]
        if dist.is_initialized():
            dist.broadcast(chosen, src=0)
        return chosen


def nearest_row(rows: Tensor, entries: Tensor) -> Tensor:
    """For each row of [n, d], the index of the entry of [K, d] at least distance: int64 [n]."""
    return (entries.square().sum(1) - 2 * rows @ entries.t()).argmin(1)

"""Validation: the metrics of a codec over excerpts that it was not trained on."""

import torch
from torch import Tensor

from dac_fast.audio.sources import AudioFile
from dac_fast.codec import DAC
from dac_fast.metrics import codebook_counts, efficiency, mel_distance, si_sdr, stft_distance
from dac_fast.training.data import Excerpts, loader
from dac_fast.training.processes import Processes
from dac_fast.training.recipe import Recipe

# Items that go through the codec together.
BATCH = 8


def read(
    recipe: Recipe, files: list[AudioFile], processes: Processes, workers: int
) -> tuple[list[Tensor], dict[str, str]]:
    """This process's part of the excerpts: batches [B, C, T], and files that cannot be read.

    Args:
        recipe: of the run.
        files: to validate on; none: no excerpts.
        processes: of the run.
        workers: processes that read.
    Raises:
        DataError: too many files in a row cannot be read.
    """
    if not files:
        return [], {}
    data = recipe.data
    excerpts = Excerpts(
        files,
        data,
        recipe.model.sample_rate,
        batch_size=data.validation_items,
        seed=0,
        seconds=data.validation_seconds,
        phase_shift=False,
        channels=recipe.model.channels,
    )
    items = list(range(processes.rank, data.validation_items, processes.count))
    numbers = [items[i : i + BATCH] for i in range(0, len(items), BATCH)]
    audio = []
    unreadable: dict[str, str] = {}
    for batch in loader(excerpts, numbers, workers):
        audio.append(batch["audio"])
        unreadable |= batch["unreadable"]
    return audio, unreadable


@torch.no_grad()
def measured(codec: DAC, batches: list[Tensor], processes: Processes) -> dict[str, float]:
    """Each metric's mean over the excerpts of all processes that have it, and codebook statistics.

    Args:
        codec: in eval mode, on the process's device.
        batches: excerpts of this process, each [B, C, T] on the CPU.
        processes: of the run.
    """
    rate, config = codec.sample_rate, codec.config
    sums = torch.zeros(3, dtype=torch.float64)
    ratios = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(config.n_codebooks, config.codebook_size, dtype=torch.int64)
    for audio in batches:
        out = codec(audio.to(processes.device))
        restored = out["audio"].float().cpu()
        mel, stft = mel_distance(restored, audio, rate), stft_distance(restored, audio)
        sums += torch.stack([mel, stft, torch.ones(())]).double() * len(audio)
        # An item that is silent has no ratio.
        pairs = zip(audio.split(1), restored.split(1), strict=True)
        each = torch.stack([si_sdr(*pair) for pair in pairs]).double()
        ratios += torch.stack([each.nansum(), (~each.isnan()).sum()])
        if "codes" in out:
            counts += codebook_counts(out["codes"].cpu(), config.codebook_size)
    sums, ratios, counts = map(processes.summed, (sums, ratios, counts))
    means = [*(sums[:2] / sums[2]).tolist(), (ratios[0] / ratios[1]).item()]
    named = dict(zip(("mel_distance", "stft_distance", "si_sdr"), means, strict=True))
    return named | codebook_statistics(counts)


def codebook_statistics(counts: Tensor) -> dict[str, float]:
    """Bitrate efficiency, and the share of all entries that were used, from counts [N, K].

    Empty where nothing was counted.
    """
    if not counts.any():
        return {}
    used = (counts > 0).double().mean().item()
    return {"bitrate_efficiency": efficiency(counts.cpu()), "codebook_usage": used}

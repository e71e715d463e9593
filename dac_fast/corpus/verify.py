"""Codes of a dataset compared with what their recordings give alone."""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dac_fast.codec import DAC, load
from dac_fast.corpus import shards
from dac_fast.corpus.encoding import Reading, chunk_frames, weights_sha256
from dac_fast.corpus.folder import DatasetError, Folder
from dac_fast.corpus.items import Item
from dac_fast.corpus.shards import Record
from dac_fast.model.quantize import ResidualVectorQuantizer

# Windows of the comparison are that many times as long, so that windows are compared as well.
LONGER = 3


@dataclass
class Verdict:
    """How codes compare with those of their recordings alone.

    Attributes:
        items: recordings that were encoded again.
        codes: in them.
        differing: codes that are others.
        regret: of a code that differs, how much farther its entry lies from what it stands for
            than the nearest does (squared distance of the normalised vectors, in float64); the
            largest of these. Float rounding alone leaves about 1e-6.
    """

    items: int = 0
    codes: int = 0
    differing: int = 0
    regret: float = 0.0


def verify(path: Path, share: float, model: str | None = None) -> Verdict:
    """Encodes a share of a dataset's recordings again, alone, in fp32, on the CPU.

    Args:
        path: of the dataset's folder.
        share: of the recordings, above 0, up to 1; at least one is encoded.
        model: a preset or a checkpoint; None: the one that the dataset names.
    Raises:
        DatasetError: the folder is no dataset, has no records, or the model is another one.
        ValueError, OSError: a recording cannot be read any more.
    """
    folder = Folder(path)
    there = folder.card.model
    codec = load(model or there.name)
    sha256 = weights_sha256(codec)
    if sha256 != there.sha256:
        raise DatasetError(
            f"{path} has codes of the model {there.name} (sha256 {there.sha256}), not of "
            f"{model or there.name} (sha256 {sha256})"
        )
    codec.fold_weight_norm()
    verdict = Verdict()
    for item, record in _sample(folder, share):
        _compare(codec, item, record, folder, verdict)
    if not verdict.items:
        raise DatasetError(f"{path} has no records to verify")
    return verdict


def _sample(folder: Folder, share: float) -> Iterator[tuple[Item, Record]]:
    """A share of the recordings with their records, the same in every call; one at least."""
    chance, first = random.Random(0), True
    failed = folder.failed()
    for number in range(len(folder.plan)):
        if not folder.is_there(number):
            continue
        items = {}
        for item in folder.plan.shard(number).items:
            drawn = chance.random() < share
            if item.key not in failed.get(number, ()) and (drawn or first):
                items[item.key], first = item, False
        if items:
            for record in shards.read(folder.shard_path(number), folder.card.layout):
                if record.key in items:
                    yield items[record.key], record


@torch.inference_mode()
def _compare(codec: DAC, item: Item, record: Record, folder: Folder, verdict: Verdict) -> None:
    """Adds a recording to the verdict."""
    settings, quantizer = folder.card.settings, codec.quantizer
    assert isinstance(quantizer, ResidualVectorQuantizer)
    reading = Reading(codec, item, settings.normalize_db, settings.audio_column)
    verdict.items += 1
    channels, codebooks, _ = record.codes.shape
    begin = 0
    for number, window in enumerate(reading.windows(LONGER * chunk_frames(codec))):
        samples = F.pad(window.signal[None], (0, -window.signal.shape[1] % codec.hop_length))
        z = codec.encoder(samples)[..., window.keep]
        alone = quantizer.encode(z, codebooks)
        channel, end = number % channels, begin + z.shape[2]
        found = torch.from_numpy(record.codes[channel, :, begin:end].astype("int64"))[None]
        differing = found != alone
        verdict.codes += found.numel()
        verdict.differing += int(differing.sum())
        if differing.any():
            regret = regret_of(quantizer, z, found)
            verdict.regret = max(verdict.regret, float(regret[differing].max()))
        if channel == channels - 1:
            begin = end


def regret_of(quantizer: ResidualVectorQuantizer, z: Tensor, codes: Tensor) -> Tensor:
    """How much farther each code's entry is from what it stands for than the nearest, in float64.

    Args:
        quantizer: that the codes are of.
        z: unquantised latent [B, D, F].
        codes: int64 [B, N, F]. Each is judged by what the codes before it left over.
    Returns:
        [B, N, F].
    """
    stages = copy.deepcopy(quantizer).double().stages(codes.shape[1])
    residual, regrets = z.double(), []
    for stage, code in zip(stages, codes.unbind(1), strict=True):
        latent, entries = stage.in_proj(residual), stage.codebook.weight
        rows = latent.transpose(1, 2)
        if stage.normalized:
            distance = torch.cdist(F.normalize(rows, dim=2), F.normalize(entries)[None])
        else:
            distance = torch.cdist(rows, entries[None])
        distance = distance.square()
        regrets.append(distance.gather(2, code[..., None])[..., 0] - distance.amin(2))
        residual = residual - stage.out_proj(F.embedding(code, entries).transpose(1, 2))
    return torch.stack(regrets, 1)

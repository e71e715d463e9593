"""`python -m bench codes`: the codes of real recordings, against the published package's.

Both have the same random weights of the 44.1 kHz size. Where two codes of a frame differ, both are
judged in float64: a code's regret is how much further than the nearest entry it is. The result file
is one JSON document: `environment`, `compared` (what was encoded), and `rows`, one per batch.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.case import Settings
from bench.cases.end_to_end import published
from bench.cases.rvq import regret
from bench.checks.random_codec import random_codec
from bench.document import (
    SCHEMA,
    Json,
    environment,
    facts,
    table_head,
    table_row,
    title,
    write,
)
from dac_fast import ops
from dac_fast.audio.reading import Recording
from dac_fast.codec import DAC

# Of a piece, about; and pieces in a batch.
SECONDS = 10
BATCH = 6
# Squared distance of unit vectors: nearer codes than that are decided by rounding.
NEAR_TIE = 1e-6
REGRETS = ("regret_ours", "regret_published")


def run_codes(
    recordings: Sequence[Path],
    minutes: float,
    published_python: str,
    path: Path,
    preset: str = "44khz",
    commit: str | None = None,
) -> Json:
    """Compares batch by batch and writes the document, again after each; returns it.

    Args:
        recordings: read one after the other, the first channel of each.
        minutes: of audio to compare at most.
        published_python: a Python that can import the published package.
        path: of the document.
        preset: the model's size.
        commit: see `environment`.
    """
    codec = random_codec(preset)
    engine = copy.deepcopy(codec).optimize()
    settings = Settings("cpu", published_python=published_python)
    rows: list[Json] = []
    document = {
        "schema": SCHEMA,
        "environment": environment("cpu", commit),
        "compared": {"preset": preset, "recordings": len(recordings)},
        "rows": rows,
    }
    pieces = itertools.islice(_pieces(recordings, codec), round(minutes * 60 / SECONDS))
    while batch := list(itertools.islice(pieces, BATCH)):
        audio = torch.stack(batch)
        theirs = published(codec, "encode", audio, settings)
        assert not isinstance(theirs, str)
        run = theirs()
        (codes,) = run()
        run.close()
        rows.append(compare(codec, engine, audio, codes))
        write(document, path)
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return document


@torch.no_grad()
def compare(codec: DAC, engine: DAC, audio: Tensor, codes: Tensor) -> Json:
    """The row of a batch.

    Args:
        codec: its weights not folded, for float64.
        engine: the same, optimized.
        audio: [B, 1, T].
        codes: the published package's, [B, N, F].
    """
    ours = engine.encode(audio).codes
    differ = ours != codes
    row: Json = {
        "seconds": round(audio.shape[0] * audio.shape[2] / codec.sample_rate, 2),
        "codes": codes.numel(),
        "differ": int(differ.sum()),
    }
    items, frames = torch.nonzero(differ.any(1), as_tuple=True)
    row["frames_that_differ"] = len(items)
    if len(items):
        exact = copy.deepcopy(codec).double()
        weights = exact.quantizer.weights(codes.shape[1])
        latents = {}
        with ops.use_backend("reference"):
            for item in items.unique().tolist():
                latents[item] = exact.encoder(audio[item][None].double())
        for key, found in zip(REGRETS, (ours, codes), strict=True):
            row[key] = max(
                regret(found[i, :, f][None, :, None], latents[i][:, :, f : f + 1], *weights)
                for i, f in zip(items.tolist(), frames.tolist(), strict=True)
            )
    return row


def _pieces(recordings: Sequence[Path], codec: DAC) -> Iterator[Tensor]:
    """Pieces [1, T] of whole frames, from recordings joined end to end."""
    size = round(SECONDS * codec.sample_rate / codec.hop_length) * codec.hop_length
    kept = np.zeros(0, np.float32)
    for path in recordings:
        for block in Recording(path).blocks(codec.sample_rate):
            kept = np.concatenate([kept, block[0]])
            while len(kept) >= size:
                yield torch.from_numpy(kept[None, :size].copy())
                kept = kept[size:]


def markdown(document: Json) -> str:
    """The page."""
    machine, compared, rows = document["environment"], document["compared"], document["rows"]
    codes, differ = (sum(row[key] for row in rows) for key in ("codes", "differ"))
    lines = [
        f"# Codes of real recordings: {title(machine)}",
        "",
        *facts(machine),
        "",
        f"The {compared['preset']} size with random weights, {sum(r['seconds'] for r in rows):.0f} "
        f"s of {compared['recordings']} recordings, engine in float32 against the published "
        f"package: {codes - differ} of {codes} codes are equal. Regret: how much further than the "
        "nearest entry the worst code of the frames that differ is, in float64 (squared distance "
        f"of unit vectors; rounding decides below {NEAR_TIE:g}).",
        "",
        *table_head(
            ("seconds", "codes", "differ", "frames that differ", "regret: ours", "published")
        ),
    ]
    for row in rows:
        regrets = [f"{row[key]:.1e}" if key in row else "" for key in REGRETS]
        lines.append(
            table_row(
                (
                    str(row["seconds"]),
                    str(row["codes"]),
                    str(row["differ"]),
                    str(row["frames_that_differ"]),
                    *regrets,
                )
            )
        )
    return "\n".join(lines) + "\n"

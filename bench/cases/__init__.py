"""Every case, by op; each module's `cases(device, quick)` lists its own."""

from bench.cases import codec, convolutions, rvq, snake, stft_bands
from bench.harness import Case


def all_cases(device: str, quick: bool = False) -> list[Case]:
    """The cases for "cpu" or "cuda"; `quick`: the same ones at sizes that run in a moment."""
    return [case for module in (stft_bands, rvq, snake, convolutions, codec) for case in module.cases(device, quick)]

"""Every case, by op; each module's `cases(device, quick)` lists its own."""

from bench.case import Case
from bench.cases import convolutions, end_to_end, rvq, snake, stft_bands, streams


def all_cases(device: str, quick: bool = False) -> list[Case]:
    """The cases for "cpu" or "cuda"; `quick`: the same ones at sizes that run in a moment."""
    modules = (stft_bands, rvq, snake, convolutions, streams, end_to_end)
    return [case for module in modules for case in module.cases(device, quick)]

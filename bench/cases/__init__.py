"""Every case, by op; the `cases(device, quick)` of each module lists its own."""

from bench.case import Case
from bench.cases import convolutions, decoders, end_to_end, rvq, snake, stft_bands, streams


def all_cases(device: str, quick: bool = False) -> list[Case]:
    """The cases of a device, "cpu" or "cuda".

    Args:
        device: to run them on.
        quick: makes them small enough to run in a moment.
    """
    modules = (stft_bands, rvq, snake, convolutions, decoders, streams, end_to_end)
    return [case for module in modules for case in module.cases(device, quick)]

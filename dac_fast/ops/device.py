"""Names of devices, as users give them."""

import re

import torch


def checked_device(name: str, origin: str) -> torch.device:
    """The device of that name: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Args:
        name: of the device.
        origin: the option that the name was given for, to begin an error message with.
    Raises:
        ValueError: no such name, or no such CUDA device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"{origin} is {name!r}; accepted: auto, cpu, cuda, cuda:N")
    available = torch.cuda.device_count()
    kind, _, number = name.partition(":")
    if kind == "cuda" and int(number or 0) >= available:
        raise ValueError(f"{origin} is {name!r}; there are {available} CUDA devices")
    return torch.device(name)

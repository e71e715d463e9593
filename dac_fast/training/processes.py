"""The processes of a run: their group under `torchrun`, memory, and the signals that stop them."""

import contextlib
import ctypes
import gc
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from dac_fast.ops.device import checked_device
from dac_fast.training.recipe import RecipeError

# Of malloc.h, and the largest value that the second one takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST_MMAP_THRESHOLD = 32 * 2**20


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        device: of this process.
    """

    rank: int
    count: int
    device: torch.device

    def summed(self, x: Tensor) -> Tensor:
        """The sum of all processes' x, a tensor on the CPU."""
        if self.count == 1:
            return x
        total = x.to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def merged(self, entries: dict[str, str]) -> dict[str, str]:
        """The entries of all processes together."""
        if self.count == 1:
            return entries
        parts: list[dict[str, str]] = [{}] * self.count
        dist.all_gather_object(parts, entries)
        return {key: value for part in parts for key, value in part.items()}


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[Processes]:
    """Yields the processes that `torchrun` has started, or this one alone.

    Args:
        device: see `TrainerConfig.device`.
    Raises:
        RecipeError: there is no such device.
    """
    name = device or "auto"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        chosen = checked_device(name, "trainer.device")
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # Shapes are the same in every step, so the search for the fastest convolutions pays.
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    if processes == 1:
        yield Processes(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), processes, chosen)
    finally:
        # A module that still holds the group would end its threads at the interpreter's exit, which
        # now and then aborts the process.
        gc.collect()
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next one.

    Else it would give large pieces back to the system, whose new pages take a tenth of a step on a
    CPU. Of the GNU library; with another one nothing changes.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, MOST_MMAP_THRESHOLD)


class Stop:
    """While active, SIGTERM and SIGINT are remembered; a second SIGINT interrupts.

    Attributes:
        received: number of the signal that came last, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "Stop":
        # Only the main thread can handle signals; elsewhere they are somebody else's to handle.
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""`python -m bench compile`: the kernels of the benchmark go to Triton's cache, by all cores.

An engine that starts tries several configurations of every layer, and its process compiles them one
after the other: minutes in all. Once they lie in the cache, it finds them there.
"""

import multiprocessing
import os
from collections.abc import Sequence

import triton
from triton.backends.compiler import GPUTarget

from bench.static.compiled import key
from bench.static.launches import Launch, benchmarked_launches


class StandIn:
    """A driver of Triton's for a GPU of some architecture, which need not be here.

    Only what a compilation asks for: a CUDA context takes a second, and half a gigabyte.
    """

    def __init__(self, architecture: int):
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """The default stream."""
        return 0


def fill(architecture: int, processes: int | None = None, quick: bool = False) -> int:
    """Compiles the kernels as a launch would, and returns their number.

    Args:
        architecture: such as 90.
        processes: at a time; None: one for each core.
        quick: a few kernels of a small codec, for the test of the benchmark itself.
    """
    launches = list({key(launch): launch for launch in benchmarked_launches(quick)}.values())
    if quick:
        launches = launches[:4]
    processes = min(processes or os.cpu_count() or 1, len(launches))
    # In turns, since neighbours take about as long as each other. Forked, since what is compiled
    # was recorded in this process.
    shares = [launches[i::processes] for i in range(processes)]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=compile_all, args=(architecture, each)) for each in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = sum(worker.exitcode != 0 for worker in workers)
    if failed:
        raise RuntimeError(f"{failed} of {processes} compiling processes failed")
    return len(launches)


def compile_all(architecture: int, launches: Sequence[Launch]) -> None:
    """Has Triton compile what the launches run, or find it in its cache."""
    triton.runtime.driver.set_active(StandIn(architecture))
    for launch in launches:
        arguments = [launch.arguments[name] for name in launch.kernel.arg_names]
        # As `dac_kernels.launch.launch` does it.
        launch.kernel.warmup(*arguments, grid=(1,), enable_fp_fusion=True, **launch.options)

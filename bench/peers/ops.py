"""Providers: the different ways to compute one case, each a function that starts it and returns what to run.

A provider is started right before its parity check, so that an implementation that fails takes down no other.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.case import Provider
from dac_fast import ops
from dac_fast.ops import reference


def functions(op: str, *args, scripted: bool = False) -> dict[str, Callable | str]:
    """Every implementation of an op for these arguments, the baseline first; a string says why one cannot run.

    Triton is listed for CUDA tensors only: its interpreter on the CPU is for tests.
    """
    eager = getattr(reference, op)
    found = {"eager": eager}
    if scripted:
        found["scripted"] = torch.jit.script(eager)
    found["compiled"] = torch.compile(eager, dynamic=False)
    on_gpu = args[0].is_cuda
    for backend, module in ops.IMPLEMENTATIONS[op].items():
        if backend == "triton" and not on_gpu:
            continue
        found[backend] = getattr(module, f"{op}_unsupported")(*args) or getattr(module, op)
    return found


def forward(functions: dict[str, Callable | str], *args) -> dict[str, Provider]:
    """Providers that call each function on `args` without gradients; they return its tensors, flat."""

    def provider(function):
        def run():
            with torch.no_grad():
                return tree_leaves(function(*args))

        return lambda: run

    return {name: f if isinstance(f, str) else provider(f) for name, f in functions.items()}


def backward(
    functions: dict[str, Callable | str],
    args: Sequence,
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> dict[str, Provider]:
    """Providers of the backward pass alone: the forward runs once, its graph is kept, each run is one `autograd.grad`.

    Args:
        args: of each function.
        leaves: the tensors among them whose gradients are wanted.
        gradients: of the function's flat outputs.
    """

    def provider(function):
        def start():
            # A compiled graph that donates its buffers could run backward only once.
            with torch._functorch.config.patch(donated_buffer=False):
                outputs = tree_leaves(function(*args))

                def run():
                    return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

                run()
            return run

        return start

    return {name: f if isinstance(f, str) else provider(f) for name, f in functions.items()}

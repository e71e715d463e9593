"""Peers of an op: the reference, eager and compiled, and the backends' implementations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.case import Outputs, Peer, Run
from dac_fast import ops
from dac_fast.ops import reference

# An op of any signature, and such a one or the reason why it cannot run.
Op = Callable[..., Any]
Function = Op | str


def functions(op: str, *args: Any, scripted: bool = False) -> dict[str, Function]:
    """The ways to compute an op on these arguments, the baseline first.

    Args:
        op: name in `dac_fast.ops`.
        args: of the op.
        scripted: whether TorchScript is one of the ways, as in the published package.
    """
    eager = getattr(reference, op)
    found: dict[str, Function] = {"eager": eager}
    if scripted:
        found["scripted"] = torch.jit.script(eager)
    found["compiled"] = torch.compile(eager, dynamic=False)
    return found | implementations(op, *args)


def implementations(op: str, *args: Any, **options: Any) -> dict[str, Function]:
    """The backends' functions for these arguments.

    On the CPU Triton is left out, whose interpreter is for tests.
    """
    return {
        backend: getattr(module, f"{op}_unsupported")(*args, **options) or getattr(module, op)
        for backend, module in ops.IMPLEMENTATIONS[op].items()
        if backend != "triton" or args[0].is_cuda
    }


def forward(functions: Mapping[str, Function], *args: Any) -> dict[str, Peer]:
    """Peers that call each function without gradients; the outputs are its tensors, flat."""

    def peer(function: Op) -> Peer:
        return lambda: Run(torch.no_grad()(lambda: tree_leaves(function(*args))))

    return {name: f if isinstance(f, str) else peer(f) for name, f in functions.items()}


def backward(
    functions: Mapping[str, Function],
    args: Sequence[Any],
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> dict[str, Peer]:
    """Peers that run the backward pass alone: the forward pass runs once, and its graph is kept.

    Args:
        functions: see `functions`.
        args: of each function.
        leaves: the tensors among them whose gradients are wanted.
        gradients: of the function's tensors, flat.
    """

    def peer(function: Op) -> Peer:
        def start() -> Run:
            # A compiled graph that donates its buffers could run backward only once.
            with torch._functorch.config.patch(donated_buffer=False):
                outputs = tree_leaves(function(*args))

                def run() -> Outputs:
                    return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

                run()
            return Run(run)

        return start

    return {name: f if isinstance(f, str) else peer(f) for name, f in functions.items()}

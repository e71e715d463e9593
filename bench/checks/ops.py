"""Whether a peer computes an op right, judged against float64.

The rule and its numbers are those of the tests, tests/tolerances.py.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.case import Check, Outputs
from bench.document import ROOT

Nested = TypeVar("Nested")


def doubles(arguments: Nested) -> Nested:
    """The same arguments, lists and dicts of them too, with every tensor in float64."""
    converted: Nested = tree_map_only(Tensor, Tensor.double, arguments)
    return converted


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest value of `exact` (float64)."""
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)).item()


def as_good_as(
    same_dtype: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype | None = None
) -> Check:
    """A check of outputs against float64, allowing for the error of PyTorch in the same dtype.

    Args:
        same_dtype: the reference's outputs for the inputs.
        exact: its outputs for them in float64.
        dtype: of the inputs, where outputs may have another one.
    Returns:
        a function of a peer's outputs and its precision, which does not matter here. The result is
        the largest relative error; where an output is further off than allowed, AssertionError is
        raised.
    """
    rule = _rule()

    def check(outputs: Outputs, precision: str) -> float:
        assert len(outputs) == len(exact), f"{len(outputs)} outputs, {len(exact)} expected"
        for actual, same, truth in zip(outputs, same_dtype, exact, strict=True):
            rule(actual, same, truth, dtype)
        return max(relative_error(a, e) for a, e in zip(outputs, exact, strict=True))

    return check


def _rule() -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location("tolerances", ROOT / "tests/tolerances.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rule: Callable[..., None] = module.assert_as_good_as
    return rule

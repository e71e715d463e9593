"""Whether a provider computes the right thing, judged before it is timed.

The rule and its numbers are those of the tests, tests/tolerances.py.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor


def _tolerances():
    path = Path(__file__).parents[2] / "tests" / "tolerances.py"
    spec = importlib.util.spec_from_file_location("tolerances", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value of `exact` (float64)."""
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)).item()


def as_good_as(
    same_dtype: Sequence[Tensor], exact: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], float]:
    """A check of outputs against float64 ones, allowing for what PyTorch in the same dtype gets wrong.

    Args:
        same_dtype: what the reference gives for the inputs.
        exact: what it gives for them in float64.
    Returns:
        a function of a provider's outputs (and its precision, which does not matter) that returns the largest relative
        error, and raises AssertionError where an output is further off than the rule allows.
    """
    rule = _tolerances().assert_as_good_as

    def check(outputs, _precision=None):
        assert len(outputs) == len(exact), f"{len(outputs)} outputs, {len(exact)} expected"
        for actual, same, truth in zip(outputs, same_dtype, exact, strict=True):
            rule(actual, same, truth)
        return max(relative_error(a, e) for a, e in zip(outputs, exact, strict=True))

    return check

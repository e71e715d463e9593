"""The one table of numerical tolerances, and the rule that uses it (see CONTRIBUTING.md).

A kernel's error against a float64 reference on the same rounded inputs may be at most twice that of
PyTorch in the same dtype, plus a floor relative to the reference's largest value.
"""

import torch

# Of minimal filtering, in float32: its products are of sums of rows and of taps, of which a part
# cancels out again.
MINIMAL_FILTERING = 4e-6
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_good_as(actual, same_dtype, exact, dtype=None, floor=None):
    """`actual` is at most twice as far from `exact` as `same_dtype`, plus the dtype's floor."""
    dtype = dtype or actual.dtype
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    error = (actual.double() - exact).abs().max().item()
    allowed = (
        2 * (same_dtype.double() - exact).abs().max().item()
        + (floor or FLOOR[dtype]) * exact.abs().max().item()
    )
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g} ({dtype})"

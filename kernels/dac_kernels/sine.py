# ruff: noqa: N803 (constants of a kernel are in capitals)
"""Sine and cosine of Triton's Snake, up to the sign that both have in common.

sin^2 and sin cos have period pi, so alpha x is reduced to r in [-pi/2, pi/2] by
the nearest multiple of pi. That multiple is subtracted in two pieces (Cody and Waite), the first
one exactly, and from the unrounded product by a fused multiply-add; the pieces are pi to 5e-12. On
r, sin is an odd polynomial of degree 9 (relative error 5e-9 before rounding) and cos an even one of
degree 8 (error 6e-8). For |alpha x| <= 1e4 the error of sin^2 is below 4e-7 where fma fuses, as on
every GPU; where fma rounds the product first, 1.2e-7 |alpha x| is added, as in PyTorch's own fp32.
For larger |alpha x| the error grows, but sin^2 stays in [0, 1], so y is off by at most 1 / beta.
The compiler's own sine is not used: its full-range path spills to local memory.

Where the result has 16 bits, the GPU's own approximations take the place of the polynomials. On
[-pi/2, pi/2] they are off by at most 2^-20.5 (PTX ISA, sin.approx), and r is what a single product
leaves, off by 1.3e-7 |alpha x|. So y is off by at most 1.5e-6 |x| + 4.6e-13 / alpha before it is
rounded, while rounding to float16 alone costs up to 4.9e-4 |y|.
"""

# Strings as annotations: without Triton, `tl.constexpr` must not be looked up.
from __future__ import annotations

from typing import no_type_check

from dac_kernels.launch import INTERPRETED, jit, tl


@jit
@no_type_check
def _reduced(x, alpha, SINGLE: tl.constexpr):
    # alpha x minus the nearest multiple of pi. Adding and subtracting 1.5 * 2^23 rounds to the
    # nearest integer; 3.140625 has 8 significant bits, so its product with that integer is exact.
    half_turns = alpha * 0.3183098861837907
    k = tl.fma(x, half_turns, 12582912.0) - 12582912.0
    if not SINGLE:
        return tl.fma(x, half_turns, -k) * 3.141592653589793
    r = tl.fma(x, alpha, k * -3.140625)
    return tl.fma(k, -0.0009676535846665502, r)


@jit
@no_type_check
def _sine(r):
    u = r * r
    p = tl.fma(u, 2.6089039693033556e-06, -0.00019811101083178073)
    p = tl.fma(u, p, 0.008333087898790836)
    p = tl.fma(u, p, -0.16666659712791443)
    return tl.fma(r * u, p, r)


@jit
@no_type_check
def _cosine(r):
    u = r * r
    p = tl.fma(u, 2.319407394679729e-05, -0.001385591458529234)
    p = tl.fma(u, p, 0.041663989424705505)
    p = tl.fma(u, p, -0.4999993145465851)
    return tl.fma(u, p, 1.0)


if INTERPRETED:
    # The interpreter has no such instructions. These are as wrong as the instructions may be.
    @jit
    @no_type_check
    def _fast_sine(r):
        wrong = tl.where(r == 0.0, 0.0, tl.where(r < 0.0, -6.7e-07, 6.7e-07))
        return _sine(tl.clamp(r, -1.6, 1.6, propagate_nan=tl.PropagateNan.ALL)) + wrong

    @jit
    @no_type_check
    def _fast_cosine(r):
        return _cosine(tl.clamp(r, -1.6, 1.6, propagate_nan=tl.PropagateNan.ALL)) + 6.7e-07

else:

    @jit
    @no_type_check
    def _fast_sine(r):
        return tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [r], dtype=tl.float32, is_pure=True, pack=1
        )

    @jit
    @no_type_check
    def _fast_cosine(r):
        return tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [r], dtype=tl.float32, is_pure=True, pack=1
        )


@jit
@no_type_check
def squared_sine(x, alpha, SINGLE: tl.constexpr):
    """sin(alpha x)^2 in float32; less exactly for results of 16 bits, not SINGLE."""
    r = _reduced(x, alpha, SINGLE)
    if not SINGLE:
        sine = _fast_sine(r)
        return sine * sine
    sine = _sine(r)
    # Where the reduction has lost all precision the polynomial leaves [-1, 1]; NaN must pass.
    return tl.minimum(sine * sine, 1.0, propagate_nan=tl.PropagateNan.ALL)


@jit
@no_type_check
def sine_and_cosine(x, alpha, SINGLE: tl.constexpr):
    """Of alpha x, in float32; less exactly for results of 16 bits, not SINGLE."""
    r = _reduced(x, alpha, SINGLE)
    if not SINGLE:
        return _fast_sine(r), _fast_cosine(r)
    # Where the reduction has lost all precision both must still be bounded; NaN must pass.
    r = tl.clamp(r, -1.6, 1.6, propagate_nan=tl.PropagateNan.ALL)
    return _sine(r), _cosine(r)

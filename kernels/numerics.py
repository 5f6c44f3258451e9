"""Device functions shared by the head kernels: the logit transform, log1p, tanh, and the online softmax statistics.

The statistics of one row are carried as numbers relative to `top`, the largest logit seen so far:
    tail     = sum_v exp(z_v - top), the top's own term (which is exactly 1) left out
    weighted = sum_v exp(z_v - top) * (top - z_v)
    squares  = sum_v exp(z_v - top)^2, the top's own term left out
    first    = the lowest column that holds `top`
Then log_sum = log1p(tail): a confident row keeps its whole tail, which 1 + tail would round away; and every term of
`weighted` is >= 0, so nothing cancels in entropy = log_sum + weighted / (1 + tail).
"""

import triton
import triton.language as tl

TANH_SWITCH = tl.constexpr(0.55)


@triton.jit
def log1p(x):
    """log(1 + x), x >= 0 and finite: the rounding of u = 1 + x is undone by the factor x / (u - 1)."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def tanh(x):
    """Within 3 ulp: an odd polynomial (least squares on Chebyshev nodes) below 0.55, 1 - 2 / (exp(2|x|) + 1) above."""
    a = tl.abs(x)
    t = x * x
    p = -0.00608550850301981 * t + 0.020943637937307358
    p = p * t - 0.0538233257830143
    p = p * t + 0.13332343101501465
    p = p * t - 0.3333331346511841
    near = x + x * t * p
    # exp(-2a) never overflows: (1 - e) / (1 + e) = 1 - 2e / (1 + e).
    e = tl.exp(-2.0 * a)
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(a < TANH_SWITCH, near, tl.where(x < 0.0, -far, far))


@triton.jit
def to_logits(raw, inner, outer, SOFTCAP: tl.constexpr):
    """h.W + b -> (z, t): z = outer * t with t = tanh(inner * raw), or z = outer * raw and t = raw without softcap."""
    if SOFTCAP:
        t = tanh(raw * inner)
    else:
        t = raw
    return t * outer, t


@triton.jit
def fold_tile(
    z, col, top, tail, first, weighted, squares, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, ARGMAX: tl.constexpr
):  # fmt: skip
    """Fold logits z [R, C] of columns col [C] (-inf outside the vocabulary) into the carried statistics, each [R]."""
    peak = tl.max(z, 1)
    where_peak = tl.min(tl.where(z == peak[:, None], col[None, :], 2147483647), 1)
    higher = peak > top
    new_top = tl.maximum(top, peak)
    # A row of nothing but -inf so far: any finite base gives exp(-inf) = 0 and no NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    scale = tl.exp(top - base)
    z -= base[:, None]
    e = tl.exp(z)
    # The new top's own term stays out of the tail; the old top's term, 1 * scale, joins it.
    rest = tl.where(higher[:, None] & (col[None, :] == where_peak[:, None]), 0.0, e)
    if ENTROPY:
        shift = tl.where(top == float("-inf"), 0.0, base - top)
        weighted = scale * (weighted + shift * (1.0 + tail))
        # e underflows to 0 long before -1000: the bound only keeps 0 * -inf from being NaN.
        weighted -= tl.sum(rest * tl.maximum(z, -1000.0), 1)
    joined = tl.where(higher, scale, 0.0)
    if SQUARES:
        squares = squares * scale * scale + joined * joined + tl.sum(rest * rest, 1)
    tail = tail * scale + joined + tl.sum(rest, 1)
    if ARGMAX:
        first = tl.where(higher, where_peak, first)
    return new_top, tail, first, weighted, squares


@triton.jit
def merge(top, tail, first, weighted, squares, top2, tail2, first2, weighted2, squares2):
    """Join the statistics of two column ranges, the second to the right of the first; each [R]."""
    higher = top2 > top
    hi = tl.where(higher, top2, top)
    lo = tl.where(higher, top, top2)
    gap = tl.where(lo == float("-inf"), 0.0, hi - lo)
    scale = tl.where(lo == float("-inf"), 0.0, tl.exp(-gap))
    tail_hi, tail_lo = tl.where(higher, tail2, tail), tl.where(higher, tail, tail2)
    w_hi, w_lo = tl.where(higher, weighted2, weighted), tl.where(higher, weighted, weighted2)
    s_hi, s_lo = tl.where(higher, squares2, squares), tl.where(higher, squares, squares2)
    out_tail = tail_hi + scale * (1.0 + tail_lo)
    out_weighted = w_hi + scale * (w_lo + gap * (1.0 + tail_lo))
    out_squares = s_hi + scale * scale * (1.0 + s_lo)
    return hi, out_tail, tl.where(higher, first2, first), out_weighted, out_squares


@triton.jit
def to_dlogits(
    z, t, hit, top, rise, fall, at_target, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr
):  # fmt: skip
    """dL/d(h.W + b) from logits z [R, C]: e (rise - fall (z - top)), at_target [R] where hit, e = exp(z - top)."""
    # top = -inf: the whole row is undefined, and rise is NaN already.
    z -= top[:, None]
    d = tl.exp(z)
    if ENTROPY:
        # Only where e = 0 is z below -1000: the bound keeps 0 * -inf from being NaN.
        d *= rise[:, None] - fall[:, None] * tl.maximum(z, -1000.0)
    else:
        d *= rise[:, None]
    d = tl.where(hit, at_target[:, None], d)
    if SOFTCAP:
        d *= 1.0 - t * t
    return d

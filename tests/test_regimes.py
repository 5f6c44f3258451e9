"""Where fused heads go wrong: confident, flat, negative, shifted, huge and masked logits, hot and cold temperatures.

Every cell: log-probs <= 0, entropy in [0, log V], nothing NaN, and rule 7 for outputs and gradients.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import DIFFERENTIABLE, Problem, assert_as_accurate, assert_same, plain_run, problem
from test_operators import DTYPES, check_accurate, check_exact, ours_run

from fastrl import linear_logprobs

EACH_ROW_WORK = True
N, H, V = 24, 32, 101


def random(dtype, scale=1.0, **options) -> Problem:
    return problem(n=N, h=H, v=V, dtype=dtype, scale=scale, **options)


def confident(dtype, rest: float) -> Problem:
    """p_target = 1 - rest on every row: each hidden state points at its target's weight, as far as it takes."""
    p = problem(n=N, h=H, v=V, dtype=torch.float64)
    direction = p.weight[p.targets]
    low, high = torch.zeros(N, 1, dtype=torch.float64), torch.full((N, 1), 200.0, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        z = (middle * direction) @ p.weight.t()
        left = 1 - z.softmax(-1).gather(1, p.targets[:, None])
        low, high = torch.where(left > rest, middle, low), torch.where(left > rest, high, middle)
    p.hidden, p.weight = (high * direction).to(dtype), p.weight.to(dtype)
    return p


def shifted(dtype, offset: float) -> Problem:
    p = random(dtype, bias=True)
    p.bias = (p.bias + offset).to(dtype)
    return p


def shifted_by_a_feature(dtype, offset: float) -> Problem:
    """A common offset that comes out of the GEMM, as a dominant hidden feature makes it."""
    p = random(dtype)
    p.hidden[:, 0], p.weight[:, 0] = offset / 64, 64
    return p


def masked(dtype, target_too: bool) -> Problem:
    """A masked vocabulary: half of the columns at -inf, some targets among them."""
    p = random(dtype, bias=True)
    p.bias[::2] = -math.inf
    odd = p.targets - (p.targets % 2 == 0).long()
    p.targets = odd.clamp(min=1)
    if target_too:
        p.targets[::5] = 4
    return p


REGIMES = {
    "random": random,
    **{f"confident_{rest:g}": lambda d, r=rest: confident(d, r) for rest in (0.1, 1e-2, 1e-3, 1e-6)},
    "flat": lambda d: random(d, 1e-4),
    "exactly_flat": lambda d: random(d, 0.0),
    "all_negative": lambda d: shifted(d, -1e3),
    "offset_plus": lambda d: shifted(d, 1e4),
    "offset_minus": lambda d: shifted(d, -1e4),
    "feature_plus": lambda d: shifted_by_a_feature(d, 1e4),
    "feature_minus": lambda d: shifted_by_a_feature(d, -1e4),
    **{f"scale_{s}": lambda d, s=s: random(d, float(s)) for s in (5, 40, 640)},
    "inf_columns": lambda d: masked(d, False),
    "inf_targets": lambda d: masked(d, True),
    **{f"temperature_{t:g}": lambda d, t=t: random(d, temperature=t) for t in (1e-2, 0.1, 10.0, 1e2)},
    "softcapped": lambda d: random(d, 20.0, softcap=30.0),
    "saturated": lambda d: random(d, 100.0, softcap=10.0),
}


def check_regime(name: str, dtype: torch.dtype) -> None:
    p = REGIMES[name](dtype)
    stats, grads = ours_run(p, workspace_bytes=V * 8 * 9)
    assert (stats.logprobs <= 0).all()
    assert (stats.entropy >= 0).all()
    # log V rounded to the output's own dtype is the largest entropy that can be told from it.
    assert (stats.entropy <= torch.tensor(math.log(V), dtype=stats.entropy.dtype)).all()
    for x in (stats.entropy, stats.logsumexp, *grads):
        assert x is None or x.isfinite().all()
    assert (stats.logprobs == -math.inf).sum() == (len(range(0, N, 5)) if name == "inf_targets" else 0)
    if dtype == torch.float64:
        # The truth itself loses digits: of 1 - p where p is near 1, of everything where logits are in the hundreds.
        check_exact(p, tolerance=1e-6 if name == "scale_640" else 1e-9)
    else:
        check_accurate(p)


# Where materialised float16 logits overflow there is no torch error to compare with; the next test takes those.
CELLS = [
    (regime, dtype)
    for regime in REGIMES
    for dtype in DTYPES
    if dtype != "fp16" or regime not in ("scale_640", "feature_plus", "feature_minus")
]


@pytest.mark.parametrize("regime,dtype", CELLS)
def test_regime(regime, dtype):
    check_regime(regime, DTYPES[dtype])


@pytest.mark.parametrize("scale", [640.0, 2000.0])
def test_logits_that_overflow_float16_do_not_overflow_here(scale):
    p = random(torch.float16, scale)
    stats, grads = ours_run(p)
    truth, true_grads = plain_run(p, torch.float64)
    plain, _ = plain_run(p, torch.float32)
    for n in DIFFERENTIABLE:
        assert_as_accurate(n, getattr(stats, n), plain[n], truth[n], 1.5)
    for g, t in zip(grads[:2], true_grads[:2], strict=True):
        assert_same("gradient", g, t, 2e-3)


@pytest.mark.parametrize("rest", [1e-3, 1e-6, 1e-9])
def test_confident_tokens_keep_their_digits(rest):
    """log p and the true class's gradient stay accurate, row by row, where 1 - p is far below the float32 epsilon."""
    check_confident(rest)


def check_confident(rest: float) -> None:
    p = confident(torch.float32, rest)
    stats, grads = ours_run(p, ("logprobs",), outputs=("logprobs", "entropy"))
    truth, true_grads = plain_run(p, torch.float64, ("logprobs",))
    for n in ("logprobs", "entropy"):
        assert (getattr(stats, n) / truth[n] - 1).abs().max() < 1e-4
    assert ((grads[0] - true_grads[0]).norm(dim=1) / true_grads[0].norm(dim=1)).max() < 1e-4


@pytest.mark.parametrize("offset", [-1e4, -512.0, 512.0, 1e4])
def test_a_common_offset_changes_nothing_bitwise(offset):
    """Logits on a grid that float32 holds exactly with the offset added: only logsumexp may move, by the offset."""
    check_offset(offset)


def check_offset(offset: float) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-4, 5, (N, 4), generator=g) / 4.0
    weight = torch.randint(-4, 5, (V, 4), generator=g) / 4.0
    upstream = problem(n=N).upstream
    base = Problem(hidden, weight, torch.randint(0, V, (N,), generator=g), torch.zeros(V), {}, upstream)
    moved = Problem(hidden, weight, base.targets, torch.full((V,), offset), {}, upstream)
    (a, grads), (b, moved_grads) = ours_run(base), ours_run(moved)
    assert torch.equal(a.logprobs, b.logprobs) and torch.equal(a.entropy, b.entropy)
    assert torch.allclose(a.logsumexp + offset, b.logsumexp, rtol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(grads, moved_grads, strict=True))


def test_probabilities_sum_to_one_at_any_scale():
    """sum_v exp(log p_v) = 1, asked word by word: forward and normaliser agree however large the logits."""
    for scale in (1.0, 40.0, 640.0):
        p = random(torch.float32, scale)
        every = torch.arange(V).repeat(N)
        stats = linear_logprobs(p.hidden.repeat_interleave(V, 0), p.weight, every)
        total = stats.logprobs.double().exp().view(N, V).sum(1)
        assert (total - 1).abs().max() < 1e-5


def test_per_token_temperatures_from_cold_to_hot():
    for dtype, check in (
        (torch.float64, check_exact),
        (torch.float32, check_accurate),
        (torch.bfloat16, check_accurate),
    ):
        p = random(dtype)
        p.options["temperature"] = torch.logspace(-2, 2, N, dtype=torch.float64)
        check(p)

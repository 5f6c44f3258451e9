"""The clipped surrogate's kernel against its definition in fastrl/losses/policy.py, by autograd in float64."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import assert_as_accurate, assert_same
from test_triton import DEVICE, Tampered

pytest.importorskip("triton")
from fastrl import losses  # noqa: E402
from fastrl.kernels import launch, policy_loss, tiles  # noqa: E402
from fastrl.objective import value_of, weighted_sum  # noqa: E402
from fastrl.ops import fused_loss, policy_kernel  # noqa: E402
from fastrl.ops.policy_kernel import coefficients, metric_sums  # noqa: E402
from fastrl.tokens import TokenBatch, TokenStats  # noqa: E402

BLOCK = tiles.VECTORS["interpreter"].columns
RANGE = BLOCK * policy_loss.STEPS  # tokens of one program
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on values that a tl.where then drops
LAWS = {
    "ppo": losses.get("ppo_clip"),
    "grpo_k3": losses.get("grpo", kl_coef=0.04),
    "dapo_k2_entropy": losses.get("dapo", kl_coef=0.3, kl="k2", entropy_coef=0.01),
    "dapo_k1": losses.get("dapo", kl_coef=-0.3, kl="k1"),
    "dr_grpo_dual": losses.get("dr_grpo", dual_clip=2.5, max_length=9, entropy_coef=-0.2),
    "everything": losses.get("ppo_clip", clip_low=0.1, clip_high=0.4, dual_clip=1.7, kl_coef=0.7, entropy_coef=0.3),
    "no_lower_bound": losses.get("ppo_clip", clip_low=1.0, clip_high=0.0, kl_coef=1e-3),
}


def inputs(t: int, seed: int = 0, spread: float = 0.6, old: bool = True, ref: bool = True):
    """(stats, batch, weights) of float32 [T]; some advantages and weights are exactly 0."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda: torch.randn(t, generator=g)  # noqa: E731
    logprobs = -torch.rand(t, generator=g) * 4
    weights = torch.rand(t, generator=g, dtype=torch.float64) / max(t, 1)
    weights[3::7] = 0.0
    advantages = randn()
    advantages[2::9] = 0.0
    gap = randn() * torch.tensor([1e-4, 1e-2, 1.0]).repeat(t)[:t]  # small gaps as well: k3 cancels there
    batch = TokenBatch(
        targets=torch.zeros(t, dtype=torch.long),
        advantages=advantages,
        old_logprobs=logprobs - spread * randn() if old else None,
        ref_logprobs=logprobs - gap if ref else None,
    )
    stats = TokenStats(logprobs=logprobs, entropy=torch.rand(t, generator=g) * 5)
    return stats.map(lambda x: x.to(DEVICE)), batch.to(DEVICE), weights.to(DEVICE)


def widened(batch: TokenBatch, dtype: torch.dtype) -> TokenBatch:
    names = ("advantages", "old_logprobs", "ref_logprobs")
    return dataclasses.replace(batch, **{n: None if (x := getattr(batch, n)) is None else x.to(dtype) for n in names})


def plain(law, stats: TokenStats, batch: TokenBatch, weights, dtype):
    """(loss, c, h or None) of the definition, by autograd in dtype; rows of weight 0 taken out first."""
    used = (weights != 0).nonzero().squeeze(1)
    leaves = [x.to(dtype).detach().requires_grad_() for x in (stats.logprobs, stats.entropy)]
    cu = torch.tensor([0, used.shape[0]], device=weights.device)
    own = TokenStats(logprobs=leaves[0][used], entropy=leaves[1][used])
    loss = weighted_sum(
        value_of(law, own, widened(batch, dtype).select(used, cu), used.shape[0]), weights[used].to(dtype)
    )
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), *grads


def check(law, stats, batch, weights) -> None:
    loss, coefs = coefficients(law, stats, batch, weights)
    truth, ordinary = (plain(law, stats, batch, weights, d) for d in (torch.float64, torch.float32))
    assert loss.shape == () and loss.dtype == coefs.logprobs.dtype == torch.float32 and coefs.logsumexp is None
    size = float(plain_terms(law, stats, batch, weights))
    assert abs(float(loss) - float(truth[0])) <= 2e-7 * size + 2 * abs(float(ordinary[0]) - float(truth[0]))
    assert_as_accurate("c", coefs.logprobs, ordinary[1], truth[1], 2.0)
    assert (coefs.entropy is None) == (truth[2] is None) == (not law.entropy_coef)
    if truth[2] is not None:
        assert_as_accurate("h", coefs.entropy, ordinary[2], truth[2], 2.0)
    check_metrics(law, stats, batch, weights)


def plain_terms(law, stats, batch, weights):
    """sum_t |w value|: the size of what the loss adds up, by which its rounding is measured."""
    own = stats.map(lambda x: x.double())
    return (law(own, widened(batch, torch.float64)).abs() * weights).nan_to_num(0).sum()


def check_metrics(law, stats, batch, weights) -> None:
    made = metric_sums(law, stats, batch, weights)
    truth = law.metrics(stats.map(lambda x: x.double()), widened(batch, torch.float64))
    assert made.keys() == truth.keys()
    for name, value in truth.items():
        assert_same(name, made[name], value.double().sum(), 5e-7)


# -- values ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("t", [1, 50, RANGE, 2 * RANGE + 37])
def test_every_law(name, t):
    check(LAWS[name], *inputs(t, seed=t))


@pytest.mark.parametrize("t", [BLOCK - 1, BLOCK, BLOCK + 1, RANGE - 1, RANGE + 1, 5 * RANGE])
def test_ragged_lengths(t):
    check(LAWS["everything"], *inputs(t, seed=t))


@pytest.mark.parametrize("name", ["ppo", "everything"])
def test_without_old_log_probs_the_ratio_is_one_with_its_gradient(name):
    stats, batch, weights = inputs(70, old=False)
    check(LAWS[name], stats, batch, weights)
    if name == "ppo":
        c = coefficients(LAWS[name], stats, batch, weights)[1].logprobs
        assert torch.equal(c, torch.where(weights != 0, -batch.advantages * weights.float(), 0.0))


def test_without_a_reference():
    check(LAWS["ppo"], *inputs(70, ref=False))
    assert "kl" not in metric_sums(LAWS["ppo"], *inputs(70, ref=False))


def test_no_tokens():
    stats, batch, weights = inputs(0)
    loss, coefs = coefficients(LAWS["everything"], stats, batch, weights)
    assert float(loss) == 0 and coefs.logprobs.shape == coefs.entropy.shape == (0,)
    assert all(float(x) == 0 for x in metric_sums(LAWS["everything"], stats, batch, weights).values())


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_log_ratios_up_to_200_stay_finite(kl):
    law = losses.get("ppo_clip", kl_coef=0.1, kl=kl, clip_high=1e6, clip_low=1.0)
    stats, batch, weights = inputs(81, seed=4)
    gaps = torch.linspace(-200, 199.3, 81, device=DEVICE)  # never 40, where the tangent begins
    batch.old_logprobs, batch.ref_logprobs = stats.logprobs - gaps, stats.logprobs + gaps.roll(17)
    loss, coefs = coefficients(law, stats, batch, weights)
    truth = plain(law, stats, batch, weights, torch.float64)
    assert loss.isfinite() and coefs.logprobs.isfinite().all()
    assert_same("loss", loss, truth[0], 1e-5)
    # Each on its own scale: c runs from 1e-80 to e^40. Its two terms may cancel: they are measured apart.
    alone = dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages))
    kl = plain(law, stats, alone, weights, torch.float64)[1]
    size = kl.abs() + (truth[1] - kl).abs()
    assert ((coefs.logprobs.double() - truth[1]).abs() <= 5e-5 * size + 1e-30).all()


def test_k3_near_zero_keeps_its_digits():
    law = losses.get("ppo_clip", kl_coef=1.0)
    stats, batch, weights = inputs(60)
    batch.advantages.zero_()
    gaps = torch.logspace(-6, -0.2, 60, device=DEVICE) * torch.tensor([1.0, -1.0], device=DEVICE).repeat(30)
    stats.logprobs.zero_()
    batch.ref_logprobs = -gaps
    batch.old_logprobs = torch.zeros_like(gaps)
    _, coefs = coefficients(law, stats, batch, weights + 0.1)
    truth = plain(law, stats, batch, weights + 0.1, torch.float64)
    assert ((coefs.logprobs.double() / truth[1]) - 1).abs().max() < 1e-6
    kl = metric_sums(law, stats, batch, weights)["kl"]
    assert_same("kl", kl, (torch.expm1(-gaps.double()) + gaps.double()).sum(), 1e-6)


def test_on_a_tie_the_unclipped_branch_keeps_its_gradient():
    law = LAWS["ppo"]
    d = torch.tensor([math.log1p(0.2), math.log1p(-0.2)], dtype=torch.float32, device=DEVICE).repeat(2)
    step = torch.tensor([1.0, 1.0, 1 + 2**-22, 1 + 2**-22], device=DEVICE)  # the next ones are clipped
    batch = TokenBatch(
        targets=torch.zeros(4, dtype=torch.long, device=DEVICE),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0], device=DEVICE),
        old_logprobs=-d * step,
    )
    stats = TokenStats(logprobs=torch.zeros(4, device=DEVICE))
    _, coefs = coefficients(law, stats, batch, torch.ones(4, device=DEVICE))
    assert (coefs.logprobs != 0).tolist() == [True, True, False, False]


# -- rows ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_of_weight_zero_contribute_nothing(bad):
    law, (stats, batch, weights) = LAWS["everything"], inputs(2 * BLOCK)
    loss, coefs = coefficients(law, stats, batch, weights)
    idle = weights == 0
    for x in (stats.logprobs, stats.entropy, batch.old_logprobs, batch.ref_logprobs, batch.advantages):
        x[idle] = bad
    again, other = coefficients(law, stats, batch, weights)
    assert torch.equal(again, loss)
    assert torch.equal(other.logprobs, coefs.logprobs) and torch.equal(other.entropy, coefs.entropy)
    assert not other.logprobs[idle].any() and idle.any()


def test_a_nan_stays_in_its_row_and_reaches_the_loss():
    law, (stats, batch, weights) = LAWS["everything"], inputs(200)
    _, clean = coefficients(law, stats, batch, weights)
    row = int((weights != 0).nonzero()[5])
    stats.logprobs[row] = math.nan
    loss, coefs = coefficients(law, stats, batch, weights)
    assert loss.isnan() and coefs.logprobs.isnan().nonzero().tolist() == [[row]]
    others = torch.arange(200, device=DEVICE) != row
    assert torch.equal(coefs.logprobs[others], clean.logprobs[others])


def test_windows_give_the_same_coefficients_and_runs_repeat_bitwise():
    law, (stats, batch, weights) = LAWS["everything"], inputs(3 * RANGE + 5)
    loss, whole = coefficients(law, stats, batch, weights)
    again, same = coefficients(law, stats, batch, weights)
    assert torch.equal(loss, again) and torch.equal(whole.logprobs, same.logprobs)
    parts = []
    for a in range(0, 3 * RANGE + 5, 111):
        b = min(a + 111, 3 * RANGE + 5)
        own = stats.map(lambda x, a=a, b=b: x[a:b])
        parts.append(coefficients(law, own, batch.window(a, b), weights[a:b]))
    assert torch.equal(torch.cat([c.logprobs for _, c in parts]), whole.logprobs)
    assert_same("loss", torch.stack([x for x, _ in parts]).sum(), loss, 1e-5)


def test_advantages_per_sequence_strided_vectors_and_half_precision():
    law, (stats, batch, weights) = LAWS["everything"], inputs(90)
    batch.cu_seqlens = torch.tensor([0, 40, 40, 90], device=DEVICE)
    batch.advantages = torch.tensor([0.5, 9.0, -1.5], device=DEVICE)
    loss, coefs = coefficients(law, stats, batch, weights)
    spread = dataclasses.replace(batch, advantages=batch.token_advantages)
    check(law, stats, spread, weights)
    twice = lambda x: torch.stack([x, x + 1], 1)[:, 0]  # noqa: E731
    own = TokenStats(logprobs=twice(stats.logprobs), entropy=twice(stats.entropy))
    moved = dataclasses.replace(spread, old_logprobs=twice(batch.old_logprobs), ref_logprobs=twice(batch.ref_logprobs))
    again, other = coefficients(law, own, moved, twice(weights))
    assert torch.equal(again, loss) and torch.equal(other.logprobs, coefs.logprobs)
    half = dataclasses.replace(spread, old_logprobs=batch.old_logprobs.bfloat16(), ref_logprobs=None)
    check(LAWS["ppo"], stats, half, weights)


# -- who is taken ----------------------------------------------------------------------------------------------------
class OwnCall(losses.policy.PPOClip):
    def __call__(self, stats, batch):
        return 2 * super().__call__(stats, batch)


class OwnLoss(losses.DAPO):
    def policy_loss(self, stats, batch):
        return -batch.token_advantages * stats.logprobs


class OwnBounds(losses.GRPO):
    def bounds(self, d, advantages):
        above, below, dual = super().bounds(d, advantages)
        return below, above, dual


@dataclasses.dataclass(frozen=True)
class OwnNumbers(losses.policy.PPOClip):
    clip_high: float = 0.5


def test_only_the_very_law_is_taken():
    given = inputs(20)
    own_function = lambda stats, batch: -stats.logprobs  # noqa: E731
    for other in (OwnCall(), OwnLoss(), OwnBounds(), losses.get("reinforce"), losses.get("nll"), own_function):
        assert coefficients(other, *given) is None and metric_sums(other, *given) is None
    check(OwnNumbers(), *given)


def test_what_the_kernel_does_not_hold_is_left_to_the_plain_law(monkeypatch):
    law, (stats, batch, weights) = LAWS["everything"], inputs(20)
    assert coefficients(law, stats.map(lambda x: x.double()), batch, weights) is None
    assert coefficients(law, stats, widened(batch, torch.float64), weights) is None
    assert coefficients(law, stats, dataclasses.replace(batch, ref_logprobs=None), weights) is None
    assert coefficients(law, TokenStats(logprobs=stats.logprobs), batch, weights) is None
    with pytest.raises(ValueError, match="needs batch.advantages"):
        coefficients(law, stats, dataclasses.replace(batch, advantages=None), weights)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    assert coefficients(law, stats.map(lambda x: x.cpu()), batch.to("cpu"), weights.cpu()) is None


def test_without_a_gpu_triton_is_not_even_loaded():
    code = """
import sys, torch
from fastrl import losses, ops
from fastrl.ops.policy_kernel import coefficients, metric_sums
from fastrl.tokens import TokenBatch, TokenStats
x = torch.zeros(3)
batch = TokenBatch(targets=x.long(), advantages=x)
given = losses.get("grpo"), TokenStats(logprobs=x), batch, x
assert coefficients(*given) is None and metric_sums(*given) is None
assert "triton" not in sys.modules
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["grpo_k3", "dapo_k2_entropy", "everything"])
def test_fused_loss_is_the_same_with_and_without_the_kernel(name, monkeypatch):
    """Through the public door, in chunks of a few rows: the law by its kernel, and by autograd."""
    stats, batch, _ = inputs(30)
    g = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 16, generator=g).to(DEVICE) for n in (30, 33))
    with_kernel, launches = [], []
    own = policy_loss.policy_loss
    monkeypatch.setattr(policy_loss, "policy_loss", lambda *a, **k: launches.append(1) or own(*a, **k))
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(policy_kernel, "coefficients", lambda *a: None)
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = fused_loss(LAWS[name], *leaves, batch, backend="triton", workspace_bytes=64 * 8 * 9)
        with_kernel.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaves)))
        assert bool(launches) == kernel
        launches.clear()
    for label, ours, plain_ in zip(("loss", "d_hidden", "d_weight"), *with_kernel, strict=True):
        assert_same(label, ours, plain_, 1e-6)


def test_refusals():
    stats, batch, weights = inputs(20)
    law = policy_loss.Surrogate(0.1, -0.1, None, 1.1, 0.9, 1.0)
    with pytest.raises(ValueError, match=r"weights is \[19\].*T=20"):
        policy_loss.policy_loss(law, stats.logprobs, batch.advantages, weights[1:])
    with pytest.raises(ValueError, match="KL term needs ref"):
        policy_loss.policy_loss(dataclasses.replace(law, kl="k3"), stats.logprobs, batch.advantages, weights)


# -- planted mistakes ------------------------------------------------------------------------------------------------
MUTANTS = {
    "last token dropped": ("policy_loss_kernel", lambda n: {"T": n["T"] - 1}),
    "no dual clip": ("policy_loss_kernel", lambda n: {"DUAL": False}),
    "another KL": ("policy_loss_kernel", lambda n: {"KIND": 2}),
    "KL only reported": ("policy_loss_kernel", lambda n: {"KIND": 0}),
    "bounds swapped": ("policy_loss_kernel", lambda n: {"log_high": -n["log_low"], "log_low": -n["log_high"]}),
    "clipped ratio off": ("policy_loss_kernel", lambda n: {"ratio_low": n["ratio_high"]}),
    "old policy forgotten": ("policy_loss_kernel", lambda n: {"old": None}),
    "weights forgotten": ("policy_loss_kernel", lambda n: {"weights": torch.ones_like(n["weights"])}),
    "entropy sign": ("policy_loss_kernel", lambda n: {"entropy_coef": -n["entropy_coef"]}),
    "one block per program": ("policy_loss_kernel", lambda n: {"STEPS": 1}),
    "last program dropped": ("finish_sums_kernel", lambda n: {"P": n["P"] - 1}),
}


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_a_planted_mistake_is_noticed(mutant, monkeypatch):
    given = inputs(2 * RANGE + 37)
    if mutant is None:
        check(LAWS["everything"], *given)
        return
    name, change = MUTANTS[mutant]
    monkeypatch.setattr(policy_loss, name, Tampered(getattr(policy_loss, name), change))
    with pytest.raises(AssertionError):
        check(LAWS["everything"], *given)

"""KL estimators: value and gradient of each kind, what they estimate on average, and how they behave far out."""

from __future__ import annotations

import pytest
import torch
from harness import check_far, check_paper, check_step, world
from oracle import assert_same
from papers_policy import law_of

from fastrl import losses
from fastrl.losses.kl import CORRECTED, KINDS, PLAIN, STRAIGHT_THROUGH, kl_corrected, kl_estimate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def grid():
    logp = torch.linspace(-12, 0, 121, dtype=torch.float64, requires_grad=True)
    ref, old = (torch.linspace(a, b, 121, dtype=torch.float64) for a, b in ((-7, -0.53), (-4, -2.07)))
    return logp, ref, old


def value(kind, logp, ref, old):
    return kl_corrected(kind, logp, ref, old) if kind in CORRECTED else kl_estimate(kind, logp, ref)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind):
    logp, ref, old = grid()
    d, r = (logp - ref).detach(), torch.exp(logp - old).detach()
    k3 = torch.exp(-d) - 1 + d
    plain = {"k1": d, "k2": d**2 / 2, "k3": k3, "abs": d.abs()}
    want = {**plain, **{f"{k}+": plain[k] for k in ("k1", "k3", "abs")}, "is_k1": r * d, "is_k3": r * k3}
    slope = {"k1": torch.ones_like(d), "k2": d, "k3": 1 - torch.exp(-d), "abs": d.sign(), "is_k1": r * (d + 1)}
    slope |= {"is_k3": r * d, **dict.fromkeys(STRAIGHT_THROUGH, d)}
    got = value(kind, logp, ref, old)
    (g,) = torch.autograd.grad(got.sum(), logp)
    assert_same("value", got, want[kind], 1e-12)
    assert_same("gradient", g, slope[kind], 1e-12)


def test_small_divergences_keep_their_digits():
    d = torch.logspace(-6, -0.4, 40).repeat(2) * torch.tensor([[1.0], [-1.0]]).repeat_interleave(40, 1).view(-1)
    logp = d.clone().requires_grad_()
    got = kl_corrected("is_k3", logp, torch.zeros_like(d), torch.full_like(d, -0.1))
    x = d.double()
    want = torch.exp(x + 0.1) * (torch.expm1(-x) + x)
    (g,) = torch.autograd.grad(got.sum(), logp)
    assert ((got - want).abs() <= 1e-5 * want.abs() + 1e-16).all()
    assert (g / (torch.exp(x + 0.1) * x) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_loss(kind):
    options = {"kl_coef": 0.7, "kl": kind}
    check_paper("dapo", options, law_of("dapo"), world(1))
    check_step("grpo", options, world(2))
    check_far("grpo", options, lambda: world(3))


@pytest.mark.parametrize("kind", CORRECTED)
def test_corrected_kinds_stay_finite_where_the_policies_part_in_different_directions(kind):
    for gap_old in (200.0, -200.0, 1e4, -1e4):
        for gap_ref in (200.0, -200.0, 1e4, -1e4, 0.3):
            logp = torch.tensor([-1.0], requires_grad=True)
            got = kl_corrected(kind, logp, logp.detach() - gap_ref, logp.detach() - gap_old)
            (g,) = torch.autograd.grad(got.sum(), logp)
            assert got.isfinite().all() and g.isfinite().all(), (gap_old, gap_ref)


def test_without_old_logprobs_the_ratio_is_one_with_its_gradient():
    logp, ref, _ = grid()
    for kind in CORRECTED:
        a, b = kl_corrected(kind, logp, ref, None), kl_corrected(kind, logp, ref, logp.detach())
        assert_same(kind, a, b, 1e-15)
        assert_same(kind, *(torch.autograd.grad(x.sum(), logp)[0] for x in (a, b)), 1e-15)


# -- what they estimate ------------------------------------------------------------------------------------------------
def expectation(kind: str, sampled_from: str):
    """(mean value and gradient in the logits) over all tokens, drawn from old or the policy; the reverse KL and
    its gradient."""
    g = torch.Generator().manual_seed(0)
    z, zf, zo = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    logp, ref = z.log_softmax(0), zf.log_softmax(0)
    old = logp.detach() if sampled_from == "policy" else zo.log_softmax(0)
    mean = (old.exp() * value(kind, logp, ref, old)).sum()
    true = (logp.exp() * (logp - ref)).sum()
    return mean, *torch.autograd.grad(mean, z, retain_graph=True), true, *torch.autograd.grad(true, z)


def test_on_policy_means():
    for kind in ("k1", "k3", "k1+", "k3+", "is_k1", "is_k3"):
        mean, _, true, _ = expectation(kind, "policy")
        assert_same(kind, mean, true, 1e-12)
    for kind in ("k2", "k1+", "k3+", "abs+", "is_k1", "is_k3"):
        _, slope, _, true = expectation(kind, "policy")
        assert_same(f"gradient of {kind}", slope, true, 1e-12)
    assert expectation("k1", "policy")[1].abs().max() < 1e-12  # the reason why k1 in the loss is warned about
    _, slope, _, true = expectation("k3", "policy")
    assert (slope - true).abs().max() > 0.01


@pytest.mark.parametrize("kind", CORRECTED)
def test_corrected_kinds_hold_off_policy(kind):
    """r k3 has the reverse KL's gradient whatever sampled the token."""
    mean, slope, true, want = expectation(kind, "old")
    assert_same("value", mean, true, 1e-12)
    assert_same("gradient", slope, want, 1e-12)


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate("k4", torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="k3"):
        kl_corrected("k3", torch.zeros(1), torch.zeros(1), None)
    assert set(PLAIN) | set(STRAIGHT_THROUGH) | set(CORRECTED) == set(KINDS)
    with pytest.raises(ValueError, match="ref_logprobs"):
        from harness import batch_of

        from fastrl import fused_loss

        w = world()
        fused_loss(losses.get("grpo", kl_coef=0.1), w.hidden, w.weight, batch_of(w, ref_logprobs=None)[1])

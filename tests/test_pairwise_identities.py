"""What the formulas of the pairwise losses imply of one another, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from harness import ours
from oracle import assert_same, gradients
from test_losses_pairwise import make

from fastrl import Teacher, TokenBatch, loss_from_logprobs, losses

# -- what the formulas imply -------------------------------------------------------------------------------------------
SAME_AS_DPO = {
    "odpo": {"alpha": 0.0},
    "r_dpo": {"alpha": 0.0},
    "d2po": {"gamma": 1.0},
    "dpop": {"penalty": 0.0},
    "dpo_shift": {"f": 1.0},
    "xpo": {"alpha": 0.0},
    "selm": {"alpha": 0.0},
    "vpo": {"alpha": 0.0},
    "spin": {},
    "gpo": {"f": "logistic"},
    "adpo": {"confidence": 1e6},
    "beta_dpo": {"alpha": 0.0},
}


@pytest.mark.parametrize("name", SAME_AS_DPO)
def test_without_its_own_term_it_is_dpo(name):
    w = make(5)
    loss, grads, _ = ours(name, SAME_AS_DPO[name], w)
    want, true, _ = ours("dpo", {}, w)
    assert_same("loss", loss, want, 1e-12)
    for g, t in zip(grads, true, strict=True):
        assert_same("gradient", g, t, 1e-12)


def test_wide_limits_are_dpo():
    """fdpo that keeps all pairs, one domain, no other objective: plain DPO. Dr. DPO's soft maximum at b -> inf too."""
    w = make(6)
    w.per_sequence["policy_rewards"] = w.rewards - 1
    w.per_sequence["domain"] = torch.zeros(12)
    want = ours("dpo", {}, w)[0]
    for name, options in (("fdpo", {}), ("group_robust_dpo", {}), ("dr_dpo", {"beta_prime": 1e7})):
        assert_same(name, ours(name, options, w)[0], want, 1e-6)
    w.margins = torch.zeros(6, dtype=torch.float64)
    assert_same("modpo", ours("modpo", {"weight": 1.0}, w)[0], want, 1e-12)


def test_rebel_at_the_sampling_policy_is_a_relative_policy_gradient():
    """Without old log-probs the log-ratios are 0: gradient -2 beta (R - R') (grad log pi(y) - grad log pi(y'))."""
    logprobs = torch.randn(7, dtype=torch.float64).requires_grad_()
    batch = TokenBatch(
        torch.zeros(7, dtype=torch.long),
        cu_seqlens=torch.tensor([0, 3, 7]),
        rewards=torch.tensor([0.5, -1.0], dtype=torch.float64),
    )
    for name in ("rebel", "refuel"):
        loss = loss_from_logprobs(losses.get(name, beta=2.0), logprobs, batch).loss
        (g,) = torch.autograd.grad(loss, logprobs)
        assert loss.item() == 2.25
        assert torch.allclose(g, torch.tensor([-6.0] * 3 + [6.0] * 4, dtype=torch.float64))


def test_sampo_keeps_as_many_tokens_of_both_without_a_column():
    lengths = torch.tensor([5, 9, 4, 4, 0, 3, 12, 1])
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    batch = TokenBatch(torch.arange(38) * 7919 % 1000, cu_seqlens=cu)
    kept = losses.get("sampo").own_weights(batch)
    counts = torch.stack([x.sum() for x in kept.split(lengths.tolist())])
    assert counts.tolist() == [5, 5, 4, 4, 0, 0, 1, 1]
    other = losses.get("sampo", seed=1).own_weights(batch)
    assert not torch.equal(kept, other)
    again = losses.get("sampo").own_weights(batch.sequences(2, 8, 14, 38))
    assert torch.equal(again, kept[14:]), "the draw must not depend on where the sequence lies"


BAD = {
    "odpo": ({"f": "sqrt"}, "f is 'sqrt'; expected one of log, linear"),
    "modpo": ({"weight": 0.0}, r"weight must be in \(0.0, 1.0\], got 0.0"),
    "r_dpo": ({"alpha": math.nan}, "alpha must be finite, got nan"),
    "mallows_dpo": ({"dispersion": -1.0}, "dispersion must be in"),
    "d2po": ({"gamma": 1.5}, "gamma must be in"),
    "dmpo": ({"gamma": 0.0}, "gamma must be in"),
    "gpo": ({"f": "cubic"}, "f is 'cubic'"),
    "chi_po": ({"r_max": 0.0}, "r_max must be in"),
    "dpop": ({"penalty": math.inf}, "penalty must be finite"),
    "dil": ({"kind": "kl"}, "kind is 'kl'"),
    "bfpo": ({"b1": 1.0}, "b1 must be in"),
    "inpo": ({"tau_over_eta": 1.1}, "tau_over_eta must be in"),
    "nash_md": ({"beta": -0.1}, "beta must be in"),
    "dr_dpo": ({"use_weighting": True}, "use_weighting must be False"),
    "sppo": ({"beta": 0.0}, "beta must be in"),
    "mppo": ({"kind": "all"}, "kind is 'all'"),
    "exo": ({"reward_temperature": 0.0}, "reward_temperature must be in"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        losses.get(name, **options)


NEEDS = {
    "sppo": "win_rate",
    "nash_md": "win_rate",
    "xpo": "from_reference",
    "iw_dpo": "pair_weights",
    "dmpo": "turns",
    "mallows_dpo": "ref_entropy",
    "group_robust_dpo": "domain",
    "fdpo": "policy_rewards",
    "dro": "values",
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_column_is_named(name):
    w = make(7)
    for columns in (w.per_token, w.per_sequence):
        columns.pop(NEEDS[name], None)
    with pytest.raises(ValueError, match=NEEDS[name]):
        ours(name, {}, w)


def test_lists_of_two_are_the_pair_losses():
    """EXO and NCA of two answers with rewards log(1-e), log e, and a target that is the better answer alone."""
    g = torch.Generator().manual_seed(3)
    logp, ref = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
    cu = torch.tensor([0, 4, 9, 14, 20])
    rewards = torch.tensor([0.999, 0.001], dtype=torch.float64).log().repeat(2)
    batch = TokenBatch(
        torch.zeros(20, dtype=torch.long),
        cu_seqlens=cu,
        ref_logprobs=ref,
        rewards=rewards,
        group_ids=torch.tensor([3, 3, 1, 1]),
    )

    def loss(name, **options):
        return loss_from_logprobs(losses.get(name, beta=0.4, **options), logp, batch).loss

    assert_same("exo", loss("exo"), loss("exo_pair"), 1e-12)
    assert_same("nca", loss("nca", reward_temperature=1e-3), loss("nca_pair"), 1e-12)
    assert_same("listnet", loss("listnet", reward_temperature=1e-3), loss("dpo"), 1e-12)


# -- with the reference's whole distribution ---------------------------------------------------------------------------
def tdpo_paper(w, reference, options):
    """(loss, gradients) of TDPO from materialised logits of both models; the KL is taken token by token."""
    beta, version = options.get("beta", 0.1), options.get("version", 2)
    leaves = w.leaves()
    logp = torch.log_softmax(leaves[0] @ leaves[1].T, -1)
    logq = torch.log_softmax(reference.hidden @ reference.weight.T, -1)
    kl = (logq.exp() * (logq - logp)).sum(-1)
    values = []
    for p in range(len(w.lengths) // 2):
        both = []
        for i in (2 * p, 2 * p + 1):
            t = w.trained(i)
            own = (logp - logq)[t, w.targets[t]].sum()
            both.append((own, kl[t].sum()))
        (chosen, far_w), (rejected, far_l) = both
        gap = far_l - far_w if version == 1 else options.get("alpha", 0.5) * (far_l - far_w.detach())
        values.append(-torch.log(torch.sigmoid(beta * (chosen - rejected - gap))))
    loss = torch.stack(values).mean()
    return loss.detach(), gradients(loss, leaves)


@pytest.mark.parametrize("strategy", [None, "two_pass", "cached"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.6, "alpha": 0.9}, {"beta": 0.6, "version": 1}])
def test_tdpo_with_the_reference_as_the_teacher(options, strategy):
    w = make(9)
    g = torch.Generator().manual_seed(1)
    hidden = w.hidden + 0.4 * torch.randn(w.hidden.shape, generator=g, dtype=torch.float64)
    reference = Teacher(hidden, w.weight + 0.1)
    w.columns["ref"] = torch.log_softmax(hidden @ reference.weight.T, -1)[torch.arange(len(hidden)), w.targets]
    for how in ({"strategy": strategy}, {"strategy": strategy, "workspace_bytes": 2500}):
        loss, grads, metrics = ours("tdpo", options, w, teacher=reference, **how)
        want, true = tdpo_paper(w, reference, options)
        assert_same("loss", loss, want, 1e-9)
        for grad, t in zip(grads, true, strict=True):
            assert_same("gradient", grad, t, 1e-9)
        assert metrics["sequential_kl/chosen"] > 0


def test_tdpo_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="teacher"):
        ours("tdpo", {}, make(9))
    with pytest.raises(ValueError, match="version must be 1 or 2, got 3"):
        losses.get("tdpo", version=3)

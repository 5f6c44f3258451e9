"""Preference losses: each against its paper, against TRL's own code, and under every cut of the step."""

from __future__ import annotations

import math

import pytest
import torch
from harness import batch_of, check_accuracy, check_chunks, check_far, check_paper, check_step, ours, world
from oracle import assert_same, plain_statistics
from papers_preference import PAPERS

from fastrl import TokenBatch, TokenStats, fused_loss, loss_from_logprobs, losses
from fastrl.losses import kto, preference, reference_free
from fastrl.objective import scope_of
from fastrl.tokens import compact

NAMES = [*preference.PREFERENCE, *kto.UNPAIRED, *reference_free.REFERENCE_FREE]
DIVERGENCES = [{"f_divergence": k} for k in preference.F_DIVERGENCES[1:]]
CASES: dict[str, list[dict]] = {
    "dpo": [
        {}, {"beta": 0.7, "label_smoothing": 0.2}, {"beta": 2.0, "reference_free": True}, *DIVERGENCES,
        {"f_divergence": "alpha_divergence", "f_alpha": 1.7}, {"f_divergence": "alpha_divergence", "f_alpha": 1.0},
        {"ld_alpha": 0.3, "use_weighting": True, "margin_coef": 0.4},
        {"references": (("ref_logprobs", 0.6), ("second", 0.4))},
    ],
    "sigmoid_norm": [{}, {"beta": 2.0, "f_divergence": "js_divergence"}],
    "dpo_nll": [{}, {"nll_coef": 0.3, "label_smoothing": 0.1}],
    "robust": [{}, {"label_smoothing": 0.3, "beta": 1.0}],
    "hinge": [{}, {"beta": 1.5, "margin_coef": 1.0}],
    "ipo": [{}, {"beta": 0.5, "length_normalised": False}, {"f_divergence": "forward_kl", "use_weighting": True}],
    "exo_pair": [{}, {"beta": 0.8, "label_smoothing": 0.2}],
    "nca_pair": [{}, {"beta": 0.9, "use_weighting": True}],
    "bco_pair": [{}, {"beta": 0.9, "ld_alpha": 0.5}],
    "sppo_hard": [{}, {"beta": 1.0}],
    "apo_zero": [{}, {"beta": 0.9}],
    "apo_down": [{}, {"beta": 0.9}],
    "discopop": [{}, {"beta": 0.5, "tau": 0.8, "margin_coef": 0.2}],
    "aot": [{}, {"beta": 0.8, "label_smoothing": 0.2}, {"reference_free": True},
            {"length_normalised": True, "beta": 2.0}],
    "aot_unpaired": [{}, {"beta": 0.8, "label_smoothing": 0.2}, {"length_normalised": True, "beta": 2.0}],
    "sft": [{}],
    "simpo": [{}, {"beta": 2.5, "gamma": 1.4, "label_smoothing": 0.1, "margin_coef": 0.3}],
    "alphapo": [{}, {"alpha": -0.4, "beta": 1.0, "gamma": 0.0}, {"alpha": 0.1, "length_normalised": False},
                {"alpha": 0.0}],
    "cpo": [{}, {"kind": "hinge", "nll_coef": 0.0, "beta": 0.6}, {"kind": "ipo", "length_normalised": True},
            {"label_smoothing": 0.2, "nll_coef": 0.5}],
    "orpo": [{}, {"beta": 1.0, "nll_coef": 0.2}],
    "tpo": [{}, {"beta": 1.0, "gamma": 0.5, "length_normalised": True}, {"kind": "hinge", "nll_coef": 0.2},
            {"kind": "ipo", "beta": 0.5, "nll_coef": 0.0, "length_normalised": True}],
    "kto": [{}, {"beta": 0.8, "desirable_weight": 1.3, "undesirable_weight": 0.6}, {"reference_free": True}],
    "apo_zero_unpaired": [{}, {"beta": 0.8, "desirable_weight": 1.3}],
    "bco": [{}, {"beta": 0.8, "density_ratios": True}, {"delta": 0.4, "density_ratios": True,
            "min_density_ratio": 0.1, "max_density_ratio": 1.0}],
}  # fmt: skip
EVERY_CASE = [(name, i) for name in CASES for i in range(len(CASES[name]))]


def with_numbers(w, g) -> None:
    """A KL above 0 with one answer that has none, positive density ratios, labels of both sorts."""
    w.per_sequence["kl"] = w.per_sequence["kl"] + 1
    w.per_sequence["kl"][3] = math.nan
    w.per_sequence["density_ratio"] = w.per_sequence["density_ratio"].exp()
    w.labels[:2] = torch.tensor([True, False])


def world_of(name: str, seed: int = 0, dtype=torch.float64, **options):
    columns = {"per_sequence": ("kl", "density_ratio")} if name in kto.UNPAIRED else {}
    make = with_numbers if columns else None
    if any("references" in o for o in CASES[name]):
        columns["per_token"] = ("second",)
    return world(seed, dtype, make=make, **columns, **options)


def test_every_loss_has_a_case_and_a_paper():
    assert set(CASES) == set(NAMES) == set(PAPERS) and set(NAMES) <= set(losses.names())
    for name in NAMES:
        law = losses.law(name)
        assert law.paper and law.formula and scope_of(losses.get(name)) and law.__doc__


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_paper_formula(name, i):
    for seed in (0, 1):
        check_paper(name, CASES[name][i], PAPERS[name], world_of(name, seed))


@pytest.mark.parametrize("name", CASES)
def test_chunks_and_strategies(name):
    check_chunks(name, CASES[name][-1], PAPERS[name], world_of(name, 2))


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_cuts_order_and_padding(name, i):
    check_step(name, CASES[name][i], world_of(name, 3))


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_policies_far_apart_stay_finite(name, i):
    check_far(name, CASES[name][i], lambda: world_of(name, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_rule7(name, dtype):
    check_accuracy(name, CASES[name][0], PAPERS[name], lambda seed, d: world_of(name, seed, d), dtype)


# -- what theory says of particular points -----------------------------------------------------------------------------
def flat(logp, ref=None, lengths=(2, 3), **fields) -> TokenBatch:
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return TokenBatch(torch.zeros(sum(lengths), dtype=torch.long), cu_seqlens=cu, ref_logprobs=ref, **fields)


LOG2 = math.log(2)
AT_REFERENCE = {  # loss where the policy is the reference, beta 0.1
    "dpo": LOG2, "sigmoid_norm": LOG2, "robust": LOG2, "hinge": 1, "ipo": 25, "nca_pair": 2 * LOG2,
    "bco_pair": 2 * LOG2, "sppo_hard": 50, "apo_zero": 1, "apo_down": 1, "discopop": LOG2 / 2 + 0.5, "aot": LOG2,
    "aot_unpaired": LOG2, "kto": 0.5, "apo_zero_unpaired": 0.5, "bco": LOG2,
}  # fmt: skip


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_at_the_reference(name):
    logp = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1], dtype=torch.float64, requires_grad=True)
    fields = {"labels": torch.tensor([True, False]), "per_sequence": {"kl": torch.zeros(2)}}
    out = loss_from_logprobs(losses.get(name), logp, flat(logp, logp.detach().clone(), **fields))
    assert_same("loss", out.loss, torch.tensor(AT_REFERENCE[name], dtype=torch.float64), 1e-12)
    [g] = torch.autograd.grad(out.loss, logp)
    if name not in ("apo_down", "discopop"):  # up with the chosen, down with the rejected
        assert (g[:2] <= 0).all() and (g[2:] >= 0).all()
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert out.metrics[metric] == 0


def test_divergences_agree_where_they_must():
    """alpha = 2 is t - 1, alpha = 0 is 1 - 1/t (forward_kl), alpha -> 1 is log t; near t = 1 all but js are log t."""
    u = torch.tensor([-3.0, -1e-6, 0.0, 1e-6, 2.0], dtype=torch.float64)
    of = lambda **o: losses.get("dpo", **o).transform(u)  # noqa: E731
    alpha = lambda a: of(f_divergence="alpha_divergence", f_alpha=a)  # noqa: E731
    assert_same("2", alpha(2.0), u.exp() - 1, 1e-12)
    assert_same("0", alpha(0.0), of(f_divergence="forward_kl"), 1e-12)
    assert_same("1", alpha(1 + 1e-9), of(), 1e-8)
    assert alpha(0.5)[3] == pytest.approx(1e-6, rel=1e-6)


def test_robust_is_unbiased_under_flips():
    """(1 - e) L(pair) + e L(pair flipped) of the corrected loss is DPO's loss, for every pair."""
    g = torch.Generator().manual_seed(0)
    logp, ref = torch.randn(2, 6, generator=g, dtype=torch.float64)
    e, straight, flipped = 0.3, flat(logp, ref, (2, 4)), flat(logp, ref.roll(-2), (4, 2))
    robust = losses.get("robust", label_smoothing=e, beta=0.9)
    mixed = (1 - e) * loss_from_logprobs(robust, logp, straight).loss
    mixed = mixed + e * loss_from_logprobs(robust, logp.roll(-2), flipped).loss
    assert_same("mean", mixed, loss_from_logprobs(losses.get("dpo", beta=0.9), logp, straight).loss, 1e-12)


def test_token_weights_and_references():
    """Weights of 0 drop a token; references that share one column at weights 0.3 and 0.7 are that column."""
    name, w = "dpo", world_of("dpo", 5)
    w.per_token["token_weights"] = torch.rand(len(w.targets), dtype=torch.float64, generator=torch.Generator())
    for options in ({}, {"ld_alpha": 0.4}, {"references": (("ref_logprobs", 0.5), ("second", -0.2))}):
        check_paper(name, options, PAPERS[name], w)
        check_step(name, options, w)
    for name in ("kto", "ipo", "simpo"):
        other = world_of(name, 5)
        other.per_token["token_weights"] = w.per_token["token_weights"]
        if name != "simpo":
            check_paper(name, {}, PAPERS[name], other)
    split = {"references": (("ref_logprobs", 0.3), ("ref_logprobs", 0.7))}
    assert_same("loss", *(ours("dpo", o, world_of("dpo", 5))[0] for o in ({}, split)), 1e-12)


def test_alphapo_of_long_answers_does_not_underflow():
    """p = e^-4000 is 0 in every dtype; the reward -expm1(alpha 4000)/alpha is not used up before it must be."""
    logp = torch.full((8,), -20.0).requires_grad_()
    objective = losses.get("alphapo", alpha=0.01, length_normalised=False)
    out = loss_from_logprobs(objective, logp, flat(logp, lengths=(4, 4)))
    [g] = torch.autograd.grad(out.loss, logp)
    assert out.loss.isfinite() and (g[:4] < 0).all() and (g[4:] > 0).all()
    assert torch.exp(logp[:4].sum() * 2) == 0


@pytest.mark.parametrize("p", [0.0, -1e-12, -1e-3, -5.0, -200.0])
def test_odds_of_certain_and_hopeless_answers(p):
    logp = torch.full((4,), p, dtype=torch.float32).requires_grad_()
    out = loss_from_logprobs(losses.get("orpo"), logp, flat(logp, lengths=(2, 2)))
    [g] = torch.autograd.grad(out.loss, logp)
    assert out.loss.isfinite() and g.isfinite().all()
    exact = p - math.log(-math.expm1(p)) if p < -1e-6 else None
    if exact is not None:
        assert float(reference_free.log_odds(logp.detach()[:1])[0]) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_empty_answers_and_empty_batches(name):
    """Empty sequences count as sequences without tokens; nothing is NaN, also where there is nothing at all."""
    lengths = (3, 0, 2, 0, 0, 4, 0, 0, 0)[: 9 if name == "tpo" else 8]
    w = world_of(name, 6, lengths=lengths)
    loss, grads, metrics = ours(name, CASES[name][0], w)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads) and grads[1].any()
    assert all(torch.as_tensor(m).isfinite() for m in metrics.values())
    empty = TokenBatch(
        torch.zeros(0, dtype=torch.long), cu_seqlens=torch.zeros(1, dtype=torch.int32), labels=torch.zeros(0).bool(),
        ref_logprobs=torch.zeros(0), group_ids=torch.zeros(0, dtype=torch.long),
        per_sequence={"kl": torch.zeros(0), "density_ratio": torch.zeros(0)},
    )  # fmt: skip
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(7, 4, requires_grad=True)
    out = fused_loss(losses.get(name), hidden, weight, empty)
    out.loss.backward()
    assert out.loss == 0 and not weight.grad.any() and all(torch.as_tensor(m) == 0 for m in out.metrics.values())


# -- statistics of the whole step over ranks ---------------------------------------------------------------------------
def across(columns, batches: list[TokenBatch], stats: list[TokenStats]) -> list[dict]:
    """What every rank's `columns` gives when `everywhere` gathers the k-th request of each rank, in rank order."""
    asked: list[list[torch.Tensor]] = []
    for batch, own in zip(batches, stats, strict=True):
        asked.append([])
        columns(batch, own, lambda x, seen=asked[-1]: (seen.append(x), x)[1])
    made = []
    for batch, own in zip(batches, stats, strict=True):
        turn = iter(range(len(asked[0])))
        made.append(columns(batch, own, lambda x, turn=turn: torch.cat([a[k] for k in [next(turn)] for a in asked])))
    return made


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "sft", "kto", "apo_zero_unpaired", "bco", "cpo", "tpo"])
def test_ranks_see_the_same_step(name):
    w, objective = world_of(name, 7), losses.get(name)
    logp = plain_statistics([w.hidden, w.weight, None], w.targets)["logprobs"]
    parts = [batch_of(w, list(order)) for order in (range(12), range(6), range(6, 12))]
    compacted = [(rows[b.mask], compact(b, -100)[0]) for rows, b in parts]
    stats = [TokenStats(logprobs=logp[rows]) for rows, _ in compacted]
    (whole, *ranks), (all_stats, *rank_stats) = [b for _, b in compacted], stats
    [want] = across(objective.columns, [whole], [all_stats])
    got = across(objective.columns, ranks, rank_stats)
    for where, named in want.items():
        for n, x in named.items():
            assert_same(n, torch.cat([g[where][n] for g in got]), x, 1e-12)


def test_equal_margins_are_each_given_their_own_place():
    """Four equal pairs: each place of the sorted reference is used once, so the loss is what sorting gives."""
    logp = torch.tensor([-1.0, -2.0] * 4, dtype=torch.float64)
    ref = torch.tensor([-1.0, -2.0, -3.0, -1.0, -0.5, -2.5, -1.0, -1.5], dtype=torch.float64)
    out = loss_from_logprobs(losses.get("aot", beta=1.0), logp, flat(logp, ref, (1,) * 8))
    gaps = ref[0::2] - ref[1::2]
    assert_same("loss", out.loss, torch.log1p(torch.exp(-(1.0 - gaps))).mean(), 1e-12)


# -- what comes in wrong -----------------------------------------------------------------------------------------------
BAD = [
    ("dpo", {"beta": 0.0}, "beta must be in"), ("dpo", {"beta": math.nan}, "beta must be finite, got nan"),
    ("dpo", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0.0, 0.5\), got 0.5"),
    ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing must"), ("dpo", {"ld_alpha": 1.1}, "ld_alpha must be"),
    ("dpo", {"f_divergence": "kl"}, "f_divergence is 'kl'; expected one of reverse_kl"),
    ("dpo", {"f_alpha": math.inf}, "f_alpha must be finite"), ("discopop", {"tau": 0.0}, "tau must be"),
    ("dpo", {"references": (("a", 1.0),), "reference_free": True}, "exclude each other"),
    ("dpo", {"references": ("a",)}, "must be .column, finite weight. pairs, got 'a'"),
    ("cpo", {"kind": "simpo"}, "kind is 'simpo'; expected one of sigmoid, hinge, ipo"),
    ("bco", {"min_density_ratio": 3.0, "max_density_ratio": 2.0}, "must not exceed"),
    ("kto", {"desirable_weight": -1.0}, "desirable_weight must be in"), ("simpo", {"gamma": math.inf}, "gamma must be"),
    ("bco", {"delta": math.nan}, "delta must be finite"), ("tpo", {"nll_coef": -1.0}, "nll_coef must be in"),
    *((name, {"use_weighting": True}, "use_weighting must be False") for name in ("aot", "aot_unpaired")),
    *((name, {"margin_coef": 0.5}, "margin_coef must be 0 in") for name in (
        "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "dil", "simper")),
]  # fmt: skip


@pytest.mark.parametrize("name,options,message", BAD)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        losses.get(name, **options)


def test_missing_columns():
    logp = torch.zeros(6)
    for name, fields, message in (
        ("dpo", {}, "DPO needs batch.ref_logprobs"),
        ("kto", {"ref": logp, "labels": torch.ones(2).bool()}, r"kto needs batch.per_sequence\['kl'\]"),
        ("kto", {"ref": logp, "per_sequence": {"kl": torch.zeros(2)}}, "KTO needs batch.labels"),
        ("tpo", {"group_ids": torch.tensor([1, 1])}, "three sequences to a group"),
        ("dpo", {"ref": logp, "lengths": (1, 2, 3)}, "odd 3 sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_from_logprobs(losses.get(name), logp, flat(logp, **{"lengths": (2, 4), **fields}))
    with pytest.raises(ValueError, match="margin_coef needs batch.margins"):
        loss_from_logprobs(losses.get("dpo", margin_coef=1.0), logp, flat(logp, logp, (2, 4)))
    with pytest.raises(ValueError, match=r"per_token\['second'\]"):
        loss_from_logprobs(losses.get("dpo", references=(("second", 1.0),)), logp, flat(logp, logp, (2, 4)))


def test_sums_know_whether_a_reference_is_read():
    assert losses.combined(["sft", "dpo"]).needs_reference and not losses.combined(["sft", "simpo"]).needs_reference
    assert not losses.combined(["dpo", "hinge"], reference_free=True).needs_reference

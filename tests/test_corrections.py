"""Off-policy corrections: each by its definition, composed, over the whole step, on the policy term alone."""

from __future__ import annotations

import math

import pytest
import torch
from harness import World, batch_of, check_accuracy, check_far, check_paper, check_step, ours, world
from oracle import assert_same, plain_statistics
from papers_policy import law_of

from fastrl import TokenStats, fused_loss, losses
from fastrl.losses import policy
from fastrl.losses.corrections import (
    CORRECTIONS,
    M2PO,
    OPSM,
    BatchNormalised,
    DivergenceReject,
    OutlierMask,
    SequenceMask,
    SequenceTruncate,
    TokenMask,
    TokenTruncate,
    step_weight,
)
from fastrl.tokens import compact

EXTRAS = {"kl_coef": 0.3, "entropy_coef": 0.2}
CASES = {
    "tis": (TokenTruncate(high=1.2),),
    "tis_both_sides": (TokenTruncate(0.8, 1.2),),
    "icepop": (TokenMask(0.8, 1.3),),
    "token_mask_and_tis": (TokenTruncate(high=1.2), TokenMask(0.7, 1.5, weighted=False)),
    "sequence_tis": (SequenceTruncate(0.7, 1.4),),
    "sequence_tis_geometric": (SequenceTruncate(0.95, 1.1, "geometric"),),
    "sequence_mask": (SequenceMask(0.5, 1.5),),
    "seq_mask_tis": (SequenceMask(0.9, 1.1, "geometric", "token"),),
    "geometric_mask_and_tis": (TokenTruncate(high=1.1), SequenceMask(0.9, 1.2, "geometric", "none")),
    "outliers": (OutlierMask(0.6, 1.6),),
    "reject_token_k1": (DivergenceReject("k1", "token", 0.2, -0.2),),
    "reject_token_k2": (DivergenceReject("k2", "token", 0.05),),
    "reject_mean_k3": (DivergenceReject("k3", "sequence_mean", 0.04),),
    "reject_sum_k1": (DivergenceReject("k1", "sequence_sum", 0.3),),
    "reject_max_k2": (DivergenceReject("k2", "sequence_max", 0.15), TokenTruncate()),
    "m2po": (M2PO(0.04),),
    "m2po_of_nothing": (M2PO(100.0),),
    "batch_normalised": (TokenTruncate(high=1.5), BatchNormalised()),
    "batch_normalised_sequences": (SequenceTruncate(high=1.5), BatchNormalised("sequence")),
    "opsm": (OPSM(0.01),),
    "everything": (TokenTruncate(0.5, 1.3), OutlierMask(0.4, 2.5), M2PO(0.06), BatchNormalised(), OPSM(0.05)),
}


def make(seed: int = 0, dtype=torch.float64) -> World:
    return world(seed, dtype, per_sequence_advantages=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_definition(name, case):
    for seed in range(2):
        check_paper(name, {"corrections": CASES[case], **EXTRAS}, law_of(name), make(seed))


@pytest.mark.parametrize("case", CASES)
def test_no_cut_order_or_padding_matters(case):
    check_step("grpo", {"corrections": CASES[case], **EXTRAS}, make(3))


@pytest.mark.parametrize("name", ["reinforce", "cispo", "sapo", "gmpo", "vespo", "rloo", "topr", "opmd", "kl_cov"])
def test_with_every_kind_of_loss(name):
    check_paper(name, {"corrections": CASES["everything"], "top_entropy": 0.6, **EXTRAS}, law_of(name), make(4))


@pytest.mark.parametrize("case", CASES)
def test_far_apart_stays_finite(case):
    check_far("dapo", {"corrections": CASES[case], **EXTRAS}, lambda: make(5))
    for gap in (200.0, -200.0, 1e4, -1e4):  # the two policies of the weight, too
        w = make(5, torch.float32)
        w.columns["rollout"] = w.columns["old"] - gap
        loss, grads, metrics = ours("dapo", {"corrections": CASES[case]}, w)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)
        assert all(torch.as_tensor(m).isfinite() for m in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule7(dtype):
    options = {"corrections": CASES["everything"], **EXTRAS}
    check_accuracy("dapo", options, law_of("dapo"), lambda seed, kind: make(seed + 10, kind), dtype)


# -- what composing them means -----------------------------------------------------------------------------------------
def test_every_correction_has_a_case():
    used = {type(c) for case in CASES.values() for c in case}
    assert used == set(CORRECTIONS.values())


def test_without_mismatch_no_weight_changes_anything():
    w = make(6)
    w.columns["rollout"] = w.columns["old"]
    want, grads, _ = ours("dapo", EXTRAS, w)
    for name, case in CASES.items():
        if name != "opsm" and not any(isinstance(c, OPSM) for c in case):
            loss, got, metrics = ours("dapo", {**EXTRAS, "corrections": case}, w)
            assert_same(name, loss, want, 1e-12)
            assert_same(name, got[1], grads[1], 1e-12)
            assert float(metrics["sampling/importance_sampling_ratio/mean"]) == pytest.approx(1.0)


def test_rejected_tokens_keep_their_place_in_the_denominator_and_their_kl():
    w = make(7)
    nothing = (TokenMask(0.0, 1e-6),)
    loss, grads, metrics = ours("dapo", {"corrections": nothing, **EXTRAS}, w)
    w.columns["advantages"] = w.columns["advantages"] * 0
    want, other, _ = ours("dapo", EXTRAS, w)
    assert metrics["sampling/importance_sampling_ratio/mean"] == 0
    assert_same("loss", loss, want, 1e-12)
    assert_same("gradient", grads[1], other[1], 1e-12)


def test_rejected_rows_cost_nothing():
    w = make(8)
    _, batch = batch_of(w)
    objective = losses.get("dapo", corrections=(TokenMask(0.9, 1.1),))
    leaves = w.leaves()
    whole = fused_loss(objective, *leaves, batch)
    short = fused_loss(objective, *leaves, batch, skip_inert=True)
    assert_same("loss", short.loss.detach(), whole.loss.detach(), 1e-12)
    assert (short.stats.logprobs == 0).sum() > (whole.stats.logprobs == 0).sum()


def test_opsm_reads_the_current_policy_and_widens_the_scope():
    assert losses.get("dapo", corrections=(OPSM(),)).scope == "sequence"
    assert losses.get("dapo", corrections=(M2PO(),)).scope == "token"
    assert losses.get("dapo", corrections=(OPSM(),), top_entropy=0.5).scope == "batch"
    w = make(9)
    w.columns["rollout"] = plain_statistics([w.hidden, w.weight, None], w.targets)["logprobs"] + 1.0
    _, grads, _ = ours("reinforce", {"corrections": (OPSM(0.5),)}, w)
    w.columns["advantages"] = w.columns["advantages"].clamp(min=0)
    _, want, _ = ours("reinforce", {}, w)
    assert_same("only the positive are left", grads[1], want[1], 1e-12)


def test_m2po_does_not_depend_on_ties():
    """Equal tokens go or stay together."""
    w = make(10)
    w.columns["rollout"] = w.columns["old"] + 0.5 * (torch.arange(len(w.targets)) % 3).double()
    _, batch = batch_of(w)
    kept, _ = compact(batch, -100)
    weight = step_weight((M2PO(0.2),), kept, lambda x: x)
    moment = (kept.old_logprobs - kept.rollout_logprobs).square()
    for value in moment.unique():
        assert len(weight[moment == value].unique()) == 1
    assert moment[weight > 0].mean() < 0.2


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TokenTruncate(2.0, 1.0), ("low=2.0", "high=1.0")),
        (lambda: SequenceMask(ratio="sum"), ("ratio", "sum", "geometric")),
        (lambda: SequenceMask(weight="both"), ("weight", "both", "token")),
        (lambda: DivergenceReject("k4"), ("metric", "k4")),
        (lambda: DivergenceReject(over="batch"), ("over", "batch")),
        (lambda: M2PO(0.0), ("threshold", "0")),
        (lambda: BatchNormalised("group"), ("over", "group")),
        (lambda: losses.get("dapo", corrections=(TokenTruncate(), SequenceTruncate())), ("TokenTruncate", "keep one")),
        (lambda: losses.get("decoupled_ppo", corrections=(TokenTruncate(),)), ("TokenMask", "TokenTruncate")),
    ],
)
def test_bad_options_are_named(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert all(w in str(error.value) for w in words)


def test_what_is_no_correction_is_refused():
    with pytest.raises(TypeError, match="tis"):
        losses.get("dapo", corrections=("tis",))


@pytest.mark.parametrize("missing", ["old_logprobs", "rollout_logprobs"])
def test_what_is_missing_is_named(missing):
    w = make()
    _, batch = batch_of(w, **{missing: None})
    with pytest.raises(ValueError, match=missing):
        fused_loss(losses.get("dapo", corrections=(TokenTruncate(),)), w.hidden, w.weight, batch)


def test_weighing_twice_warns(monkeypatch):
    monkeypatch.setattr(policy, "SAID", set())
    with pytest.warns(UserWarning, match="twice"):
        losses.get("dppo_tv", corrections=(TokenTruncate(),))


# -- top entropy -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", ["reinforce", "gspo"])
def test_high_entropy_tokens_only(name, fraction):
    options = {"top_entropy": fraction, "kl_coef": 0.3}
    check_paper(name, options, law_of(name), make(11))
    check_step(name, options, make(11))


def test_about_that_fraction_is_kept():
    w = make(12)
    objective = losses.get("reinforce", top_entropy=0.3)
    _, batch = batch_of(w)
    from fastrl.objective import prepared

    kept, rows = compact(batch, -100)
    stats = TokenStats(**plain_statistics([w.hidden, w.weight, None], w.targets)).map(lambda x: x[rows])
    weight = prepared(objective, [kept], [stats])[0].per_token["policy_weight"]
    assert int(weight.sum()) == math.ceil(0.3 * (len(rows) - 1)) or abs(float(weight.mean()) - 0.3) < 0.03
    assert stats.entropy[weight > 0].min() >= stats.entropy[weight == 0].max()

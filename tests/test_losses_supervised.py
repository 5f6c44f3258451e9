"""Supervised losses: each against its paper's formula over materialised log-probs, torch's cross_entropy and TRL."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F
from harness import (
    H,
    V,
    as_one_step,
    batch_of,
    check_accuracy,
    check_chunks,
    check_far,
    check_paper,
    check_step,
    ours,
    token_mean,
    world,
)
from oracle import Watch, assert_same, gradients

import fastrl.losses.supervised as supervised
import fastrl.ops.distill as distill
from fastrl import TokenBatch, fused_loss, linear_cross_entropy, losses
from fastrl.losses.supervised import unlikelihood
from fastrl.objective import outputs_of, prepared

EOS = 7


# -- the formulas, in float64 or the dtype of the log-probs ----------------------------------------------------------
def each(of):
    """A law that averages `of(seq, o) -> [n]` over all trained tokens."""
    return lambda seqs, o: token_mean([of(s, o) for s in seqs])


def _dft(s, o):
    return -s.logp.detach().exp() * s.logp


def _focal(s, o):
    return -((1 - s.logp.exp()) ** o.get("gamma", 2.0)) * s.logp


def _psft(s, o):
    r, top = torch.exp(s.logp - s.old.to(s.logp.dtype)), 1 + o.get("clip_high", 0.28)
    return -torch.minimum(r, torch.full_like(r, top))


def _unlikelihood(s, o):
    return -s.logp if s.label else -o.get("alpha", 1.0) * torch.log(1 - s.logp.exp())


def _weighted(seqs, o):
    name = o.get("column", "weights")
    weights = [s.token[name] if name in s.token else s.number[name].expand(s.n) for s in seqs]
    loss = sum((w.to(s.logp.dtype) * -s.logp).sum() for w, s in zip(weights, seqs, strict=True))
    return loss / (sum(w.sum() for w in weights) if o.get("normalise") else sum(s.n for s in seqs))


def _rwr(seqs, o):
    gains = torch.tensor([math.exp(s.reward / o.get("tau", 1.0)) for s in seqs], dtype=torch.float64)
    gains = gains / gains.mean()
    return token_mean([-float(g) * s.logp for g, s in zip(gains, seqs, strict=True)])


def _awr(s, o):
    weights = torch.exp(s.advantages / o.get("tau", 1.0)).clamp(max=o.get("max_weight", 20.0))
    return -weights.to(s.logp.dtype) * s.logp


def _eos(s, o):
    return -torch.where(s.token["y"] == o["eos_id"], o["eos_weight"], 1.0).to(s.logp.dtype) * s.logp


LAWS = {
    "nll": each(lambda s, o: -s.logp),
    "dft": each(_dft),
    "focal": each(_focal),
    "psft": each(_psft),
    "unlikelihood": each(_unlikelihood),
    "confidence_penalty": each(lambda s, o: -s.logp - o.get("entropy_coef", 0.1) * s.entropy),
    "weighted_sft": _weighted,
    "c_rlft": each(lambda s, o: -(1.0 if s.label else o.get("negative_weight", 0.1)) * s.logp),
    "rwr": _rwr,
    "awr": each(_awr),
    "eos_weighted": each(_eos),
}
BY_LOGITS = ("label_smoothing", "z_loss")  # read more of a row than its log-prob and entropy
CASES = {
    "nll": [{}],
    "dft": [{}],
    "focal": [{}, {"gamma": 0.5}, {"gamma": 0.0}],
    "psft": [{}, {"clip_high": 0.1}],
    "unlikelihood": [{}, {"alpha": 0.3}],
    "confidence_penalty": [{}, {"entropy_coef": -0.7}],
    "weighted_sft": [{}, {"normalise": True}, {"column": "score", "normalise": True}],
    "c_rlft": [{}, {"negative_weight": 0.0}],
    "rwr": [{}, {"tau": 0.3}],
    "awr": [{}, {"tau": 0.5, "max_weight": 1.5}],
    "eos_weighted": [{"eos_id": EOS, "eos_weight": 4.0}, {"eos_id": EOS, "eos_weight": 0.0}],
}
EVERY = [(name, i) for name in CASES for i in range(len(CASES[name]))]


def step(seed=0, dtype=torch.float64):
    def make(w, g):
        w.targets[torch.rand(len(w.targets), generator=g) < 0.3] = EOS
        w.per_token = {"weights": torch.rand(len(w.targets), generator=g).double(), "y": w.targets}
        w.per_token["weights"][::5] = 0.0
        w.per_sequence = {"score": w.per_sequence["score"].abs()}

    return world(seed, dtype, per_sequence=("score",), make=make)


def test_every_loss_is_covered():
    assert {*CASES, *BY_LOGITS} == set(supervised.SUPERVISED) and set(CASES) == set(LAWS)


@pytest.mark.parametrize("name,i", EVERY)
def test_paper_formula(name, i):
    for seed in range(3):
        check_paper(name, CASES[name][i], LAWS[name], step(seed))


@pytest.mark.parametrize("name,i", EVERY)
def test_chunks_and_strategies(name, i):
    check_chunks(name, CASES[name][i], LAWS[name], step())


@pytest.mark.parametrize("name,i", EVERY)
def test_cuts_order_and_padding_change_nothing(name, i):
    check_step(name, CASES[name][i], step())


@pytest.mark.parametrize("name", CASES)
def test_far_policies_stay_finite(name):
    check_far(name, CASES[name][0], step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name,i", EVERY)
def test_accuracy(name, i, dtype):
    check_accuracy(name, CASES[name][i], LAWS[name], step, dtype)


# -- label smoothing and z-loss: torch's and linear_cross_entropy's --------------------------------------------------
def torch_loss(name, o, w, dtype=torch.float64, bias=None, scale=1.0, temperature=1.0):
    """(loss, gradients of hidden and weight) by torch over materialised logits."""
    leaves, kept = w.leaves(dtype), w.mask
    z = F.linear(leaves[0], leaves[1], bias)[kept]
    z = (z if z.dtype == torch.float64 else z.float()) * scale / temperature
    loss = F.cross_entropy(z, w.targets[kept], label_smoothing=o.get("label_smoothing", 0.1) * (name != "z_loss"))
    if name == "z_loss":
        loss = loss + o.get("z_loss", 1e-4) * z.logsumexp(-1).square().mean()
    return loss.detach(), gradients(loss, leaves)


@pytest.mark.parametrize("how", [{}, {"backend": "reference"}, {"strategy": "two_pass"},
                                 {"workspace_bytes": 6 * V * 8}])  # fmt: skip
@pytest.mark.parametrize("name,options", [("label_smoothing", {}), ("label_smoothing", {"label_smoothing": 0.6}),
                                          ("z_loss", {"z_loss": 0.3})])  # fmt: skip
def test_against_torch(name, options, how):
    w = step()
    want, (loss, grads, _) = torch_loss(name, options, w), ours(name, options, w, **how)
    assert_same("loss", loss, want[0], 1e-10)
    for x, t in zip(grads, want[1], strict=True):
        assert_same("gradient", x, t, 1e-10)


@pytest.mark.parametrize("name", BY_LOGITS)
def test_cuts_of_losses_by_logits(name):
    check_step(name, {}, step())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BY_LOGITS)
def test_losses_by_logits_are_as_accurate_as_torch(name, dtype):
    from oracle import assert_as_accurate

    every: dict[str, tuple[list, list, list]] = {}
    for seed in range(6):
        w = step(seed, dtype)
        runs = (ours(name, {}, w)[:2], torch_loss(name, {}, w, dtype), torch_loss(name, {}, w))
        for which, (loss, grads) in enumerate(runs):
            for n, x in zip(("loss", "d_hidden", "d_weight"), (loss, *grads), strict=True):
                every.setdefault(n, ([], [], []))[which].append(x.flatten())
    for n, lists in every.items():
        a, b, truth = (torch.cat(x) for x in lists)
        assert_as_accurate(n, a.float() if n == "loss" else a, b, truth, 1.5 if n == "loss" else 2.0)


@pytest.mark.parametrize("name,options", [("label_smoothing", {"label_smoothing": 0.2}), ("z_loss", {"z_loss": 0.1})])
def test_agrees_with_linear_cross_entropy_under_every_head_option(name, options):
    w = step()
    head = {"logit_scale": 1.4, "temperature": 0.3 + torch.rand(len(w.targets)).double()}
    bias, (_, batch) = torch.randn(V).double(), batch_of(w)
    leaves, other = w.leaves(), w.leaves()
    biases = [bias.clone().requires_grad_() for _ in range(2)]
    out = fused_loss(losses.get(name, **options), *leaves, batch, biases[0], **head)
    want = linear_cross_entropy(*other, batch.targets.where(batch.mask, -100), biases[1], **options, **head)
    assert_same("loss", out.loss, want, 1e-10)
    mine, theirs = gradients(out.loss, [*leaves, biases[0]]), gradients(want, [*other, biases[1]])
    for x, t in zip(mine, theirs, strict=True):
        assert_same("gradient", x, t, 1e-10)


def test_label_smoothing_costs_no_gemm_and_refuses_a_softcap():
    h, w = torch.randn(64, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    batch = TokenBatch(torch.arange(64) % V)
    with Watch() as watch:
        fused_loss(losses.get("label_smoothing"), h, w, batch, backend="torch").loss.backward()
    assert watch.macs == pytest.approx(3 * 64 * H * V, rel=0.01)
    with pytest.raises(ValueError, match="softcap has no logits-free form"):
        fused_loss(losses.get("label_smoothing"), h, w, batch, softcap=5.0)


@pytest.mark.filterwarnings("ignore")
def test_parity_with_the_trainers_label_smoother():
    # It sums over the vocabulary in float32.
    from transformers.trainer_pt_utils import LabelSmoother

    w = step()
    leaves = w.leaves()
    labels = w.targets.where(w.mask, -100)[None]
    want = LabelSmoother(0.1)({"logits": F.linear(*leaves)[None]}, labels)
    loss, grads, _ = ours("label_smoothing", {}, w)
    assert_same("loss", loss, want, 1e-6)
    for x, t in zip(grads, gradients(want, leaves), strict=True):
        assert_same("gradient", x, t, 1e-6)


# -- identities ------------------------------------------------------------------------------------------------------
IDENTITIES = {
    "focal": {"gamma": 0.0},
    "label_smoothing": {"label_smoothing": 0.0},
    "z_loss": {"z_loss": 0.0},
    "confidence_penalty": {"entropy_coef": 0.0},
    "c_rlft": {"negative_weight": 1.0},
    "eos_weighted": {"eos_id": EOS, "eos_weight": 1.0},
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_with_its_number_off_it_is_the_likelihood(name):
    w = step()
    (loss, grads, _), (want, true, _) = ours(name, IDENTITIES[name], w), ours("nll", {}, w)
    assert_same("loss", loss, want, 1e-12)
    for x, t in zip(grads, true, strict=True):
        assert_same("gradient", x, t, 1e-12)


def test_equal_rewards_are_the_likelihood_and_distant_ones_stay_finite():
    w = step()
    w.rewards = torch.full_like(w.rewards, 1e4)
    assert_same("loss", ours("rwr", {}, w)[0], ours("nll", {}, w)[0], 1e-12)
    w.rewards = torch.linspace(-1e4, 1e4, len(w.rewards)).double()
    loss, grads, _ = ours("rwr", {}, w)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)


def test_psft_without_old_logprobs_has_the_gradient_of_the_likelihood():
    w = step()
    rows, batch = batch_of(w, old_logprobs=None)
    leaves = w.leaves()
    loss = fused_loss(losses.get("psft"), *leaves, batch).loss
    assert_same("loss", loss, -torch.ones(()), 1e-12)
    for x, t in zip(gradients(loss, leaves), ours("nll", {}, w)[1], strict=True):
        assert_same("gradient", x, t, 1e-12)


def test_unlikelihood_of_a_certain_token_has_a_gradient():
    """-log(1 - e^l) from e^-200 to 1: finite, increasing, with the derivative p / (1 - p)."""
    x = torch.tensor([-200.0, -5.0, -0.7, -1e-3, -1e-5, -1e-7, 0.0], dtype=torch.float64, requires_grad=True)
    y = unlikelihood(x)
    [slope] = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and (y.diff() > 0).all() and (slope > 0).all()
    want = 1 / torch.expm1(-x.detach()[:5])
    assert torch.allclose(slope[:5], want, rtol=1e-9) and slope[-1] == pytest.approx(1e6, rel=1e-3)


def test_tokens_of_weight_zero_cost_nothing_and_reach_nothing():
    """skip_inert leaves them out of every GEMM; an infinite log-prob under weight zero adds nothing."""
    h, w = torch.randn(64, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    batch = TokenBatch(torch.arange(64) % V, per_token={"weights": (torch.arange(64) % 4 == 0).float()})
    with Watch() as watch:
        fused_loss(losses.get("weighted_sft"), h, w, batch, backend="torch", skip_inert=True).loss.backward()
    assert watch.macs == pytest.approx(3 * 16 * H * V, rel=0.01)
    bias = torch.zeros(V).index_fill(0, torch.tensor([1]), -math.inf)
    loss = fused_loss(losses.get("weighted_sft"), h, w, batch, bias).loss
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, [h, w]))


def test_a_step_of_weight_zero_has_loss_zero():
    batch = TokenBatch(torch.zeros(4).long(), per_token={"weights": torch.zeros(4)})
    h, w = torch.randn(4, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    assert float(fused_loss(losses.get("weighted_sft", normalise=True), h, w, batch).loss.detach()) == 0


@pytest.mark.parametrize("name", [*CASES, *BY_LOGITS])
def test_an_empty_batch_gives_a_connected_zero(name):
    h, w = torch.randn(3, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    nan = torch.full((3,), math.nan)
    batch = TokenBatch(torch.zeros(3).long(), torch.zeros(3, dtype=torch.bool), advantages=nan, old_logprobs=nan,
                       labels=torch.ones(1).bool(), rewards=torch.zeros(1), per_token={"weights": nan})  # fmt: skip
    loss = fused_loss(losses.get(name), h, w, batch).loss
    loss.backward()
    assert float(loss.detach()) == 0 and not w.grad.any()


# -- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("focal", {"gamma": -1.0}, r"gamma must be in \[0, inf\), got -1.0"),
        ("psft", {"clip_high": 0.0}, "clip_high must be positive"),
        ("unlikelihood", {"alpha": -1.0}, "alpha must be"),
        ("label_smoothing", {"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ("z_loss", {"z_loss": math.nan}, "z_loss must be"),
        ("confidence_penalty", {"entropy_coef": math.inf}, "entropy_coef must be finite"),
        ("c_rlft", {"negative_weight": -0.1}, "negative_weight must be"),
        ("rwr", {"tau": 0.0}, "tau must be positive"),
        ("awr", {"max_weight": math.inf}, "max_weight must be positive and finite"),
        ("eos_weighted", {"eos_id": -1}, "eos_id must be a token id"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        losses.get(name, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [("unlikelihood", "batch.labels"), ("c_rlft", "batch.labels"), ("rwr", "batch.rewards"), ("awr", "advantages"),
     ("weighted_sft", r"per_sequence\['weights'\]")],
)  # fmt: skip
def test_missing_columns_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        fused_loss(losses.get(name), torch.randn(3, H), torch.randn(V, H), TokenBatch(torch.zeros(3).long()))


def test_side_statistics_are_no_outputs_of_a_call():
    assert outputs_of(losses.get("label_smoothing")) == ("logprobs", "logsumexp", "mean_logits")
    with pytest.raises(ValueError, match="unknown name 'mean_logits'"):
        outputs_of(losses.get("nll"), ("mean_logits",))


# -- planted mistakes ------------------------------------------------------------------------------------------------
def dft_without_its_stop(patch):
    patch.setattr(supervised.DFT, "__call__", lambda self, s, b: -s.logprobs.exp() * s.logprobs)


def focal_with_the_probability(patch):
    law = lambda self, s, b: -s.logprobs.exp().pow(self.gamma) * s.logprobs  # noqa: E731
    patch.setattr(supervised.Focal, "__call__", law)


def labels_swapped(patch):
    patch.setattr(supervised, "_labels", lambda batch, why: ~batch.labels)


def weights_of_the_micro_batch(patch):
    keep = supervised.WeightedSFT.columns
    patch.setattr(supervised.WeightedSFT, "columns", lambda self, b, s, e: keep(self, b, s, lambda x: x[:7]))


def rewards_not_normalised(patch):
    patch.setattr(supervised.RWR, "weights", lambda self, b: b.spread((b.rewards / self.tau).exp()))


def clip_of_the_wrong_side(patch):
    law = lambda self, s, b: -(s.logprobs - b.old_logprobs).exp().clamp(min=1 - self.clip_high)  # noqa: E731
    patch.setattr(supervised.ProximalSFT, "__call__", law)


MUTANTS = {
    dft_without_its_stop: ("dft", 0),
    focal_with_the_probability: ("focal", 0),
    labels_swapped: ("unlikelihood", 0),
    weights_of_the_micro_batch: ("weighted_sft", 1),
    rewards_not_normalised: ("rwr", 0),
    clip_of_the_wrong_side: ("psft", 0),
}


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda f: f.__name__)
def test_the_suite_notices(plant, monkeypatch):
    name, i = MUTANTS[plant]
    check_paper(name, CASES[name][i], LAWS[name], step())
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            check_paper(name, CASES[name][i], LAWS[name], step())


def test_the_suite_notices_a_mean_logit_without_gradient(monkeypatch):
    keep = distill.mean_logits
    monkeypatch.setattr(distill, "mean_logits", lambda *args: keep(*args).detach())
    with pytest.raises(AssertionError, match="gradient"):
        test_against_torch("label_smoothing", {}, {})


def test_the_step_is_prepared_as_a_whole():
    """Weights normalised over the step: the micro-batches of a prepared step give sum w nll / sum w together."""
    w, objective = step(), losses.get("weighted_sft", normalise=True)
    order = list(range(len(w.lengths)))
    random.Random(1).shuffle(order)
    parts = as_one_step(objective, [batch_of(w, [i]) for i in order], w.leaves())
    total = sum(float(b.per_token["sft_weight"].sum()) for _, b in parts)
    assert total == pytest.approx(float(w.mask.sum()), rel=1e-9)
    assert dataclasses.is_dataclass(objective)


@pytest.mark.parametrize("name", ["rwr", "weighted_sft"])
def test_ranks_share_their_normaliser(name):
    """Two ranks, each with its own sequences and what `everywhere` gathers, add up to one."""
    w, objective = step(), losses.get(name, **({"normalise": True} if name == "weighted_sft" else {}))
    want, total, leaves = ours(objective, {}, w)[0], 0.0, w.leaves()
    parts = [[0, 3, 4, 7, 11], [1, 2, 5, 6, 8, 9, 10]]
    batches = [as_one_step(losses.get("nll"), [batch_of(w, part)], leaves)[0] for part in parts]
    of = (lambda b: b.rewards) if name == "rwr" else (lambda b: b.per_token["weights"])
    gathered = torch.cat([of(b) for _, b in batches])
    for rows, batch in batches:
        [made] = prepared(objective, [batch], everywhere=lambda x: gathered)
        total = total + fused_loss(objective, leaves[0][rows], leaves[1], made).loss
    assert_same("loss", total, want, 1e-10)

"""Listwise losses: against the papers, TRL where a list of two is a pair, ties, holes, far policies, cuts."""

from __future__ import annotations

import math

import papers_listwise as papers
import pytest
import torch
from harness import check_accuracy, check_chunks, check_far, check_paper, check_step, ours, world
from oracle import assert_same

import fastrl.losses.listwise as listwise
from fastrl import TokenBatch, TokenStats, loss_from_logprobs, losses
from fastrl.losses.listwise import LISTWISE

CASES = {
    "pro": [{}, {"sft_coef": 0.0}, {"sft_coef": 0.3}],
    "rrhf": [{}, {"sft_coef": 0.0}],
    "lire": [{}, {"temperature": 0.5, "length_normalised": True, "sft_coef": 0.2}],
    "plackett_luce": [{}, {"beta": 0.7, "sft_coef": 0.1}, {"beta": 0.2, "reference_free": True}],
    "dpo_all_pairs": [{}, {"beta": 0.7}],
    "lipo_lambda": [{}, {"beta": 0.7}, {"reference_free": True}],
    "listnet": [{}, {"beta": 0.4, "reward_temperature": 0.3}],
    "raft": [{}],
}
EVERY_CASE = [(name, i) for name in CASES for i in range(len(CASES[name]))]


def law(name):
    return getattr(papers, name)


def ragged(w, g) -> None:
    """Lists of one, of seven, of two scored and one not, and of nobody; ties at the top and below; an empty answer."""
    w.groups = (0, 0, 5, 0, 0, 0, 2, 2, 2, 9, 0, 0)
    w.rewards = torch.randn(12, generator=g, dtype=torch.float64)
    w.rewards[[0, 1]] = 2.5
    w.rewards[[3, 4]] = -1.0
    w.rewards[[8, 9]] = math.nan
    w.mask[w.rows(10)] = False


def test_every_loss_is_covered():
    assert set(CASES) == set(LISTWISE) and set(LISTWISE) <= set(losses.names())


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_paper_formula(name, i):
    for seed in range(3):
        check_paper(name, CASES[name][i], law(name), world(seed))


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_ragged_lists_ties_and_holes(name, i):
    for seed in range(2):
        check_paper(name, CASES[name][i], law(name), world(seed, make=ragged))


@pytest.mark.parametrize("name", CASES)
def test_chunks_and_strategies(name):
    check_chunks(name, CASES[name][-1], law(name), world(3))


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_cuts_order_and_padding(name, i):
    check_step(name, CASES[name][i], world(4))
    w = world(5)
    w.rewards[[0, 1, 4, 5]] = 0.5  # ties: the order of the batch must not break them
    check_step(name, CASES[name][i], w)


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_far_policies_stay_finite(name, i):
    check_far(name, CASES[name][i], lambda: world(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name, dtype):
    check_accuracy(name, CASES[name][-1], law(name), lambda seed, d: world(seed, d), dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("nothing", ["equal", "unscored", "no tokens", "no sequences"])
def test_nothing_to_rank(name, nothing):
    """Finite everywhere, and no gradient unless the loss is of one answer alone (its NLL)."""

    def make(w, g):
        if nothing == "no tokens":
            w.mask[:] = False
        else:
            w.rewards[:] = 0.7 if nothing == "equal" else math.nan

    w = world(7, lengths=() if nothing == "no sequences" else (5, 2, 8, 7, 1, 3), make=make)
    options = {} if name == "raft" else {"sft_coef": 0.0}
    loss, grads, metrics = ours(name, options, w)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert all(torch.as_tensor(m).isfinite() for m in metrics.values())
    if nothing != "equal" or name in ("pro", "rrhf", "plackett_luce", "dpo_all_pairs", "lipo_lambda"):
        assert loss == 0 and not any(g.any() for g in grads)


def two_answers(seed=0):
    """A pair as a list of two: (stats, batch, sums of policy and reference log-probs of chosen and rejected)."""
    g = torch.Generator().manual_seed(seed)
    logp = (-torch.rand(9, generator=g, dtype=torch.float64)).requires_grad_()
    ref = -torch.rand(9, generator=g, dtype=torch.float64)
    batch = TokenBatch(
        torch.zeros(9, dtype=torch.long), cu_seqlens=torch.tensor([0, 4, 9]), ref_logprobs=ref,
        rewards=torch.tensor([1.0, -1.0]), group_ids=torch.tensor([3, 3]),
    )  # fmt: skip
    return TokenStats(logprobs=logp), batch


@pytest.mark.parametrize("name", ["plackett_luce", "dpo_all_pairs"])
def test_a_list_of_two_is_dpo(name):
    stats, batch = two_answers()
    ours_, theirs = (loss_from_logprobs(losses.get(n, beta=0.3), stats, batch).loss for n in (name, "dpo"))
    assert_same("loss", ours_, theirs, 1e-12)
    grads = [torch.autograd.grad(x, stats.logprobs, retain_graph=True)[0] for x in (ours_, theirs)]
    assert_same("gradient", *grads, 1e-12)


def test_known_by_heart():
    """Three answers, all alike: every order is as likely."""
    batch = TokenBatch(
        torch.zeros(3, dtype=torch.long), cu_seqlens=torch.arange(4), ref_logprobs=torch.zeros(3),
        rewards=torch.tensor([2.0, 1.0, 0.0]), group_ids=torch.zeros(3, dtype=torch.long),
    )  # fmt: skip
    value = lambda name, **o: float(loss_from_logprobs(losses.get(name, **o), torch.zeros(3), batch).loss)  # noqa: E731
    assert value("plackett_luce") == pytest.approx(math.log(3) + math.log(2))
    assert value("pro") == pytest.approx(math.log(3) + math.log(2))
    assert value("lire") == pytest.approx(-1.0)
    assert value("dpo_all_pairs") == pytest.approx(math.log(2))
    assert value("listnet") == pytest.approx(math.log(3))
    # log-ratios of (2, 1, 0): the value of methods' listwise reward loss
    batch.ref_logprobs = torch.tensor([-2.0, -1.0, 0.0])
    assert value("plackett_luce", beta=1.0) == pytest.approx(0.72087, abs=1e-5)


def test_lambda_weights_at_the_reference():
    """All scores equal: the worst order is assumed, so that no pair weighs 0."""
    w = world(8)
    w.columns["ref"] = torch.zeros_like(w.columns["ref"])
    logp = torch.zeros(len(w.targets), dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, *torch.tensor(w.lengths).cumsum(0).tolist()])
    batch = TokenBatch(
        w.targets, cu_seqlens=bounds, ref_logprobs=logp.detach(), rewards=w.rewards, group_ids=torch.tensor(w.groups)
    )
    loss_from_logprobs(losses.get("lipo_lambda"), logp, batch).loss.backward()
    assert (logp.grad != 0).all()


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("pro", {"sft_coef": -1.0}, "sft_coef"),
        ("plackett_luce", {"sft_coef": math.inf}, "sft_coef"),
        ("plackett_luce", {"beta": 0.0}, "beta"),
        ("lire", {"temperature": 0.0}, "temperature"),
        ("listnet", {"reward_temperature": -2.0}, "reward_temperature"),
    ],
)
def test_bad_numbers_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        losses.get(name, **options)


def test_what_is_missing_is_named():
    stats, batch = two_answers()
    batch.rewards = None
    with pytest.raises(ValueError, match="RRHF .* needs batch.rewards"):
        loss_from_logprobs(losses.get("rrhf"), stats, batch)
    stats, batch = two_answers()
    batch.ref_logprobs = None
    with pytest.raises(ValueError, match="ref_logprobs"):
        loss_from_logprobs(losses.get("listnet"), stats, batch)


# -- planted mistakes --------------------------------------------------------------------------------------------------
def beats_with(change):
    return property(lambda self: change(Lists_beats.fget(self)))


Lists_beats = listwise.Lists.beats
MUTANTS = {
    "ranks upside down": ("pro", listwise.Lists, "beats", beats_with(lambda b: b.transpose(1, 2))),
    "ties contrasted": (
        "plackett_luce", listwise.Lists, "beats",
        property(lambda self: self.present[:, :, None] & (self.rewards[:, :, None] >= self.rewards[:, None, :])),
    ),
    "sum instead of mean": (
        "rrhf", listwise, "mean_logprobs", lambda stats, batch: listwise.segment_sum(stats.logprobs, batch)
    ),
    "one best only": (
        "raft", listwise.Lists, "best", property(lambda self: torch.eye(self.present.shape[1])[self.rewards.argmax(1)])
    ),
    "the last of a list forgotten": (
        "listnet", listwise.Lists, "softmax", lambda self, x: x.masked_fill(~self.present, -1e30).softmax(1) * 0.9
    ),
    "a smaller denominator": (
        "dpo_all_pairs", listwise, "logsigmoid", lambda x: torch.nn.functional.logsigmoid(x) / 2
    ),
    "temperature upside down": ("lire", listwise.Lists, "softmax", lambda self, x: x.softmax(1)),
    "no discount": ("lipo_lambda", listwise.torch, "log1p", torch.ones_like),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_planted_mistake_is_noticed(mistake, monkeypatch):
    name, owner, attribute, wrong = MUTANTS[mistake]

    def check():
        check_paper(name, CASES[name][-1], law(name), world(0, make=ragged))

    check()
    monkeypatch.setattr(owner, attribute, wrong)
    with pytest.raises(AssertionError):
        check()

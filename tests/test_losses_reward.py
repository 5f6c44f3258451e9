"""Losses of reward, process and value heads: each against its paper's formula, and what no batch may break."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
from types import SimpleNamespace

import papers_reward
import pytest
import torch
from oracle import assert_same, errors
from papers_reward import ROWS, SEQUENCES, Answer, Row

import fastrl
from fastrl import HeadStats, TokenBatch, loss_from_scores, losses
from fastrl.losses import reward, reward_ratings, value
from fastrl.objective import scope_of

GROUPS = (0, 0, 0, 4, 4, 4, 2, 2, 2, 9, 9, 9)
S = len(GROUPS)
LENGTHS = (5, 2, 8, 1, 3, 9)  # of the rows of a critic's batch
CASES: dict[str, list[dict]] = {
    "bradley_terry": [{}, {"label_smoothing": 0.2, "center": 0.05}],
    "soft_bradley_terry": [{}, {"center": 0.1}],
    "bradley_terry_ties": [{}, {"theta": 1.3}],
    "hinge_reward": [{}, {"gap": 0.3}],
    "r3m": [{}, {"lam": 0.4}],
    "adaptive_scale": [{}, {"rho": 0.3, "tau_min": 0.4, "tau_max": 0.9}],
    "pcrm": [{}, {"b1": 2.0, "b2": 0.5, "b3": 0.4}],
    "confidence_pairs": [{}, {"center": 0.1}],
    "mean_variance_pairs": [{}, {"center": 0.1}],
    "plackett_luce_reward": [{}],
    "reward_regression": [{}],
    "multi_attribute": [{}],
    "quantile_reward": [{}],
    "gaussian_reward": [{}],
    "verifier": [{}],
    "value_mse": [{}, {"cliprange": 0.3}],
    "value_clip": [{}, {"cliprange": 0.6}],
    "value_huber": [{"delta": 0.5}, {"delta": 0.4, "cliprange": 0.3}],
    "value_expectile": [{}, {"tau": 0.2, "cliprange": 0.5}],
    "value_gaussian": [{}],
    "value_histogram": [{}, {"low": -2.0, "high": 3.0, "sigma": 1.5}],
    "prm_class": [{}],
    "prm_bce": [{}],
    "prm_mse": [{}],
}
OUTPUTS = {"confidence_pairs": 2, "multi_attribute": 4, "quantile_reward": 5, "value_histogram": 7, "prm_class": 3}
EVERY = [(name, i) for name in CASES for i in range(len(CASES[name]))]


def test_every_law_is_covered():
    ours_ = {**reward.REWARD, **reward_ratings.RATINGS, **value.VALUE}
    assert set(CASES) == set(ours_) == set(SEQUENCES) | set(ROWS)
    for name in CASES:
        law = losses.law(name)
        assert law.paper and law.formula and scope_of(law()) and law.reads in ("scores", "values")


# -- one step of scored sequences or rows ------------------------------------------------------------------------------
@dataclasses.dataclass
class World:
    """out [N] or [N, K] and log_variance [N] of N sequences (or rows), everything else by name."""

    out: torch.Tensor
    log_variance: torch.Tensor
    columns: dict[str, torch.Tensor]
    mask: torch.Tensor  # rows only
    shift: float = 0.0

    def leaves(self, dtype=None) -> list[torch.Tensor]:
        return [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in (self.out, self.log_variance)]


def world(name: str, seed: int = 0, dtype=torch.float64) -> World:
    g = torch.Generator().manual_seed(seed)
    n = S if name in SEQUENCES else sum(LENGTHS)
    k = OUTPUTS.get(name)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    out, log_variance = (randn(n, k) if k else randn(n)).to(dtype), (0.7 * randn(n)).to(dtype)
    columns = {
        "rewards": randn(n),
        "labels": torch.rand(n, generator=g) < 0.5,
        "margins": randn(n // 2),
        "preference": torch.rand(n, generator=g, dtype=torch.float64),
        "tie": torch.rand(n, generator=g) < 0.4,
        "length": torch.randint(1, 20, (n,), generator=g).double(),
        "attributes": torch.where(torch.rand(n, k or 1, generator=g) < 0.3, math.nan, randn(n, k or 1)),
        "returns": randn(n),
        "old_values": out.double().reshape(n, -1)[:, 0] + 0.4 * randn(n),
        "step_label": torch.rand(n, generator=g, dtype=torch.float64),
        "targets": torch.randint(0, k or 2, (n,), generator=g),
    }
    columns["attributes"][3] = math.nan  # a sequence that nobody rated
    # Exact in float32: a test of accuracy is not one of rounding what is given.
    columns = {n: x.float().double() if x.is_floating_point() else x for n, x in columns.items()}
    mask = torch.rand(n, generator=g) < 0.7
    mask[0] = True
    return World(out, log_variance, columns, mask)


def answers_of(w: World, leaves) -> list[Answer]:
    own = ("preference", "tie", "length", "attributes")
    return [
        Answer(
            leaves[0][i], leaves[1][i], float(w.columns["rewards"][i]), bool(w.columns["labels"][i]), GROUPS[i],
            float(w.columns["margins"][i // 2]), {n: w.columns[n][i] for n in own},
        )  # fmt: skip
        for i in range(S)
    ]


def rows_of(w: World, leaves) -> list[Row]:
    own = ("returns", "old_values", "step_label")
    return [
        Row(leaves[0][t], leaves[1][t], int(w.columns["targets"][t]), {n: w.columns[n][t] for n in own})
        for t in w.mask.nonzero()[:, 0].tolist()
    ]


def paper(name: str, options: dict, w: World, dtype=torch.float64, upstream=1.0):
    leaves = w.leaves(dtype)
    made = answers_of(w, leaves) if name in SEQUENCES else rows_of(w, leaves)
    loss = {**SEQUENCES, **ROWS}[name](made, options)
    return loss.detach(), gradients(loss * upstream, leaves)


def gradients(total, leaves):
    made = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, made, strict=True)]


def stats_of(name: str, out, log_variance) -> HeadStats:
    kind = losses.law(name).reads
    two = getattr(losses.law(name), "mean_variance", False)
    return HeadStats(**{kind: out}, log_variance=log_variance if two else None)


def sequence_batch(w: World, order: list[int], dtype) -> TokenBatch:
    """One row a sequence; the counts are the whole step's."""
    take = lambda n: w.columns[n][order].to(dtype) if w.columns[n].is_floating_point() else w.columns[n][order]  # noqa: E731
    return TokenBatch(
        torch.zeros(len(order), dtype=torch.long),
        cu_seqlens=torch.arange(len(order) + 1, dtype=torch.int32),
        labels=w.columns["labels"][order],
        group_ids=torch.tensor([GROUPS[i] for i in order]),
        rewards=take("rewards"),
        margins=w.columns["margins"][[i // 2 for i in order[0::2]]].to(dtype) if len(order) % 2 == 0 else None,
        num_sequences=S,
        num_tokens=S,
        num_groups=4,
        per_sequence={n: take(n) for n in ("preference", "tie", "length", "attributes")},
    )


def row_batch(w: World, order: list[int], dtype) -> tuple[torch.Tensor, TokenBatch]:
    """Sequences `order` of LENGTHS with garbage in the untrained rows; the counts are the whole step's."""
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    rows = torch.tensor([t for i in order for t in range(starts[i], starts[i] + LENGTHS[i])])
    keep = w.mask[rows]
    own = ("returns", "old_values", "step_label")
    junk = {n: torch.where(keep, w.columns[n][rows].to(dtype), math.nan) for n in own}
    ends = torch.tensor([0, *(LENGTHS[i] for i in order)]).cumsum(0).to(torch.int32)
    batch = TokenBatch(
        torch.where(keep, w.columns["targets"][rows], 10**6), keep, ends, num_tokens=int(w.mask.sum()),
        num_sequences=len(LENGTHS), per_token=junk,
    )  # fmt: skip
    return rows, batch


def ours(name: str, options: dict, w: World, upstream=1.0, cut=None):
    """(loss, gradients of out and log_variance, metrics): one call for each part of the cut, added up."""
    leaves, objective = w.leaves(), losses.get(name, **options)
    dtype = torch.promote_types(w.out.dtype, torch.float32)
    total, metrics = 0.0, {}
    sequences = name in SEQUENCES
    for order in cut or [list(range(S if sequences else len(LENGTHS)))]:
        if sequences:
            rows, batch = torch.tensor(order), sequence_batch(w, order, dtype)
            picked = [x[rows] for x in leaves]
        else:
            rows, batch = row_batch(w, order, dtype)
            keep = batch.mask
            picked = [torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x[rows], math.nan) for x in leaves]
        out = loss_from_scores(objective, stats_of(name, *picked), batch)
        total = total + out.loss
        for n, x in out.metrics.items():
            metrics[n] = metrics.get(n, 0.0) + x
    return total.detach(), gradients(total * upstream, leaves), metrics


def check_paper(name: str, options: dict, seed: int = 0) -> None:
    w = world(name, seed)
    loss, grads, _ = ours(name, options, w, -1.7)
    true_loss, true_grads = paper(name, options, w, upstream=-1.7)
    assert loss.shape == () and loss.dtype == torch.float64
    assert true_grads[0].any()
    assert_same("loss", loss, true_loss, 1e-9)
    for g, t in zip(grads, true_grads, strict=True):
        assert_same("gradient", g, t, 1e-9)


@pytest.mark.parametrize("name,i", EVERY)
def test_paper_formula(name, i):
    for seed in range(3):
        check_paper(name, CASES[name][i], seed)


@pytest.mark.parametrize("name,i", EVERY)
def test_cuts_and_order_change_nothing(name, i):
    options, w = CASES[name][i], world(name)
    want, grads, metrics = ours(name, options, w)
    n = S if name in SEQUENCES else len(LENGTHS)
    unit = {"pair": 2, "group": 3}.get(scope_of(losses.get(name)), 1)
    units = [list(range(a, a + unit)) for a in range(0, n, unit)]
    random.Random(1).shuffle(units)
    for size in (1, 2, len(units)):
        cut = [[j for u in units[a : a + size] for j in u] for a in range(0, len(units), size)]
        loss, other, seen = ours(name, options, w, cut=cut)
        assert_same("loss", loss, want, 1e-9)
        for g, t in zip(other, grads, strict=True):
            assert_same("gradient", g, t, 1e-9)
        assert set(seen) == set(metrics)
        for m in metrics:
            assert_same(m, torch.as_tensor(seen[m]), torch.as_tensor(metrics[m]), 1e-5)


@pytest.mark.parametrize("far", [200.0, -200.0, 1e4, -1e4])
@pytest.mark.parametrize("name,i", EVERY)
def test_far_scores_stay_finite(name, i, far):
    """Scores (and log-variances) far apart in float32: chosen and rejected, values and returns."""
    w = world(name)
    n = w.out.shape[0]
    sign = torch.where(torch.arange(n) % 2 == 0, far, -far)
    w.out = (w.out + (sign[:, None] if w.out.dim() > 1 else sign)).float()
    if w.out.dim() > 1:
        w.out[:, 0] -= far
    w.log_variance = (w.log_variance + far).float()
    loss, grads, metrics = ours(name, CASES[name][i], w)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert all(torch.as_tensor(m).isfinite() for m in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name, dtype):
    """Rule 7 over six draws: no less accurate than the formula in float32 (what bfloat16 is taken to)."""
    every: dict[str, tuple[list, list, list]] = {}
    for seed in range(6):
        w = world(name, seed, dtype)
        options = CASES[name][0]
        runs = (ours(name, options, w)[:2], paper(name, options, w, torch.float32), paper(name, options, w))
        for which, (loss, grads) in enumerate(runs):
            every.setdefault("loss", ([], [], []))[which].append(loss.flatten())
            every.setdefault("gradient", ([], [], []))[which].append(grads[0].flatten())
    for lists in every.values():
        a, b, truth = (torch.cat(x) for x in lists)
        b = b.to(a.dtype)  # autograd rounds a gradient to its leaf's type
        (rms, most), (plain_rms, plain_most) = errors(a, truth), errors(b, truth)
        eps = torch.finfo(a.dtype).eps
        assert rms <= 2 * plain_rms + eps / 2 and most <= 3 * plain_most + eps


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_train_is_zero(name):
    objective = losses.get(name)
    k = OUTPUTS.get(name)
    empty = torch.zeros(*((0, k) if k else (0,)), requires_grad=True)
    batch = TokenBatch(
        torch.zeros(0, dtype=torch.long), cu_seqlens=torch.zeros(1, dtype=torch.int32), rewards=torch.zeros(0),
        labels=torch.zeros(0, dtype=torch.bool), group_ids=torch.zeros(0, dtype=torch.long),
        per_token={n: torch.zeros(0) for n in ("returns", "old_values", "step_label")},
        per_sequence={"preference": torch.zeros(0), "length": torch.zeros(0), "attributes": torch.zeros(0, k or 1)},
    )  # fmt: skip
    out = loss_from_scores(objective, stats_of(name, empty, torch.zeros(0)), batch)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0


# -- the numbers of the review -----------------------------------------------------------------------------------------
def pair_loss(name, d, options=None, **columns) -> tuple[float, float]:
    """(loss, dL/dd) of one pair with difference d."""
    x = torch.tensor([d, 0.0], dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(torch.zeros(2, dtype=torch.long), cu_seqlens=torch.arange(3), per_sequence=columns)
    out = loss_from_scores(losses.get(name, **(options or {})), HeadStats(scores=x), batch).loss
    (g,) = torch.autograd.grad(out, x)
    return float(out.detach()), float(g[0])


def test_expected_values():
    assert pair_loss("bradley_terry", 0.0)[0] == pytest.approx(math.log(2))
    for y in (0.0, 0.3, 1.0):
        soft = pair_loss("soft_bradley_terry", 0.0, preference=torch.tensor([y, 1 - y]))[0]
        assert soft == pytest.approx(math.log(2))
    loss, slope = pair_loss("r3m", -3.0, {"lam": 0.1})
    assert loss == pytest.approx(0.62508, abs=1e-5) and slope == pytest.approx(-0.1)
    assert losses.get("adaptive_scale", rho=0.1).c == pytest.approx(0.94344, abs=1e-5)
    tau = 0.7 / losses.get("adaptive_scale", rho=0.1).c
    assert tau == pytest.approx(0.7420, abs=1e-4)
    want = tau * math.log1p(math.exp(-0.7 / tau)) + (0.1 - math.log(2)) * tau
    assert pair_loss("adaptive_scale", 0.7)[0] == pytest.approx(want)
    alike = {"length": torch.tensor([3.0, 3.0])}
    bound = 6 / 1.001
    assert bound == pytest.approx(5.994, abs=1e-3)
    assert pair_loss("pcrm", bound / 2, **alike)[1] == pytest.approx(0.0, abs=1e-12)
    assert pair_loss("hinge_reward", 0.5)[0] == 0.5  # R better 0.5, worse 0
    labels = reward.updated_labels(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 0.1)
    assert float(labels) == pytest.approx(0.95)
    f = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    batch = TokenBatch(
        torch.zeros(3, dtype=torch.long), cu_seqlens=torch.arange(4), group_ids=torch.zeros(3).long(), rewards=f
    )
    ranked = loss_from_scores(losses.get("plackett_luce_reward"), HeadStats(scores=f), batch).loss
    assert float(ranked) == pytest.approx(0.72087, abs=1e-5)
    two = TokenBatch(torch.zeros(2, dtype=torch.long), cu_seqlens=torch.arange(3))
    head = HeadStats(scores=torch.tensor([1.0, 0.0]).double(), log_variance=torch.zeros(2).double())
    assert float(loss_from_scores(losses.get("mean_variance_pairs"), head, two).loss) == pytest.approx(
        -math.log(0.76025), abs=1e-5
    )


def test_r3m_never_pulls_harder_than_its_price():
    assert all(abs(pair_loss("r3m", d, {"lam": 0.2})[1]) <= 0.2 + 1e-12 for d in (-100.0, -3.0, 0.0, 1.38, 1.39, 5.0))


def test_equal_ranks_do_not_depend_on_the_order():
    scores, ranks = torch.tensor([0.3, -1.0, 2.0, 0.7]).double(), torch.tensor([1.0, 0.0, 1.0, math.nan]).double()

    def loss(order):
        batch = TokenBatch(
            torch.zeros(4, dtype=torch.long), cu_seqlens=torch.arange(5), group_ids=torch.zeros(4).long(),
            rewards=ranks[order],
        )  # fmt: skip
        return float(loss_from_scores(losses.get("plackett_luce_reward"), HeadStats(scores=scores[order]), batch).loss)

    assert loss([0, 1, 2, 3]) == pytest.approx(loss([2, 3, 1, 0]))
    assert math.isfinite(loss([0, 1, 2, 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_of_the_normal_distribution_and_its_slope(dtype):
    """Against scipy-free truth: float64 log_ndtr, and d log Phi = phi / Phi, which is -z (1 + 1/z^2 ...) far down."""
    z = torch.tensor([-60.0, -11.0, -10.0, -9.0, -3.0, -1.0, 0.0, 2.0, 8.0], dtype=dtype, requires_grad=True)
    out = reward.log_normal_cdf(z)
    (slope,) = torch.autograd.grad(out.sum(), z)
    wide = z.detach().double()
    truth = torch.special.log_ndtr(wide)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-8
    assert torch.allclose(out.double(), truth, rtol=tolerance, atol=1e-8)
    want = torch.exp(-0.5 * wide.square() - 0.5 * math.log(2 * math.pi) - truth)
    assert torch.allclose(slope.double(), want, rtol=2e-5 if dtype == torch.float32 else 1e-7, atol=1e-9)
    far = torch.tensor([-1e5, -1e10], dtype=dtype, requires_grad=True)
    reward.log_normal_cdf(far).sum().backward()
    assert torch.allclose(far.grad, -far.detach(), rtol=1e-4)


def test_value_of_a_histogram():
    logits = torch.full((2, 4), -1e9)
    logits[0, 0] = logits[1, 3] = 0.0
    assert value.expected_value(logits, -1.0, 1.0).tolist() == [-0.75, 0.75]


def test_ties_of_the_value_clip_leave_the_gradient_whole():
    """Inside the clip range both errors are the same: the gradient is V - R, not half of it."""
    v = torch.tensor([0.1], requires_grad=True)
    batch = TokenBatch(torch.zeros(1).long(), per_token={"returns": torch.ones(1), "old_values": torch.zeros(1)})
    loss_from_scores(losses.get("value_clip"), HeadStats(values=v), batch).loss.backward()
    assert float(v.grad) == pytest.approx(-0.9)


def test_bradley_terry_is_trls():
    """RewardTrainer's own compute_loss on the same scores, margins and centring; its metrics too."""
    trl = pytest.importorskip("trl")
    scores, margins = torch.randn(8), torch.rand(4)
    chosen, rejected = scores[0::2], scores[1::2]
    model = lambda **_: SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])  # noqa: E731
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=0.01),
        accelerator=accelerator, _total_train_tokens=0, _tp_size=1, _metrics={"train": collections.defaultdict(list)},
    )  # fmt: skip
    want = trl.RewardTrainer.compute_loss(trainer, model, {"margin": margins, "attention_mask": torch.ones(8, 3)})
    batch = TokenBatch(torch.zeros(8).long(), cu_seqlens=torch.arange(9), margins=margins)
    out = loss_from_scores(losses.get("bradley_terry", center=0.01), HeadStats(scores=scores), batch)
    assert float(out.loss) == pytest.approx(float(want), rel=1e-6)
    for name in ("accuracy", "margin", "mean_reward"):
        assert float(out.metrics[name]) == pytest.approx(trainer._metrics["train"][name][0], rel=1e-5, abs=1e-6)


def test_sums_of_losses():
    two = losses.combined(["bradley_terry", "hinge_reward"], [1.0, 0.5])
    scores = torch.randn(4, requires_grad=True)
    batch = TokenBatch(torch.zeros(4).long(), cu_seqlens=torch.arange(5))
    parts = [loss_from_scores(losses.get(n), HeadStats(scores), batch).loss for n in ("bradley_terry", "hinge_reward")]
    out = loss_from_scores(two, HeadStats(scores), batch)
    assert two.reads == "scores" and out.metrics["accuracy"].dim() == 0
    assert torch.allclose(out.loss, parts[0] + 0.5 * parts[1])


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name,options,match",
    [
        ("r3m", {"lam": 0.5}, "lam must be strictly between 0 and 0.5, got 0.5"),
        ("adaptive_scale", {"rho": 0.7}, "rho must be"),
        ("adaptive_scale", {"tau_min": 11.0}, "tau_min must be"),
        ("bradley_terry", {"label_smoothing": 0.5}, "label_smoothing"),
        ("bradley_terry", {"center": math.nan}, "center must be finite"),
        ("value_clip", {"cliprange": 0.0}, "cliprange must be positive"),
        ("value_huber", {"delta": -1.0}, "delta"),
        ("value_histogram", {"low": 2.0}, "low must be below"),
        ("value_expectile", {"tau": 1.0}, "tau"),
        ("bradley_terry_ties", {"theta": 1.0}, "theta"),
        ("pcrm", {"b1": 0.0}, "b1"),
    ],
)
def test_bad_options_are_named(name, options, match):
    with pytest.raises(ValueError, match=match):
        losses.get(name, **options)


def test_bad_statistics_are_named():
    two = TokenBatch(torch.zeros(2, dtype=torch.long), cu_seqlens=torch.arange(3))
    good = HeadStats(scores=torch.zeros(2))
    with pytest.raises(ValueError, match="scores must be float"):
        loss_from_scores(losses.get("bradley_terry"), HeadStats(scores=torch.zeros(3)), two)
    with pytest.raises(ValueError, match="neither scores nor values"):
        loss_from_scores(losses.get("bradley_terry"), HeadStats(), two)
    with pytest.raises(TypeError, match="HeadStats"):
        loss_from_scores(losses.get("bradley_terry"), fastrl.TokenStats(), two)
    with pytest.raises(ValueError, match="reads the values"):
        loss_from_scores(losses.get("value_mse"), good, two)
    with pytest.raises(ValueError, match="log_variance"):
        loss_from_scores(losses.get("mean_variance_pairs"), good, two)
    with pytest.raises(ValueError, match="rewards"):
        loss_from_scores(losses.get("reward_regression"), good, two)
    with pytest.raises(ValueError, match="K=2"):
        loss_from_scores(losses.get("confidence_pairs"), good, two)
    with pytest.raises(AttributeError, match="HeadStats has no 'logprobs': a loss that reads it takes log-probs"):
        loss_from_scores(losses.get("nll"), HeadStats(values=torch.zeros(2)), two)
    with pytest.raises(ValueError, match="returns"):
        loss_from_scores(losses.get("value_mse"), HeadStats(values=torch.zeros(2)), two)


# -- the suite notices -------------------------------------------------------------------------------------------------
MUTANTS = {
    "a sign": (reward.BradleyTerry, "pair_loss", lambda f: lambda self, d, b: f(self, -d, b), "bradley_terry", 0),
    "margin left out": (
        reward.BradleyTerry,
        "pair_loss",
        lambda f: lambda self, d, b: f(self, d, dataclasses.replace(b, margins=None)),
        "bradley_terry",
        0,
    ),
    "centring left out": (
        reward.PairReward,
        "__call__",
        lambda f: lambda self, s, b: f(dataclasses.replace(self, center=0.0), s, b),
        "bradley_terry",
        1,
    ),
    "chosen and rejected swapped": (reward, "pairs", lambda f: lambda x: f(x)[::-1], "r3m", 0),
    "worse ones left out of the list": (
        reward_ratings.PlackettLuceReward,
        "__call__",
        lambda f: lambda self, s, b: f(self, s, dataclasses.replace(b, rewards=-b.rewards)),
        "plackett_luce_reward",
        0,
    ),
    "half of the squared error forgotten": (
        value.ValueLoss,
        "of_error",
        lambda f: lambda self, u: 2 * f(self, u),
        "value_clip",
        0,
    ),
    "value clip left out": (
        value.ValueLoss,
        "parts",
        lambda f: lambda self, s, b: (f(self, s, b)[0],) * 2,
        "value_clip",
        0,
    ),
    "soft labels rounded": (value, "step_labels", lambda f: lambda s, b: f(s, b).round(), "prm_bce", 0),
    "expectile upside down": (
        value.ExpectileValueLoss,
        "of_error",
        lambda f: lambda self, u: f(self, -u),
        "value_expectile",
        0,
    ),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_planted_mistakes_are_noticed(what, monkeypatch):
    owner, attribute, change, name, i = MUTANTS[what]
    check_paper(name, CASES[name][i])
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        check_paper(name, CASES[name][i])


def test_the_papers_know_nothing_of_us():
    assert "fastrl" not in vars(papers_reward)

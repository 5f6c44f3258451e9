"""Distillation losses: each against its paper's formula, TRL's functions, and what no cut or garbage may change."""

from __future__ import annotations

import dataclasses
import math
import random

import harness
import pytest
import torch
from harness import H, V, as_one_step, batch_of, objective_of
from oracle import Watch, assert_as_accurate, assert_same, gradients
from papers_distillation import LAWS, Row

import fastrl.losses.distillation as distillation
import fastrl.losses.sampled as sampled
import fastrl.losses.top_k as top_k
import fastrl.ops.distill as distill
from fastrl import Teacher, TokenBatch, TokenStats, fused_loss, losses
from fastrl.ops import divergence_torch

H2, K = 7, 5
FULL = {"temperature": 1.7, "nll_coef": 0.4, "weighted": True}
CASES = {
    "forward_kl": [{}, FULL],
    "reverse_kl": [{}, FULL],
    "gkd": [{}, {"beta": 0.0}, {"beta": 1.0}, {"beta": 0.1, **FULL}],
    "mixed_kl": [{}, {"alpha": 0.8, **FULL}, {"alpha": 0.0}, {"alpha": 1.0}],
    "jeffreys": [{}, FULL],
    "tvd": [{}, FULL],
    "skew_kl": [{}, {"alpha": 0.6, **FULL}, {"alpha": 0.0}],
    "skew_rkl": [{}, {"alpha": 0.6, **FULL}, {"alpha": 0.0}],
    "kd": [{}, {"alpha": 0.2, "temperature": 4.0, "weighted": True}, {"alpha": 0.0}],
    "seq_kd": [{}],
    "top_k": [{"kind": k, "tail": t, **m} for k, m in (("forward_kl", {}), ("reverse_kl", {"nll_coef": 0.3}),
              ("jsd", {"beta": 0.3}), ("jsd", {"beta": 1.0})) for t in ("bucket", "renormalise", "drop")],
    "opd": [{}],
    "opd_is": [{}],
    "iw_opd": [{}, {"gamma": 2.0}],
    "minillm": [{}, {"gamma": 0.7, "length_normalised": False, "clip": 0.1}, {"single_step": False, "gamma": 0.0},
                {"single_step": False, "gamma": 0.6}],
}  # fmt: skip
EVERY = [(name, i) for name in CASES for i in range(len(CASES[name]))]
HEADS = {"plain": {}, "everything": {"bias": True, "temperature": 0.7, "softcap": 4.0, "logit_scale": 1.5}}


# -- a step with a teacher -------------------------------------------------------------------------------------------
def softmax_logits(hidden, weight, bias, temperature=1.0, logit_scale=1.0, softcap=None):
    z = hidden @ weight.t()
    z = z if z.dtype == torch.float64 else z.float()
    z = z if bias is None else z + bias.to(z.dtype)
    z = logit_scale * z
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


@dataclasses.dataclass
class Step:
    """harness.World, a bias of the student, the teacher's (hidden, weight, bias) and the options of both heads."""

    world: harness.World
    bias: torch.Tensor | None
    teacher: list
    head: dict

    def leaves(self, dtype=None):
        leaves = self.world.leaves(dtype)
        return [*leaves, None if self.bias is None else self.bias.detach().to(leaves[0].dtype).requires_grad_()]

    def teacher_logits(self, dtype=torch.float64):
        scale = 1.3 if "logit_scale" in self.head else 1.0
        cap = 6.0 if "softcap" in self.head else None
        own = [None if x is None else x.to(dtype) for x in self.teacher]
        return softmax_logits(*own, self.head.get("temperature", 1.0), scale, cap)


def step(seed=0, dtype=torch.float64, head="plain", old=True, spread=1.0, **options) -> Step:
    options = {"per_token": ("token_weights",), **options}
    w = harness.world(seed, dtype, **options)
    g = torch.Generator().manual_seed(seed + 99)
    t, options = len(w.targets), dict(HEADS[head])
    made = [spread * torch.randn(t, H2, generator=g, dtype=torch.float64), torch.randn(V, H2, generator=g).double() / 2]
    biased = options.pop("bias", False)
    made += [torch.randn(V, generator=g).double() if biased else None]
    made = [None if x is None else x.to(dtype) for x in made]
    bias = torch.randn(V, generator=g).to(dtype) if biased else None
    s = Step(w, bias, made, options)
    q = s.teacher_logits().log_softmax(-1)
    top = q.topk(K)
    # Log-probs of other policies are of this head's, one word of one top-k is absent.
    own = softmax_logits(*(None if x is None else x.detach().double() for x in s.leaves()), **options).log_softmax(-1)
    own = own.gather(1, w.targets[:, None])[:, 0]
    w.columns["old"] = own + 0.3 * torch.randn(t, generator=g, dtype=torch.float64) if old else None
    w.per_token["teacher_logprobs"] = q.gather(1, w.targets[:, None])[:, 0]
    w.per_token["teacher_topk_indices"] = top.indices
    w.per_token["teacher_topk_logprobs"] = top.values.index_fill(1, torch.tensor([K - 1]), -math.inf)
    return s


def paper(name, options, s: Step, dtype=torch.float64, upstream=1.0):
    """(loss, gradients of hidden, weight, bias): the mean over all trained tokens of the paper's value."""
    w, leaves = s.world, s.leaves(dtype)
    z, t, values = softmax_logits(*leaves, **s.head), s.teacher_logits(dtype), []
    for i in range(len(w.lengths)):
        r = w.trained(i)
        old = w.columns["old"]
        row = Row(z[r], t[r], w.targets[r], None if old is None else old[r], {n: x[r] for n, x in w.per_token.items()})
        values.append(LAWS[name](row, options))
    loss = torch.cat(values).sum() / sum(len(v) for v in values)
    return loss.detach(), gradients(loss * upstream, leaves)


def ours(name, options, s: Step, upstream=1.0, cut=None, padding=None, **how):
    """As harness.ours, with a teacher whose untrained rows hold NaN."""
    w, objective = s.world, objective_of(name, options)
    leaves = s.leaves()
    missing = {} if w.columns["old"] is not None else {"old_logprobs": None}
    whole = w.columns["old"]
    w.columns["old"] = torch.zeros(len(w.targets)).double() if whole is None else whole
    parts = [batch_of(w, order, padding, **missing) for order in (cut or [list(range(len(w.lengths)))])]
    w.columns["old"] = whole
    if cut is not None:
        parts = as_one_step(objective, parts, leaves)
    total, metrics = 0.0, {}
    for rows, batch in parts:
        kept = rows >= 0 if batch.mask is None else batch.mask

        def take(x, rows=rows, kept=kept):
            filled = x[rows.clamp(min=0)]
            return torch.where(kept[:, None], filled, torch.full_like(filled, math.nan))

        teacher = None
        if "divergence" in getattr(objective, "outputs", ()):
            scale = {"logit_scale": 1.3, "softcap": 6.0} if "softcap" in s.head else {}
            teacher = Teacher(take(s.teacher[0]), *s.teacher[1:], **scale)
        out = fused_loss(objective, take(leaves[0]), leaves[1], batch, leaves[2], teacher=teacher, **s.head, **how)
        total = total + out.loss
        for n, x in out.metrics.items():
            metrics[n] = metrics.get(n, 0.0) + x
    return total.detach(), gradients(total * upstream, leaves), metrics


def check_same(got, want, tolerance=1e-9):
    assert_same("loss", got[0], want[0], tolerance)
    for n, x, t in zip(("d_hidden", "d_weight", "d_bias"), got[1], want[1], strict=True):
        if t is not None:
            assert_same(n, x, t, tolerance)


def check_paper(name, i, head="plain", seed=0, **how):
    s, options = step(seed, head=head), CASES[name][i]
    want = paper(name, options, s, upstream=-1.7)
    assert any(g is not None and g.any() for g in want[1])
    check_same(ours(name, options, s, -1.7, **how), want)


# -- the formulas ----------------------------------------------------------------------------------------------------
def test_every_loss_is_covered():
    assert set(CASES) == set(LAWS) == set(distillation.DISTILLATION)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name,i", EVERY)
def test_paper_formula(name, i, head):
    check_paper(name, i, head)


@pytest.mark.parametrize("name,i", EVERY)
def test_chunks_and_strategies(name, i):
    for strategy in ("one_pass", "two_pass", "cached"):
        check_paper(name, i, "everything", strategy=strategy, workspace_bytes=6 * V * 8)
    check_paper(name, i, "everything", backend="reference")


@pytest.mark.parametrize("name,i", EVERY)
def test_cuts_order_and_padding_change_nothing(name, i):
    s, options, rng = step(), CASES[name][i], random.Random(0)
    want, sequences = ours(name, options, s), list(range(len(s.world.lengths)))
    for size, padding in ((1, None), (5, rng)):
        rng.shuffle(sequences)
        cut = [sequences[a : a + size] for a in range(0, len(sequences), size)]
        got = ours(name, options, s, cut=cut, padding=padding)
        check_same(got, want)
        assert got[2].keys() == want[2].keys()
        for n, x in want[2].items():
            assert_same(n, torch.as_tensor(got[2][n]), torch.as_tensor(x), 1e-6)


@pytest.mark.parametrize("name", ["opd", "opd_is"])
def test_without_old_logprobs_the_policy_is_the_current_one(name):
    s = step(old=False)
    check_same(ours(name, {}, s), paper(name, {}, s))


@pytest.mark.parametrize("name", ["iw_opd", "minillm"])
def test_old_logprobs_are_asked_for(name):
    with pytest.raises(ValueError, match="needs batch.old_logprobs"):
        ours(name, {}, step(old=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name,i", [("gkd", 3), ("mixed_kl", 1), ("skew_kl", 0), ("skew_rkl", 0), ("kd", 1),
                                    ("top_k", 0), ("top_k", 7), ("opd_is", 0), ("minillm", 0)])  # fmt: skip
def test_accuracy(name, i, dtype):
    """Rule 7 over six draws together."""
    every: dict[str, tuple[list, list, list]] = {}
    for seed in range(6):
        s = step(seed, dtype)
        runs = (ours(name, CASES[name][i], s, 0.7)[:2], paper(name, CASES[name][i], s, dtype, 0.7),
                paper(name, CASES[name][i], s, upstream=0.7))  # fmt: skip
        for which, (loss, grads) in enumerate(runs):
            for n, x in zip(("loss", "d_hidden", "d_weight"), (loss, *grads[:2]), strict=True):
                every.setdefault(n, ([], [], []))[which].append(x.flatten())
    for n, lists in every.items():
        a, b, truth = (torch.cat(x) for x in lists)
        assert_as_accurate(n, a.float() if n == "loss" else a, b, truth, 1.5 if n == "loss" else 2.0)


@pytest.mark.parametrize("gap", [200.0, -200.0, 1e4, -1e4])
@pytest.mark.parametrize("name", ["opd", "opd_is", "iw_opd", "minillm"])
def test_policies_far_apart_stay_finite(name, gap):
    s = step(0, torch.float32)
    s.world.columns["old"] = s.world.columns["old"] - gap
    loss, grads, metrics = ours(name, {}, s)
    assert loss.isfinite() and all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("opd", "opd_is", "iw_opd")])
def test_a_confident_teacher_stays_finite(name):
    s = step(0, torch.float32, spread=300.0)
    loss, grads, _ = ours(name, {}, s)
    assert loss.isfinite() and all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_words_that_one_model_masks(strategy):
    """A word of probability 0 in the student: KL(q||p) is infinite, not NaN; the bounded divergences stay finite."""
    s = step(head="everything")
    s.head.pop("softcap")
    s.bias[3] = -math.inf
    s.world.targets[s.world.targets == 3] = 4
    for name in CASES:
        if "divergence" not in objective_outputs(losses.get(name)) or name in ("minillm", "mixed_kl", "jeffreys"):
            continue
        loss, grads, _ = ours(name, {}, s, strategy=strategy)
        infinite = name in ("forward_kl", "kd")
        assert loss == math.inf if infinite else loss.isfinite(), name
        assert infinite or all(g is None or g.isfinite().all() for g in grads), name


@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch_gives_a_connected_zero(name):
    hidden, weight = torch.zeros(3, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    n = {"dtype": torch.float32, "fill_value": math.nan}
    columns = {"teacher_logprobs": torch.full((3,), **n), "teacher_topk_logprobs": torch.full((3, K), **n)}
    columns["teacher_topk_indices"] = torch.zeros(3, K, dtype=torch.long)
    batch = TokenBatch(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool),
                       old_logprobs=torch.zeros(3), per_token=columns)  # fmt: skip
    objective = losses.get(name)
    teacher = Teacher(torch.randn(3, H2), torch.randn(V, H2)) if "divergence" in objective_outputs(objective) else None
    out = fused_loss(objective, hidden, weight, batch, teacher=teacher)
    out.loss.backward()
    assert float(out.loss.detach()) == 0 and not weight.grad.any()


def objective_outputs(objective):
    return getattr(objective, "outputs", ())


# -- identities, cost, one call for several --------------------------------------------------------------------------
def test_a_student_that_is_its_teacher_loses_nothing():
    s = step()
    s = dataclasses.replace(s, teacher=[s.world.hidden, s.world.weight, None])
    for name in ("forward_kl", "reverse_kl", "gkd", "mixed_kl", "jeffreys", "tvd", "skew_kl", "skew_rkl"):
        loss, grads, _ = ours(name, {}, s)
        assert loss.abs() < 1e-12 and all(g is None or g.abs().max() < 1e-12 for g in grads), name


def test_opd_is_the_gradient_of_the_reverse_kl_in_expectation():
    """Over every word as the sampled one, weighted by p: sum_y p(y) (log p(y) - log q(y)) grad log p(y) = grad KL."""
    g = torch.Generator().manual_seed(0)
    h, w, th, tw = (torch.randn(*n, generator=g, dtype=torch.float64) for n in ((1, H), (V, H), (1, H2), (V, H2)))
    h.requires_grad_()
    q, p = (th @ tw.t()).log_softmax(-1)[0], (h.detach() @ w.t()).log_softmax(-1)[0]
    batch = TokenBatch(torch.arange(V), per_token={"teacher_logprobs": q}, num_tokens=1)
    expected = fused_loss(losses.get("opd"), h.expand(V, H), w, batch, aggregate=lambda b: p.exp()).loss
    full = fused_loss(losses.get("reverse_kl"), h, w, TokenBatch(torch.zeros(1).long()), teacher=Teacher(th, tw)).loss
    assert_same("d_hidden", torch.autograd.grad(expected, h)[0], torch.autograd.grad(full, h)[0], 1e-10)


def call_of(objective, t=64, dtype=torch.float32, **how):
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*n, generator=g).to(dtype).requires_grad_() for n in ((t, H), (V, H)))
    teacher = Teacher(*(torch.randn(*n, generator=g).to(dtype) for n in ((t, H), (V, H))))
    columns = {"teacher_topk_indices": torch.arange(t * K).view(t, K) % V}
    columns["teacher_topk_logprobs"] = torch.full((t, K), -3.0)
    batch = TokenBatch(torch.arange(t) % V, per_token=columns)
    teacher = teacher if "divergence" in objective_outputs(objective) else None
    with Watch() as watch:
        fused_loss(objective, h, w, batch, teacher=teacher, backend="torch", **how).loss.backward()
    return watch.macs / (t * H * V)


@pytest.mark.parametrize(("name", "gemms"), [("gkd", 4), ("mixed_kl", 4), ("skew_kl", 4), ("tvd", 4), ("kd", 7)])
def test_gemms(name, gemms):
    assert call_of(losses.get(name)) == pytest.approx(gemms, abs=0.01)


def test_renormalised_top_k_forms_no_logits_of_the_vocabulary():
    assert call_of(losses.get("top_k", tail="renormalise")) < 0.01
    assert call_of(losses.get("top_k")) == pytest.approx(3, abs=0.01)


def test_the_rows_that_are_not_trained_cost_nothing():
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*n, generator=g).requires_grad_() for n in ((64, H), (V, H)))
    teacher = Teacher(torch.randn(64, H, generator=g), torch.randn(V, H, generator=g))
    batch = TokenBatch(torch.zeros(64).long(), mask=torch.arange(64) % 4 == 0)
    with Watch() as watch:
        fused_loss(losses.get("gkd"), h, w, batch, teacher=teacher, backend="torch").loss.backward()
    assert watch.macs / (64 * H * V) == pytest.approx(1, abs=0.01)


def test_a_sum_shares_one_teacher():
    s = step()
    both = losses.combined(["gkd", "nll"], [0.7, 0.3])
    gkd, nll = ours("gkd", {}, s), ours("seq_kd", {}, s)
    got = ours(both, {}, s)
    assert_same("loss", got[0], 0.7 * gkd[0] + 0.3 * nll[0], 1e-10)
    for x, a, b in zip(got[1][:2], gkd[1][:2], nll[1][:2], strict=True):
        assert_same("gradient", x, 0.7 * a + 0.3 * b, 1e-10)
    small = {"workspace_bytes": 6 * V * 8}
    mixed = losses.combined(["nll", "grpo"], [0.5, 2.0])  # the second one weighs tokens by their sequence's length
    check_same(ours(mixed, {}, s, **small), ours(mixed, {}, s))
    with pytest.raises(ValueError, match="one divergence"):
        ours(losses.combined(["gkd", "tvd"]), {}, s)


@dataclasses.dataclass(frozen=True)
class Squared:
    """An own objective that is not linear in the divergence, over whole sequences."""

    scope = "sequence"
    outputs = ("divergence",)
    divergence = losses.get("tvd").divergence

    def __call__(self, stats, batch):
        value = torch.zeros(batch.num_segments, dtype=stats.divergence.dtype)
        return value.index_add(0, batch.segment_ids, stats.divergence.square() - stats.logprobs * stats.divergence)


@pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])
def test_an_objective_that_is_not_linear_in_the_divergence(strategy):
    s = step()
    leaves = s.leaves()
    z, t = softmax_logits(*leaves), s.teacher_logits()
    d = (z.softmax(-1) - t.softmax(-1)).abs().sum(-1) / 2
    logp, r = z.log_softmax(-1).gather(1, s.world.targets[:, None])[:, 0], s.world.mask
    want = (d.square() - logp * d)[r].sum() / len(s.world.lengths)
    got = ours(Squared(), {}, s, strategy=strategy, workspace_bytes=6 * V * 8)
    check_same(got, (want.detach(), gradients(want, leaves)), 1e-9)


def test_statistics_and_metrics_come_back():
    s = step()
    _, batch = batch_of(s.world)
    out = fused_loss(losses.get("gkd"), *s.leaves()[:2], batch, teacher=Teacher(*s.teacher[:2]), outputs=("logprobs",))
    mask = s.world.mask
    assert out.stats.divergence.shape == out.stats.logprobs.shape == mask.shape
    assert not out.stats.divergence[~mask].any() and (out.stats.divergence[mask] > 0).all()
    assert_same("metric", out.metrics["divergence"], out.loss, 1e-12)
    with torch.no_grad():
        again = fused_loss(losses.get("gkd"), *s.leaves()[:2], batch, teacher=Teacher(*s.teacher[:2]))
    assert_same("loss", again.loss, out.loss, 1e-12)


def test_a_temperature_for_each_token_and_a_teacher_in_another_dtype():
    s = step(dtype=torch.float32)
    g, t = torch.Generator().manual_seed(3), len(s.world.targets)
    temperature = 0.5 + torch.rand(t, generator=g, dtype=torch.float64).float().double()
    hidden, weight = s.teacher[0].bfloat16(), s.teacher[1].bfloat16()
    leaves, (_, batch) = s.leaves()[:2], batch_of(s.world)
    batch = dataclasses.replace(batch, per_token={})
    out = fused_loss(losses.get("gkd"), *leaves, batch, teacher=Teacher(hidden, weight), temperature=temperature)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    z = (exact[0] @ exact[1].t() / temperature[:, None]).log_softmax(-1)
    q = (hidden.double() @ weight.double().t() / temperature[:, None]).log_softmax(-1)
    want = LAWS["gkd"](Row(z, q, s.world.targets, None, {}), {})[s.world.mask].mean()
    assert_same("loss", out.loss, want, 1e-5)
    for x, y in zip(gradients(out.loss, leaves), gradients(want, exact), strict=True):
        assert_same("gradient", x, y, 1e-5)


def test_torch_compile_breaks_its_graph_and_agrees():
    s = step()
    _, batch = batch_of(s.world)
    leaves, objective = s.leaves()[:2], losses.get("gkd", nll_coef=0.5)

    def loss(h, w):
        return fused_loss(objective, h * 1.0, w, batch, teacher=Teacher(*s.teacher[:2])).loss

    want, got = loss(*leaves), torch.compile(loss, backend="eager")(*leaves)
    assert_same("loss", got, want, 1e-12)
    for a, b in zip(gradients(got, leaves), gradients(want, leaves), strict=True):
        assert_same("gradient", a, b, 1e-12)


# -- TRL -------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_parity_with_trl_gkd(beta):
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    s = step()
    leaves, labels = s.leaves(), torch.where(s.world.mask, s.world.targets, -100)
    law = trl.GKDTrainer.generalized_jsd_loss
    z, t = softmax_logits(*leaves), s.teacher_logits()
    want = law(z[None] * 0.9, t[None] * 0.9, labels[None], beta=beta, temperature=0.9)
    check_same(ours("gkd", {"beta": beta}, s), (want.detach(), gradients(want, leaves)), 1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_parity_with_trl_top_k(beta, tail):
    trl = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer")
    s = step()
    leaves, r = s.leaves(), s.world.mask
    words, given = (s.world.per_token[f"teacher_topk_{n}"][r] for n in ("indices", "logprobs"))
    a, seen = softmax_logits(*leaves)[r].log_softmax(-1).gather(1, words), given > -math.inf
    a = a.masked_fill(~seen, -math.inf)
    if tail == "bucket":
        (a, every), (b, _) = trl._add_tail_bucket(a, seen), trl._add_tail_bucket(given, seen)
    else:
        a, b, every = a - a.logsumexp(1, keepdim=True), given - given.logsumexp(1, keepdim=True), seen
    want = trl._jsd_divergence(a, b, beta, every).sum() / int(r.sum())
    options = {"kind": "jsd", "beta": beta, "tail": tail}
    check_same(ours("top_k", options, s), (want.detach(), gradients(want, leaves)), 1e-9)


@pytest.mark.filterwarnings("ignore")
def test_parity_with_trl_iw_opd():
    """TRL's own method on one padded batch, its trainer replaced by the four numbers that it reads."""
    from collections import defaultdict
    from types import SimpleNamespace

    trl = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer")
    s = step(every_row=True, lengths=(6, 6))
    leaves, old, w = s.leaves(), s.world.columns["old"], s.world
    stub = SimpleNamespace(temperature=1.0, iw_opd_epsilon=1e-8, iw_opd_gamma=0.8, model=SimpleNamespace(training=True),
                           _metrics={"train": defaultdict(list)})  # fmt: skip
    fold = lambda x: x.view(2, 6, *x.shape[1:])  # noqa: E731
    want = trl.IWOPDTrainer._compute_iw_opd_loss(
        stub, fold(softmax_logits(*leaves)), fold(w.targets), fold(w.targets), fold(w.per_token["teacher_logprobs"]),
        fold(old),
    )  # fmt: skip
    check_same(ours("iw_opd", {"gamma": 0.8}, s), (want.detach(), gradients(want, leaves)), 1e-9)


# -- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gkd", {"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ("gkd", {"temperature": 0.0}, "temperature must be positive"),
        ("forward_kl", {"nll_coef": -1.0}, "nll_coef must be >= 0"),
        ("kd", {"alpha": 2.0}, "alpha must be"),
        ("skew_kl", {"alpha": 1.0}, "compares a distribution with itself"),
        ("top_k", {"tail": "cut"}, "tail is 'cut'; expected one of bucket"),
        ("top_k", {"kind": "tvd"}, "kind is 'tvd'"),
        ("minillm", {"clip": 1.0}, "clip must be"),
        ("iw_opd", {"gamma": -0.1}, "gamma must be"),
        ("uld", {}, "sorts both softmaxes"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        losses.get(name, **options)


def test_bad_calls_are_named():
    s = step()
    _, batch = batch_of(s.world)
    leaves, teacher = s.leaves()[:2], Teacher(*s.teacher[:2])
    refused = [
        ("gkd", {}, "pass teacher="),
        ("nll", {"teacher": teacher}, "reads no divergence"),
        ("gkd", {"teacher": Teacher(s.teacher[0][1:], s.teacher[1])}, "expected the same rows"),
        ("gkd", {"teacher": Teacher(s.teacher[0], s.teacher[1][1:])}, "share one vocabulary"),
        ("gkd", {"teacher": teacher, "outputs": ("divergenze",)}, "unknown name"),
    ]
    for name, how, message in refused:
        with pytest.raises(ValueError, match=message):
            fused_loss(losses.get(name), *leaves, batch, **how)
    with pytest.raises(TypeError, match="must be a fastrl.Teacher"):
        fused_loss(losses.get("gkd"), *leaves, batch, teacher=s.teacher)
    wrong = batch.with_columns({"teacher_topk_indices": batch.per_token["teacher_topk_indices"] + V})
    with pytest.raises(ValueError, match=r"must be in \[0, V=41\)"):
        fused_loss(losses.get("top_k"), *leaves, wrong)
    with pytest.raises(ValueError, match=r"per_token\['teacher_logprobs'\]"):
        fused_loss(losses.get("opd"), *leaves, dataclasses.replace(batch, per_token={}))


# -- planted mistakes ------------------------------------------------------------------------------------------------
def swap_sides(patch):
    change = lambda f: lambda law, p, q, ratio, shrink, gap: f(law, q, p, -ratio, shrink, -gap)  # noqa: E731
    patch.setattr(divergence_torch, "_terms", change(divergence_torch._terms))


def forget_the_linear_part(patch):
    patch.setattr(distill.Sides, "pull", lambda self, loss: loss)


def gathered_logits_without_gradient(patch):
    keep = distill.gathered_logits
    patch.setattr(distill, "gathered_logits", lambda *args: keep(*args).detach())


def own_token_counts_as_later(patch):
    patch.setattr(sampled.MiniLLM, "_later", lambda self, x, batch: sampled.suffix_sums(x, batch, self.gamma))


def sums_run_into_the_next_sequence(patch):
    whole = lambda x, batch, discount=1.0: x.double().flip(0).cumsum(0).flip(0)  # noqa: E731
    patch.setattr(sampled, "suffix_sums", whole)


def no_tail(patch):
    patch.setattr(top_k, "log_rest", lambda x: torch.full_like(x[:, :1], -30.0))


def no_temperature_squared(patch):
    patch.setattr(distillation.KD, "divergence_coef", 0.5)


def teacher_softcap_forgotten(patch):
    keep = distill.head_spec
    patch.setattr(distill, "head_spec", lambda w, b, t, scale, cap, h: keep(w, b, t, scale, None, h))


def advantage_with_the_wrong_sign(patch):
    keep = sampled.teacher_advantage
    patch.setattr(sampled, "teacher_advantage", lambda *args: -keep(*args))


def gap_of_the_mixture_forgotten(patch):
    keep = divergence_torch._dlogits
    patch.setattr(divergence_torch, "_dlogits", lambda p, gap, g, top, out: keep(p, gap, g * 1.01, top, out))


MUTANTS = {
    swap_sides: ("forward_kl", 0),
    forget_the_linear_part: ("gkd", 3),
    gathered_logits_without_gradient: ("top_k", 0),
    own_token_counts_as_later: ("minillm", 0),
    sums_run_into_the_next_sequence: ("iw_opd", 0),
    no_tail: ("top_k", 0),
    no_temperature_squared: ("kd", 0),
    teacher_softcap_forgotten: ("tvd", 0),
    advantage_with_the_wrong_sign: ("opd", 0),
    gap_of_the_mixture_forgotten: ("skew_kl", 0),
}


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda f: f.__name__)
def test_the_suite_notices(plant, monkeypatch):
    check_paper(*MUTANTS[plant], "everything")
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            check_paper(*MUTANTS[plant], "everything")


def test_loss_from_logprobs_takes_a_divergence_made_elsewhere():
    from fastrl import loss_from_logprobs

    batch = TokenBatch(torch.zeros(4).long())
    stats = TokenStats(logprobs=torch.full((4,), -1.0), divergence=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert float(loss_from_logprobs(losses.get("gkd", nll_coef=2.0), stats, batch).loss) == 4.5

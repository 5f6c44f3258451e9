"""fused_loss and loss_from_logprobs: every method against its paper's formula, and what no batch may break."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    Problem,
    assert_as_accurate,
    assert_same,
    gradients,
    kl_term,
    paper_loss,
    plain_statistics,
    problem,
    step,
    with_garbage,
)

from fastrl import TokenBatch, TokenStats, fused_loss, linear_cross_entropy, linear_logprobs, loss_from_logprobs, losses
from fastrl.tokens import segment_sum

V, ROW = 37, 37 * 8
ALL_EXTRAS = {"kl_coef": 0.3, "kl": "k3", "entropy_coef": 0.2}
CASES = {
    "nll": [{}],
    "reinforce": [{}, ALL_EXTRAS, {"kl_coef": 0.5, "kl": "k1"}, {"kl_coef": 0.5, "kl": "k2"}],
    "ppo_clip": [{}, {"clip_low": 0.1, "clip_high": 0.6, "dual_clip": 3.0, **ALL_EXTRAS}],
    "grpo": [{}, {"clip_low": 0.3, "clip_high": 0.4, "kl_coef": 0.1}],
    "dapo": [{}, {"clip_high": 0.5, "dual_clip": 2.0, "entropy_coef": -0.1}],
    "dr_grpo": [{"max_length": 11}, {"max_length": 5, "clip_low": 0.5, "clip_high": 0.9, **ALL_EXTRAS}],
    "dpo": [{}, {"beta": 0.7, "label_smoothing": 0.2}, {"beta": 2.0, "reference_free": True}],
}
EVERY_CASE = [(name, i) for name in CASES for i in range(len(CASES[name]))]
HEADS = {
    "plain": {},
    "everything": {"bias": True, "temperature": "per_token", "softcap": 6.0, "logit_scale": 1.5},
}


def make(seed=0, dtype=torch.float64, lengths=(5, 0, 3, 1, 7, 4), **head):
    """(clean problem, the same with garbage in untrained rows, TokenBatch fields, Sequences)."""
    p = problem(seed, n=sum(lengths), v=V, dtype=dtype, scale=1.5, **head)
    fields, sequences = step(seed, lengths, V)
    clean = Problem(p.hidden, p.weight, fields["targets"], p.bias, p.options)
    truth = plain_statistics(clean.leaves(torch.float64), clean.targets, **p.options)["logprobs"].detach()
    fields, sequences = step(seed, lengths, V, truth)
    return clean, with_garbage(clean, fields), fields, sequences


def fused(name, options, p, fields, upstream=1.0, aggregate=None, objective=None, **how):
    """(LossOutput, gradients) of fused_loss under an upstream scalar."""
    batch = TokenBatch(**fields)
    leaves = p.leaves()
    objective = objective or losses.get(name, **options)
    out = fused_loss(objective, *leaves[:2], batch, leaves[2], aggregate=aggregate, **p.options, **how)
    return out, gradients(out.loss * upstream, leaves)


def paper(name, options, p, sequences, upstream=1.0, aggregate=None, dtype=torch.float64):
    """(loss, gradients) through materialised logits and the paper's formula."""
    leaves = p.leaves(dtype)
    loss = paper_loss(name, plain_statistics(leaves, p.targets, **p.options), sequences, options, aggregate)
    return loss.detach(), gradients(loss * upstream, leaves)


def check_paper(name, options, head="plain", aggregate=None, seed=0, backend=None) -> None:
    """Loss and gradients equal the paper's formula in float64, under a random upstream scalar and four chunks."""
    clean, garbage, fields, sequences = make(seed, **HEADS[head])
    out, grads = fused(name, options, garbage, fields, -1.7, aggregate, backend=backend, workspace_bytes=4 * ROW)
    loss, true_grads = paper(name, options, clean, sequences, -1.7, aggregate)
    assert out.loss.shape == () and out.loss.dtype == torch.float64
    assert_same("loss", out.loss, loss, 1e-10)
    assert any(g is not None and g.any() for g in true_grads)
    for n, g, t in zip(("d_hidden", "d_weight", "d_bias"), grads, true_grads, strict=True):
        if t is not None:
            assert_same(n, g, t, 1e-10)


def test_every_loss_is_covered():
    """By a case here, or in a table (of cases, or of papers' formulas) of the tests of its family."""
    here, covered = Path(__file__).parent, {*CASES, "tdpo"}  # tdpo's is a test of its own: it reads another head
    for path in [*here.glob("papers_*.py"), *here.glob("test_losses_*.py"), *here.glob("test_distillation*.py")]:
        if path.stem in ("test_losses_table", "test_losses_world"):
            continue
        tables = (x for x in vars(importlib.import_module(path.stem)).values() if isinstance(x, dict))
        covered |= {key for table in tables for key in table if isinstance(key, str)}
    missing = [name for name in losses.names() if name not in covered]
    assert not missing, f"{missing} have no formula and no case: write them in tests/, from the paper"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_paper_formula(name, i, head):
    for seed in (0, 1, 2):
        check_paper(name, CASES[name][i], head, seed=seed)


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_paper_formula_by_the_reference_backend(name, i):
    check_paper(name, CASES[name][i], "everything", backend="reference")


@pytest.mark.parametrize(
    "aggregate", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "prompt_mean"]
)
@pytest.mark.parametrize("name", ["nll", "reinforce", "ppo_clip", "grpo", "dapo"])
def test_every_aggregation(name, aggregate):
    check_paper(name, CASES[name][-1], aggregate=aggregate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_rule7(name, i, dtype):
    """Over six draws together: one log-prob that plain torch happens to round well decides nothing."""
    options, every = CASES[name][i], {}
    for seed in range(6):
        clean, garbage, fields, sequences = make(seed, dtype, lengths=(5, 0, 13, 1, 7, 14), **HEADS["everything"])
        runs = (
            fused(name, options, garbage, fields, 0.7, workspace_bytes=20 * ROW),
            paper(name, options, clean, sequences, 0.7, dtype=dtype),
            paper(name, options, clean, sequences, 0.7),
        )
        assert all(g.dtype == dtype for g in runs[0][1])
        for which, (loss, grads) in enumerate(runs):
            loss = getattr(loss, "loss", loss).detach()
            for n, x in zip(("loss", "d_hidden", "d_weight", "d_bias"), (loss, *grads), strict=True):
                every.setdefault(n, ([], [], []))[which].append(x.flatten())
    for n, lists in every.items():
        ours, plain, truth = (torch.cat(x) for x in lists)
        ours = ours.float() if n == "loss" else ours
        assert_as_accurate(n, ours, plain, truth, 1.5 if n == "loss" else 2.0)


def test_metrics_are_global_means():
    clean, garbage, fields, sequences = make(**HEADS["plain"])
    stats = plain_statistics(clean.leaves(), clean.targets)
    rows = torch.cat(sequences.rows)
    logp, old, ref, adv = stats["logprobs"][rows], *(sequences.columns[c][rows] for c in ("old", "ref", "advantages"))
    ratio = (logp - old).exp()
    low, high = (ratio < 0.8) & (adv < 0), (ratio > 1.28) & (adv > 0)
    want = {
        "ratio": ratio,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
        "kl": kl_term("k3", logp, ref),
        "entropy": stats["entropy"][rows],
        "mean_token_accuracy": stats["is_argmax"][rows],
    }
    assert low.any() and high.any()
    for how in ({}, {"backend": "reference"}, {"workspace_bytes": ROW}):
        out, _ = fused("dapo", {}, garbage, fields, outputs=("entropy", "is_argmax"), **how)
        assert set(out.metrics) == set(want)
        for n, x in want.items():
            assert_same(n, out.metrics[n], x.detach().double().mean(), 1e-6)
    out, _ = fused("dpo", {"beta": 0.3}, garbage, fields)
    gain = 0.3 * torch.stack([(stats["logprobs"] - sequences.columns["ref"])[r].sum() for r in sequences.rows])
    assert_same("margins", out.metrics["rewards/margins"], (gain[0::2] - gain[1::2]).mean(), 1e-10)
    assert_same("chosen", out.metrics["rewards/chosen"], gain[0::2].mean(), 1e-10)
    assert_same("accuracies", out.metrics["rewards/accuracies"], (gain[0::2] > gain[1::2]).double().mean(), 1e-6)


@pytest.mark.parametrize("name", ["dapo", "dpo"])
def test_returned_statistics_are_zero_where_nothing_is_trained(name):
    clean, garbage, fields, sequences = make()
    truth = plain_statistics(clean.leaves(), clean.targets)
    kept = torch.zeros_like(fields["mask"]).index_fill(0, torch.cat(sequences.rows), True)
    fused_out, _ = fused(name, {}, garbage, fields, outputs=("entropy",))
    given = TokenStats(logprobs=torch.where(kept, truth["logprobs"], torch.nan), entropy=truth["entropy"])
    for out in (fused_out, loss_from_logprobs(losses.get(name), given, TokenBatch(**fields))):
        assert out.stats.logprobs.shape == kept.shape and not out.stats.logprobs.requires_grad
        assert_same("logprobs", out.stats.logprobs, truth["logprobs"] * kept, 1e-10)
        assert_same("entropy", out.stats.entropy, truth["entropy"] * kept, 1e-10)


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_loss_from_logprobs_is_the_same_law(name, i):
    options = CASES[name][i]
    clean, garbage, fields, _ = make()
    out, grads = fused(name, options, garbage, fields, outputs=("entropy",))
    leaves = clean.leaves()
    stats = linear_logprobs(*leaves[:2], clean.targets, outputs=("logprobs", "entropy"))
    same = loss_from_logprobs(losses.get(name, **options), stats, TokenBatch(**fields))
    assert_same("loss", same.loss, out.loss, 1e-12)
    for g, t in zip(gradients(same.loss, leaves)[:2], grads[:2], strict=True):
        assert_same("gradient", g, t, 1e-10)
    assert set(same.metrics) == set(out.metrics)
    for n in out.metrics:
        assert_same(n, same.metrics[n], out.metrics[n], 1e-6)
    if not options.get("entropy_coef"):
        bare = loss_from_logprobs(losses.get(name, **options), stats.logprobs, TokenBatch(**fields))
        assert torch.equal(bare.loss, same.loss)


# -- upstream, advantages, old log-probs ----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_scalar_is_not_rounded_to_the_gradients_dtype(dtype):
    """1/3 in bfloat16 is off by 0.1%: the same on every element, so no averaging removes it."""
    clean, _, fields, _ = make(0, dtype)
    _, ones = fused("nll", {}, clean, fields)
    _, thirds = fused("nll", {}, clean, fields, 1 / 3)
    tied = (thirds[1].double() * ones[1].double()).sum() / ones[1].double().square().sum()
    assert abs(float(tied) * 3 - 1) < 2e-4


def test_backward_twice_adds_up_and_grad_is_not_shared():
    clean, _, fields, _ = make()
    hidden, weight, _ = clean.leaves()
    out = fused_loss(losses.get("nll"), hidden, weight, TokenBatch(**fields))
    out.loss.backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad.mul_(5)  # as gradient clipping does: the graph's own copy must not follow
    weight.grad = None
    out.loss.backward()
    assert torch.equal(weight.grad, first)


def test_second_derivative_raises():
    clean, _, fields, _ = make()
    hidden, weight, _ = clean.leaves()
    for name in ("nll", "dpo"):
        loss = fused_loss(losses.get(name), hidden, weight, TokenBatch(**fields)).loss
        (g,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            g.square().sum().backward()


def test_advantages_per_sequence_are_spread_over_its_tokens():
    clean, garbage, fields, _ = make()
    per_sequence = torch.tensor([0.5, 9.0, -1.0, 2.0, -0.3, 1.0], dtype=torch.float64)
    lengths = fields["cu_seqlens"].diff().long()
    for backend in ("torch", "reference"):
        a, da = fused("grpo", {}, garbage, {**fields, "advantages": per_sequence}, backend=backend)
        b, db = fused(
            "grpo", {}, garbage, {**fields, "advantages": per_sequence.repeat_interleave(lengths)}, backend=backend
        )
        assert torch.equal(a.loss, b.loss) and torch.equal(da[1], db[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_update_has_ratio_one_exactly(dtype, temperature):
    """old_logprobs from linear_logprobs on the same rows: log-ratio 0 in every bit, whatever the temperature."""
    clean, _, fields, _ = make(0, dtype, lengths=(40, 0, 31, 1, 57, 44), bias=True)
    clean.options = {"temperature": temperature}
    how = {"workspace_bytes": 20 * ROW}
    batch = TokenBatch(
        **{k: fields[k] for k in ("targets", "cu_seqlens")},
        advantages=fields["advantages"].nan_to_num(1.0, 1.0, 1.0).to(dtype),
    )
    with torch.no_grad():  # as a trainer scores; what keeps logits for a backward cuts the rows elsewhere
        old = linear_logprobs(*clean.leaves()[:2], clean.targets, clean.bias, **clean.options, **how).logprobs
    batch.old_logprobs = old
    for name in ("ppo_clip", "grpo", "dapo"):
        out = fused_loss(losses.get(name), *clean.leaves()[:2], batch, clean.bias, **clean.options, **how)
        assert torch.equal(out.stats.logprobs, old)
        assert out.metrics["clip_ratio/region_mean"] == 0 and abs(float(out.metrics["ratio"]) - 1) < 1e-6


@pytest.mark.parametrize("old", ["none", "same"])
def test_ppo_gradient_at_ratio_one_is_reinforce(old):
    clean, garbage, fields, _ = make(bias=True)
    logp = linear_logprobs(clean.hidden, clean.weight, clean.targets, clean.bias).logprobs
    same = {**fields, "old_logprobs": None if old == "none" else logp}
    _, want = fused("reinforce", {}, garbage, fields)
    for name in ("ppo_clip", "dapo"):
        _, grads = fused(name, {}, garbage, same)
        for g, t in zip(grads, want, strict=True):
            assert_same(name, g, t, 1e-12)


@pytest.mark.parametrize("far", [200.0, -200.0, 60.0, 1e4, -1e4])
@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_policies_far_apart_stay_finite(name, i, far):
    check_far(name, CASES[name][i], far)


def check_far(name, options, far) -> None:
    clean, garbage, fields, sequences = make(0, torch.float32)
    kept = torch.cat(sequences.rows)
    for field in ("old_logprobs", "ref_logprobs"):
        fields[field][kept] = clean_logprobs(clean)[kept] - far
    out, grads = fused(name, options, garbage, {**fields, "old_logprobs": fields["old_logprobs"].float()})
    assert out.loss.isfinite() and all(g.isfinite().all() for g in grads[:2])
    assert all(m.isfinite() for m in out.metrics.values())


def clean_logprobs(p: Problem) -> torch.Tensor:
    return plain_statistics(p.leaves(torch.float64), p.targets, **p.options)["logprobs"].detach()


def test_a_policy_that_strayed_is_pulled_back():
    """Past the exponent's range the gradient keeps its sign: clamps that stop it leave the worst tokens unpunished."""
    for far, sign in ((-200.0, -1), (-60.0, -1), (60.0, 1), (200.0, 1)):
        logp = torch.tensor([far], requires_grad=True)
        (g,) = torch.autograd.grad(losses.kl_estimate("k3", logp, torch.zeros(1)).sum(), logp)
        assert g.isfinite().all() and (g * sign > 0).all()
    logp = torch.tensor([200.0], requires_grad=True)
    batch = TokenBatch(torch.zeros(1, dtype=torch.long), advantages=-torch.ones(1), old_logprobs=torch.zeros(1))
    (g,) = torch.autograd.grad(loss_from_logprobs(losses.get("ppo_clip"), logp, batch).loss, logp)
    assert g.isfinite().all() and (g > 0).all()


# -- KL and entropy terms ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_values_and_gradients(kind):
    logp = torch.linspace(-12, 0, 41, dtype=torch.float64, requires_grad=True)
    ref = torch.linspace(-7, -0.5, 41, dtype=torch.float64)
    d = (logp - ref).detach()
    value = losses.kl_estimate(kind, logp, ref)
    (g,) = torch.autograd.grad(value.sum(), logp)
    assert_same("value", value, {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind], 1e-12)
    assert_same("gradient", g, {"k1": torch.ones_like(d), "k2": d, "k3": 1 - torch.exp(-d)}[kind], 1e-12)


def test_k3_keeps_the_digits_of_small_divergences():
    check_small_k3()


def check_small_k3() -> None:
    d = torch.logspace(-7, 0.5, 60).repeat(2) * torch.tensor([[1.0], [-1.0]]).repeat_interleave(60, 1).view(-1)
    logp = d.clone().requires_grad_()
    value = losses.kl_estimate("k3", logp, torch.zeros_like(d))
    (g,) = torch.autograd.grad(value.sum(), logp)
    x = -d.double()
    powers = [x**k / float(math.factorial(k)) for k in range(1, 40)]
    assert (value / sum(powers[1:]) - 1).abs().max() < 2e-6 and (value >= 0).all()
    assert (g / -sum(powers) - 1).abs().max() < 2e-6


def test_entropy_bonus_is_its_true_gradient():
    """By central differences of the entropy itself, through no formula of ours or torch's autograd."""
    clean, garbage, fields, sequences = make(bias=True)
    rows, eps = torch.cat(sequences.rows), 1e-6
    direction = torch.randn(clean.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def entropy(t):
        weight = clean.weight + t * direction
        return plain_statistics((clean.hidden, weight, clean.bias), clean.targets)["entropy"][rows].mean()

    slope = (entropy(eps) - entropy(-eps)) / (2 * eps)
    only = losses.get("reinforce", entropy_coef=1.0)
    _, grads = fused(
        None, None, garbage, {**fields, "advantages": torch.zeros(20, dtype=torch.float64)}, objective=only
    )
    assert abs(float((grads[1] * direction).sum() + slope)) < 1e-7 * max(1.0, abs(float(slope)))


# -- empty and fully masked batches ------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["no_sequences", "empty_sequences", "all_masked", "all_ignored"])
@pytest.mark.parametrize("name,i", EVERY_CASE)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nothing_trained_is_zero_loss_with_zero_gradients(name, i, how, backend):
    t = 4 if how.startswith("all") else 0
    cu = {"no_sequences": [0], "empty_sequences": [0, 0, 0]}.get(how, [0, 1, 4])
    column = torch.full((t,), torch.nan)
    batch = TokenBatch(
        targets=torch.full((t,), -100 if how == "all_ignored" else 2),
        mask=torch.zeros(t, dtype=torch.bool) if how == "all_masked" else None,
        cu_seqlens=torch.tensor(cu),
        advantages=column,
        old_logprobs=column,
        ref_logprobs=column,
    )
    hidden, weight = torch.randn(t, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    out = fused_loss(losses.get(name, **CASES[name][i]), hidden, weight, batch, backend=backend)
    out.loss.backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape
    assert not hidden.grad.any() and not weight.grad.any()
    assert all(m.isfinite() for m in out.metrics.values()) and out.loss.isfinite()
    if name != "dpo":  # an empty pair is a pair: its loss is log 2, and only its gradient is zero
        assert out.loss == 0


# -- objectives of one's own ------------------------------------------------------------------------------------------
def own_token(stats, batch):
    return stats.logprobs**2 * (1 + batch.spread(batch.rewards)) + 0.1 * stats.entropy * stats.logsumexp


def own_sequence(stats, batch):
    return torch.exp(segment_sum(stats.logprobs, batch) / batch.lengths.clamp(min=1)) * batch.rewards


def own_pair(stats, batch):
    s = segment_sum(stats.logprobs, batch)
    return (s[0::2] - s[1::2] - batch.margins) ** 2


def own_group(stats, batch):
    from fastrl.objective import group_index, num_groups

    s = segment_sum(stats.logprobs, batch) * batch.rewards
    return s.new_zeros(num_groups(batch)).index_add(0, group_index(batch), s) ** 2


def own_batch(stats, batch):
    s = segment_sum(stats.logprobs, batch)
    return torch.logsumexp(s / 10, 0) + stats.entropy.var()


own_token.scope, own_token.outputs = "token", ("entropy", "logsumexp")
own_sequence.scope, own_pair.scope, own_group.scope, own_batch.scope = "sequence", "pair", "group", "batch"
own_batch.outputs = ("entropy",)
REWARDS = torch.tensor([0.4, -1.0, 2.0, 0.3, -0.5, 1.1], dtype=torch.float64)
MARGINS = torch.tensor([0.1, -2.0, 1.0], dtype=torch.float64)


def own_truth(scope, stats, sequences):
    """The five functions above from their definitions, one weight per unit: each sequence 1/S, or each token 1/T."""
    logps = [stats["logprobs"][r] for r in sequences.rows]
    sums = torch.stack([x.sum() for x in logps])
    if scope == "token":
        per = [
            x**2 * (1 + REWARDS[i]) + 0.1 * stats["entropy"][r] * stats["logsumexp"][r]
            for i, (x, r) in enumerate(zip(logps, sequences.rows, strict=True))
        ]
        return torch.cat(per).mean()
    if scope == "sequence":
        return torch.stack(
            [torch.exp(x.mean() if len(x) else x.sum()) * REWARDS[i] for i, x in enumerate(logps)]
        ).mean()
    if scope == "pair":
        return ((sums[0::2] - sums[1::2] - MARGINS) ** 2).mean()
    if scope == "group":
        ids = torch.tensor(sequences.group_ids)
        return sum((sums * REWARDS)[ids == g].sum() ** 2 * (ids == g).sum() for g in ids.unique()) / len(ids)
    return torch.logsumexp(sums / 10, 0) + stats["entropy"][torch.cat(sequences.rows)].var()


@pytest.mark.parametrize(
    "objective", [own_token, own_sequence, own_pair, own_group, own_batch], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_plain_function_with_a_scope_is_an_objective(objective, backend):
    clean, garbage, fields, sequences = make(bias=True)
    fields = {**fields, "rewards": REWARDS, "margins": MARGINS}
    out, grads = fused(None, None, garbage, fields, 0.3, objective=objective, backend=backend, workspace_bytes=3 * ROW)
    leaves = clean.leaves()
    truth = own_truth(objective.scope, plain_statistics(leaves, clean.targets), sequences)
    assert_same("loss", out.loss, truth, 1e-10)
    for g, t in zip(grads, gradients(truth * 0.3, leaves), strict=True):
        assert_same("gradient", g, t, 1e-10)


def test_aggregate_may_be_a_function_of_the_batch():
    clean, garbage, fields, sequences = make()

    def later_tokens_count_more(batch):
        return torch.arange(1, batch.targets.shape[0] + 1) / 100

    out, _ = fused("nll", {}, garbage, fields, aggregate=later_tokens_count_more)
    rows = torch.cat(sequences.rows)
    want = -(clean_logprobs(clean)[rows] * torch.arange(1, len(rows) + 1) / 100).sum()
    assert_same("loss", out.loss, want, 1e-6)


# -- linear_cross_entropy ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.3, "z_loss": 0.1}]
)
@pytest.mark.parametrize(
    "head", [{}, {"bias": True, "temperature": 0.7, "logit_scale": 1.3}, {"temperature": "per_token"}]
)
def test_linear_cross_entropy(reduction, options, head):
    p = problem(**head)
    p.targets[[1, 6]] = -100
    leaves = p.leaves()
    z = F.linear(leaves[0], leaves[1], leaves[2]) * p.options.get("logit_scale", 1.0)
    t = p.options.get("temperature", 1.0)
    z = z / (t[:, None] if isinstance(t, torch.Tensor) else t)
    truth = F.cross_entropy(z, p.targets, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    truth = truth + options.get("z_loss", 0.0) * z.logsumexp(-1) ** 2 * (p.targets != -100)
    upstream = torch.randn(13, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    truth = {"mean": truth.sum() / 11, "sum": truth.sum(), "none": truth * upstream}[reduction]
    ours_leaves = p.leaves()
    p.hidden[1] = torch.nan
    ours_leaves[0].data[1] = torch.nan  # an ignored row may hold anything
    own = linear_cross_entropy(*ours_leaves[:2], p.targets, ours_leaves[2], reduction=reduction, **options, **p.options)
    own = own * upstream if reduction == "none" else own
    assert_same("loss", own, truth, 1e-10)
    for g, t in zip(gradients(own.sum(), ours_leaves), gradients(truth.sum(), leaves), strict=True):
        if t is not None:
            assert_same("gradient", g, t, 1e-10)


def test_linear_cross_entropy_is_torchs_by_default():
    p = problem(dtype=torch.float32, bias=True)
    want = F.cross_entropy(F.linear(p.hidden, p.weight, p.bias), p.targets)
    assert torch.allclose(linear_cross_entropy(p.hidden, p.weight, p.targets, p.bias), want, rtol=1e-6)
    ignored = torch.full_like(p.targets, -100)
    assert linear_cross_entropy(p.hidden, p.weight, ignored).isnan()  # as torch: the mean of nothing
    assert linear_cross_entropy(p.hidden, p.weight, ignored, reduction="sum") == 0


def test_linear_cross_entropy_under_autocast_keeps_float32_logits():
    p = problem(n=32, dtype=torch.float32)
    low = (p.hidden.bfloat16().double(), p.weight.bfloat16().double())
    want = F.cross_entropy(F.linear(*low), p.targets, label_smoothing=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = linear_cross_entropy(p.hidden, p.weight, p.targets, label_smoothing=0.2)
    assert abs(float(own) - float(want)) < 1e-6


# -- support ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("head", [{}, {"bias": True, "temperature": "per_token", "logit_scale": 1.4, "softcap": 4.0}])
def test_support_is_softmax_over_the_kept_tokens(head):
    p = problem(**head)
    g = torch.Generator().manual_seed(2)
    keep = torch.rand(13, V, generator=g) < 0.3
    keep[torch.arange(13), p.targets] = True
    keep[3, p.targets[3]], keep[4] = False, False  # a target outside its support; a support of one word
    keep[4, p.targets[4]] = True
    p.targets[[0, 7]] = -100
    leaves = p.leaves()
    names = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "is_argmax")
    z = F.linear(leaves[0], leaves[1], leaves[2]) * p.options.get("logit_scale", 1.0)
    cap, t = p.options.get("softcap"), p.options.get("temperature", torch.ones(13, dtype=torch.float64))
    z = (z if cap is None else cap * torch.tanh(z / cap)) / t[:, None]
    z = z.masked_fill(~keep, -math.inf)
    logp = z.log_softmax(-1)
    safe, kept = logp.masked_fill(~keep, 0.0), p.targets != -100
    target = p.targets.clamp(min=0)[:, None]
    truth = {
        "logprobs": logp.gather(1, target)[:, 0],
        "entropy": -(logp.exp() * safe).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "is_argmax": z.argmax(-1) == target[:, 0],
    }
    own_leaves = p.leaves()
    own_leaves[0].data[7] = torch.nan
    support = (keep.nonzero()[:, 1].int(), F.pad(keep.sum(1).cumsum(0), (1, 0)).int())
    own = linear_logprobs(*own_leaves[:2], p.targets, own_leaves[2], support=support, outputs=names, **p.options)
    for n in names:
        assert_same(n, getattr(own, n), torch.where(kept, truth[n], torch.zeros_like(truth[n])), 1e-10)
    total, true_total = 0, 0
    sound = kept & (torch.arange(13) != 3)
    for n in names[:3]:
        total = total + (getattr(own, n)[sound] * p.upstream[n][sound]).sum()
        true_total = true_total + (truth[n][sound] * p.upstream[n][sound]).sum()
    for x, t in zip(gradients(total, own_leaves), gradients(true_total, leaves), strict=True):
        if t is not None:
            assert_same("gradient", x, t, 1e-10)
    assert own.logprobs[3] == -math.inf and own.logprobs[4] == 0

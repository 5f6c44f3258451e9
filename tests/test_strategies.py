"""Each strategy by name: the same numbers, and the GEMMs, memory and dropped rows that it promises. No clocks."""

from __future__ import annotations

import bisect
import dataclasses
import types
from fractions import Fraction

import pytest
import test_losses
import torch
from oracle import DIFFERENTIABLE, Problem, Watch, assert_as_accurate, assert_same, gradients, plain_run, problem
from test_losses import CASES, HEADS, own_batch, own_group, own_pair, own_sequence
from test_operators import DTYPES, GRADS, OPTIONS, check_accurate_on_average, check_exact

from fastrl import TokenBatch, fused_loss, linear_logprobs, losses
from fastrl.losses.policy import PolicyLoss
from fastrl.ops import custom, dispatch, fused, native_backend, torch_backend, walk
from fastrl.ops.head import Coefs

EACH_ROW_WORK = True
N, H, V = 48, 8, 64
GEMM = N * H * V
LEARNED = ("two_pass", "cached")
IN_LOSS = ("one_pass", "two_pass", "cached")


def room(rows: int, v: int = V, size: int = 4) -> int:
    """The smallest workspace that holds the logits of that many rows: 3/16 of it are for the tiles."""
    return next(w for w in range(rows * v * size * 16 // 13, 1 << 40) if w - 3 * (w // 16) >= rows * v * size)


# -- linear_logprobs: the numbers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 5, 13, 1000])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strategy", LEARNED)
def test_exact_in_float64(strategy, options, rows):
    p = problem(**OPTIONS[options])
    check_exact(p, strategy=strategy, workspace_bytes=room(rows, p.weight.shape[0], 8))


def frozen_run(p: Problem, **how):
    """(log-probs, dH) of a head without gradients."""
    hidden, weight, bias = p.leaves()
    own = weight.detach(), None if bias is None else bias.detach()
    logprobs = linear_logprobs(hidden, own[0], p.targets, own[1], strategy="frozen", **p.options, **how).logprobs
    (grad,) = torch.autograd.grad((logprobs * p.upstream["logprobs"].to(logprobs.dtype)).sum(), hidden)
    return logprobs.detach(), grad


def check_frozen(options: str = "everything", rows: int = 5) -> None:
    p = problem(**OPTIONS[options])
    p.upstream["logprobs"][2:5] = 0.0
    stats, true = plain_run(p, torch.float64, ("logprobs",))
    logprobs, grad = frozen_run(p, workspace_bytes=room(rows, p.weight.shape[0], 8))
    assert_same("logprobs", logprobs, stats["logprobs"], 1e-10)
    assert_same("d_hidden", grad, true[0], 1e-10)


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("options", OPTIONS)
def test_frozen_is_exact_in_float64(options, rows):
    check_frozen(options, rows)


def test_frozen_row_without_coefficient_gives_zero_whatever_stands_in_it():
    p = problem()
    p.hidden[4] = torch.nan
    p.upstream["logprobs"][4] = 0.0
    _, grad = frozen_run(p)
    assert not grad[4].any() and grad.isfinite().all()


@pytest.mark.parametrize("n", [1, 13, 64, 70])
@pytest.mark.parametrize("strategy", (None, *LEARNED))
def test_batch_invariant_is_exact_too(strategy, n):
    """Its GEMMs take 64 rows whatever n is; what stands beside the n must reach nothing."""
    check_exact(problem(n=n, bias=True), strategy=strategy, batch_invariant=True)
    if strategy is None:
        p = problem(n=n)
        _, grad = frozen_run(p, batch_invariant=True)
        assert_same("d_hidden", grad, plain_run(p, torch.float64, ("logprobs",))[1][0], 1e-10)


def wide(dtype: str, seed: int, options: str) -> Problem:
    return problem(dtype=DTYPES[dtype], seed=seed, **{"n": 48, "h": 64, "v": 211, **OPTIONS[options]})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("strategy", LEARNED)
def test_rule7(strategy, options, dtype):
    made = [wide(dtype, seed, options) for seed in range(4)]
    check_accurate_on_average(made, strategy=strategy, workspace_bytes=room(20, 211))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_frozen_rule7(options, dtype):
    found = ([], []), ([], []), ([], [])
    for p in (wide(dtype, seed, options) for seed in range(4)):
        plain, truth = (plain_run(p, d, ("logprobs",)) for d in (None, torch.float64))
        runs = frozen_run(p, workspace_bytes=room(20, 211)), plain, truth
        for lists, (stats, grads) in zip(found, runs, strict=True):
            lists[0].append(stats["logprobs"] if isinstance(stats, dict) else stats)
            lists[1].append(grads[0] if isinstance(grads, list) else grads)
    for n, i, k in (("logprobs", 0, 1.5), ("d_hidden", 1, 2.0)):
        assert_as_accurate(n, *(torch.cat(lists[i]) for lists in found), k)


# -- linear_logprobs: what it costs ----------------------------------------------------------------------------------
def cost(strategy, needs=(True, True), outputs=("logprobs",), rows=16, zero=None, twice=False, dtype=torch.float32):
    """(GEMMs of the forward, of the backward). zero: [N] bool, rows whose upstream gradient is 0."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=g).to(dtype) for n in (N, V))
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    targets = torch.randint(0, V, (N,), generator=g)
    how = dict(strategy=strategy, workspace_bytes=room(rows), outputs=outputs)
    with Watch() as forward:
        stats = linear_logprobs(hidden, weight, targets, **how)
    if not any(needs):
        return Fraction(forward.macs, GEMM), 0
    upstream = torch.randn(N, generator=g).masked_fill(torch.zeros(N, dtype=torch.bool) if zero is None else zero, 0.0)
    total = sum((getattr(stats, n) * upstream).sum() for n in outputs)
    with Watch() as backward:
        total.backward(retain_graph=twice)
    return Fraction(forward.macs, GEMM), Fraction(backward.macs, GEMM)


def test_forward_is_one_gemm():
    assert cost("forward", (False, False)) == cost(None, (False, False)) == (1, 0)
    with torch.no_grad():
        hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        with Watch() as watch:
            linear_logprobs(hidden, weight, torch.zeros(N, dtype=torch.long))
    assert watch.macs == GEMM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_pass_makes_every_logit_again(dtype):
    for rows in (1, 16, 1000):
        assert cost("two_pass", rows=rows, dtype=dtype) == (1, 3)
        assert cost("two_pass", (True, False), rows=rows, dtype=dtype) == (1, 2)
        assert cost("two_pass", (False, True), rows=rows, dtype=dtype) == (1, 2)


@pytest.mark.parametrize("rows", [1, 7, 16, 32, 48, 1000])
def test_cached_makes_again_what_did_not_fit(rows):
    check_cached_cost(rows)


def check_cached_cost(rows: int) -> None:
    again = Fraction(max(0, N - rows), N)
    assert cost("cached", rows=rows) == (1, 2 + again)
    assert cost("cached", (True, False), rows=rows) == (1, 1 + again)
    assert cost("cached", (False, True), rows=rows, outputs=DIFFERENTIABLE) == (1, 1 + again)


def test_frozen_takes_two_gemms_and_none_in_the_backward():
    for rows in (1, 16, 1000):
        assert cost("frozen", (True, False), rows=rows) == (2, 0)


def test_defaults():
    """As fastrl/ops/dispatch.py says them: forward, frozen, cached; two_pass on triton."""
    assert cost(None, rows=16) == cost("cached", rows=16) == (1, 2 + Fraction(32, 48))
    assert cost(None, (True, False)) == (2, 0)
    assert cost(None, (True, False), ("logprobs", "entropy")) == (1, 1 + Fraction(32, 48))
    assert cost(None, (False, True)) == (1, 1 + Fraction(32, 48))
    choose, both = dispatch.statistics_strategy, (True, True, False)
    assert choose(None, "triton", both, ("logprobs",)) == "two_pass"
    assert choose(None, "triton", (True, False, False), ("logprobs",)) == "frozen"
    assert choose(None, "torch", both, ()) == choose(None, "torch", (False,) * 3, ("logprobs",)) == "forward"
    assert choose(None, "native", (True, False, True), ("logprobs",)) == "cached"
    assert dispatch.loss_strategy(None) == "one_pass"


@pytest.mark.parametrize("strategy,per_row", [("two_pass", (3, 3)), ("cached", (3, 2)), ("frozen", (0, 0))])
def test_rows_without_coefficient_leave_the_backward(strategy, per_row):
    check_dropped(strategy, per_row)


def check_dropped(strategy, per_row) -> None:
    """A quarter of the rows counts, among those whose logits were kept (the last 16) and the others."""
    counts = torch.arange(N) % 4 == 1
    needs = (True, strategy != "frozen")
    lost, kept = int(counts[:32].sum()), int(counts[32:].sum())
    assert cost(strategy, needs, zero=~counts)[1] == Fraction(per_row[0] * lost + per_row[1] * kept, N)
    assert cost(strategy, needs, zero=torch.ones(N, dtype=torch.bool))[1] == 0


@pytest.mark.parametrize("strategy", LEARNED)
def test_dropped_rows_change_nothing(strategy):
    p = problem(n=N, bias=True)
    for every in (2, 5):
        p.upstream = {n: u * (torch.arange(N) % every == 1) for n, u in p.upstream.items()}
        check_exact(p, strategy=strategy, workspace_bytes=room(16, 37, 8))


@pytest.mark.parametrize("strategy", (*LEARNED, "frozen"))
def test_backward_twice_gives_the_same(strategy):
    p = problem(n=N, dtype=torch.float32)
    hidden, weight, _ = p.leaves()
    weight.requires_grad_(strategy != "frozen")
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    logprobs = linear_logprobs(hidden, weight, p.targets, strategy=strategy, workspace_bytes=room(16, 37)).logprobs
    total = (logprobs * p.upstream["logprobs"].float()).sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for part in (1.0, 0.5):  # other coefficients in between must not disturb what is kept
        torch.autograd.grad((logprobs[: N // 2] * part).sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_support_costs_its_own_words():
    """2*nnz*H flops forward and for each gradient, whatever V is."""
    p = problem(n=N, h=H, v=5000, dtype=torch.float32)
    hidden, weight, _ = p.leaves()
    support = (p.targets[:, None] + torch.tensor([0, 1, 7])).remainder(5000).flatten(), torch.arange(0, 3 * N + 1, 3)
    with Watch() as forward:
        logprobs = linear_logprobs(hidden, weight, p.targets, support=support).logprobs
    with Watch() as backward:
        (logprobs * p.upstream["logprobs"].float()).sum().backward()
    assert forward.macs <= 3 * N * H and backward.macs <= 2 * 3 * N * H
    assert forward.largest < N * 5000 // 8


# -- fused_loss: the numbers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", IN_LOSS)
@pytest.mark.parametrize("rows", [1, 4, 12, 1000])
@pytest.mark.parametrize("name,i", [("ppo_clip", 1), ("grpo", 0), ("dr_grpo", 1), ("nll", 0), ("dpo", 1)])
def test_loss_is_the_papers(name, i, rows, strategy):
    check_law(name, i, rows, strategy)


def check_law(name, i, rows, strategy) -> None:
    clean, garbage, fields, sequences = test_losses.make(1, **HEADS["everything"])
    how = dict(strategy=strategy, workspace_bytes=room(rows, 37, 8))
    out, grads = test_losses.fused(name, CASES[name][i], garbage, fields, -1.7, **how)
    loss, true = test_losses.paper(name, CASES[name][i], clean, sequences, -1.7)
    assert_same("loss", out.loss, loss, 1e-10)
    for n, g, t in zip(GRADS, grads, true, strict=True):
        assert_same(n, g, t, 1e-10)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", IN_LOSS)
@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_loss_rule7(name, strategy, dtype):
    every: dict = {}
    for seed in range(6):
        shape = dict(lengths=(40, 0, 31, 1, 57, 44), **HEADS["everything"])
        clean, garbage, fields, sequences = test_losses.make(seed, DTYPES[dtype], **shape)
        how = dict(strategy=strategy, workspace_bytes=room(50, 37))
        runs = (
            test_losses.fused(name, {}, garbage, fields, 0.7, **how),
            test_losses.paper(name, {}, clean, sequences, 0.7, dtype=DTYPES[dtype]),
            test_losses.paper(name, {}, clean, sequences, 0.7),
        )
        for which, (_, grads) in enumerate(runs):
            for n, x in zip(GRADS, grads, strict=True):
                every.setdefault(n, ([], [], []))[which].append(x.flatten())
    for n, lists in every.items():
        assert_as_accurate(n, *(torch.cat(x) for x in lists), 2.0)


LENGTHS = (
    (5, 3, 9, 1, 17, 7, 2, 4),
    (0, 0, 30, 1, 0, 0, 8, 9),  # a pair of nothing first and in the middle
    (16, 16, 16, 0, 0, 0, 0, 0),  # and last
    (0, 48, 0, 0, 0, 0, 0, 0),
    (1, 1, 1, 1, 41, 1, 1, 1),
)
OBJECTIVES = {"sequence": own_sequence, "pair": own_pair, "group": own_group, "batch": own_batch}


def units_of(scope: str, lengths) -> list[int]:
    if scope in ("group", "batch"):
        return [sum(lengths)]
    each = 2 if scope == "pair" else 1
    return [sum(lengths[i : i + each]) for i in range(0, len(lengths), each)]


def packed(lengths, dtype=torch.float64, needs=(True, True), zero_rewards=()):
    """(hidden, weight, batch) of sequences of these lengths."""
    g = torch.Generator().manual_seed(3)
    t, s = sum(lengths), len(lengths)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    rewards = randn(s)
    rewards[list(zero_rewards)] = 0.0
    batch = TokenBatch(
        targets=torch.randint(0, V, (t,), generator=g),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        advantages=randn(t),
        old_logprobs=randn(t) - 4,
        ref_logprobs=randn(t) - 4,
        group_ids=torch.arange(s) % 3,  # the sequences of a group stand apart
        rewards=rewards,
        margins=randn(s // 2),
    )
    hidden, weight = (x.to(dtype).requires_grad_(a) for x, a in zip((randn(t, H), randn(V, H)), needs, strict=True))
    return hidden, weight, batch


@pytest.mark.parametrize("scope", OBJECTIVES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_units_of_any_length_in_any_workspace(lengths, scope):
    check_units(lengths, scope)


def check_units(lengths, scope) -> None:
    """Loss and gradients as the reference backend's, which materialises the logits and sees no unit."""
    hidden, weight, batch = packed(lengths)
    objective = OBJECTIVES[scope]
    truth = fused_loss(objective, hidden, weight, batch, backend="reference")
    true = torch.autograd.grad(truth.loss, (hidden, weight))
    assert truth.loss.isfinite()
    for strategy in IN_LOSS:
        for rows in (1, 2, 9, 16, 17, 31, 1000) if strategy == "one_pass" else (9,):
            out = fused_loss(objective, hidden, weight, batch, strategy=strategy, workspace_bytes=room(rows, size=8))
            assert_same("loss", out.loss, truth.loss, 1e-10)
            for n, g, t in zip(GRADS, torch.autograd.grad(out.loss, (hidden, weight)), true, strict=False):
                assert_same(n, g, t, 1e-10)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_dpo_with_empty_pairs(lengths):
    """An empty pair is a pair: its loss is log 2, wherever it stands."""
    check_dpo(lengths)


def check_dpo(lengths) -> None:
    hidden, weight, batch = packed(lengths)
    objective = losses.get("dpo")
    truth = fused_loss(objective, hidden, weight, batch, backend="reference")
    true = torch.autograd.grad(truth.loss, (hidden, weight))
    for rows in (1, 9, 17, 1000):
        out = fused_loss(objective, hidden, weight, batch, workspace_bytes=room(rows, size=8))
        assert_same("loss", out.loss, truth.loss, 1e-10)
        for n, g, t in zip(GRADS, torch.autograd.grad(out.loss, (hidden, weight)), true, strict=False):
            assert_same(n, g, t, 1e-10)


# -- fused_loss: what it costs ----------------------------------------------------------------------------------------
def loss_cost(objective, lengths=(N,), strategy=None, rows=16, needs=(True, True), zero_rewards=(), batch=None, **how):
    hidden, weight, own = packed(lengths, torch.float32, needs, zero_rewards)
    with Watch() as watch:
        out = fused_loss(objective, hidden, weight, batch or own, strategy=strategy, workspace_bytes=room(rows), **how)
        if out.loss.requires_grad:
            out.loss.backward()
    return Fraction(watch.macs, GEMM)


@pytest.mark.parametrize("name", ["nll", "reinforce", "own"])
def test_token_scope(name):
    objective = test_losses.own_token if name == "own" else losses.get(name)
    for rows in (9, 1000):
        again = Fraction(max(0, N - rows), N)
        for needs, more in (((True, True), 2), ((True, False), 1), ((False, True), 1)):
            run = lambda strategy: loss_cost(objective, strategy=strategy, rows=rows, needs=needs)  # noqa: E731, B023
            assert run("one_pass") == run(None) == 1 + more
            if name == "own" or needs != (True, False):
                assert run("two_pass") == 2 + more
                assert run("cached") == 1 + more + again
        assert loss_cost(objective, rows=rows, needs=(False, False)) == 1


@pytest.mark.parametrize("scope", OBJECTIVES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_units_that_fit_take_three_gemms_and_longer_ones_up_to_four(lengths, scope):
    check_unit_cost(lengths, scope)


def check_unit_cost(lengths, scope) -> None:
    objective, units = OBJECTIVES[scope], units_of(scope, lengths)
    again = {rows: Fraction(sum(max(0, u - rows) for u in units), N) for rows in (1, 9, 16, 48)}
    for rows, more in again.items():
        assert loss_cost(objective, lengths, rows=rows) == 3 + more
    for needs in ((True, False), (False, True)):
        assert loss_cost(objective, lengths, rows=16, needs=needs) == 2 + again[16]
    assert loss_cost(objective, lengths, rows=16, needs=(False, False)) == 1
    assert loss_cost(objective, lengths, "two_pass") == 4
    assert loss_cost(objective, lengths, "cached", rows=16) == 3 + Fraction(32, 48)


@pytest.mark.parametrize("strategy", IN_LOSS)
def test_sequences_without_reward_leave_the_backward(strategy):
    """Their rows are 3/8 of all; those whose logits are made again leave that GEMM as well."""
    lengths, gone = (10, 6, 6, 8, 6, 12), (1, 2, 4)
    for rows in (16, 1000):
        lost = {"one_pass": 0, "two_pass": 30, "cached": max(0, 30 - 12) if rows == 16 else 0}[strategy]
        assert loss_cost(own_sequence, lengths, strategy, rows, zero_rewards=gone) == 1 + Fraction(2 * 30 + lost, N)


def clipped_batch(kept: torch.Tensor) -> TokenBatch:
    """Advantage +1 and a ratio far above the clip on all rows but `kept`: known only after their forward."""
    _, _, batch = packed((N,))
    old = torch.where(kept, 0.0, batch.old_logprobs - 100)
    return dataclasses.replace(batch, advantages=torch.ones(N), old_logprobs=old)


@pytest.mark.parametrize("strategy,per_row", [("one_pass", (2, 2)), ("two_pass", (3, 3)), ("cached", (3, 2))])
def test_clipped_rows_leave_the_backward(strategy, per_row):
    kept = torch.arange(N) % 4 == 2
    expected = 1 + Fraction(per_row[0] * 8 + per_row[1] * 4, N)
    assert loss_cost(losses.get("grpo"), strategy=strategy, batch=clipped_batch(kept)) == expected
    none = clipped_batch(torch.zeros(N, dtype=torch.bool))
    assert loss_cost(losses.get("grpo"), strategy=strategy, batch=none) == 1


@pytest.mark.parametrize("strategy", IN_LOSS)
def test_inert_rows_leave_the_forward_too(strategy):
    check_inert(strategy)


def check_inert(strategy) -> None:
    """A quarter of the rows has an advantage. A KL or entropy term trains the others all the same."""
    lengths = (13, 0, 11, 24)
    hidden, weight, batch = packed(lengths)
    batch.advantages = torch.where(torch.arange(N) % 4 == 3, batch.advantages, 0.0)
    batch.old_logprobs = None  # ratio 1: nothing is clipped
    full = {"one_pass": 3, "two_pass": 4, "cached": 3}[strategy]
    for options in ({}, {"kl_coef": 0.3}, {"entropy_coef": 0.1}):
        objective, runs = losses.get("grpo", **options), []
        for skip in (False, True):
            out = fused_loss(objective, hidden, weight, batch, strategy=strategy, skip_inert=skip)
            runs.append((out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))))
        for n, a, b in zip(("loss", *GRADS), *runs, strict=False):
            assert_same(n, b, a, 1e-12)
        spent = [
            loss_cost(objective, lengths, strategy, rows=1000, batch=batch, skip_inert=skip) for skip in (False, True)
        ]
        assert spent == [full, full] if options else spent == [1 + Fraction(full - 1, 4), Fraction(full, 4)]


def test_skip_inert_leaves_other_scopes_alone():
    assert loss_cost(own_sequence, (24, 24), rows=1000, zero_rewards=(1,), skip_inert=True) == 2


@pytest.mark.parametrize("strategy", IN_LOSS)
def test_loss_backward_twice_gives_the_same(strategy):
    for objective in (losses.get("grpo"), own_pair):
        hidden, weight, batch = packed((5, 3, 9, 31), torch.float32)
        loss = fused_loss(objective, hidden, weight, batch, strategy=strategy, workspace_bytes=room(16)).loss
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
        again = torch.autograd.grad(loss, (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 15, 48, 113])
def test_scoring_and_one_pass_make_the_same_bits(n, dtype):
    """So that the ratio of an on-policy update is exactly 1."""
    p = problem(n=n, h=24, v=211, dtype=DTYPES[dtype], temperature=0.8, bias=True)
    for rows in (1, 16, 20, 64, 1000):
        how = dict(workspace_bytes=room(rows, 211), temperature=0.8)
        old = linear_logprobs(p.hidden, p.weight, p.targets, p.bias, strategy="forward", **how).logprobs
        hidden, weight, bias = p.leaves()
        batch = TokenBatch(p.targets, advantages=torch.ones(n), old_logprobs=old)
        out = fused_loss(losses.get("ppo_clip"), hidden, weight, batch, bias, **how)
        assert torch.equal(out.stats.logprobs, old) and float(out.metrics["ratio"]) == 1.0


# -- names ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "strategy,needs,outputs,why",
    [
        ("one_pass", (True, True), ("logprobs",), "per-token statistics take None or one of"),
        ("fast", (True, True), ("logprobs",), "strategy is 'fast'"),
        ("forward", (True, False), ("logprobs",), "has no backward"),
        ("frozen", (True, True), ("logprobs",), "a head without gradients"),
        ("frozen", (True, False), ("logprobs", "entropy"), "only differentiable output"),
    ],
)
def test_names_that_do_not_fit_say_why(strategy, needs, outputs, why):
    with pytest.raises(ValueError, match=why):
        cost(strategy, needs, outputs)


def test_names_that_fused_loss_does_not_take():
    for name in ("frozen", "forward", "fast"):
        with pytest.raises(ValueError, match="fused_loss takes None, one_pass, two_pass or cached"):
            loss_cost(losses.get("nll"), strategy=name)
    with pytest.raises(ValueError, match="with triton use 'two_pass'"):
        dispatch.statistics_strategy("cached", "triton", (True, True, True), ("logprobs",))
    for budget in (0, -1):
        with pytest.raises(ValueError, match="workspace_bytes must be a positive number"):
            hidden, weight, batch = packed((4,))
            fused_loss(losses.get("nll"), hidden, weight, batch, workspace_bytes=budget)


# -- memory -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strategy", [*IN_LOSS, "statistics_two_pass", "statistics_cached", "frozen"])
def test_live_bytes(strategy, dtype):
    check_memory(strategy, dtype)


def check_memory(strategy, dtype) -> None:
    """At 768 x 24576 the logits would take 72 MiB."""
    n, h, v, workspace = 768, 32, 24576, 8 << 20
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, h, generator=g).to(dtype).requires_grad_() for k in (n, v))
    weight.requires_grad_(strategy != "frozen")
    targets = torch.randint(0, v, (n,), generator=g)
    with Watch() as watch:
        if strategy in IN_LOSS:
            batch = TokenBatch(targets, cu_seqlens=torch.arange(0, n + 1, 96), ref_logprobs=torch.full((n,), -9.0))
            objective = losses.get("dpo")
            fused_loss(objective, hidden, weight, batch, strategy=strategy, workspace_bytes=workspace).loss.backward()
        else:
            name = strategy.removeprefix("statistics_")
            stats = linear_logprobs(hidden, weight, targets, strategy=name, workspace_bytes=workspace)
            (stats.logprobs * torch.randn(n, generator=g)).sum().backward()
    rows = n * h * 4
    learned = 0 if strategy == "frozen" else v * h * 4
    rounded = 0 if dtype == torch.float32 else (n * h + (learned // 4)) * 2
    widened = 0 if dtype == torch.float32 else 8 << 20
    # Beside the logits: dH, dW, the gathered rows of hidden and their gradients, and the scratch of the row work.
    assert watch.peak <= workspace + learned + rounded + widened + 6 * rows + (1 << 20), f"{watch.peak / 2**20:.1f} MiB"
    assert watch.peak >= learned * dtype.itemsize // 4 + rows


# -- mistakes ----------------------------------------------------------------------------------------------------------
MUTANTS: dict[str, tuple] = {}


def mutant(*checks):
    """Registers a function that plants one mistake, and the checks that must fail each."""

    def register(plant):
        MUTANTS[plant.__name__] = (plant, checks)
        return plant

    return register


def cached_exact():
    check_exact(problem(bias=True), strategy="cached", workspace_bytes=room(5, 37, 8))


@mutant(cached_exact)
def kept_rows_start_one_late(patch):
    def change(f):
        def source(self, chosen, targets, law, logits=None, begin=0, end=0, start=0):
            if logits is not None:
                logits = logits.roll(-1, 1)
            return f(self, chosen, targets, law, logits, begin, end, start)

        return source

    patch.setattr(walk.Walk, "source", change(walk.Walk.source))


@mutant(lambda: check_dpo(LENGTHS[2]))
def empty_units_after_a_piece_forgotten(patch):
    def left(units, stop):
        return bisect.bisect_left(units, stop) + 1

    patch.setattr(fused, "bisect", types.SimpleNamespace(bisect_right=left))


@mutant(lambda: check_units(LENGTHS[0], "pair"), lambda: check_units(LENGTHS[0], "sequence"))
def unit_cursor_stands_still(patch):
    part = fused._Law._part

    def standing(self, start, stop):
        made = part(self, start, stop)
        self.next_unit = max(0, self.next_unit - 1)
        return made

    patch.setattr(fused._Law, "_part", standing)


@mutant(check_frozen)
def frozen_unit_without_its_upstream(patch):
    def signs(*given, **named):  # the backward names none of them
        return Coefs(*(None if x is None else (x != 0).to(x.dtype) for x in given), **named)

    patch.setattr(custom, "Coefs", signs)


@mutant(
    lambda: check_dropped("cached", (3, 2)), lambda: check_dropped("two_pass", (3, 3)),
    lambda: test_clipped_rows_leave_the_backward("one_pass", (2, 2)),
)  # fmt: skip
def zero_rows_kept(patch):
    patch.setattr(Coefs, "nonzero_rows", lambda self: torch.arange(self.present()[0].shape[0]))


@mutant(lambda: check_dropped("cached", (3, 2)))
def zero_rows_kept_where_logits_are_cached(patch):
    def change(f):
        def source(self, chosen, targets, law, logits=None, begin=0, end=0, start=0):
            if logits is not None:
                chosen = torch.arange(begin, end)
            return f(self, chosen, targets, law, logits, begin, end, start)

        return source

    patch.setattr(walk.Walk, "source", change(walk.Walk.source))


@mutant(lambda: check_units(LENGTHS[0], "pair"), lambda: check_units(LENGTHS[4], "batch"))
def pieces_split_a_unit(patch):
    pieces = walk.pieces
    patch.setattr(walk, "pieces", lambda n, capacity, units=None: pieces(n, capacity))


@mutant(lambda: check_unit_cost(LENGTHS[0], "sequence"))
def every_unit_a_piece_that_keeps_nothing(patch):
    change_kept(patch)


def change_kept(patch) -> None:
    source = walk.Walk.source

    def again(self, chosen, targets, law, logits=None, begin=0, end=0, start=0):
        return source(self, chosen, targets, law, start=start)

    patch.setattr(walk.Walk, "source", again)


@mutant(lambda: check_cached_cost(16), lambda: check_cached_cost(1000))
def cached_keeps_nothing(patch):
    change_kept(patch)


@mutant(lambda: check_cached_cost(16), lambda: check_memory("statistics_cached", torch.float32))
def workspace_not_honoured(patch):
    patch.setattr(walk.Walk, "_columns", lambda self, most: max(1, self.hidden.shape[0]))


@mutant(lambda: check_inert("one_pass"), lambda: check_inert("cached"))
def inert_whatever_the_kl(patch):
    patch.setattr(PolicyLoss, "inert", lambda self, batch: batch.token_advantages == 0)


@mutant(lambda: check_inert("one_pass"))
def inert_rows_take_their_share_of_the_weights(patch):
    def renormed(f):
        def dropped(*args):
            batch, rows, weights = f(*args)
            return batch, rows, weights * (args[3].sum() / weights.sum())

        return dropped

    patch.setattr(fused, "_drop", renormed(fused._drop))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name, monkeypatch):
    plant, checks = MUTANTS[name]
    for check in checks:
        check()
        with monkeypatch.context() as patch:
            plant(patch)
            with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError)):
                check()


def test_mutants_restore_what_they_change():
    assert gradients is not None and torch_backend.statistics is not native_backend.statistics
    cached_exact()

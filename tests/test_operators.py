"""linear_logprobs: every output and gradient against materialised logits, every option, shape, stride and workspace."""

from __future__ import annotations

import dataclasses
import itertools
from statistics import mean

import pytest
import torch
from oracle import (
    DIFFERENTIABLE,
    EVERY_STAT,
    Problem,
    Watch,
    assert_as_accurate,
    assert_same,
    errors,
    gradients,
    plain_run,
    problem,
)

from fastrl import TokenBatch, fused_loss, linear_logprobs, losses

EACH_ROW_WORK = True
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "per_token_temperature": {"temperature": "per_token", "bias": True},
    "logit_scale": {"logit_scale": 0.25, "scale": 3.0},
    "softcap": {"softcap": 5.0, "scale": 4.0},
    "ignored": {"ignore_index": 3, "v": 7},  # an index inside [0, V) that many targets have
    "everything": {"softcap": 8.0, "logit_scale": 1.7, "temperature": "per_token", "bias": True, "scale": 3.0},
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRADS = ("d_hidden", "d_weight", "d_bias")


def ours_run(p: Problem, names=DIFFERENTIABLE, outputs=None, **how):
    """(TokenStats, gradients) of linear_logprobs under the problem's upstream gradients of `names`."""
    leaves = p.leaves()
    stats = linear_logprobs(*leaves[:2], p.targets, leaves[2], outputs=outputs or names, **p.options, **how)
    total = sum((getattr(stats, n) * p.upstream[n].to(getattr(stats, n).dtype)).sum() for n in names)
    return stats.detach(), gradients(total, leaves)


def check_exact(p: Problem, names=DIFFERENTIABLE, tolerance=1e-10, **how) -> None:
    """Outputs and gradients equal float64 autograd through materialised logits."""
    stats, grads = ours_run(p, names, outputs=(*names, *(n for n in EVERY_STAT if n not in names)), **how)
    truth, true_grads = plain_run(p, torch.float64, names)
    for n in EVERY_STAT:
        assert_same(n, getattr(stats, n), truth[n], tolerance)
    for n, g, t in zip(GRADS, grads, true_grads, strict=True):
        assert (g is None) == (t is None)
        if g is not None:
            assert_same(n, g, t, tolerance)


def check_accurate(p: Problem, names=DIFFERENTIABLE, **how) -> None:
    """Rule 7: within 1.5 (outputs) or 2 (gradients) of the error of materialised torch in the same dtype."""
    stats, grads = ours_run(p, names, **how)
    truth, true_grads = plain_run(p, torch.float64, names)
    plain, plain_grads = plain_run(p, p.hidden.dtype, names)
    for n in names:
        ours = getattr(stats, n)
        assert ours.dtype == (torch.float64 if p.hidden.dtype == torch.float64 else torch.float32)
        assert_as_accurate(n, ours, plain[n], truth[n], 1.5)
    for n, ours, other, true, x in zip(GRADS, grads, plain_grads, true_grads, p.leaves(), strict=True):
        if x is not None:
            assert ours.dtype == x.dtype and ours.shape == x.shape
            assert_as_accurate(n, ours, other, true, 2.0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("names", [("logprobs",), ("entropy",), ("logsumexp",), DIFFERENTIABLE], ids="-".join)
def test_exact_in_float64(options, names, backend):
    check_exact(problem(**OPTIONS[options]), names, backend=backend, workspace_bytes=37 * 8 * 5)


def check_accurate_on_average(problems: list[Problem], **how) -> None:
    """Rule 7 for the mean of the errors: one maximum of a few hundred numbers is luck, theirs and ours."""
    found: dict[str, list] = {}
    for p in problems:
        (truth, true), (plain, other) = plain_run(p, torch.float64), plain_run(p, p.hidden.dtype)
        stats, grads = ours_run(p, **how)
        triples = [(n, getattr(stats, n), plain[n], truth[n]) for n in DIFFERENTIABLE]
        triples += [x for x in zip(GRADS, grads, other, true, strict=True) if x[1] is not None]
        for name, ours, theirs, right in triples:
            found.setdefault(name, []).append((*errors(ours, right), *errors(theirs, right), ours.dtype))
    for name, rows in found.items():
        rms, most, plain_rms, plain_most = (mean(r[i] for r in rows) for i in range(4))
        eps = torch.finfo(rows[0][4]).eps
        k = 2.0 if name in GRADS else 1.5
        assert rms <= k * plain_rms + eps / 4, f"{name}: rms error {rms:.2e} > {k} * {plain_rms:.2e}"
        assert most <= 3 * plain_most + eps / 2, f"{name}: max error {most:.2e} > 3 * {plain_most:.2e}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_rule7(options, dtype):
    wide = {"n": 48, "h": 64, "v": 211}
    made = [problem(dtype=DTYPES[dtype], seed=seed, **{**wide, **OPTIONS[options]}) for seed in range(4)]
    check_accurate_on_average(made, workspace_bytes=211 * 4 * 10)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 12, 13, 1000])
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_any_workspace(rows, dtype):
    p = problem(dtype=DTYPES[dtype], **OPTIONS["everything"])
    check = check_exact if dtype == "fp64" else check_accurate
    check(p, workspace_bytes=rows * 37 * (8 if dtype == "fp64" else 4))


def test_workspace_smaller_than_one_row():
    check_exact(problem(bias=True), workspace_bytes=1)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_error_does_not_grow_with_the_number_of_chunks(dtype):
    """dW summed in half precision chunk by chunk is a bug that every fused head shipped with once."""
    check_flat_error(DTYPES[dtype])


def check_flat_error(dtype: torch.dtype) -> None:
    """dW of fused_loss in 1 and in 1024 chunks, of linear_logprobs likewise."""
    p = problem(n=1024, h=16, v=19, dtype=dtype)
    p.upstream = {n: u.abs() for n, u in p.upstream.items()}  # one sign: partial sums grow, and so would their rounding
    batch = TokenBatch(p.targets, advantages=-p.upstream["logprobs"].float())
    _, true = plain_run(p, torch.float64, ("logprobs",))
    budgets = [rows * 19 * 4 * 4 // 3 + 8 for rows in (1024, 1)]

    def one_pass(budget: int) -> torch.Tensor:
        leaves = p.leaves()
        loss = fused_loss(losses.get("reinforce"), *leaves[:2], batch, aggregate=ones, workspace_bytes=budget).loss
        return gradients(loss, leaves[:2])[1]

    assert_as_accurate("d_weight of 1024 chunks", one_pass(budgets[1]), one_pass(budgets[0]), true[1], 1.1)
    few, many = (ours_run(p, ("logprobs",), strategy="two_pass", workspace_bytes=b)[1][1] for b in budgets)
    assert_as_accurate("d_weight of two passes", many, few, true[1], 1.1)


def ones(batch: TokenBatch) -> torch.Tensor:
    return torch.ones(batch.targets.shape[0])


@pytest.mark.parametrize("v,h,n", [(1, 4, 3), (2, 1, 5), (1, 1, 1), (127, 3, 4), (257, 129, 2), (5, 8, 64)])
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_odd_shapes(v, h, n, dtype):
    p = problem(n=n, h=h, v=v, bias=True, dtype=DTYPES[dtype])
    check_exact(p, tolerance=1e-10 if dtype == "fp64" else 2e-5)


def test_one_word_vocabulary_is_certain():
    stats, grads = ours_run(problem(v=1, bias=True))
    assert not stats.logprobs.any() and not stats.entropy.any()
    _, grads = ours_run(problem(v=1, bias=True), ("logprobs", "entropy"))
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("how", ["no_rows", "all_ignored"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nothing_to_do(how, backend):
    p = problem(n=0 if how == "no_rows" else 4, bias=True)
    p.targets = torch.full_like(p.targets, -100)
    stats, grads = ours_run(p, outputs=EVERY_STAT, backend=backend)
    for n in EVERY_STAT:
        assert getattr(stats, n).shape == p.targets.shape and not getattr(stats, n).any()
    for g, x in zip(grads, p.leaves(), strict=True):
        assert g.shape == x.shape and not g.any()


def test_ignored_rows_are_zero_and_untouchable():
    """Garbage in an ignored row (NaN, inf) reaches neither outputs nor any gradient."""
    p = problem(bias=True)
    p.targets[[0, 5, 12]] = -100
    truth, true_grads = plain_run(p, torch.float64)
    p.hidden[0], p.hidden[5], p.hidden[12, 3] = float("nan"), float("inf"), -float("inf")
    stats, grads = ours_run(p)
    for n in DIFFERENTIABLE:
        assert not getattr(stats, n)[[0, 5, 12]].any()
        assert_same(n, getattr(stats, n), truth[n], 1e-10)
    assert not grads[0][[0, 5, 12]].any()
    for n, g, t in zip(GRADS, grads, true_grads, strict=True):
        assert_same(n, g, t, 1e-10)


def test_nan_stays_in_its_row():
    p = problem()
    clean, _ = ours_run(p, outputs=EVERY_STAT)
    p.hidden[4, 2] = float("nan")
    stats, grads = ours_run(p, outputs=EVERY_STAT)
    other = torch.arange(13) != 4
    for n in DIFFERENTIABLE:
        assert getattr(stats, n)[4].isnan()
        assert torch.equal(getattr(stats, n)[other], getattr(clean, n)[other])
    assert grads[0][4].isnan().all() and not grads[0][other].isnan().any()


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinite_logits_are_torchs_nan(value):
    """One column at +inf, or all of them at -inf: log_softmax has no answer, and none is made up."""
    p = problem(bias=True)
    p.bias[3 if value > 0 else slice(None)] = value
    stats, _ = ours_run(p, outputs=EVERY_STAT)
    assert stats.logprobs.isnan().all() and stats.entropy.isnan().all()
    assert torch.equal(stats.logsumexp, torch.full_like(stats.logsumexp, value)) or stats.logsumexp.isnan().all()


# -- strides, shapes, dtypes of the arguments ----------------------------------------------------------------------
def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides."""
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "every_second":
        wide = torch.full((2 * x.shape[0], x.shape[1] + 3), torch.nan, dtype=x.dtype)
        wide[::2, 1:-2] = x
        return wide[::2, 1:-2]
    return torch.cat([torch.zeros_like(x[:1]), x])[1:]  # "offset"


@pytest.mark.parametrize("how", ["transposed", "every_second", "offset"])
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_strided_inputs(how, dtype):
    p = problem(bias=True, dtype=DTYPES[dtype])
    stats, grads = ours_run(p, workspace_bytes=37 * 8 * 4)
    hidden, weight = (strided(x, how).detach().requires_grad_() for x in (p.hidden, p.weight))
    bias = torch.stack([p.bias, p.bias], 1)[:, 0].detach().requires_grad_()
    targets = torch.stack([p.targets, p.targets], 1)[:, 1]
    own = linear_logprobs(hidden, weight, targets, bias, outputs=DIFFERENTIABLE, workspace_bytes=37 * 8 * 4)
    upstream = [torch.stack([p.upstream[n]] * 2, 1)[:, 0].to(own.logprobs.dtype) for n in DIFFERENTIABLE]
    own_grads = torch.autograd.grad([getattr(own, n) for n in DIFFERENTIABLE], (hidden, weight, bias), upstream)
    tolerance = 1e-12 if dtype == "fp64" else 1e-2
    for n in DIFFERENTIABLE:
        assert_same(n, getattr(own, n), getattr(stats, n), 1e-12 if dtype == "fp64" else 1e-5)
    for n, g, t in zip(GRADS, own_grads, grads, strict=True):
        assert_same(n, g, t, tolerance)


def test_expanded_hidden_weight_and_upstream():
    """Stride 0: every row the same, every word the same, upstream of ones as .sum() sends it."""
    p = problem()
    row, word = p.hidden[:1].clone().requires_grad_(), p.weight[:1].clone().requires_grad_()
    for hidden, weight in ((row.expand(13, 16), p.weight), (p.hidden, word.expand(37, 16))):
        leaf = row if hidden.shape[0] == 13 and hidden.stride(0) == 0 else word
        (g,) = torch.autograd.grad(linear_logprobs(hidden, weight, p.targets).logprobs.sum(), leaf)
        truth = torch.log_softmax(hidden @ weight.t(), -1).gather(1, p.targets[:, None]).sum()
        (t,) = torch.autograd.grad(truth, leaf)
        assert float((g - t).abs().max()) <= 1e-10 * max(1.0, float(t.abs().max()))


def test_leading_dimensions():
    p = problem(n=12, temperature="per_token")
    flat, flat_grads = ours_run(p, outputs=EVERY_STAT)
    hidden, weight, _ = p.leaves()
    shaped = linear_logprobs(
        hidden.view(3, 4, 16),
        weight,
        p.targets.view(3, 4),
        temperature=p.options["temperature"].view(3, 4),
        outputs=EVERY_STAT,
    )
    total = sum((getattr(shaped, n) * p.upstream[n].view(3, 4)).sum() for n in DIFFERENTIABLE)
    for n in EVERY_STAT:
        assert torch.equal(getattr(shaped, n), getattr(flat, n).view(3, 4))
    for g, t in zip(gradients(total, (hidden, weight)), flat_grads, strict=False):
        assert torch.equal(g, t)
    one = linear_logprobs(hidden[0], weight, p.targets[0], temperature=float(p.options["temperature"][0]))
    assert one.logprobs.shape == () and torch.allclose(one.logprobs, flat.logprobs[0], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_target_dtypes(dtype):
    p = problem()
    truth, _ = ours_run(p, outputs=EVERY_STAT)
    p.targets = p.targets.to(dtype)
    stats, _ = ours_run(p, outputs=EVERY_STAT)
    assert all(torch.equal(getattr(stats, n), getattr(truth, n)) for n in EVERY_STAT)


def test_outputs_that_were_not_asked_for_are_none():
    p = problem()
    for n in EVERY_STAT:
        stats = linear_logprobs(p.hidden, p.weight, p.targets, outputs=n)
        assert [m for m in EVERY_STAT if getattr(stats, m) is not None] == [n]


def test_temperature_tensor_of_equal_numbers_is_the_scalar():
    p, q = problem(temperature=0.7), problem(temperature=torch.full((13,), 0.7, dtype=torch.float64))
    (a, da), (b, db) = ours_run(p), ours_run(q)
    assert torch.equal(a.logprobs, b.logprobs) and all(torch.equal(x, y) for x, y in zip(da[:2], db[:2], strict=True))
    zero_dim = linear_logprobs(p.hidden, p.weight, p.targets, temperature=torch.tensor(0.7, dtype=torch.float64))
    assert torch.equal(zero_dim.logprobs, a.logprobs)


# -- autograd ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("asked", list(itertools.product([True, False], repeat=3)))
def test_frozen_inputs_get_no_gradient_and_cost_nothing(asked):
    p = problem(bias=True)
    _, truth = plain_run(p, torch.float64)
    leaves = [x.requires_grad_(a) for x, a in zip(p.leaves(), asked, strict=True)]
    with Watch() as forward:
        how = {"strategy": "two_pass"} if any(asked) else {}
        stats = linear_logprobs(*leaves[:2], p.targets, leaves[2], outputs=DIFFERENTIABLE, **how)
    gemm = 13 * 16 * 37
    assert forward.macs == gemm
    assert all(getattr(stats, n).requires_grad == any(asked) for n in DIFFERENTIABLE)
    if any(asked):
        with Watch() as backward:
            sum((getattr(stats, n) * p.upstream[n]).sum() for n in DIFFERENTIABLE).backward()
        assert backward.macs == gemm * (1 + asked[0] + asked[1])
    for name, x, t, a in zip(GRADS, leaves, truth, asked, strict=True):
        assert (x.grad is not None) == a
        if a:
            assert_same(name, x.grad, t, 1e-10)


def test_rows_without_upstream_gradient_cost_nothing():
    p = problem(n=16)
    kept = torch.arange(16) % 4 == 1
    p.upstream = {n: u * kept for n, u in p.upstream.items()}
    check_exact(p)
    hidden, weight, _ = p.leaves()
    logprobs = linear_logprobs(hidden, weight, p.targets, strategy="two_pass").logprobs
    with Watch() as backward:
        (logprobs * p.upstream["logprobs"]).sum().backward()
    assert backward.macs == 3 * 4 * 16 * 37


def test_second_backward_raises():
    p = problem()
    hidden, weight, _ = p.leaves()
    logprobs = linear_logprobs(hidden, weight, p.targets).logprobs
    (g,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (logprobs.sum() + g.square().sum()).backward()  # a gradient penalty must not pass as a constant


def test_backward_again_with_retain_graph_gives_the_same():
    p = problem()
    hidden, weight, _ = p.leaves()
    logprobs = linear_logprobs(hidden, weight, p.targets).logprobs.sum()
    first = torch.autograd.grad(logprobs, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(logprobs, (hidden, weight)), strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad(context):
    p = problem()
    hidden, weight, _ = p.leaves()
    truth = linear_logprobs(hidden, weight, p.targets, outputs=EVERY_STAT)
    with context(), Watch() as watch:
        stats = linear_logprobs(hidden, weight, p.targets, outputs=EVERY_STAT)
    assert watch.macs == 13 * 16 * 37
    assert all(torch.equal(getattr(stats, n), getattr(truth, n)) for n in EVERY_STAT)
    assert not stats.logprobs.requires_grad


def test_only_differentiable_statistics_carry_a_graph():
    p = problem()
    hidden, weight, _ = p.leaves()
    stats = linear_logprobs(hidden, weight, p.targets, outputs=EVERY_STAT)
    assert {n for n in EVERY_STAT if getattr(stats, n).requires_grad} == set(DIFFERENTIABLE)
    assert stats.is_argmax.dtype == torch.bool


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_upstream_are_never_modified(dtype):
    p = problem(dtype=DTYPES[dtype], **OPTIONS["everything"])
    leaves = p.leaves()
    before = [x.detach().clone() for x in (*leaves, p.targets, p.options["temperature"])]
    stats = linear_logprobs(*leaves[:2], p.targets, leaves[2], outputs=DIFFERENTIABLE, **p.options)
    kept = stats.detach().map(torch.clone)
    upstream = [p.upstream[n].to(stats.logprobs.dtype) for n in DIFFERENTIABLE]
    copies = [u.clone() for u in upstream]
    torch.autograd.backward([getattr(stats, n) for n in DIFFERENTIABLE], upstream)
    for a, b in zip((*leaves, p.targets, p.options["temperature"]), before, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(upstream, copies, strict=True))
    assert all(torch.equal(getattr(stats, n), getattr(kept, n)) for n in DIFFERENTIABLE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bitwise_the_same_every_time(dtype):
    p = problem(n=64, v=211, dtype=DTYPES[dtype], **OPTIONS["everything"])
    stats, grads = ours_run(p, workspace_bytes=211 * 40)
    for _ in range(3):
        again, again_grads = ours_run(p, workspace_bytes=211 * 40)
        assert all(torch.equal(getattr(again, n), getattr(stats, n)) for n in DIFFERENTIABLE)
        assert all(torch.equal(a, b) for a, b in zip(again_grads, grads, strict=True))


# -- autocast ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_cast_and_nothing_more(backend, dtype):
    """Under autocast: hidden and weight in its dtype, and the logits still never rounded below float32."""
    p = problem(n=32, dtype=torch.float32, bias=True)
    low = dataclasses.replace(p, hidden=p.hidden.to(dtype), weight=p.weight.to(dtype))
    truth, true_grads = ours_run(low, backend="torch")
    with torch.autocast("cpu", dtype=dtype):
        stats, grads = ours_run(p, backend=backend)
    for n in DIFFERENTIABLE:
        assert getattr(stats, n).dtype == torch.float32
        assert_same(n, getattr(stats, n), getattr(truth, n), 1e-5)
    for n, g, t in zip(GRADS, grads, true_grads, strict=True):
        assert g.dtype == torch.float32
        # The reference's own backward runs inside this autocast region, in half precision, as any torch matmul.
        assert_same(n, g, t, 1e-3 if backend == "torch" else 3e-2)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_exact(problem(bias=True))

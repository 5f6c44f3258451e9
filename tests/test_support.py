"""Sampled support: softmax over each row's kept words, against materialised logits masked to the same words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from oracle import DIFFERENTIABLE, EVERY_STAT, Problem, Watch, assert_as_accurate, assert_same, gradients, problem
from test_operators import DTYPES, GRADS, strided
from test_triton import DEVICE, Tampered, there

pytest.importorskip("triton")
from fastrl import linear_logprobs  # noqa: E402
from fastrl.kernels import support_stats, tiles  # noqa: E402
from fastrl.ops import support_torch, support_triton  # noqa: E402
from fastrl.ops.head import HeadSpec, accumulation_dtype  # noqa: E402
from fastrl.ops.support import support_statistics  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on values that a tl.where then drops
BACKENDS = ["torch", "triton"]
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "per_token_temperature": {"temperature": "per_token"},
    "everything": {"softcap": 8.0, "logit_scale": 1.7, "temperature": "per_token", "bias": True, "scale": 3.0},
}
N, V = 11, 29


@dataclass
class Case:
    p: Problem
    keep: torch.Tensor  # [N, V] bool
    bounded: torch.Tensor  # [N] bool, rows whose log-prob is finite

    @property
    def support(self):
        return self.keep.nonzero()[:, 1], F.pad(self.keep.sum(1).cumsum(0), (1, 0))


def case(dtype, seed=0, n=N, v=V, h=24, share=0.35, **options) -> Case:
    """Ragged supports: every word in row 0, one in row 1, a target outside in row 2; rows 3 and 4 are ignored."""
    p = there(problem(seed=seed, n=n, h=h, v=v, dtype=dtype, **options))
    g = torch.Generator().manual_seed(seed + 1)
    keep = (torch.rand(n, v, generator=g) < share).to(p.hidden.device)
    keep[0], keep[1] = True, False
    rows = torch.arange(n, device=keep.device)
    keep[rows, p.targets] = True
    keep[2, p.targets[2]] = False
    p.targets[3:5] = -100
    return Case(p, keep, (rows != 2) & (p.targets != -100))


def head_of(p: Problem, leaves) -> HeadSpec:
    o, acc = p.options, accumulation_dtype(p.hidden.dtype)
    t = o.get("temperature", 1.0)
    return HeadSpec(
        leaves[1],
        leaves[2],
        o.get("logit_scale", 1.0),
        o.get("softcap"),
        t.to(acc) if isinstance(t, torch.Tensor) else t,
    )


def run(c: Case, backend="torch", names=DIFFERENTIABLE, leaves=None, **how):
    """(TokenStats, gradients) of the support's statistics under the problem's upstream gradients."""
    leaves = leaves or c.p.leaves()
    stats = support_statistics(
        head_of(c.p, leaves), leaves[0], c.p.targets, c.support, EVERY_STAT, -100, backend=backend, **how
    )
    rows = c.bounded.nonzero().squeeze(1)
    total = sum((getattr(stats, n)[rows] * c.p.upstream[n][rows].to(stats.logprobs.dtype)).sum() for n in names)
    return stats.detach(), gradients(total, leaves)


def plain(c: Case, dtype, names=DIFFERENTIABLE):
    """The same by materialised logits in dtype, masked to the support."""
    leaves, o = c.p.leaves(dtype), c.p.options
    z = F.linear(leaves[0], leaves[1])
    z = z if z.dtype == torch.float64 else z.float()
    z = (z if leaves[2] is None else z + leaves[2].to(z.dtype)) * o.get("logit_scale", 1.0)
    cap, t = o.get("softcap"), o.get("temperature", 1.0)
    z = z if cap is None else cap * torch.tanh(z / cap)
    z = z / (t.to(z.dtype)[:, None] if isinstance(t, torch.Tensor) else t)
    z = z.masked_fill(~c.keep, -math.inf)
    logp = z.log_softmax(-1)
    safe, used = logp.masked_fill(logp == -math.inf, 0.0), c.p.targets != -100
    target = c.p.targets.clamp(min=0)[:, None]
    made = {
        "logprobs": logp.gather(1, target)[:, 0],
        "entropy": -(logp.exp() * safe).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "is_argmax": z.argmax(-1) == target[:, 0],
    }
    made = {n: torch.where(used, x, torch.zeros_like(x)) for n, x in made.items()}
    rows = c.bounded.nonzero().squeeze(1)
    total = sum((made[n][rows] * c.p.upstream[n][rows].to(z.dtype)).sum() for n in names)
    return {n: x.detach() for n, x in made.items()}, gradients(total, leaves)


def check(c: Case, backend: str, names=DIFFERENTIABLE, **how) -> None:
    """Rule 7 on every statistic and gradient; and what must hold of the values themselves."""
    stats, grads = run(c, backend, names, **how)
    (truth, true_grads), (ordinary, plain_grads) = plain(c, torch.float64, names), plain(c, c.p.hidden.dtype, names)
    for n in (*DIFFERENTIABLE, "log_sum_sq_probs"):
        ours = getattr(stats, n)
        assert ours.dtype == accumulation_dtype(c.p.hidden.dtype)
        assert_as_accurate(n, ours, ordinary[n], truth[n], 1.5)
    assert torch.equal(stats.is_argmax, truth["is_argmax"])
    assert (stats.logprobs <= 0).all() and (stats.entropy >= 0).all()
    assert (stats.entropy <= c.keep.sum(1).clamp(min=1).float().log() * (1 + 1e-6)).all()
    for n, ours, other, true, x in zip(GRADS, grads, plain_grads, true_grads, c.p.leaves(), strict=True):
        if x is not None:
            assert ours.dtype == x.dtype and ours.shape == x.shape
            assert_as_accurate(n, ours, other, true, 2.0)


# -- accuracy --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_rule7(options, dtype, backend):
    check(case(DTYPES[dtype], h=40, **OPTIONS[options]), backend, workspace_bytes=5000)  # two blocks of H


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("options", OPTIONS)
def test_exact_in_float64(options, backend):
    c = case(torch.float64, **OPTIONS[options])
    stats, grads = run(c, backend)
    truth, true_grads = plain(c, torch.float64)
    for n in EVERY_STAT:
        assert_same(n, getattr(stats, n), truth[n], 1e-12)
    for n, g, t in zip(GRADS, grads, true_grads, strict=True):
        if t is not None:
            assert_same(n, g, t, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_statistic_alone(name, backend):
    check(case(torch.float32, **OPTIONS["everything"]), backend, (name,))


def confident(c: Case, rest: float) -> Case:
    """Every target's logit so far above the others that they share a probability of about `rest`."""
    h = c.p.hidden
    h.zero_()
    h[:, 0] = 1.0
    c.p.weight[:, 0] = 0.0
    c.p.hidden = torch.cat([torch.eye(len(h), device=h.device, dtype=h.dtype), h], 1)  # row n reads column n of W
    raised = torch.zeros(c.p.weight.shape[0], len(h), dtype=h.dtype, device=h.device)
    raised[c.p.targets.clamp(min=0), torch.arange(len(h), device=h.device)] = -math.log(rest)
    raised += 0.5 * torch.rand(raised.shape, generator=torch.Generator().manual_seed(0)).to(raised)
    c.p.weight = torch.cat([raised, c.p.weight], 1)
    return c


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rest", [1e-3, 1e-6, 1e-9])
def test_confident_tokens_keep_their_digits(rest, backend):
    c = confident(case(torch.float32), rest)
    stats, grads = run(c, backend, ("logprobs",))
    truth, true_grads = plain(c, torch.float64, ("logprobs",))
    rows = c.bounded & (c.keep.sum(1) > 1)
    for n in ("logprobs", "entropy"):
        assert (getattr(stats, n)[rows] / truth[n][rows] - 1).abs().max() < 1e-5
    size = true_grads[0][rows].norm(dim=1)
    assert ((grads[0][rows] - true_grads[0][rows]).norm(dim=1) / size).max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_costs_nothing_but_the_logits_own_rounding(offset, backend):
    c = case(torch.float32, bias=True)
    c.p.bias += offset
    check(c, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_of_logit_minus_infinity(backend):
    c = case(torch.float32, bias=True)
    c.p.bias[::4] = -math.inf
    c.bounded &= torch.isfinite(c.p.bias)[c.p.targets.clamp(min=0)]
    check(c, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_support_of_every_word_is_the_head_itself(backend):
    c = case(torch.float32, share=2.0, bias=True)
    c.keep[:] = True
    leaves = c.p.leaves()
    own = run(c, backend)[0]
    full = linear_logprobs(*leaves[:2], c.p.targets, leaves[2], outputs=EVERY_STAT, backend="reference")
    for n in EVERY_STAT:
        assert_same(n, getattr(own, n), getattr(full, n), 2e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_torch_s_own_operator_for_the_dot_products(dtype, monkeypatch):
    c = case(DTYPES[dtype], **OPTIONS["everything"])
    own, _ = run(c)
    assert support_torch.BAG_DOTS is not None
    monkeypatch.setattr(support_torch, "BAG_DOTS", None)
    check(c, "torch", workspace_bytes=3000)
    assert_same("logsumexp", run(c)[0].logsumexp, own.logsumexp, 1e-6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_without_grad(backend, context):
    c = case(torch.float32, bias=True)
    truth, _ = run(c, backend)
    with context():
        leaves = c.p.leaves()
        own = support_statistics(
            head_of(c.p, leaves), leaves[0], c.p.targets, c.support, EVERY_STAT, -100, backend=backend
        )
    assert all(torch.equal(getattr(own, n), getattr(truth, n)) for n in EVERY_STAT)
    assert not own.logprobs.requires_grad


def test_long_sums_keep_the_error_of_a_gemm():
    """A word that every row keeps: dW adds one term a row, and a row of a long support adds thousands to dH."""
    g = torch.Generator().manual_seed(0)
    source, coef = torch.randn(6000, 16, generator=g), torch.randn(6000, generator=g)
    keys = torch.zeros(6000, dtype=torch.long)
    out = torch.zeros(1, 16)
    support_torch.grouped_sum(out, keys, source, torch.arange(6000), coef, 1 << 20)
    truth = coef.double() @ source.double()
    assert_as_accurate("sum", out[0], torch.mm(coef.expand(64, -1), source)[0], truth, 2.0)
    entries = support_stats.Entries(torch.arange(6000), torch.tensor([0]), torch.tensor([6000]))
    ours = support_stats.gather_sum(*(x.to(DEVICE) for x in (source, coef)), moved(entries), out.to(DEVICE) * 0)
    assert_as_accurate("kernel", ours[0].cpu(), torch.mm(coef.expand(64, -1), source)[0], truth, 2.0)


def entries_of(c: Case):
    return support_stats.Entries(c.support[0], c.support[1][:-1], c.support[1][1:])


def moved(entries):
    return support_stats.Entries(*(x.to(DEVICE) for x in (entries.indices, entries.starts, entries.stops)))


# -- rows ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_what_is_kept_decides_the_value(backend):
    c = case(torch.float32)
    c.keep[6] = False  # an empty support
    c.bounded[6] = False
    stats, grads = run(c, backend)
    assert stats.logprobs[2] == -math.inf and stats.logprobs[1] == 0 and stats.entropy[1] == 0
    assert stats.logprobs[6] == stats.logsumexp[6] == -math.inf and stats.entropy[6] == 0 and not stats.is_argmax[6]
    for n in EVERY_STAT:
        assert not getattr(stats, n)[3:5].any()
    assert not grads[0][[2, 3, 4, 6]].any()
    leaves = c.p.leaves()
    outside = support_statistics(
        head_of(c.p, leaves), leaves[0], c.p.targets, c.support, ("logprobs",), -100, backend=backend
    )
    (d_hidden,) = torch.autograd.grad(outside.logprobs[2], leaves[0])
    assert not d_hidden.any()  # a constant


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_and_rows_without_upstream_reach_nothing(backend):
    c = case(torch.float32, bias=True)
    clean, clean_grads = run(c, backend)
    c.p.hidden[3:5] = math.nan  # ignored
    c.p.hidden[2] = math.nan  # no upstream gradient (its log-prob is not bounded)
    stats, grads = run(c, backend)
    rows = c.bounded
    for n in DIFFERENTIABLE:
        assert torch.equal(getattr(stats, n)[rows], getattr(clean, n)[rows])
    assert all(torch.equal(a, b) for a, b in zip(grads, clean_grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row(backend):
    c = case(torch.float32)
    clean, _ = run(c, backend)
    c.p.hidden[7, 3] = math.nan
    stats, grads = run(c, backend)
    others = torch.arange(N, device=DEVICE) != 7
    for n in DIFFERENTIABLE:
        assert getattr(stats, n)[7].isnan() and torch.equal(getattr(stats, n)[others], getattr(clean, n)[others])
    assert grads[0][7].isnan().all() and not grads[0][others].isnan().any()
    assert grads[1][c.keep[7]].isnan().all() and not grads[1][~c.keep[7]].isnan().any()


@pytest.mark.parametrize("bad", [-1, V, 10**9])
def test_a_word_outside_the_vocabulary_poisons_its_row_alone(bad):
    """On the GPU nobody has looked at the indices: the kernels must neither read there nor hide it."""
    c = case(torch.float32)
    indices, offsets = c.support
    kept = support_torch.Kept(indices.clone(), offsets[:-1], offsets[1:])
    head = head_of(c.p, c.p.leaves())
    plan = (head, c.p.hidden, c.p.targets, kept)
    clean, _ = support_triton.statistics(*plan, EVERY_STAT, 1 << 20)
    kept.indices[offsets[5]] = bad
    stats, saved = support_triton.statistics(*plan, EVERY_STAT, 1 << 20)
    others = torch.arange(N, device=DEVICE) != 5
    assert stats.entropy[5].isnan() and torch.equal(stats.entropy[others], clean.entropy[others])
    coefs = support_triton.Coefs(entropy=torch.ones(N, device=DEVICE))
    d_hidden, d_weight, _ = support_triton.gradients(*plan, saved, coefs, (True, True, False), 1 << 20)
    assert d_hidden[5].isnan().all() and not d_hidden[others].isnan().any() and d_weight.isnan().any()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("n", [0, 5])
def test_no_rows_and_all_ignored(n, backend):
    p = there(problem(n=n, bias=True, dtype=torch.float32))
    p.targets[:] = -100
    leaves = p.leaves()
    support = (torch.arange(2 * n) % 37, 2 * torch.arange(n + 1))
    stats = support_statistics(head_of(p, leaves), leaves[0], p.targets, support, EVERY_STAT, -100, backend=backend)
    total = sum(getattr(stats, m).sum() for m in DIFFERENTIABLE)
    for m in EVERY_STAT:
        assert getattr(stats, m).shape == (n,) and not getattr(stats, m).any()
    for g, x in zip(gradients(total, leaves), leaves, strict=True):
        assert g.shape == x.shape and not g.any()


# -- cost, inputs, determinism -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_is_the_workspace_and_nnz_numbers(dtype):
    """Rows of 4096: gathered all at once they would take 16 KiB for each of about 4000 entries."""
    c = case(DTYPES[dtype], n=64, v=200, h=4096, share=0.3)
    leaves, indices = c.p.leaves(), c.support[0]
    budget = 1 << 20
    with Watch() as forward:
        stats = support_statistics(
            head_of(c.p, leaves), leaves[0], c.p.targets, c.support, ("logprobs", "entropy"), -100,
            backend="torch", workspace_bytes=budget,
        )  # fmt: skip
        total = stats.logprobs[c.bounded].sum() + stats.entropy.sum()
    assert forward.peak <= 1.1 * budget + 200 * len(indices)
    with Watch() as backward:
        gradients(total, leaves)
    own = sum(x.numel() * x.element_size() for x in leaves if x is not None)
    assert backward.peak <= own + 2.1 * budget + 300 * len(indices)
    assert 4 * len(indices) * 4096 > 20 * budget


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_the_same_every_time_and_the_workspace_changes_only_rounding(backend):
    c = case(torch.bfloat16, **OPTIONS["everything"])
    stats, grads = run(c, backend)
    again, again_grads = run(c, backend)
    assert all(torch.equal(getattr(stats, n), getattr(again, n)) for n in EVERY_STAT)
    assert all(torch.equal(a, b) for a, b in zip(grads, again_grads, strict=True))
    for budget in (1, 700, 20_000) if backend == "torch" else ():
        small, small_grads = run(c, backend, workspace_bytes=budget)
        for n in DIFFERENTIABLE:
            assert_same(n, getattr(small, n), getattr(stats, n), 1e-6)
        for n, a, b in zip(GRADS, small_grads, grads, strict=True):
            assert_same(n, a, b, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["transposed", "every_second", "offset"])
def test_strided_inputs(how, backend):
    c = case(torch.float32, bias=True)
    stats, grads = run(c, backend)
    leaves = [strided(x.cpu(), how).to(DEVICE).detach().requires_grad_() for x in (c.p.hidden, c.p.weight)]
    leaves.append(torch.stack([c.p.bias, c.p.bias], 1)[:, 0].detach().requires_grad_())
    own, own_grads = run(c, backend, leaves=leaves)
    for n in DIFFERENTIABLE:
        assert_same(n, getattr(own, n), getattr(stats, n), 1e-6)
    for n, a, b in zip(GRADS, own_grads, grads, strict=True):
        assert_same(n, a, b, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_inputs(backend):
    c = case(torch.bfloat16, bias=True)
    _, grads = run(c, backend)
    for asked in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [x.detach().requires_grad_(a) for x, a in zip(c.p.leaves(), asked, strict=True)]
        stats = support_statistics(
            head_of(c.p, leaves), leaves[0], c.p.targets, c.support, DIFFERENTIABLE, -100, backend=backend
        )
        rows = c.bounded.nonzero().squeeze(1)
        sum((getattr(stats, n)[rows] * c.p.upstream[n][rows].float()).sum() for n in DIFFERENTIABLE).backward()
        for x, g, a in zip(leaves, grads, asked, strict=True):
            assert (x.grad is not None) == a and (not a or torch.equal(x.grad, g))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_backward_raises_where_the_reference_has_it(backend):
    c = case(torch.float32)
    for name in (backend, "reference"):
        leaves = c.p.leaves()
        stats = support_statistics(
            head_of(c.p, leaves), leaves[0], c.p.targets, c.support, ("entropy",), -100, backend=name
        )
        (g,) = torch.autograd.grad(stats.entropy.sum(), leaves[0], create_graph=True)
        penalty = stats.entropy.sum() + g.square().sum()
        if name == "reference":
            penalty.backward()
            continue
        with pytest.raises(RuntimeError, match="differentiated twice"):
            penalty.backward()


def test_the_public_door_takes_any_shape_and_int32():
    c = case(torch.float64)
    own, _ = run(c)
    indices, offsets = (x.int() for x in c.support)
    shaped = linear_logprobs(
        c.p.hidden.view(1, N, -1), c.p.weight, c.p.targets.view(1, N), support=(indices, offsets), outputs=EVERY_STAT
    )
    for n in EVERY_STAT:
        assert torch.equal(getattr(shaped, n), getattr(own, n).view(1, N))


def test_refusals():
    c = case(torch.float32)
    head = head_of(c.p, c.p.leaves())
    for backend, indices, match in (
        ("tritom", c.support[0], "backend is 'tritom'"),
        ("torch", c.support[0].view(1, -1), "indices has 1 entries"),
    ):
        with pytest.raises(ValueError, match=match):
            support_statistics(
                head, c.p.hidden, c.p.targets, (indices, c.support[1]), ("logprobs",), -100, backend=backend
            )
    with pytest.raises(TypeError, match="float64.*use backend='torch'"):
        run(case(torch.float64), "triton")
    entries = support_stats.Entries(c.support[0], c.support[1][:-2], c.support[1][1:])
    with pytest.raises(ValueError, match=f"starts is .*N={N}"):
        support_stats.support_stats(c.p.hidden, c.p.weight, c.p.targets, entries)
    with pytest.raises(ValueError, match=r"coef \[3\]"):
        support_stats.gather_sum(c.p.hidden, c.p.hidden[0, :3], entries_of(c), c.p.hidden.clone())


# -- planted mistakes --------------------------------------------------------------------------------------------------
BLOCK = tiles.GATHER["interpreter"].rows


def tamper(name: str, change):
    return lambda m: m.setattr(support_stats, name, Tampered(getattr(support_stats, name), change))


def wrap(owner, name: str, change):
    return lambda m: m.setattr(owner, name, change(getattr(owner, name)))


def shifted_law(law):
    return lambda head, saved, coefs: law(head, saved.at_rows(torch.arange(N).roll(1).to(DEVICE)), coefs)


MUTANTS = {
    "last entry of a row forgotten": ("triton", tamper("support_stats_kernel", lambda n: {"stops": n["stops"] - 1})),
    "last columns of H forgotten": ("triton", tamper("support_stats_kernel", lambda n: {"H": n["H"] - 1})),
    "no temperature": ("triton", tamper("support_stats_kernel", lambda n: {"outer_rows": None, "outer": 8.0})),
    "no bias": ("triton", tamper("support_stats_kernel", lambda n: {"bias": None})),
    "no slope of the softcap": ("triton", tamper("support_dlogits_kernel", lambda n: {"SOFTCAP": False})),
    "no entropy gradient": ("triton", tamper("support_dlogits_kernel", lambda n: {"ENTROPY": False})),
    "statistics of another row": ("triton", wrap(support_triton, "_row_gradient", shifted_law)),
    "last term of a sum forgotten": ("triton", tamper("gather_sum_kernel", lambda n: {"stops": n["stops"] - 1})),
    "coefficients in the wrong order": (
        "triton",
        wrap(support_triton, "gather_sum", lambda f: lambda s, c, e, o: f(s, c.flip(0), e, o)),
    ),
    "a bag in two is dropped": (
        "torch",
        wrap(support_torch, "_bags", lambda f: lambda s, i, b, c: f(s, i, b, c) * (torch.arange(len(b)) % 2)[:, None]),
    ),
    "rows of dW left unsorted": (
        "torch",
        wrap(support_torch, "grouped_sum", lambda f: lambda o, k, s, i, c, w: f(o, k, s, i.sort()[0], c, w)),
    ),
    "target's own probability forgotten": (
        "torch",
        wrap(support_torch, "target_dlogit", lambda f: lambda c, lp, h: f(c, lp, h) * 0 + c.logprobs),
    ),
    "last chunk of dot products": ("torch", wrap(support_torch, "_dots", lambda f: lambda *a: f(*a) * cut(a[2]))),
}


def cut(rows: torch.Tensor) -> torch.Tensor:
    return (torch.arange(len(rows)) < len(rows) - 3).float()


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_a_planted_mistake_is_noticed(mutant, monkeypatch):
    c = case(torch.float32, **OPTIONS["everything"])
    if mutant is None:
        for backend in BACKENDS:
            check(c, backend)
        return
    backend, plant = MUTANTS[mutant]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(c, backend)

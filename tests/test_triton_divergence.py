"""The triton backend of linear_divergence and its kernels, in Triton's interpreter (conftest.py) or on a GPU.

The pairs, the truth and the checks are test_divergence's; shapes are small, for the interpreter is slow.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from oracle import Problem, Watch, assert_same
from test_divergence import (
    DTYPES,
    GRADS,
    KINDS,
    OPTIONS,
    Pair,
    call,
    check_accurate,
    check_exact,
    check_frozen,
    check_mask,
    check_nearly_equal,
    check_two_words,
    confident,
    disjoint,
    near,
    one_pass_run,
    ours_run,
    pair,
    shifted,
)

pytest.importorskip("triton")
from test_triton import DEVICE, HOW, tamper  # noqa: E402

import fastrl.ops.divergence as divergence  # noqa: E402
import fastrl.ops.divergence_triton as backend  # noqa: E402
from fastrl.kernels import divergence_dlogits, divergence_stats, tiles  # noqa: E402
from fastrl.kernels.divergence_dlogits import DivergenceLaw  # noqa: E402
from fastrl.kernels.divergence_tile import Operand  # noqa: E402
from fastrl.kernels.launch import LogitScale  # noqa: E402
from fastrl.ops.triton_sink import Sink  # noqa: E402

TILE = tiles.DIVERGENCE_STATS["interpreter"]
R, C = TILE.rows, TILE.columns
SMALL = {"n": 6, "seed": 2, "h": 24, "v": 2 * C + 3, "teacher_h": 16, "beta": 0.3}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on values that a tl.where then drops


def there(p: Pair) -> Pair:
    """The pair on the device that the kernels run on."""
    if DEVICE == "cpu":
        return p
    move = lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x  # noqa: E731

    def moved(q: Problem) -> Problem:
        fields = {f.name: getattr(q, f.name) for f in dataclasses.fields(q)}
        upstream = {k: move(x) for k, x in fields.pop("upstream").items()}
        return Problem(**{k: move(x) for k, x in fields.items()}, upstream=upstream)

    return Pair(moved(p.student), moved(p.teacher), {k: move(x) for k, x in p.options.items()})


# -- accuracy ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options,dtype", [("plain", "fp32"), ("plain", "bf16"), ("everything", "fp16")])
@pytest.mark.parametrize("kind", KINDS)
def test_rule7(kind, options, dtype):
    p = pair(kind=kind, dtype=DTYPES[dtype], **SMALL, **OPTIONS[options])
    check_accurate(there(p), **HOW, workspace_bytes=2 * 4 * 192 * 4)


@pytest.mark.parametrize("options", ["bias", "student_softcap", "everything"])
def test_each_option(options):
    for kind, dtype in (("jsd", "bf16"), ("reverse_kl", "fp32"), ("forward_kl", "bf16"), ("tvd", "fp32")):
        check_accurate(there(pair(kind=kind, dtype=DTYPES[dtype], **SMALL, **OPTIONS[options])), **HOW)


@pytest.mark.parametrize("kind", KINDS)
def test_two_words(kind):
    check_two_words(kind, every=2, device=DEVICE, **HOW)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_nearly_equal_heads_keep_their_digits(kind):
    check_nearly_equal(there(cut(near(torch.float32, 1e-3))), kind, **HOW)


REGIMES = {
    "confident": lambda d: confident(d, 1e-6, False),
    "agreed": lambda d: confident(d, 1e-3, True),
    "offset_apart": lambda d: shifted(d, -1e4, 1e4),
    "disjoint_80": lambda d: disjoint(d, 80.0),
    "disjoint_300": lambda d: disjoint(d, 300.0),
    "scale_40": lambda d: pair(n=9, h=32, v=101, teacher_h=20, dtype=d, scale=40.0),
}


CELLS = [(name, kind, "bf16") for name in REGIMES for kind in KINDS]
CELLS += [(name, kind, "fp32") for name in ("confident", "disjoint_300", "scale_40") for kind in ("reverse_kl", "jsd")]


@pytest.mark.parametrize("name,kind,dtype", CELLS)
def test_regime(name, kind, dtype):
    check_regime(name, kind, DTYPES[dtype])


def check_regime(name: str, kind: str, dtype: torch.dtype) -> None:
    p = cut(there(REGIMES[name](dtype).but(kind=kind, beta=0.3)))
    values, grads = ours_run(p, **HOW)
    assert (values >= 0).all() and values.isfinite().all() and all(g is None or g.isfinite().all() for g in grads)
    assert (values <= torch.tensor(divergence.Law(kind, 0.3).bound, dtype=torch.float32)).all()
    check_accurate(p, grads=kind != "tvd" or name != "offset_apart", **HOW)


def cut(p: Pair, n: int = 6) -> Pair:
    """The first n rows."""

    def few(q: Problem) -> Problem:
        upstream = {k: u[:n] for k, u in q.upstream.items()}
        return dataclasses.replace(q, hidden=q.hidden[:n], targets=q.targets[:n], upstream=upstream)

    return Pair(few(p.student), few(p.teacher), p.options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_masked_vocabulary(kind, dtype):
    """Half of the words at -inf in both heads, then one in the teacher's or the student's alone."""
    check_masked(kind, DTYPES[dtype])


def check_masked(kind: str, dtype: torch.dtype) -> None:
    p = pair(kind=kind, dtype=dtype, bias=True, **SMALL)
    p.student.bias[::2] = p.teacher.bias[::2] = -math.inf
    check_accurate(there(p), **HOW)
    p.teacher.bias[3] = -math.inf
    values, grads = ours_run(there(p), **HOW)
    assert values.isposinf().all() if kind == "reverse_kl" else values.isfinite().all()
    p.teacher.bias[3], p.student.bias[3] = 0.0, -math.inf
    values, grads = ours_run(there(p), **HOW)
    assert values.isposinf().all() if kind == "forward_kl" else values.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_divergence_exactly_zero(kind, dtype):
    p = pair(kind=kind, dtype=DTYPES[dtype], bias=True, temperature="per_token", **SMALL)
    p.teacher = p.student
    values, grads = ours_run(there(p), **HOW)
    assert not values.any() and not any(g.any() for g in grads)


# -- shapes, rows, dtypes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n,h,v", [(1, 1, 1), (1, 8, C), (R + 1, 33, C - 1), (R - 1, 16, C + 1), (3, 7, 4 * C + 3)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ragged_shapes(n, h, v, dtype):
    for kind in ("forward_kl",) if n > 9 else ("reverse_kl", "jsd"):
        p = there(pair(kind=kind, n=n, h=h, v=v, teacher_h=h + 8, bias=True, dtype=DTYPES[dtype]))
        if v == 1:
            values, grads = ours_run(p, **HOW)
            assert not values.any() and not any(g.any() for g in grads)
        elif n == 1:  # too few numbers for a statistic of errors
            check_exact(p, tolerance=2e-6 if dtype == "fp32" else 2e-2, **HOW)
        else:
            check_accurate(p, **HOW)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_rows(dtype, reduction):
    p = there(pair(n=0, bias=True, dtype=DTYPES[dtype], reduction=reduction))
    leaves = p.student.leaves()
    out = call(p, leaves, **HOW)
    assert out.shape == ((0,) if reduction == "none" else ()) and not out.any()
    for g, x in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert g.shape == x.shape and g.dtype == x.dtype and not g.any()


def test_masked_rows():
    check_mask("triton", torch.bfloat16, there)


@pytest.mark.parametrize("reduction,dtype", [("none", "bf16"), ("none", "fp32"), ("sum", "fp16")])
def test_frozen_inputs(reduction, dtype):
    check_frozen(there(pair(kind="jsd", dtype=DTYPES[dtype], bias=True, **SMALL)), reduction, **HOW)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("side,kind", [("student", "jsd"), ("teacher", "tvd"), ("teacher", "forward_kl")])
def test_nan_stays_in_its_row(kind, side, dtype):
    p = there(pair(kind=kind, dtype=DTYPES[dtype], **SMALL))
    clean, clean_grads = ours_run(p, **HOW)
    own = getattr(p, side)
    own.hidden = own.hidden.clone()
    own.hidden[4, 2] = math.nan
    values, grads = ours_run(p, **HOW)
    other = torch.arange(6, device=DEVICE) != 4
    assert values[4].isnan() and torch.equal(values[other], clean[other])
    assert grads[0][4].isnan().all() and torch.equal(grads[0][other], clean_grads[0][other])


@pytest.mark.parametrize("dtypes", [("bf16", "fp16"), ("bf16", "fp32"), ("fp32", "bf16")])
def test_each_head_in_its_own_dtype(dtypes):
    """Values exact in every dtype: the heads' dtypes change nothing but the rounding of the gradients."""
    p = pair(kind="jsd", dtype=torch.bfloat16, **SMALL)
    for q in (p.student, p.teacher):
        q.hidden, q.weight = ((8 * x).round() / 8 for x in (q.hidden, q.weight))
    base, base_grads = ours_run(there(p), **HOW)
    for q, name in zip((p.student, p.teacher), dtypes, strict=True):
        q.hidden, q.weight = q.hidden.to(DTYPES[name]), q.weight.to(DTYPES[name])
    values, grads = ours_run(there(p), **HOW)
    assert_same("values", values, base, 1e-5)
    for name, a, b in zip(GRADS[:2], grads, base_grads, strict=False):
        assert_same(name, a, b, 2e-2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_strides_and_views(dtype):
    """Transposed weights and every second row of a larger hidden: no tensor map can describe either."""
    p = there(pair(kind="reverse_kl", dtype=DTYPES[dtype], **SMALL))
    values, grads = ours_run(p, **HOW)
    for q in (p.student, p.teacher):
        q.weight = q.weight.t().contiguous().t()
        q.hidden = torch.stack([q.hidden, q.hidden + 1], 1).flatten(0, 1)[::2]
    leaves = [p.student.hidden.detach().requires_grad_(), p.student.weight.detach().requires_grad_(), None]
    own = call(p, leaves, **HOW)
    assert_same("values", own, values, 1e-5)
    own_grads = torch.autograd.grad((own * p.upstream.float()).sum(), leaves[:2])
    for name, a, b in zip(GRADS[:2], own_grads, grads, strict=False):
        assert_same(name, a, b, 1e-5 if dtype == "fp32" else 1e-2)


def test_offsets_beyond_31_bits():
    """Rows 2^29 elements apart: the offset of the last ones does not fit in 32 bits. Untouched pages cost no memory."""
    stride, rows = 2**29 + 8, 6
    far = torch.empty(rows * stride, dtype=torch.bfloat16, device=DEVICE).as_strided((rows, 16), (stride, 1))
    far.copy_(torch.randn(rows, 16))
    p = there(pair(n=rows, kind="jsd", dtype=torch.bfloat16))
    for weight in (p.student.weight, p.student.weight.t().contiguous().t()):  # with and without tensor maps
        p.student = dataclasses.replace(p.student, weight=weight, hidden=far)
        a = call(p, (far, weight, None), **HOW)
        assert torch.equal(a, call(p, (far.contiguous(), weight, None), **HOW))


# -- cost ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gemms(dtype):
    """Library GEMMs; in half precision the logits' own are in the kernels, but for the one pass."""
    n, h, v, k = SMALL["n"], SMALL["h"], SMALL["v"], SMALL["teacher_h"]
    p = there(pair(kind="jsd", dtype=DTYPES[dtype], **SMALL))
    both = n * v * (h + k) if dtype == "fp32" else 0
    for needs, extra in (((True, True), 2), ((True, False), 1)):
        leaves = [x.requires_grad_(a) for x, a in zip(p.student.leaves()[:2], needs, strict=True)] + [None]
        with Watch() as forward:
            values = call(p, leaves, **HOW)
        with Watch() as backward:
            (values[1:] * 2).sum().backward()
        assert forward.macs == both and backward.macs == (both + extra * n * v * h) * (n - 1) // n
        with Watch() as once:
            call(p, leaves, reduction="mean", **HOW)
        assert once.macs == n * v * (h + k) + extra * n * v * h


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_two_forms_and_any_workspace_agree(dtype):
    p = there(pair(kind="reverse_kl", dtype=DTYPES[dtype], **{**SMALL, "n": 7}, bias=True))
    base = ours_run(p, **HOW)[1]
    for workspace in (1, 2 * 4 * 192 * 4):
        for made in (
            ours_run(p, **HOW, workspace_bytes=workspace)[1],
            one_pass_run(p, **HOW, workspace_bytes=workspace)[1],
        ):
            for name, a, b in zip(GRADS, made, base, strict=True):
                assert_same(name, a, b, 2e-6 if dtype == "fp32" else 1e-2)


@pytest.mark.parametrize("weight", [2.0**-24, 2.0**12])
def test_float16_coefficients_neither_underflow_nor_overflow(weight):
    p = there(pair(kind="reverse_kl", dtype=torch.float16, **SMALL, scale=4.0))
    base = ours_run(p, **HOW)[1][0]
    p.student.upstream["logprobs"] = p.upstream * weight
    leaves = p.student.leaves()
    student = backend.Side(p.student.hidden, backend.HeadSpec(p.student.weight))
    teacher = backend.Side(p.teacher.hidden, backend.HeadSpec(p.teacher.weight))
    law = divergence.Law("reverse_kl")
    _, saved = backend.values(law, student, teacher, 1 << 20)
    sink = Sink(student.head, student.hidden, (True, True, False))
    rule = backend._rule(law, student.head, saved, p.upstream, sink)
    backend._slices(student, teacher, rule, sink, 1 << 20)
    assert_same("d_hidden", sink.d_hidden / sink.scale / weight, base.float(), 2e-3)
    assert leaves[0].dtype == torch.float16


# -- launchers -------------------------------------------------------------------------------------------------------
def operands(dtype=torch.float32):
    p = there(pair(dtype=dtype, bias=True, n=7, h=16, v=203))
    scale = LogitScale(torch.linspace(0.5, 2, 7, device=DEVICE), 0.3, softcap=True)
    made = [Operand(q.hidden, q.weight, q.bias, s) for q, s in ((p.student, scale), (p.teacher, LogitScale(1.3)))]
    sides = [linear_norms(x) for x in made]
    return *made, torch.cat(sides)


def linear_norms(x: Operand):
    from fastrl.kernels.linear_stats import linear_stats

    made = linear_stats(x.hidden, x.weight, torch.zeros(7, dtype=torch.int64, device=DEVICE), x.bias, x.scale)
    return torch.stack([made.max, made.log_sum])


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_splits_and_row_kernels_agree(kind):
    student, teacher, norms = operands()
    base = divergence_stats.divergence_stats(student, teacher, norms, kind, 0.3, splits=1)
    raw = tuple(x.hidden @ x.weight.t() for x in (student, teacher))
    rest = (student.bias, teacher.bias), (student.scale, teacher.scale), norms, kind, 0.3
    others = [
        divergence_stats.divergence_stats(student, teacher, norms, kind, 0.3, splits=3),
        divergence_stats.divergence_stats(student, teacher, norms, kind, 0.3, tile=tiles.Tile(16, 32, 16, 4, 1, 4)),
        divergence_stats.divergence_row_stats(raw, *rest),
        divergence_stats.divergence_row_stats(raw, *rest, splits=2),
    ]
    for made in others:
        for f in dataclasses.fields(made):
            assert_same(f.name, getattr(made, f.name), getattr(base, f.name), 5e-6)
    again = divergence_stats.divergence_stats(student, teacher, norms, kind, 0.3, splits=1)
    assert torch.equal(again.value, base.value) and torch.equal(again.mean, base.mean)

    law = DivergenceLaw(norms, torch.randn(3, 7, device=DEVICE), kind, 0.3)
    dz, sums = divergence_dlogits.divergence_dlogits(student, teacher, law, need_bias=True)
    own = divergence_dlogits.divergence_row_dlogits(raw, *rest[:2], law, raw[0])
    assert_same("dz", own, dz, 5e-6)
    assert_same("column sums", sums, dz.sum(0), 5e-6)
    part = (Operand(x.hidden, x.weight[50:99], x.bias[50:99], x.scale) for x in (student, teacher))
    assert_same("slice", divergence_dlogits.divergence_dlogits(*part, law)[0], dz[:, 50:99], 5e-6)


def test_refusals():
    student, teacher, norms = operands()
    law = DivergenceLaw(norms, norms[:3].clone(), "jsd")
    short = dataclasses.replace(teacher, weight=teacher.weight[1:], bias=None)
    raw = (torch.zeros(7, 9), torch.zeros(7, 8))
    few = norms[:3]
    cases = [
        (ValueError, "norms is \\[3, 7\\]", lambda: divergence_stats.divergence_stats(student, teacher, few, "jsd")),
        (ValueError, "V=203.*V=202", lambda: divergence_stats.divergence_stats(student, short, norms, "jsd")),
        (ValueError, "raw is \\[7, 8\\]", lambda: divergence_stats.divergence_row_stats(raw, None, None, norms, "jsd")),
        (ValueError, "law.rows", lambda: divergence_dlogits.divergence_dlogits(
            student, teacher, dataclasses.replace(law, rows=norms))),
        (ValueError, "out is \\[7, 9\\]", lambda: divergence_dlogits.divergence_dlogits(
            student, teacher, law, out=raw[0].to(DEVICE))),
        (ValueError, "own rows", lambda: divergence_dlogits.divergence_row_dlogits(
            (raw[0], raw[0]), None, None, DivergenceLaw(norms.cpu(), norms[:3].cpu(), "jsd"), raw[0].clone())),
    ]  # fmt: skip
    for kind, message, action in cases:
        with pytest.raises(kind, match=message):
            action()
    p = pair()
    with pytest.raises(TypeError, match="hidden is torch.float64.*use backend='torch'"):
        ours_run(p, **HOW)


# -- planted mistakes: the checks above must notice each ---------------------------------------------------------------
def shrink(named):
    """The last tile is forgotten."""
    return {"V": named["V"] // C * C}


def rows_of(**wrong):
    """Another number for one of a row's three: reference 0, mean 1, coefficient 2."""

    def change(m):
        true = backend._rule

        def rule(*args):
            made = true(*args)
            rows = made.rows.clone()
            for name, value in wrong.items():
                i = ("reference", "mean", "coefficient").index(name)
                rows[i] = value(rows[i])
            return dataclasses.replace(made, rows=rows)

        m.setattr(backend, "_rule", rule)

    return change


STATS, DLOGITS = (divergence_stats, "divergence_stats_kernel"), (divergence_dlogits, "divergence_dlogits_kernel")
ROW_STATS = (divergence_stats, "divergence_row_stats_kernel")
MUTANTS = {
    "dropped last tile": tamper(*STATS, shrink),
    "dropped last tile of dz": tamper(*DLOGITS, shrink),
    "dropped last tile of a row": tamper(*ROW_STATS, shrink),
    "no bias of the teacher": tamper(*STATS, lambda named: {"other_bias": named["other_bias"] * 0}),
    "no bias of the teacher in dz": tamper(*DLOGITS, lambda named: {"other_bias": named["other_bias"] * 0}),
    "heads swapped in dz": tamper(*DLOGITS, lambda named: {"norms": named["norms"].roll(2, 0).contiguous()}),
    "beta swapped": tamper(*STATS, lambda named: {"beta": named["alpha"], "alpha": named["beta"]}),
    "another kind in dz": tamper(*DLOGITS, lambda named: {"KIND": 1}),
    "no slope of the softcap": tamper(*DLOGITS, lambda named: {"SOFTCAP": False}),
    "temperature of the teacher missing": tamper(*STATS, lambda named: {"other_outer_rows": None}),
    "no E[g]": rows_of(mean=torch.zeros_like),
    "coefficients of other rows": rows_of(coefficient=lambda x: x.roll(1)),
    "zero dW": lambda m: m.setattr(Sink, "end_slice", lambda self, a, b: None),
}


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_a_planted_mistake_is_noticed(mutant, monkeypatch):
    rows = mutant == "dropped last tile of a row"
    p = pair(kind="jsd", dtype=torch.float32 if rows else torch.bfloat16, **SMALL, **OPTIONS["everything"])
    if mutant is None:
        check_accurate(there(p), **HOW)
        return
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(AssertionError):
        check_accurate(there(p), **HOW)


def test_the_reference_word_saves_the_confident_gradient(monkeypatch):
    """Planted: E_p[g] over every word, as it stands. Right, but for the digits that cancel."""
    p = there(cut(confident(torch.float32, 1e-6, False))).but(kind="reverse_kl")

    def error() -> float:
        d = ours_run(p, **HOW)[1][0].double()
        t = ours_run(double(p))[1][0]
        return float(((d - t).norm(dim=1) / t.norm(dim=1)).max())

    assert error() < 1e-4
    monkeypatch.setattr(divergence_stats, "join", without_reference)
    assert error() > 1e-3


def double(p: Pair) -> Pair:
    wide = lambda q: dataclasses.replace(q, hidden=q.hidden.double(), weight=q.weight.double())  # noqa: E731
    return Pair(wide(p.student), wide(p.teacher), p.options)


def without_reference(parts, norms):
    value, sure, _, rest = parts.sum(1).unbind(0)
    return divergence_stats.DivergenceStats(value, sure * 0, rest + sure * torch.exp(-norms[1]))

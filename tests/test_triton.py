"""The triton backend and its kernels, in Triton's interpreter (conftest.py) or on the GPU where there is one.

The interpreter checks what is computed, tile tails and masks included; test_aot.py checks that it compiles.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from oracle import DIFFERENTIABLE, EVERY_STAT, Problem, Watch, assert_as_accurate, assert_same, plain_run, problem
from test_operators import DTYPES, GRADS, OPTIONS, check_accurate, check_exact, ours_run, strided
from test_regimes import REGIMES, N, V, confident

pytest.importorskip("triton")
from fastrl import losses  # noqa: E402
from fastrl.kernels import launch, linear_dlogits, linear_stats, row_dlogits, row_stats, tiles  # noqa: E402
from fastrl.kernels.launch import LogitScale  # noqa: E402
from fastrl.ops import fused_loss, linear_logprobs, triton_backend  # noqa: E402
from fastrl.ops.head import Coefs, HeadSpec, Plan  # noqa: E402
from fastrl.ops.triton_sink import Sink  # noqa: E402
from fastrl.tokens import TokenBatch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOW = {"backend": "triton"}
PLAN = Plan(1 << 20)
TILE = tiles.LINEAR_STATS["interpreter"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on values that a tl.where then drops


def there(p: Problem) -> Problem:
    """The problem on the device that the kernels run on."""
    if DEVICE == "cpu":
        return p
    move = lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x  # noqa: E731
    fields = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
    dicts = {k: {n: move(x) for n, x in fields.pop(k).items()} for k in ("options", "upstream")}
    return Problem(**{k: move(x) for k, x in fields.items()}, **dicts)


def test_the_kernels_under_test_are_interpreted_or_on_a_gpu():
    assert DEVICE == "cuda" or launch.interpreting(), "conftest.py must set TRITON_INTERPRET before triton loads"


# -- accuracy --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_rule7(options, dtype):
    p = problem(dtype=DTYPES[dtype], **{**{"n": 34, "h": 40, "v": 67, "seed": 1}, **OPTIONS[options]})
    check_accurate(there(p), **HOW, workspace_bytes=67 * 4 * 20)


@pytest.mark.parametrize("options", ["plain", "everything"])
def test_every_output_in_float32(options):
    p = there(problem(dtype=torch.float32, **OPTIONS[options]))
    check_exact(p, tolerance=2e-6, **HOW, workspace_bytes=37 * 8 * 5)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_statistic_alone(name):
    for dtype in (torch.float32, torch.bfloat16):
        check_accurate(there(problem(dtype=dtype, **OPTIONS["everything"])), (name,), **HOW)


CELLS = [(r, d) for r in REGIMES for d in ("fp32", "bf16")]
CELLS += [(r, "fp16") for r in ("random", "confident_1e-06", "scale_40", "inf_targets")]


@pytest.mark.parametrize("regime,dtype", CELLS)
def test_regime(regime, dtype):
    check_regime(there(REGIMES[regime](DTYPES[dtype])), regime)


def check_regime(p: Problem, regime: str) -> None:
    stats, grads = ours_run(p, **HOW)
    assert (stats.logprobs <= 0).all() and (stats.entropy >= 0).all()
    assert (stats.entropy <= torch.tensor(math.log(V), dtype=torch.float32)).all()
    for x in (stats.entropy, stats.logsumexp, *grads):
        assert x is None or x.isfinite().all()
    assert (stats.logprobs == -math.inf).sum() == (len(range(0, N, 5)) if regime == "inf_targets" else 0)
    assert_rule7(p, stats, grads)


def assert_rule7(p: Problem, stats, grads) -> None:
    truth, true_grads = plain_run(p, torch.float64)
    plain, plain_grads = plain_run(p, p.hidden.dtype)
    for n in DIFFERENTIABLE:
        assert_as_accurate(n, getattr(stats, n), plain[n], truth[n], 1.5)
    for n, g, a, t in zip(GRADS, grads, plain_grads, true_grads, strict=True):
        assert (g is None) == (t is None)
        if t is not None:
            assert_as_accurate(n, g, a, t, 2.0)


@pytest.mark.parametrize("rest", [1e-3, 1e-6, 1e-9])
def test_confident_tokens_keep_their_digits(rest):
    p = there(confident(torch.float32, rest))
    stats, grads = ours_run(p, ("logprobs",), outputs=("logprobs", "entropy"), **HOW)
    truth, true_grads = plain_run(p, torch.float64, ("logprobs",))
    for n in ("logprobs", "entropy"):
        assert (getattr(stats, n) / truth[n] - 1).abs().max() < 1e-4
    assert ((grads[0] - true_grads[0]).norm(dim=1) / true_grads[0].norm(dim=1)).max() < 1e-4


def test_float16_coefficients_as_small_as_one_over_the_tokens_do_not_underflow():
    """The mean of a 100k-token batch times the loss weight of a rare sample: 1e-9, far below float16's range."""
    p = there(problem(n=19, dtype=torch.float16, scale=2.0))
    _, big = ours_run(p, **HOW)
    p.upstream = {n: u * 2.0**-20 for n, u in p.upstream.items()}
    leaves = p.leaves()
    stats = linear_logprobs(*leaves[:2], p.targets, outputs=DIFFERENTIABLE, **HOW)
    head, h = HeadSpec(leaves[1].detach()), leaves[0].detach()
    _, saved, _ = triton_backend.statistics(head, h, p.targets, DIFFERENTIABLE, PLAN)
    coefs = Coefs(**{n: p.upstream[n].to(stats.logprobs.dtype) for n in DIFFERENTIABLE})
    sink = Sink(head, h, (True, True, False))
    law = sink.rescale(triton_backend._row_gradient(head, saved, coefs))
    triton_backend._slices(head, h, p.targets, law, sink, True, 1 << 20)
    assert sink.d_hidden.abs().max() > 2.0**10  # kept in large units...
    d_hidden = sink.d_hidden / sink.scale * 2.0**20
    assert_same("d_hidden", d_hidden, big[0].float(), 2e-3)  # ...which undone give the same gradient


# -- shapes ----------------------------------------------------------------------------------------------------------
R, C = TILE.rows, TILE.columns
SHAPES = [(1, 1, 1), (1, 8, C), (R, 16, C - 1), (R + 1, 16, C + 1), (R - 1, 7, 2 * C), (3, 24, 97), (R + 2, 33, 131)]


@pytest.mark.parametrize("n,h,v", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ragged_shapes(n, h, v, dtype):
    check_ragged(n, h, v, DTYPES[dtype])


def check_ragged(n, h, v, dtype, **options) -> None:
    p = there(problem(n=n, h=h, v=v, bias=True, dtype=dtype, temperature="per_token", **options))
    p.targets[-1] = v - 1  # the last column of the last tile
    if v == 1:
        stats, grads = ours_run(p, **HOW)
        assert not stats.logprobs.any() and not stats.entropy.any()
    else:
        check_accurate(p, **HOW)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_no_rows_and_all_ignored(dtype):
    for n in (0, 4):
        p = problem(n=n, bias=True, dtype=DTYPES[dtype])
        p.targets = torch.full_like(p.targets, -100)
        p = there(p)
        stats, grads = ours_run(p, outputs=EVERY_STAT, **HOW)
        for name in EVERY_STAT:
            assert getattr(stats, name).shape == (n,) and not getattr(stats, name).any()
        for g, x in zip(grads, p.leaves(), strict=True):
            assert g.shape == x.shape and g.dtype == x.dtype and not g.any()


@pytest.mark.parametrize("how", ["transposed", "every_second", "offset"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_strided_inputs(how, dtype):
    p = there(problem(bias=True, dtype=DTYPES[dtype], h=24))
    stats, grads = ours_run(p, **HOW)
    hidden, weight = (strided(x.cpu(), how).to(DEVICE).detach().requires_grad_() for x in (p.hidden, p.weight))
    bias = torch.stack([p.bias, p.bias], 1)[:, 0].detach().requires_grad_()
    targets = torch.stack([p.targets, p.targets], 1)[:, 1]
    own = linear_logprobs(hidden, weight, targets, bias, outputs=DIFFERENTIABLE, **HOW)
    upstream = [torch.stack([p.upstream[n]] * 2, 1)[:, 0].to(own.logprobs.dtype) for n in DIFFERENTIABLE]
    own_grads = torch.autograd.grad([getattr(own, n) for n in DIFFERENTIABLE], (hidden, weight, bias), upstream)
    for n in DIFFERENTIABLE:
        assert_same(n, getattr(own, n), getattr(stats, n), 1e-5)
    for n, g, t in zip(GRADS, own_grads, grads, strict=True):
        assert_same(n, g, t, 1e-5 if dtype == "fp32" else 1e-2)


def test_expanded_weight_and_hidden():
    p = there(problem(dtype=torch.bfloat16))
    for hidden, weight in ((p.hidden[:1].expand(13, 16), p.weight), (p.hidden, p.weight[:1].expand(37, 16))):
        ours = linear_logprobs(hidden, weight, p.targets, **HOW).logprobs
        truth = torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(1, p.targets[:, None])[:, 0]
        assert_same("logprobs", ours, truth, 1e-5)


def test_offsets_beyond_31_bits():
    """Rows 2^29 elements apart: the offset of the last ones does not fit in 32 bits. Untouched pages cost no memory."""
    stride, rows = 2**29 + 8, 6
    hidden = torch.empty(rows * stride, dtype=torch.bfloat16, device=DEVICE).as_strided((rows, 16), (stride, 1))
    hidden.copy_(torch.randn(rows, 16))
    p = there(problem(dtype=torch.bfloat16))
    for weight in (p.weight, p.weight.t().contiguous().t()):  # with and without tensor maps
        far = linear_stats.linear_stats(hidden, weight, p.targets[:rows])
        near = linear_stats.linear_stats(hidden.contiguous(), weight, p.targets[:rows])
        assert torch.equal(far.logprobs, near.logprobs) and torch.equal(far.entropy, near.entropy)


def test_int32_targets_and_frozen_inputs():
    p = there(problem(bias=True, dtype=torch.bfloat16))
    truth, true_grads = ours_run(p, **HOW)
    p.targets = p.targets.int()
    hidden, weight, bias = p.leaves()
    for asked in ((True, False, False), (False, True, False), (False, False, True)):
        given = [x.detach().requires_grad_(a) for x, a in zip((hidden, weight, bias), asked, strict=True)]
        stats = linear_logprobs(given[0], given[1], p.targets, given[2], outputs=DIFFERENTIABLE, **HOW)
        assert torch.equal(stats.logprobs, truth.logprobs)
        with Watch() as backward:
            sum((getattr(stats, n) * p.upstream[n]).sum() for n in DIFFERENTIABLE).backward()
        assert backward.macs == (0 if asked[2] else 13 * 16 * 37)  # library GEMMs: the recompute is in the kernel
        for x, g, a in zip(given, true_grads, asked, strict=True):
            assert (x.grad is not None) == a and (not a or torch.equal(x.grad, g))


# -- which rows take part --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_without_upstream_gradient_cost_nothing(dtype):
    p = there(problem(n=16, dtype=DTYPES[dtype], temperature="per_token"))
    kept = torch.arange(16, device=DEVICE) % 4 == 1
    p.upstream = {n: u * kept for n, u in p.upstream.items()}
    check_accurate(p, **HOW)
    hidden, weight, _ = p.leaves()
    logprobs = linear_logprobs(hidden, weight, p.targets, **HOW).logprobs
    with Watch() as backward:
        (logprobs * p.upstream["logprobs"]).sum().backward()
    assert backward.macs == (3 if dtype == "fp32" else 2) * 4 * 16 * 37
    assert not hidden.grad[~kept].any()


def test_nan_stays_in_its_row():
    for dtype in (torch.float32, torch.bfloat16):
        p = there(problem(n=18, dtype=dtype))
        clean, _ = ours_run(p, outputs=EVERY_STAT, **HOW)
        p.hidden[4, 2] = float("nan")
        stats, grads = ours_run(p, outputs=EVERY_STAT, **HOW)
        other = torch.arange(18, device=DEVICE) != 4
        for n in DIFFERENTIABLE:
            assert getattr(stats, n)[4].isnan()
            assert torch.equal(getattr(stats, n)[other], getattr(clean, n)[other])
        assert grads[0][4].isnan().all() and not grads[0][other].isnan().any() and grads[1].isnan().all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [-1, 37, 10**9])
def test_unknown_targets_poison_their_row_alone(dtype, bad):
    p = there(problem(dtype=DTYPES[dtype]))
    head = HeadSpec(p.weight)
    clean, _, _ = triton_backend.statistics(head, p.hidden, p.targets, EVERY_STAT, PLAN)
    p.targets[5] = bad
    stats, saved, _ = triton_backend.statistics(head, p.hidden, p.targets, EVERY_STAT, PLAN)
    other = torch.arange(13, device=DEVICE) != 5
    assert stats.logprobs[5].isnan() and torch.equal(stats.logprobs[other], clean.logprobs[other])
    coefs = Coefs(logprobs=torch.ones(13, device=DEVICE))
    d_hidden, _, _ = triton_backend.gradients(head, p.hidden, p.targets, saved, coefs, (True, True, False), PLAN)
    assert d_hidden[5].isnan().all() and not d_hidden[other].isnan().any()


# -- one pass --------------------------------------------------------------------------------------------------------
def check_one_pass(p: Problem, kept: torch.Tensor, workspace: int) -> list[tuple[int, int]]:
    """Gradients of sum_n u_n . stats_n by one_pass within rule 7; returns the chunks."""
    p = there(p)
    p.upstream = {n: u * kept.to(DEVICE) for n, u in p.upstream.items()}
    windows = []

    def coefficient(start, stop, stats):
        windows.append((start, stop))
        assert stats.logprobs.shape == (stop - start,)
        return Coefs(**{n: p.upstream[n][start:stop].to(stats.logprobs.dtype) for n in DIFFERENTIABLE})

    options = {**p.options, "temperature": p.options.get("temperature", 1.0)}
    if isinstance(options["temperature"], torch.Tensor):
        options["temperature"] = options["temperature"].float()
    head = HeadSpec(p.weight, p.bias, **options)
    needs = (True, True, p.bias is not None)
    plan = Plan(workspace)
    stats, *grads, _ = triton_backend.one_pass(head, p.hidden, p.targets, EVERY_STAT, coefficient, needs, plan)
    assert_rule7(p, stats, grads)
    return windows


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_one_pass(dtype, options, rows):
    p = problem(n=23, v=45, dtype=DTYPES[dtype], seed=3, **OPTIONS[options])
    kept = torch.arange(23) % 3 != 1
    kept[7:14] = False  # a whole chunk without a gradient
    windows = check_one_pass(p, kept, rows * 64 * (8 if dtype == "fp32" else 4))
    assert windows == [(a, min(a + rows, 23)) for a in range(0, 23, rows)]


def test_one_pass_in_float16_units_follow_the_largest_coefficient():
    """A first chunk of tiny coefficients, then ordinary ones: the units chosen for the first would overflow."""
    p = problem(n=24, v=45, dtype=torch.float16)
    tiny = torch.where(torch.arange(24) < 8, 2.0**-24, 1.0).double()
    p.upstream = {n: u * tiny for n, u in p.upstream.items()}
    check_one_pass(p, torch.ones(24), 8 * 64 * 4)


def test_one_pass_without_rows_or_without_needs():
    p = there(problem(n=0, bias=True, dtype=torch.bfloat16))
    head = HeadSpec(p.weight, p.bias)
    none = lambda start, stop, stats: Coefs(logprobs=torch.zeros_like(stats.logprobs))  # noqa: E731
    stats, *grads, _ = triton_backend.one_pass(head, p.hidden, p.targets, ("logprobs",), none, (True,) * 3, PLAN)
    assert stats.logprobs.shape == (0,) and [g.shape for g in grads] == [x.shape for x in p.leaves()]
    q = there(problem(bias=True, dtype=torch.bfloat16))
    stats, *grads, _ = triton_backend.one_pass(
        HeadSpec(q.weight, q.bias), q.hidden, q.targets, ("entropy",), none, (False,) * 3, PLAN
    )
    assert stats.entropy.shape == (13,) and grads == [None, None, None]


@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_fused_loss_is_the_torch_backend_s(name):
    """A token-scope law (one pass) and a pair-scope law (two passes) through the public door."""
    p = there(problem(n=20, v=45, dtype=torch.bfloat16, bias=True))
    log_p = linear_logprobs(p.hidden, p.weight, p.targets, p.bias, backend="torch").logprobs.detach()
    batch = TokenBatch(
        targets=p.targets,
        cu_seqlens=torch.tensor([0, 6, 11, 15, 20], device=DEVICE),
        advantages=torch.tensor([1.0, 0.0, -0.5, 2.0], device=DEVICE),
        old_logprobs=log_p - 0.1,
        ref_logprobs=log_p + 0.3,
    )
    made = {}
    for backend in ("torch", "triton"):
        leaves = p.leaves()
        out = fused_loss(losses.get(name), *leaves[:2], batch, leaves[2], backend=backend, workspace_bytes=64 * 4 * 9)
        made[backend] = (out.loss.detach(), *torch.autograd.grad(out.loss, leaves))
    for label, ours, truth in zip(("loss", *GRADS), made["triton"], made["torch"], strict=True):
        assert_same(label, ours, truth, 1e-5 if label == "loss" else 1e-2)


# -- launchers ---------------------------------------------------------------------------------------------------------
def test_splits_and_tiles_change_nothing_but_rounding_and_repeat_bitwise():
    p = there(problem(n=37, h=40, v=203, dtype=torch.float32, bias=True))
    scale = LogitScale(torch.linspace(0.5, 2, 37, device=DEVICE), 0.3, softcap=True)
    call = lambda **how: linear_stats.linear_stats(p.hidden, p.weight, p.targets, p.bias, scale, **how)  # noqa: E731
    base = call(splits=1)
    for how in ({"splits": 1}, {"splits": 2}, {"splits": 6}, {"splits": 99}, {"tile": tiles.Tile(32, 16, 32, 4, 1, 4)}):
        made = call(**how)
        for f in dataclasses.fields(made):
            ours, truth = getattr(made, f.name), getattr(base, f.name)
            if how == {"splits": 1}:
                assert torch.equal(ours, truth)
            assert_same(f.name, ours, truth, 2e-6)


def test_row_and_linear_kernels_agree():
    p = there(problem(n=11, h=40, v=203, dtype=torch.float32, bias=True))
    scale = LogitScale(torch.linspace(0.5, 2, 11, device=DEVICE), 0.3, softcap=True)
    raw = p.hidden @ p.weight.t()
    a = linear_stats.linear_stats(p.hidden, p.weight, p.targets, p.bias, scale)
    for splits in (1, 3, 50):
        b = row_stats.row_stats(raw, p.targets, p.bias, scale, splits=splits)
        for f in dataclasses.fields(a):
            assert_same(f.name, getattr(b, f.name), getattr(a, f.name), 2e-6)
    law = linear_dlogits.RowGradient(a.max, *torch.randn(3, 11, device=DEVICE).unbind(0))
    dz, sums = linear_dlogits.linear_dlogits(p.hidden, p.weight, p.targets, p.bias, scale, law, need_bias=True)
    own = row_dlogits.row_dlogits(raw, p.targets, p.bias, scale, law, raw)
    assert_same("dz", own, dz, 2e-6)
    assert_same("column sums", sums, dz.sum(0), 2e-6)
    part, _ = linear_dlogits.linear_dlogits(
        p.hidden, p.weight[50:99], p.targets, p.bias[50:99], scale, law, column0=50
    )  # fmt: skip
    assert_same("slice", part, dz[:, 50:99], 2e-6)


def test_ties_go_to_the_first_column():
    p = there(problem(n=6, v=70, dtype=torch.float32))
    p.hidden.zero_()
    p.targets = torch.tensor([0, 1, 69, 0, 33, 0], device=DEVICE)
    for splits in (1, 3):
        made = linear_stats.linear_stats(p.hidden, p.weight, p.targets, splits=splits)
        assert made.is_argmax.tolist() == [True, False, False, True, False, True]


@pytest.mark.parametrize("n,v,h", [(16384, 128256, 4096), (16384, 151936, 896), (1, 50257, 768), (10**6, 151936, 896)])
@pytest.mark.parametrize("workspace", [1 << 20, 64 << 20, 1 << 30])
def test_slice_plan_keeps_to_the_workspace(n, v, h, workspace):
    rows, columns = triton_backend._slice_plan(n, v, h, True, workspace)
    assert 1 <= rows <= n and 1 <= columns <= v
    smallest = columns <= 256 and rows <= 128
    assert smallest or 2 * rows * columns + 4 * h * columns <= workspace


@pytest.mark.parametrize("blocks,tiles_,cores", [(128, 501, 132), (1, 594, 132), (7, 3, 132), (1, 1, 1), (1000, 2, 80)])
def test_splits_fill_the_gpu(blocks, tiles_, cores):
    for group in (None, launch.ROW_GROUP):
        splits = launch.pick_splits(blocks, tiles_, cores, group)
        assert 1 <= splits <= max(1, tiles_ // 4)
        each = -(-tiles_ // splits)
        if blocks * tiles_ >= 8 * cores:
            assert blocks * tiles_ / (-(-blocks * splits // cores) * cores * each) > 0.85
        if group and blocks >= group and tiles_ > 4 * cores:
            assert splits * group >= cores


def test_refusals(monkeypatch):
    p = problem()
    with pytest.raises(TypeError, match="float64.*use backend='torch'"):
        linear_logprobs(p.hidden, p.weight, p.targets, **HOW)
    h, w = p.hidden.float(), p.weight.float()
    cases = [
        (ValueError, "expected \\[N, H\\]", lambda: linear_stats.linear_stats(h[:, :3], w, p.targets)),
        (TypeError, "bfloat16", lambda: linear_stats.linear_stats(h.bfloat16(), w, p.targets)),
        (ValueError, "targets is \\[12\\]", lambda: linear_stats.linear_stats(h, w, p.targets[1:])),
        (ValueError, "bias is \\[3\\]", lambda: linear_stats.linear_stats(h, w, p.targets, w[:3, 0])),
        (ValueError, "0 < V", lambda: linear_stats.linear_stats(h, w[:0], p.targets)),
        (ValueError, "float32 with unit", lambda: row_stats.row_stats(h.double(), p.targets)),
        (ValueError, "raw's own", lambda: row_dlogits.row_dlogits(h, p.targets, None, LogitScale(), None, h.clone())),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    for module in (launch, tiles):
        monkeypatch.setattr(module, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="hidden is on cpu.*use backend='torch'"):
        linear_logprobs(h.bfloat16(), w.bfloat16(), p.targets, **HOW)


# -- planted mistakes: the checks above must notice each ---------------------------------------------------------------
class Tampered:
    """A kernel whose launch arguments pass through `change(arguments by name)` first."""

    def __init__(self, kernel, change):
        self.kernel, self.change = kernel, change

    def __getitem__(self, grid):
        def launch_with(*args, **options):
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | options
            self.kernel[grid](**{**named, **self.change(named)})

        return launch_with


def shrink(named):
    """The last tile is forgotten."""
    return {"V": max(1, (named["V"] - 1) // C * C)}


def tamper(module, name: str, change):
    kernel = getattr(module, name)
    return lambda m: m.setattr(module, name, Tampered(kernel, change))


def replace(owner, name: str, value):
    return lambda m: m.setattr(owner, name, value)


MUTANTS = {
    "dropped last tile": tamper(linear_stats, "linear_stats_kernel", shrink),
    "dropped last tile of a row": tamper(row_stats, "row_stats_kernel", shrink),
    "dropped last tile of dz": tamper(linear_dlogits, "linear_dlogits_kernel", shrink),
    "target off by one": tamper(linear_dlogits, "linear_dlogits_kernel", lambda n: {"column0": n["column0"] + 1}),
    "no bias in dz": tamper(linear_dlogits, "linear_dlogits_kernel", lambda named: {"bias": named["bias"] * 0}),
    "wrong range owns the target": tamper(
        linear_stats, "finish_stats_kernel", lambda named: {"columns_per_split": named["columns_per_split"] // 2}
    ),
    "missing temperature": replace(triton_backend, "_logit_scale", lambda head: LogitScale(head.logit_scale)),
    "temperature of another row": replace(
        triton_backend, "_logit_scale", lambda head: LogitScale((head.logit_scale / head.temperature).roll(1))
    ),
    "missing temperature in the slope": lambda m: tamper_law(m, lambda law: law, cold=True),
    "no entropy gradient": lambda m: tamper_law(m, lambda law: dataclasses.replace(law, fall=law.fall * 0)),
    "zero dW": replace(Sink, "end_slice", lambda self, a, b: None),
    "dW carried into the next slice": replace(Sink, "end_slice", lambda self, a, b: carry(self, a, b)),
}


def tamper_law(monkeypatch, change, cold=False) -> None:
    true = triton_backend._row_gradient

    def law(head, saved, coefs):
        return change(true(dataclasses.replace(head, temperature=1.0) if cold else head, saved, coefs))

    monkeypatch.setattr(triton_backend, "_row_gradient", law)


def carry(self, v0: int, v1: int) -> None:
    if self.d_weight is None:
        self.d_weight = torch.empty_like(self.head.weight)
    self.d_weight[v0:v1] = self.slab[: v1 - v0]


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_a_planted_mistake_is_noticed(mutant, monkeypatch):
    rows = mutant == "dropped last tile of a row"
    n, dtype = (3, torch.float32) if rows else (R + 1, torch.bfloat16)
    p = there(problem(n=n, h=16, v=300, bias=True, dtype=dtype, temperature="per_token"))
    budget = (2 * n + 4 * 16) * 256  # two vocabulary slices
    if mutant is None:
        check_accurate(p, **HOW, workspace_bytes=budget)
        return
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(AssertionError):
        check_accurate(p, **HOW, workspace_bytes=budget)

"""The row work in C++: the same numbers under every instruction set, and planted mistakes that must be noticed."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import DIFFERENTIABLE, EVERY_STAT, problem
from test_operators import OPTIONS, check_accurate, check_exact, ours_run
from test_regimes import REGIMES, check_confident, check_offset, check_regime

from fastrl import TokenBatch, fused_loss, linear_logprobs, losses
from fastrl.ops import dispatch, rows_native
from fastrl.ops.head import HeadSpec
from fastrl.ops.rows import Law, new_state

ROOT = Path(__file__).resolve().parents[1]
HOW = {"backend": "native"}
WIDE = {"n": 48, "h": 64, "v": 211}
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler: there is no native backend to test")


def test_it_is_compiled_and_the_default():
    assert dispatch.has_native(), rows_native.library()[1]
    assert dispatch.pick(None, torch.zeros(1), native=True) == "native"
    assert dispatch.pick(None, torch.zeros(1, dtype=torch.float64), native=True) == "torch"


def isas() -> list[str]:
    lib = rows_native.library()[0]
    found = [name for name in ("baseline", "avx2", "avx512") if lib.fastrl_use_isa(name.encode()) == 0]
    lib.fastrl_use_isa(found[-1].encode())
    return found


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    if request.param not in isas():
        assert request.param != "baseline"
        pytest.skip(f"this machine has no {request.param}")
    lib = rows_native.library()[0]
    lib.fastrl_use_isa(request.param.encode())
    yield request.param
    lib.fastrl_use_isa(isas()[-1].encode())


@pytest.mark.parametrize("options", ["plain", "bias", "everything"])
def test_every_instruction_set(isa, options):
    for n in (1, 3, 37, 70):
        p = problem(**{**dict(n=n, h=40, v=131, dtype=torch.float32), **OPTIONS[options]})
        check_exact(p, tolerance=5e-6, **HOW)
        check_exact(p, tolerance=5e-6, **HOW, workspace_bytes=131 * 4 * 20)


@pytest.mark.parametrize("regime", ["confident_1e-06", "inf_columns", "inf_targets", "offset_minus", "saturated"])
def test_hard_regimes_under_every_instruction_set(isa, regime):
    check_regime(regime, torch.float32)


def test_a_row_does_not_depend_on_its_lane():
    """The same hidden state in every column, alone or among others: the row work gives it the same bits."""
    p = problem(n=1, h=16, v=1999, dtype=torch.float32)
    raw = (p.hidden @ p.weight.t()).t().repeat(1, 75)
    rows = rows_native.Rows(0, 0, raw)
    made = []
    for width in (1, 3, 16, 33, 75):
        room = torch.full((1999, -(-width // 16) * 16), torch.nan)
        room[:, :width] = raw[:, :width]
        state = new_state(room.shape[1], raw)
        state = rows.fold(state, room[:, :width], HeadSpec(p.weight), None, p.targets.repeat(width), 0, EVERY_STAT)
        made.append(torch.stack([x[:width].double() for x in state.tensors()]))
        assert (made[-1] == made[0]).all()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_change_a_bit(threads):
    """Of the row work. (The GEMMs around it are torch's, whose threads may.)"""
    g = torch.Generator().manual_seed(0)
    raw, targets = torch.randn(700, 48, generator=g), torch.randint(0, 700, (40,), generator=g)
    rows, head, made = rows_native.Rows(0, 0, raw), HeadSpec(raw, softcap=3.0), []
    law = Law(*torch.randn(4, 40, generator=g).unbind(0))
    before = torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        state = rows.fold(new_state(48, raw), raw[:, :40], head, None, targets, 0, EVERY_STAT)
        out = torch.zeros(700, 20)
        keep = torch.arange(0, 40, 2)
        rows.dlogits(raw[:, :40], head, None, targets[keep], 0, law.at_rows(keep), keep, out)
        made.append([x[:40] for x in state.tensors()] + [out])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_nan_and_infinite_logits_are_what_torch_makes_of_them():
    for value in (torch.nan, torch.inf, -torch.inf):
        p = problem(n=20, h=4, v=300, dtype=torch.float32, bias=True)
        p.hidden[3] = value if value != -torch.inf else p.hidden[3]
        if value == -torch.inf:
            p.bias[:] = value
        for backend in ("native", "torch"):
            stats = linear_logprobs(p.hidden, p.weight, p.targets, p.bias, outputs=DIFFERENTIABLE, backend=backend)
            for n in ("logprobs", "entropy"):
                x = getattr(stats, n)
                assert x[3].isnan() and (value == -torch.inf or x.isfinite().sum() == 19), (value, backend, n)


def test_offsets_beyond_two_to_the_31st():
    """Three words whose rows lie 2^30 floats apart; the memory between them is never touched."""
    step = 2**30
    room = torch.empty(2 * step + 64)
    raw = room.as_strided((3, 40), (step, 1))
    raw.copy_(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)))
    near = torch.zeros(3, 48)
    near[:, :40] = raw
    rows, head, targets = rows_native.Rows(0, 0, near), HeadSpec(near), torch.arange(40) % 3
    law = Law(*torch.randn(4, 40, generator=torch.Generator().manual_seed(1)).unbind(0))
    made = []
    for x in (raw, near[:, :40]):
        state = rows.fold(new_state(48, near), x, head, None, targets, 0, EVERY_STAT)
        out = torch.empty(3, 40)
        rows.dlogits(x, head, None, targets, 0, law, None, out)
        made.append([v[:40] for v in state.tensors()] + [out])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_more_than_two_to_the_31_logits():
    """N x V > 2^31, forward and backward; a few rows and a few words against float64."""
    n, v, h = 2148, 1_000_003, 16
    g = torch.Generator().manual_seed(0)
    hidden = (torch.randn(n, h, generator=g) / 4).requires_grad_()
    weight = torch.randn(v, h, generator=g).requires_grad_()
    targets, advantages = torch.randint(v, (n,), generator=g), torch.randn(n, generator=g)
    targets[-1] = v - 1
    out = fused_loss(
        losses.get("reinforce"), hidden, weight, TokenBatch(targets, advantages=advantages), outputs=("logsumexp",),
        aggregate=lambda batch: torch.ones(n),
    )  # fmt: skip
    out.loss.backward()
    rows = torch.tensor([0, 1, n - 2, n - 1])
    z = hidden.detach().double()[rows] @ weight.detach().double().t()
    logp = z.log_softmax(1)
    truth = logp.gather(1, targets[rows, None])[:, 0]
    assert torch.allclose(out.stats.logprobs[rows].double(), truth, rtol=1e-6)
    dz = logp.exp() * advantages[rows, None]
    dz[torch.arange(4), targets[rows]] -= advantages[rows].double()
    assert torch.allclose(hidden.grad[rows].double(), dz @ weight.detach().double(), rtol=1e-4, atol=1e-5)
    words = torch.tensor([0, 1, v - 2, v - 1, int(targets[0])])
    z = hidden.detach().double() @ weight.detach().double()[words].t() - out.stats.logsumexp.double()[:, None]
    dz = (z.exp() - (targets[:, None] == words).double()) * advantages[:, None]
    assert torch.allclose(weight.grad[words].double(), dz.t() @ hidden.detach().double(), rtol=1e-4, atol=1e-6)


# -- planted mistakes ------------------------------------------------------------------------------------------------
def accurate(options="everything"):
    p = problem(**{**dict(n=48, h=64, v=211, dtype=torch.float32), **OPTIONS[options]})
    return lambda: check_accurate(p, **HOW)


def exact(n=40, v=300, options="bias", **how):
    p = problem(**{**dict(n=n, v=v, dtype=torch.float32), **OPTIONS[options]})
    return lambda: check_exact(p, tolerance=1e-5, **HOW, **how)


def dropping_rows():
    p = problem(n=40, v=70, bias=True, dtype=torch.float32)
    p.upstream = {n: u * (torch.arange(40) % 4 == 1) for n, u in p.upstream.items()}
    check_exact(p, tolerance=1e-5, **HOW)


def tied():
    check_regime("exactly_flat", torch.float32)


# what is planted: (file, text, what takes its place, the check that must turn red)
MUTANTS: dict[str, tuple[str, str, str, Callable]] = {
    "last words of a tile left out": ("rows_isa.h", "v < rows; v++", "v < rows - 1; v++", exact()),
    "ties with the top not counted": ("rows_isa.h", "count[g] -= hit;", "count[g] = Int{} + 1;", tied),
    "no rescaling when the top rises": (
        "rows_isa.h", "store(s.rest + c, a * (rest", "store(s.rest + c, (rest", exact()
    ),
    "gap forgotten when parts join": (
        "rows_isa.h", "w = a * (w + where(keep, Vec{}, gap * (count + rest)));", "w = a * w;", exact()
    ),
    "part merged twice": (
        "rows_isa.h", "merge_part<OUTPUTS>(state, part_at(i), c);",
        "merge_part<OUTPUTS>(state, part_at(i ? i : 1 % parts), c);", exact()
    ),
    "temperature missing": ("rows_isa.h", "return z / temperature;", "return z;", accurate()),
    "bias missing in the backward": (
        "rows_isa.h", "float bias = h.bias ? h.bias[v] : 0.0f;", "float bias = 0.0f;", exact()
    ),
    "slope of the softcap missing": ("rows_isa.h", "d * (1.0f - t * t) : d", "d : d", accurate()),
    "slope at the target missing": ("rows_isa.h", "(F == CAPPED ? slopes[c] : 1.0f)", "1.0f", accurate()),
    "entropy term of the gradient missing": (
        "rows_isa.h", "bracket = bracket - load(fall)", "bracket = bracket - 0.0f * load(fall)", exact()
    ),
    "target off by one": (
        "rows_isa.h", "int64_t v = tile.targets[c] - tile.first_word;",
        "int64_t v = tile.targets[c] - tile.first_word + 1;", exact()
    ),
    "kept columns ignored": ("rows_isa.h", "kept[c] = raw[law.keep[c]]", "kept[c] = raw[c]", dropping_rows),
    "zero times minus infinity": (
        "rows_isa.h", "where(gap < all(-1000.0f), all(-1000.0f), where(hit, Vec{}, gap))", "where(hit, Vec{}, gap)",
        lambda: check_regime("inf_columns", torch.float32)
    ),
    "coarse exponential": ("vector.h", "p = p * r + 0.008369079721703447f;", "p = p * r;", accurate("plain")),
    "coarse hyperbolic tangent": ("vector.h", "p = p * t - 0.0538233257830143f;", "p = p * t;", accurate()),
    "exponential that ends too early": (
        "vector.h", "LOWEST = -87.3f", "LOWEST = -10.0f", lambda: check_confident(1e-6)
    ),
}  # fmt: skip


def compiled(folder: Path, file: str, text: str, planted: str) -> Path:
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    before = (source / file).read_text()
    assert before.count(text) >= 1, f"{file} no longer holds {text!r}"
    (source / file).write_text(before.replace(text, planted))
    made = folder / "native.so"
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi", "-DFASTRL_BASELINE_ONLY"]
    subprocess.run(["g++", *flags, "-o", made, source / "native.cpp"], check=True)
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_notices(name, tmp_path, monkeypatch):
    file, text, planted, check = MUTANTS[name]
    check()
    lib = rows_native.declare(ctypes.CDLL(str(compiled(tmp_path, file, text, planted))))
    monkeypatch.setattr(rows_native, "library", lambda: (lib, "mutant"))
    with pytest.raises(AssertionError):
        check()


def test_a_rebuilt_library_without_a_mistake_passes(tmp_path, monkeypatch):
    """Negative control of the mutants: the way they are compiled and loaded changes nothing."""
    lib = rows_native.declare(ctypes.CDLL(str(compiled(tmp_path, "rows.h", "#pragma once", "#pragma once"))))
    monkeypatch.setattr(rows_native, "library", lambda: (lib, "baseline"))
    for check in {id(m[3]): m[3] for m in MUTANTS.values()}.values():
        check()
    check_offset(-1e4)


def test_without_the_library_everything_runs_on_torch(monkeypatch):
    p = problem(n=40, dtype=torch.float32)
    truth, _ = ours_run(p, backend="torch")
    monkeypatch.setattr(dispatch, "has_native", lambda: False)
    monkeypatch.setattr(rows_native, "library", lambda: (None, "not compiled"))
    stats, _ = ours_run(p)
    assert torch.equal(stats.logprobs, truth.logprobs)
    with pytest.raises(ValueError, match="backend='native' was asked for but is not compiled.*use backend='torch'"):
        ours_run(p, **HOW)


def test_what_native_does_not_take_is_refused_by_name():
    with pytest.raises(ValueError, match="backend='native' takes float32.*got torch.float64 on cpu"):
        ours_run(problem(), **HOW)


@pytest.mark.parametrize("regime", REGIMES)
def test_native_and_torch_agree(regime):
    p = REGIMES[regime](torch.float32)
    (a, da), (b, db) = ours_run(p, backend="native"), ours_run(p, backend="torch")
    for n in ("logprobs", "entropy"):
        x, y = getattr(a, n), getattr(b, n)
        assert torch.allclose(x, y, rtol=2e-4, atol=2e-4), n
    for x, y in zip(da[:2], db[:2], strict=True):
        assert (x - y).norm() <= 2e-3 * y.norm() + 1e-6

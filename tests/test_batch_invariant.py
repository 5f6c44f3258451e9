"""batch_invariant=True: a row's statistics are the same bits whatever stands around it, and as right as ever."""

from __future__ import annotations

import pytest
import torch
from oracle import EVERY_STAT, assert_as_accurate, plain_statistics, problem

from fastrl import linear_logprobs
from fastrl.ops import rows_native, triton_backend, walk

N = 200
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKENDS = ("native", "torch", "triton")
SIZES = (1, 2, 17, 63, 64, 65, N)


def make(dtype, **shape):
    return problem(n=N, **{"h": 33, "v": 301, **shape}, dtype=dtype, bias=True, scale=3.0, temperature="per_token")


def exact_dots(p):
    """The same problem with numbers whose dot products are exact in float32: the interpreter's own product of two tiles
    (numpy's BLAS) rounds by the place of a row in its tile, which tensor cores do not."""
    p.hidden, p.weight = (4 * p.hidden).round() / 4, (8 * p.weight).round() / 8
    return p


def run(p, rows, backend: str, **how) -> dict:
    """Statistics of these rows of the problem; `invariant` unless told otherwise."""
    temperature = p.options["temperature"][rows]
    how = {"batch_invariant": True, "outputs": EVERY_STAT, **how}
    hidden, weight, bias = (x.detach().clone() for x in p.leaves())
    if how.get("strategy") != "forward":
        hidden.requires_grad_()
    made = linear_logprobs(hidden[rows], weight, p.targets[rows], bias, temperature=temperature, backend=backend, **how)
    return {name: x.detach() for name in EVERY_STAT if (x := getattr(made, name)) is not None}


def differing(backend: str, p, sizes=SIZES, **how) -> list[str]:
    """What changes when the same rows are taken fewer at a time, from elsewhere, in another order."""
    whole = run(p, torch.arange(N), backend, **how)
    g = torch.Generator().manual_seed(1)
    cuts = {f"first {n}": torch.arange(n) for n in sizes}
    cuts |= {f"last {n}": torch.arange(N - n, N) for n in sizes}
    cuts |= {f"random {n}": torch.randperm(N, generator=g)[:n] for n in sizes}
    found = []
    for label, rows in cuts.items():
        part = run(p, rows, backend, **how)
        found += [f"{label} {name}" for name, x in part.items() if not torch.equal(x, whole[name][rows])]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_the_same_bits_anywhere(backend, dtype):
    if backend == "triton":
        p, sizes = exact_dots(make(DTYPES[dtype], h=16, v=900)), (1, 17, 65)  # the interpreter takes its time
    else:
        p, sizes = make(DTYPES[dtype]), SIZES
    assert differing(backend, p, sizes, strategy="two_pass") == []


@pytest.mark.parametrize("shape", [(16, 37), (64, 2048), (257, 2100), (100, 4099)], ids=str)
@pytest.mark.parametrize(("backend", "own"), [("native", True), ("native", False), ("torch", False)])
def test_many_shapes(backend, own, shape, monkeypatch):
    monkeypatch.setattr(rows_native, "own_gemm", lambda: own)
    p = make(torch.float32, h=shape[0], v=shape[1])
    assert differing(backend, p, (1, 2, 17, 65), strategy="two_pass") == []


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("own", [True, False])
def test_workspace_strategy_and_ignored_rows_change_no_bit(backend, own, monkeypatch):
    monkeypatch.setattr(rows_native, "own_gemm", lambda: own)
    p = make(torch.float32)
    rows = torch.arange(N)
    want = run(p, rows, backend, strategy="two_pass")
    for workspace in (1, 301 * 4 * 10, 301 * 4 * 100, 1 << 26):
        for strategy in ("two_pass", "cached"):
            made = run(p, rows, backend, strategy=strategy, workspace_bytes=workspace)
            for name, x in made.items():
                assert torch.equal(x, want[name]), (workspace, strategy, name)
    frozen = run(p, rows, backend, strategy="frozen", outputs=("logprobs",))
    assert torch.equal(frozen["logprobs"], want["logprobs"])
    p.targets = torch.where(rows % 3 == 1, -100, p.targets)
    made = run(p, rows, backend, strategy="cached")
    for name, x in made.items():
        assert torch.equal(x, torch.where(rows % 3 == 1, torch.zeros_like(x), want[name])), name


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_it_is_right(backend, invariant):
    """Values and gradients against float64, beside the default mode."""
    p = make(torch.float32)
    names = ("logprobs", "entropy", "logsumexp")
    leaves = p.leaves()
    made = linear_logprobs(
        leaves[0], leaves[1], p.targets, leaves[2], outputs=names, backend=backend, batch_invariant=invariant,
        **p.options,
    )  # fmt: skip
    total = sum((getattr(made, n) * p.upstream[n].float()).sum() for n in names)
    results = {}
    for key, dtype in (("truth", torch.float64), ("plain", torch.float32)):
        own = p.leaves(dtype)
        stats = plain_statistics(own, p.targets, **p.options)
        results[key] = stats, torch.autograd.grad(sum((stats[n] * p.upstream[n].to(dtype)).sum() for n in names), own)
    for n in names:
        assert_as_accurate(n, getattr(made, n), results["plain"][0][n], results["truth"][0][n], 1.5)
    for i, d in enumerate(torch.autograd.grad(total, leaves)):
        assert_as_accurate(str(i), d, results["plain"][1][i], results["truth"][1][i], 2.0)


# -- what the promise rests on: without it, bits do change ----------------------------------------------------------
def unpadded(patch):
    """GEMMs and vectors as long as there are rows."""
    patch.setattr(walk, "_padded", lambda head, targets, hidden: (head, targets, hidden))


def default_mode(patch):
    """The flag is forgotten."""
    init = walk.Walk.__init__

    def forgetful(self, rows, head, hidden, plan):
        init(self, rows, head, hidden, walk.Plan(plan.workspace, False, plan.shard))

    patch.setattr(walk.Walk, "__init__", forgetful)


def splits_by_rows(patch):
    """As many column ranges as fill the device: more for fewer rows."""
    call = triton_backend.linear_stats

    def changed(hidden, *rest, splits=None, **asked):
        return call(hidden, *rest, splits=max(1, 8 // hidden.shape[0] + 1), **asked)

    patch.setattr(triton_backend, "linear_stats", changed)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("plant", [unpadded, default_mode], ids=lambda f: f.__name__)
def test_mutants_of_the_walk_are_seen(plant, backend, monkeypatch):
    monkeypatch.setattr(rows_native, "own_gemm", lambda: False)  # whose bits depend on no shape, in any mode
    plant(monkeypatch)
    assert differing(backend, make(torch.float32), (1, 2, 17), strategy="two_pass")


def test_mutant_of_the_kernel_is_seen(monkeypatch):
    p = exact_dots(make(torch.float32, h=16, v=900))
    splits_by_rows(monkeypatch)
    assert differing("triton", p, (1, 17), strategy="two_pass")

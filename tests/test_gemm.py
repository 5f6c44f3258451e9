"""The CPU's own matrix product (csrc/gemm_isa.h): right in every layout, and the same bits wherever they stand."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch
from oracle import problem
from test_native import compiled, isa, isas  # noqa: F401  (isa is a fixture)
from test_operators import OPTIONS, check_accurate, check_exact
from torch import Tensor

from fastrl.ops import rows_native

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler: there is no native backend to test")
# m, n, k: one of each, edges of the register tile, primes, several slabs of k, several passes over n, many rows
SHAPES = [
    (1, 1, 1), (6, 16, 8), (7, 17, 9), (5, 15, 256), (97, 31, 257), (101, 208, 512), (13, 1025, 300), (1000, 40, 33),
    (16, 2100, 1031), (208, 64, 4100),
]  # fmt: skip
LAYOUTS = ("nn", "nt", "tn", "tt")


def matrices(shape: tuple[int, int, int], layout: str) -> tuple[Tensor, Tensor]:
    """a [m, k] and b [k, n]; t: stored the other way round."""
    m, n, k = shape
    g = torch.Generator().manual_seed(m + n + k)
    a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
    return tuple(x.t().contiguous().t() if way == "t" else x for x, way in zip((a, b), layout, strict=True))


def check(shape: tuple[int, int, int], layout: str) -> None:
    """As accurate as torch's product, into the middle of a larger matrix whose rest stays what it was."""
    a, b = matrices(shape, layout)
    m, n, k = shape
    truth = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()  # error is relative to this
    room = torch.randn(m + 2, n + 21, generator=torch.Generator().manual_seed(0))
    for add in (False, True):
        before = room.clone()
        out = room[1:-1, 3 : n + 3]
        want = truth + before[1:-1, 3 : n + 3] if add else truth
        plain = (a @ b + before[1:-1, 3 : n + 3] if add else a @ b) - want
        rows_native.gemm(a, b, out, add)
        error = out - want
        assert error.norm() <= 2 * plain.norm() + 1e-7 * size.norm(), (add, error.norm(), plain.norm())
        assert (error.abs() <= 2e-6 * (size + 1)).all()
        before[1:-1, 3 : n + 3] = out
        assert torch.equal(before, room), "it wrote outside its place"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_as_accurate_as_torch(shape, layout):
    check(shape, layout)


def test_every_instruction_set(isa):  # noqa: F811
    for layout in LAYOUTS:
        for shape in ((7, 17, 9), (101, 35, 300), (13, 1040, 20)):
            check(shape, layout)


def test_any_strides():
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(40, 60, 3, generator=g)
    a, b = wide[:, :30, 0], wide[:30, 5:50, 2]
    expanded = wide[0, :30, :1].expand(30, 20)
    for left, right in ((a, b), (a, expanded), (expanded.t(), b)):
        out = torch.empty(left.shape[0], right.shape[1])
        rows_native.gemm(left, right, out)
        assert torch.allclose(out, left @ right, atol=1e-5)


def test_nothing_to_sum_and_nothing_to_write():
    out = torch.ones(3, 5)
    rows_native.gemm(torch.empty(3, 0), torch.empty(0, 5), out, add=True)
    assert (out == 1).all()
    rows_native.gemm(torch.empty(3, 0), torch.empty(0, 5), out)
    assert (out == 0).all()
    rows_native.gemm(torch.empty(0, 4), torch.empty(4, 5), torch.empty(0, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_depend_on_the_row_and_the_column_alone(layout, isa):  # noqa: F811
    """Not on how many others there are, on its place among them, or on the threads."""
    a, b = matrices((203, 75, 700), layout)
    whole = rows_native.gemm(a, b, torch.empty(203, 75))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 4):
            torch.set_num_threads(threads)
            for rows, columns in ((slice(1), slice(1)), (slice(9, 110), slice(3, 75)), (slice(202, 203), slice(1, 40))):
                part = a[rows], b[:, columns]
                made = rows_native.gemm(*part, torch.empty(part[0].shape[0], part[1].shape[1]))
                assert torch.equal(made, whole[rows, columns]), (threads, rows, columns)
    finally:
        torch.set_num_threads(before)


def test_infinities_and_nan_stay_in_their_rows_and_columns():
    a, b = matrices((20, 33, 40), "nn")
    a[3, 5], b[7, 11] = torch.inf, torch.nan
    made = rows_native.gemm(a, b, torch.empty(20, 33))
    odd = torch.zeros(20, 33, dtype=torch.bool)
    odd[3], odd[:, 11] = True, True
    assert torch.equal(~made.isfinite(), odd)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_with_either_product(own, dtype, monkeypatch):
    """Whatever this machine takes by itself, both are tested."""
    monkeypatch.setattr(rows_native, "own_gemm", lambda: own)
    for options in ("plain", "everything"):
        for n in (1, 37, 150):
            p = problem(**{**dict(n=n, h=70, v=331, dtype=dtype), **OPTIONS[options]})
            how = dict(backend="native", workspace_bytes=331 * 4 * 60)
            if dtype == torch.float32:
                check_exact(p, tolerance=5e-6, **how)
            else:
                check_accurate(p, **how)


def test_it_is_taken_where_it_was_measured_to_be_faster():
    lib = rows_native.library()[0]
    want = lib.fastrl_isa() == b"avx2" and lib.fastrl_vendor() == b"AuthenticAMD"
    assert rows_native.own_gemm() == want


SEVERAL, LONG, TRANSPOSED, TALL = (101, 208, 512), (16, 2100, 1031), (208, 64, 4100), (1000, 40, 33)
MUTANTS = {
    "a slab is dropped": ("low < slabs; low += together", "low < slabs - 1; low += together", LONG, "nn"),
    "the last slab takes the place of the others": ("(add || slab)", "(add)", SEVERAL, "nn"),
    "the last slab of strips does": ("else if (add || slab)\n", "else if (add)\n", TRANSPOSED, "tn"),
    "the last slab does where b is copied": ("copy && (add || slab)", "copy && add", TRANSPOSED, "tn"),
    "a slab of strips is dropped": ("turn < slabs * blocks", "turn < (slabs - 1) * blocks", TRANSPOSED, "tn"),
    "add is forgotten": ("ADD ? load(to) + sum[i][0] : sum[i][0]", "sum[i][0]", (6, 16, 8), "nn"),
    "the last column of a panel is dropped": ("q < most ?", "q < most - 1 ?", (7, 17, 9), "nn"),
    "a row too few is summed": ("p = 0; p < k; p++) {\n    Vec", "p = 1; p < k; p++) {\n    Vec", (6, 16, 8), "nn"),
    "a missing row is read": ("(i < rows ? i : rows - 1)", "(i < rows ? i : 0)", None, None),
    "edges are written whole": ("rows == HEIGHT && columns == WIDTH", "rows == HEIGHT", (6, 17, 9), "nn"),
    "strips of the first row": ("(r < most ? r : most - 1) * a.row", "0 * a.row", (8, 9, 12), "tn"),
    "one pass over the columns": ("j < n; j += COLUMNS", "j < COLUMNS; j += COLUMNS", (13, 1025, 300), "nn"),
    "half of the copies": ("p < end; p += GROUP_ROWS", "p < end; p += 2 * GROUP_ROWS", SEVERAL, "nn"),
    "half of a strip": ("p < depth; p += GROUP_ROWS", "p < depth; p += 2 * GROUP_ROWS", SEVERAL, "tn"),
    "half of a panel is left": ("store(panel + p * WIDTH, left);", "", SEVERAL, "tn"),
    "every panel is the first": ("first * b.row + j * WIDTH * b.column", "first * b.row", SEVERAL, "tn"),
    "the second block of rows is the first": ("item / cuts * tall", "0 * tall", TALL, "nn"),
    "the second block of strips is the first": ("(t % blocks) / blocks", "0 / blocks", TALL, "tn"),
    "no last columns": ("across * (thread % beside + 1) / beside", "j0 + across / beside - 1", SEVERAL, "tn"),
}  # fmt: skip
HARMLESS = "a missing row is read"  # rows that are not written may hold anything: the tests must not ask for more


@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_notices(name, tmp_path, monkeypatch):
    text, planted, shape, layout = MUTANTS[name]
    lib = rows_native.declare(ctypes.CDLL(str(compiled(tmp_path, "gemm_isa.h", text, planted))))
    monkeypatch.setattr(rows_native, "library", lambda: (lib, "mutant"))
    if name == HARMLESS:
        check((7, 17, 9), "nn")
        return
    with pytest.raises(AssertionError):
        check(shape, layout)

"""Segment sums, means and DPO's pair logits: their kernels and plain forms against float64, and their derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_as_accurate, assert_same
from test_triton import DEVICE, Tampered

pytest.importorskip("triton")
from fastrl import losses  # noqa: E402
from fastrl.kernels import segments as kernels  # noqa: E402
from fastrl.kernels import tiles  # noqa: E402
from fastrl.ops import segments  # noqa: E402
from fastrl.tokens import TokenBatch, TokenStats  # noqa: E402
from fastrl.tokens import segment_mean as plain_mean  # noqa: E402
from fastrl.tokens import segment_sum as plain_sum  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BLOCK = tiles.VECTORS["interpreter"].columns
BACKENDS = ["torch", "triton"]
LENGTHS = [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 0, 2, 0]
PLAIN = {"segment_sum": plain_sum, "segment_mean": plain_mean}


def packed(lengths=LENGTHS, dtype=torch.float32, seed=0, cu_dtype=torch.int32):
    """(values [T], cu_seqlens, upstream [S])."""
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=cu_dtype)
    values = torch.randn(int(cu[-1]), generator=g, dtype=torch.float64).to(dtype)
    upstream = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    return values.to(DEVICE), cu.to(DEVICE), upstream.to(DEVICE)


def definition(name: str, values, cu, upstream, dtype):
    x = values.to(dtype).detach().requires_grad_()
    out = PLAIN[name](x, TokenBatch(targets=torch.zeros_like(values, dtype=torch.long), cu_seqlens=cu))
    return out.detach(), *torch.autograd.grad(out, x, upstream.to(dtype))


def check_reduction(name: str, backend: str, dtype=torch.float32, lengths=LENGTHS, cu_dtype=torch.int32) -> None:
    values, cu, upstream = packed(lengths, dtype, cu_dtype=cu_dtype)
    x = values.clone().requires_grad_()
    out = getattr(segments, name)(x, cu, backend=backend)
    (grad,) = torch.autograd.grad(out, x, upstream.to(dtype))
    assert out.dtype == grad.dtype == dtype
    truth, plain = (definition(name, values, cu, upstream, d) for d in (torch.float64, dtype))
    assert_as_accurate(name, out, plain[0], truth[0], 1.5)
    assert_as_accurate("gradient", grad, plain[1], truth[1], 2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions(name, dtype, backend):
    check_reduction(name, backend, dtype)
    check_reduction(name, backend, dtype, lengths=[5], cu_dtype=torch.int64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PLAIN)
def test_in_float64_to_the_last_digits(name, backend):
    values, cu, upstream = packed(dtype=torch.float64)
    truth = definition(name, values, cu, upstream, torch.float64)
    x = values.clone().requires_grad_()
    out = getattr(segments, name)(x, cu, backend=backend)
    assert_same(name, out, truth[0], 1e-14)
    assert_same("gradient", torch.autograd.grad(out, x, upstream)[0], truth[1], 1e-15)


def test_a_long_segment_of_cancelling_values_keeps_its_digits():
    """One token of 3e4 among a million small ones, then its opposite: a plain float32 sum loses most of them."""
    t = 40 * BLOCK
    values = torch.full((t,), 1e-3, device=DEVICE)
    values[3], values[3 + 8 * BLOCK] = 3e4, -3e4
    out = kernels.segment_sum(values, torch.tensor([0, t], device=DEVICE))
    assert abs(float(out) - 1e-3 * (t - 2)) < 1e-5 * t * 1e-3


def test_infinities_and_nan_are_those_of_a_sum():
    values = torch.tensor([1.0, math.inf, 2.0, -math.inf, 1.0, math.inf, -math.inf, math.nan, 3.0], device=DEVICE)
    cu = torch.tensor([0, 3, 5, 7, 8, 9], device=DEVICE)
    out = kernels.segment_sum(values, cu)
    assert out[0] == math.inf and out[1] == -math.inf and out[2].isnan() and out[3].isnan() and out[4] == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_sum(backend):
    for lengths in ([], [0], [0, 0]):
        values, cu, _ = packed(lengths)
        for name in PLAIN:
            x = values.clone().requires_grad_()
            out = getattr(segments, name)(x, cu, backend=backend)
            assert out.shape == (len(lengths),) and not out.any()
            assert torch.autograd.grad(out.sum(), x)[0].shape == (0,)
        if len(lengths) % 2 == 0:
            assert segments.pair_logits(values, None, cu, 0.1, backend=backend).shape == (len(lengths) // 2,)


# -- pairs -------------------------------------------------------------------------------------------------------------
def pair_inputs(dtype=torch.float32, lengths=LENGTHS):
    values, cu, upstream = packed(lengths, dtype)
    g = torch.Generator().manual_seed(9)
    ref = (values.double() + 0.3 * torch.randn(len(values), generator=g, dtype=torch.float64).to(DEVICE)).to(dtype)
    return values, ref, cu, upstream[: len(lengths) // 2]


def dpo_logits(values, ref, cu, upstream, beta: float, dtype):
    """By the objective itself: log-ratios [S], chosen minus rejected."""
    x = values.to(dtype).detach().requires_grad_()
    law = losses.get("dpo", beta=beta, reference_free=ref is None)
    batch = TokenBatch(
        targets=torch.zeros_like(values, dtype=torch.long),
        cu_seqlens=cu,
        ref_logprobs=None if ref is None else ref.to(dtype),
    )
    sums = law.log_ratios(TokenStats(logprobs=x), batch)
    out = beta * (sums[0::2] - sums[1::2])
    return out.detach(), *torch.autograd.grad(out, x, upstream.to(dtype))


def check_pairs(backend: str, with_ref=True, beta=0.37, lengths=LENGTHS) -> None:
    values, ref, cu, upstream = pair_inputs(lengths=lengths)
    ref = ref if with_ref else None
    x = values.clone().requires_grad_()
    out = segments.pair_logits(x, ref, cu, beta, backend=backend)
    (grad,) = torch.autograd.grad(out, x, upstream.float())
    truth, plain = (dpo_logits(values, ref, cu, upstream, beta, d) for d in (torch.float64, torch.float32))
    assert_as_accurate("logits", out, plain[0], truth[0], 1.5)
    assert_as_accurate("c", grad, plain[1], truth[1], 2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_ref", [True, False])
def test_pair_logits(with_ref, backend):
    check_pairs(backend, with_ref)
    check_pairs(backend, with_ref, lengths=[1, 0])


def test_pair_logits_report_the_sum_of_each_sequence():
    values, ref, cu, _ = pair_inputs()
    logits, sums = kernels.pair_logits(values, ref, cu, 0.5)
    batch = TokenBatch(targets=torch.zeros_like(values, dtype=torch.long), cu_seqlens=cu)
    assert_same("sums", sums, plain_sum(values.double() - ref.double(), batch), 1e-6)
    assert_same("logits", logits, 0.5 * (sums[0::2] - sums[1::2]), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_log_probs_are_summed_in_float32(backend):
    values, ref, cu, _ = pair_inputs(torch.bfloat16)
    out = segments.pair_logits(values, ref, cu, 0.2, backend=backend)
    truth = segments.pair_logits(values.double(), ref.double(), cu, 0.2, backend="torch")
    assert out.dtype == torch.float32
    assert_same("logits", out, truth, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_dpo_and_its_second_derivative(backend):
    """Every map is linear, but the loss on top is not: a gradient penalty needs the backward's own backward."""
    values, ref, cu, _ = pair_inputs(torch.float64, lengths=[2, 1, 0, 2])
    x = values.clone().requires_grad_()

    def loss(v):
        return -torch.nn.functional.logsigmoid(segments.pair_logits(v, ref, cu, 0.4, backend=backend)).mean()

    assert torch.autograd.gradcheck(loss, x) and torch.autograd.gradgradcheck(loss, x)
    square = lambda v: segments.segment_mean(v.square(), cu, backend=backend).square().sum()  # noqa: E731
    assert torch.autograd.gradcheck(square, x) and torch.autograd.gradgradcheck(square, x)


# -- inputs ------------------------------------------------------------------------------------------------------------
def test_strided_vectors_and_bitwise_repeats():
    values, ref, cu, _ = pair_inputs()
    twice = torch.stack([values, ref], 1)
    out = segments.pair_logits(twice[:, 0], twice[:, 1], torch.stack([cu, cu], 1)[:, 0], 0.5, backend="triton")
    assert torch.equal(out, segments.pair_logits(values, ref, cu, 0.5, backend="triton"))
    one = values[:1].expand(len(values))
    assert_same("expanded", segments.segment_sum(one, cu, backend="triton"), cu.diff() * float(values[0]), 1e-6)


def test_refusals():
    values, ref, cu, _ = pair_inputs()
    cases = [
        (ValueError, "float .T. vector", lambda: segments.segment_sum(values[:, None], cu)),
        (ValueError, r"must be \[S\+1\], got \[0\]", lambda: segments.segment_sum(values, cu[:0])),
        (TypeError, "int32 or int64", lambda: segments.segment_sum(values, cu.float())),
        (ValueError, "ascend from 0 to T", lambda: segments.segment_mean(values.cpu()[1:], cu.cpu())),
        (ValueError, "an odd 9", lambda: segments.pair_logits(values, ref, cu[:-1], 0.1)),
        (ValueError, r"ref_logprobs is \[3\]", lambda: segments.pair_logits(values, ref[:3], cu, 0.1)),
        (ValueError, "backend is 'cuda'", lambda: segments.segment_sum(values, cu, backend="cuda")),
        (ValueError, "an odd 9", lambda: kernels.pair_logits(values, ref, cu[:-1], 0.1)),
        (ValueError, r"per_pair is \[4\]", lambda: kernels.pair_coefficients(values[:4], cu, 9, 0.1)),
        (ValueError, r"per_segment is \[4\]", lambda: kernels.segment_spread(values[:4], cu, 9)),
        (ValueError, "bounds is .*float32", lambda: kernels.segment_sum(values, cu.float())),
    ]
    for kind, match, call in cases:
        with pytest.raises(kind, match=match):
            call()


# -- planted mistakes --------------------------------------------------------------------------------------------------
def everything() -> None:
    for name in PLAIN:
        check_reduction(name, "triton")
    check_pairs("triton")


MUTANTS = {
    "mean is a sum": ("segment_sum_kernel", lambda n: {"MEAN": False}),
    "last row dropped": ("segment_sum_kernel", lambda n: {"bounds": n["bounds"].clamp(max=int(n["bounds"][-1]) - 1)}),
    "mean's gradient is the sum's": ("segment_spread_kernel", lambda n: {"MEAN": False}),
    "pushed the wrong way": ("segment_spread_kernel", lambda n: {"factor": -n["factor"]}),
    "beta forgotten in the gradient": ("segment_spread_kernel", lambda n: {"factor": 1.0}),
    "no reference": ("pair_logits_kernel", lambda n: {"ref": None}),
    "beta forgotten": ("pair_logits_kernel", lambda n: {"beta": 1.0}),
    "half precision sums": ("pair_logits_kernel", lambda n: {"ACC": kernels.tl.float16}),
}


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_a_planted_mistake_is_noticed(mutant, monkeypatch):
    if mutant is None:
        everything()
        return
    name, change = MUTANTS[mutant]
    monkeypatch.setattr(kernels, name, Tampered(getattr(kernels, name), change))
    with pytest.raises(AssertionError):
        everything()

"""The operators one by one on pytest-benchmark.

    pytest bench/test_kernels.py --benchmark-only                       N=512 D=256 V=16384, fp32, CPU
    BENCH_ROWS=2048 BENCH_VOCABULARY=65536 BENCH_DEVICE=cuda BENCH_DTYPE=bfloat16 pytest bench/test_kernels.py
    pytest bench/test_kernels.py --benchmark-only --benchmark-compare   against the run saved with --benchmark-autosave

Each test's extra_info holds the TFLOP/s of the GEMMs that its case cannot do without.
"""

from __future__ import annotations

import os

import common  # noqa: F401 - makes fastrl importable
import pytest
import torch

import fastrl
from fastrl.bench import machine
from fastrl.bench.problems import Case, make_data, make_problem
from fastrl.bench.rivals import runner

SHAPE = {
    "rows": int(os.environ.get("BENCH_ROWS", 512)),
    "hidden": int(os.environ.get("BENCH_HIDDEN", 256)),
    "vocabulary": int(os.environ.get("BENCH_VOCABULARY", 16384)),
    "dtype": os.environ.get("BENCH_DTYPE", "float32"),
    "device": os.environ.get("BENCH_DEVICE", "cpu"),
}
CASES = {
    "forward": Case(what="forward", **SHAPE),
    "one_pass": Case(what="head", strategy="one_pass", **SHAPE),
    "two_pass": Case(what="head", strategy="two_pass", **SHAPE),
    "cached": Case(what="tokens", strategy="cached", **SHAPE),
    "per_token": Case(what="tokens", **SHAPE),
    "frozen": Case(what="frozen", **SHAPE),
    "masked": Case(what="masked", **SHAPE),
    "zero_advantage": Case(what="zero", **SHAPE),
    "clipped": Case(what="clipped", **SHAPE),
    "dpo": Case(what="head", loss="dpo", **SHAPE),
}
KEPT = 32  # tokens a row in the sampled support


@pytest.fixture(scope="module")
def data():
    return make_data(CASES["forward"])


def timed(benchmark, call, flop: float):
    """Run it, and say the TFLOP/s of its least arithmetic."""

    def whole():
        result = call()
        machine.synchronize(SHAPE["device"])
        return result

    result = benchmark(whole)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["tflops"] = flop / benchmark.stats.stats.median / 1e12
    return result


@pytest.mark.parametrize("name", CASES)
def test_head(benchmark, data, name):
    problem = make_problem(CASES[name], data)
    run = runner("fastrl", CASES[name])
    result = timed(benchmark, lambda: run(problem), CASES[name].flop)
    assert all(x.isfinite().all() for x in result.tensors().values())


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_support(benchmark, data, what):
    """Log-softmax over KEPT recorded tokens a row: 2 N K D a pass, three passes with the backward."""
    n, v = SHAPE["rows"], SHAPE["vocabulary"]
    make = torch.Generator(SHAPE["device"]).manual_seed(0)
    kept = torch.randint(v, (n, KEPT), generator=make, device=SHAPE["device"])
    kept[:, 0] = data.targets
    support = kept.flatten(), torch.arange(n + 1, device=SHAPE["device"]) * KEPT

    def call():
        hidden, weight = (x.detach().requires_grad_(what == "backward") for x in (data.hidden, data.weight))
        logprobs = fastrl.linear_logprobs(hidden, weight, data.targets, support=support).logprobs
        return torch.autograd.grad(logprobs.sum(), (hidden, weight)) if what == "backward" else (logprobs,)

    passes = 3 if what == "backward" else 1
    assert all(x.isfinite().all() for x in timed(benchmark, call, 2.0 * passes * n * KEPT * SHAPE["hidden"]))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_divergence(benchmark, data, kind):
    """A student's head against a teacher's of the same size: 2 GEMMs forward, 2 backward."""
    problem = make_problem(CASES["per_token"], data)
    teacher = data.weight.roll(1, 0)

    def call():
        hidden, weight = problem.leaves()
        value = fastrl.linear_divergence(hidden, weight, data.hidden, teacher, kind=kind)
        return torch.autograd.grad(value.mul(problem.upstream.to(value.dtype)).sum(), (hidden, weight))

    flop = 2.0 * 4 * SHAPE["rows"] * SHAPE["hidden"] * SHAPE["vocabulary"]
    assert all(x.isfinite().all() for x in timed(benchmark, call, flop))

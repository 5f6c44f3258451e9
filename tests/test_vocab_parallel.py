"""A head cut over 2 and 4 processes by its vocabulary: every number as one process that has all of it.

One spawn of processes a world size runs every check in the same order on every rank; a test then reads the verdicts.
The checks are those of the unsharded operators, with every call replaced by a sharded one whose gradients are put
together again, and asserted to be the same bits on all ranks where all ranks have them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
import traceback
from datetime import timedelta
from unittest.mock import patch

import pytest
import test_losses
import test_operators
import test_regimes
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import DIFFERENTIABLE, EVERY_STAT, Watch, assert_as_accurate, assert_same, gradients, plain_run, problem
from test_operators import GRADS, OPTIONS, check_exact
from test_regimes import check_regime

from fastrl import TokenBatch, fused_loss, linear_logprobs, losses
from fastrl.ops import custom, dispatch, shard
from fastrl.ops import fused as fused_module
from fastrl.ops.rows import State
from fastrl.ops.rows import join as true_join

WORLDS = (2, 4)
SECONDS = 240
CHECKS: dict[str, tuple] = {}  # name -> (function, arguments)
MUTANTS: dict[str, tuple] = {}  # name -> (how it is planted, the check that must notice)
CUTS = {
    "even": lambda v, r: [v // r + (i < v % r) for i in range(r)],
    "one_word_first": lambda v, r: [1, *CUTS["even"](v - 1, r - 1)],
    "one_word_last": lambda v, r: [*CUTS["even"](v - 1, r - 1), 1],
    "no_words_last": lambda v, r: [*CUTS["even"](v, r - 1), 0],
}


# -- one call over the ranks -----------------------------------------------------------------------------------------
class Cut:
    """How the calls of a check are sharded; `cut` names the sizes of the shards."""

    cut = "even"

    @classmethod
    def words(cls, v: int) -> slice:
        sizes = CUTS[cls.cut](v, dist.get_world_size())
        first = sum(sizes[: dist.get_rank()])
        return slice(first, first + sizes[dist.get_rank()])


def everyone(x) -> list:
    made = [None] * dist.get_world_size()
    dist.all_gather_object(made, x)
    return made


def same_bits(what: str, tensors: list) -> None:
    mine, *others = everyone(tensors)
    for other in others:
        for a, b in zip(mine, other, strict=True):
            same = (a is None) == (b is None) and (a is None or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)))
            assert same, f"{what} is not the same bits on every rank"


def shards(p) -> list:
    """Leaves: hidden, and this rank's words of weight and bias."""
    hidden, weight, bias = p.leaves()
    own = Cut.words(p.weight.shape[0])
    cut = [None if x is None else x.detach()[own].clone().requires_grad_() for x in (weight, bias)]
    return [hidden, *cut]


def joined(grads: list) -> list:
    """(dH, dW, db) of the whole head from every rank's."""
    same_bits("d_hidden", grads[:1])
    whole = everyone(grads[1:])
    return [grads[0], *(None if parts[0] is None else torch.cat(parts) for parts in zip(*whole, strict=True))]


def sharded_run(p, names=DIFFERENTIABLE, outputs=None, **how):
    """As test_operators.ours_run, over the ranks."""
    leaves = shards(p)
    how = {"process_group": dist.group.WORLD, **how}
    stats = linear_logprobs(*leaves[:2], p.targets, leaves[2], outputs=outputs or names, **p.options, **how)
    total = sum((getattr(stats, n) * p.upstream[n].to(getattr(stats, n).dtype)).sum() for n in names)
    grads = gradients(total, leaves)
    stats = stats.detach()
    same_bits("a statistic", [getattr(stats, n) for n in EVERY_STAT])
    return stats, joined(grads)


def sharded_fused(name, options, p, fields, upstream=1.0, aggregate=None, objective=None, **how):
    """As test_losses.fused, over the ranks."""
    leaves = shards(p)
    objective = objective or losses.get(name, **options)
    how = {"process_group": dist.group.WORLD, **how}
    out = fused_loss(objective, *leaves[:2], TokenBatch(**fields), leaves[2], aggregate=aggregate, **p.options, **how)
    grads = gradients(out.loss * upstream, leaves)
    same_bits("the loss", [out.loss.detach(), *out.metrics.values(), out.stats.logprobs])
    return out, joined(grads)


# -- checks ----------------------------------------------------------------------------------------------------------
def check(name: str, *args):
    def register(function):
        CHECKS[name] = (function, args)
        return function

    return register


def exact(options: str, cut: str, strategy: str | None, rows: float, names=DIFFERENTIABLE, **how) -> None:
    """fp64 1e-10. rows: how many rows of the largest shard's logits the workspace holds, tiles not counted."""
    Cut.cut = cut
    p = problem(**OPTIONS[options])
    widest = max(CUTS[cut](p.weight.shape[0], dist.get_world_size()))
    budget = max(1, int(rows * widest * 8 * 4 / 3))
    if strategy == "frozen":
        return frozen(p, budget)
    check_exact(p, names, strategy=strategy, workspace_bytes=budget, **how)


def frozen(p, budget: int) -> None:
    """A head without gradients: dlogprob/dhidden is made in the forward."""
    _, true = plain_run(p, torch.float64, ("logprobs",))
    for strategy in ("frozen", None, "two_pass"):
        hidden, weight, bias = shards(p)
        own = (weight.detach(), None if bias is None else bias.detach())
        how = dict(strategy=strategy, workspace_bytes=budget, process_group=dist.group.WORLD)
        logprobs = linear_logprobs(hidden, own[0], p.targets, own[1], **p.options, **how).logprobs
        (grad,) = torch.autograd.grad((logprobs * p.upstream["logprobs"]).sum(), hidden)
        same_bits("d_hidden", [grad])
        assert_same("d_hidden", grad, true[0], 1e-10)


for _options in OPTIONS:
    for _cut in CUTS:
        CHECKS[f"exact-{_options}-{_cut}"] = (exact, (_options, _cut, "two_pass", 5))
for _strategy in ("two_pass", "cached", "frozen"):
    for _rows in (0, 1, 4, 100):
        CHECKS[f"strategy-{_strategy}-{_rows}"] = (exact, ("everything", "one_word_first", _strategy, _rows))
for _name in ("logprobs", "entropy", "logsumexp"):
    CHECKS[f"alone-{_name}"] = (exact, ("bias", "even", "cached", 5, (_name,)))


@check("fewer words than a tile", 7)
@check("two words a rank", 0)
def few_words(v: int) -> None:
    Cut.cut = "even"
    check_exact(problem(v=v or 2 * dist.get_world_size(), bias=True))


@check("batch invariant")
def invariant() -> None:
    Cut.cut = "one_word_last"
    check_exact(problem(n=70, bias=True), batch_invariant=True)


@check("targets on every shard and ignored rows")
def every_target() -> None:
    Cut.cut = "one_word_first"
    p = problem(n=39, bias=True)
    p.targets = torch.arange(39) % 37
    p.targets[[3, 38]] = -100
    _, true = plain_run(p, torch.float64)
    p.hidden[3] = torch.nan
    stats, grads = sharded_run(p, outputs=EVERY_STAT, workspace_bytes=2000)
    assert not stats.logprobs[[3, 38]].any()
    for n, g, t in zip(GRADS, grads, true, strict=True):
        assert_same(n, g, t, 1e-10)


@check("every row ignored")
def nothing() -> None:
    Cut.cut = "even"
    p = problem(bias=True)
    p.targets[:] = -100
    stats, grads = sharded_run(p)
    assert not stats.logprobs.any() and not any(g.any() for g in grads)
    p.targets = torch.zeros_like(p.targets)
    _, grads = sharded_run(dataclasses.replace(p, upstream={n: u * 0 for n, u in p.upstream.items()}))
    assert not any(g.any() for g in grads)


@check("a shard of nothing but -inf", 0)
@check("the last shard of nothing but -inf", -1)
def masked_shard(which: int) -> None:
    """Its maximum is -inf; no target stands there but one, whose log-prob is -inf."""
    Cut.cut = "even"
    p = problem(v=40, bias=True)
    size = 40 // dist.get_world_size()
    first = 0 if which == 0 else 40 - size
    p.bias[first : first + size] = -math.inf
    p.targets = (first + size + torch.arange(13) % (40 - size)) % 40
    for backend, dtype in (("torch", torch.float64), (row_work(), torch.float32)):
        q = dataclasses.replace(p, hidden=p.hidden.to(dtype), weight=p.weight.to(dtype), bias=p.bias.to(dtype))
        check_exact(q, backend=backend, tolerance=1e-10 if dtype == torch.float64 else 2e-5)
    p.targets[4] = first
    stats, _ = sharded_run(p)
    assert stats.logprobs[4] == -math.inf and (stats.logprobs != -math.inf).sum() == 12


@check("no rank but the last has a finite logit")
def one_finite_shard() -> None:
    """As a grammar mask that leaves the words of one rank."""
    Cut.cut = "even"
    p = problem(v=40, bias=True)
    p.bias[: 40 - 40 // dist.get_world_size()] = -math.inf
    p.targets = 39 - torch.arange(13) % 3
    check_exact(p)


@check("ties across ranks")
def ties() -> None:
    """Equal maxima on all ranks: the lowest word is the argmax, and a flat row has entropy log V."""
    Cut.cut = "even"
    p = problem(v=40)
    p.hidden, p.weight = p.hidden.round(), p.weight[:1].round().expand(40, 16)  # equal however a GEMM sums them
    p.targets = torch.arange(13) % 3 * 10
    stats, _ = sharded_run(p, outputs=EVERY_STAT)
    assert torch.equal(stats.is_argmax, p.targets == 0)
    assert_same("entropy", stats.entropy, torch.full((13,), math.log(40), dtype=torch.float64), 1e-12)


def rule7(options: str, dtype: torch.dtype, native: bool, strategy: str) -> None:
    Cut.cut = "one_word_last"
    wide = {"n": 48, "h": 64, "v": 211}
    made = [problem(dtype=dtype, seed=seed, **{**wide, **OPTIONS[options]}) for seed in range(3)]
    how = dict(backend=row_work() if native else "torch", strategy=strategy, workspace_bytes=211 * 4 * 10)
    test_operators.check_accurate_on_average(made, **how)


def row_work() -> str:
    """The compiled row work; without a compiler there is only the one in torch."""
    assert dispatch.has_native() or not shutil.which("g++"), "csrc is not compiled: pip install -e ."
    return "native" if dispatch.has_native() else "torch"


for _dtype in (torch.float32, torch.bfloat16):
    for _native in (True, False):
        for _options, _strategy in (("everything", "cached"), ("bias", "two_pass")):
            _label = f"rule7-{_options}-{_dtype}-{'native' if _native else 'torch'}".replace("torch.", "")
            CHECKS[_label] = (rule7, (_options, _dtype, _native, _strategy))


def regime(name: str, dtype: torch.dtype) -> None:
    Cut.cut = "even"
    check_regime(name, dtype)


for _regime in ("all_negative", "offset_plus", "offset_minus", "confident_0.01", "confident_1e-06", "inf_targets"):
    for _dtype in (torch.float64, torch.float32, torch.bfloat16):
        CHECKS[f"regime-{_regime}-{_dtype}".replace("torch.", "")] = (regime, (_regime, _dtype))


@check("offset of 1e4", 1e4)
@check("offset of -1e4", -1e4)
def offset(x: float) -> None:
    Cut.cut = "one_word_first"
    test_regimes.check_offset(x)


@check("confident tokens keep their digits")
def confident() -> None:
    Cut.cut = "even"
    test_regimes.check_confident(1e-9)


def law(name: str, i: int, strategy: str, rows: int, aggregate=None) -> None:
    """The paper's loss and gradients, fp64; many rows of grpo are clipped, and leave the gradient GEMMs."""
    Cut.cut = "one_word_last"
    clean, garbage, fields, sequences = test_losses.make(1, **test_losses.HEADS["everything"])
    options, how = test_losses.CASES[name][i], dict(strategy=strategy, workspace_bytes=rows * 37 * 8)
    out, grads = sharded_fused(name, options, garbage, fields, -1.7, aggregate, **how)
    loss, true = test_losses.paper(name, options, clean, sequences, -1.7, aggregate)
    assert_same("loss", out.loss, loss, 1e-10)
    for n, g, t in zip(GRADS, grads, true, strict=True):
        assert_same(n, g, t, 1e-10)
    metrics = everyone({n: float(x) for n, x in out.metrics.items()})
    whole = fused_loss(
        losses.get(name, **options), *garbage.leaves()[:2], TokenBatch(**fields), garbage.bias, aggregate=aggregate,
        **garbage.options,
    )  # fmt: skip
    assert set(metrics[0]) == set(whole.metrics)
    for n, x in whole.metrics.items():
        assert abs(metrics[0][n] - float(x)) <= 1e-6 * max(1.0, abs(float(x))), n


for _strategy in ("one_pass", "two_pass", "cached"):
    for _name, _i in (("grpo", 0), ("ppo_clip", 1), ("dpo", 1), ("nll", 0)):
        for _rows in (1, 4, 100):
            CHECKS[f"law-{_name}-{_strategy}-{_rows}"] = (law, (_name, _i, _strategy, _rows))


@check("first update has ratio one exactly")
def ratio_one() -> None:
    Cut.cut = "even"
    clean, _, fields, _ = test_losses.make(0, torch.float32, lengths=(40, 0, 31, 1, 57, 44), bias=True)
    hidden, weight, bias = shards(clean)
    how = dict(workspace_bytes=20 * 37 * 4, process_group=dist.group.WORLD)
    with torch.no_grad():
        old = linear_logprobs(hidden, weight, clean.targets, bias, **how).logprobs
    batch = TokenBatch(clean.targets, cu_seqlens=fields["cu_seqlens"], advantages=torch.ones(6), old_logprobs=old)
    out = fused_loss(losses.get("grpo"), hidden, weight, batch, bias, **how)
    out.loss.backward()
    assert torch.equal(out.stats.logprobs, old) and float(out.metrics["ratio"]) == 1


@check("fused loss by rule 7")
def fused_rule7() -> None:
    Cut.cut = "even"
    for dtype in (torch.float32, torch.bfloat16):
        every: dict = {}
        for seed in range(4):
            shape = dict(lengths=(40, 0, 31, 1, 57, 44), **test_losses.HEADS["everything"])
            clean, garbage, fields, sequences = test_losses.make(seed, dtype, **shape)
            how = dict(workspace_bytes=20 * 37 * 8, backend=row_work())
            runs = (
                sharded_fused("grpo", {}, garbage, fields, 0.7, **how),
                test_losses.paper("grpo", {}, clean, sequences, 0.7, dtype=dtype),
                test_losses.paper("grpo", {}, clean, sequences, 0.7),
            )
            for which, (_, grads) in enumerate(runs):
                for n, x in zip(GRADS, grads, strict=True):
                    every.setdefault(n, ([], [], []))[which].append(x.flatten())
        for n, lists in every.items():
            assert_as_accurate(n, *(torch.cat(x) for x in lists), 2.0)


@check("messages are O(N)")
def messages() -> None:
    """One gather of 7 numbers a row for each chunk of the forward, one sum of dH; two questions for the sizes."""
    Cut.cut = "even"
    n, v, h, ranks = 48, 2000, 16, dist.get_world_size()
    p = problem(n=n, h=h, v=v, dtype=torch.float32, bias=True)
    hidden, weight, bias = shards(p)
    batch = TokenBatch(p.targets, advantages=p.upstream["logprobs"].float())
    budget = 5 * math.ceil(v / ranks) * 4
    calls = (
        lambda: linear_logprobs(hidden, weight, p.targets, bias, **how).logprobs.sum().backward(),
        lambda: fused_loss(losses.get("reinforce"), hidden, weight, batch, bias, **how).loss.backward(),
    )
    how = dict(workspace_bytes=budget, process_group=dist.group.WORLD)
    for call, questions in zip(calls, (2, 1), strict=True):
        with counted() as (gathered, summed):
            call()
        sizes, states = gathered[0:1] + gathered[len(gathered) - questions + 1 :], [x for x in gathered if x > ranks]
        assert set(sizes) == {ranks} and len(gathered) == len(states) + questions
        assert sum(states) == 7 * n * ranks and len(states) > 3
        assert summed == [n * h]


@contextlib.contextmanager
def counted():
    """Element counts of what the collectives bring: ([gathered], [summed])."""
    gathered, summed = [], []
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(made, x, **rest):
        gathered.append(len(made) * x.numel())
        return gather(made, x, **rest)

    def all_reduce(x, **rest):
        summed.append(x.numel())
        return reduce(x, **rest)

    with patch.multiple(dist, all_gather=all_gather, all_reduce=all_reduce):
        yield gathered, summed


@check("hidden without gradients")
def frozen_hidden() -> None:
    """Nothing to sum: dW and db of this rank's words, and 1 GEMM less on each rank."""
    Cut.cut = "one_word_last"
    p = problem(n=48, bias=True)
    _, true = plain_run(p, torch.float64, ("logprobs",))
    own = Cut.words(37)
    batch = TokenBatch(p.targets, advantages=-p.upstream["logprobs"])
    how = dict(process_group=dist.group.WORLD)
    for strategy in ("two_pass", "one_pass"):
        _, weight, bias = shards(p)
        with Watch() as watch, counted() as (_, summed):
            if strategy == "two_pass":
                logprobs = linear_logprobs(p.hidden, weight, p.targets, bias, strategy=strategy, **how).logprobs
                (logprobs * p.upstream["logprobs"]).sum().backward()
            else:
                objective, ones = losses.get("reinforce"), lambda b: torch.ones(48)
                out = fused_loss(objective, p.hidden, weight, batch, bias, aggregate=ones, **how)
                out.loss.backward()
        everyone(None)
        assert not summed and watch.macs == (3 if strategy == "two_pass" else 2) * 48 * 16 * weight.shape[0]
        for n, x, t in (("d_weight", weight, true[1]), ("d_bias", bias, true[2])):
            assert_same(n, x.grad, t[own], 1e-10)


@check("bad input")
def bad_input() -> None:
    Cut.cut = "even"
    p = problem(v=40)
    hidden, weight, _ = shards(p)
    group = {"process_group": dist.group.WORLD}
    p.targets[5] = 40
    for call in (
        lambda: linear_logprobs(hidden, weight, p.targets, **group),
        lambda: fused_loss(losses.get("nll"), hidden, weight, TokenBatch(p.targets), **group),
    ):
        with pytest.raises(ValueError, match=r"outside \[0, V=40\): the first is 40 at row 5"):
            call()
    p.targets[5] = 39
    for backend in ("triton", "reference"):
        for strategy in (None, "two_pass"):
            with pytest.raises(ValueError, match=f"backend='{backend}' does not take a process_group"):
                linear_logprobs(hidden, weight, p.targets, backend=backend, strategy=strategy, **group)
            with pytest.raises(ValueError, match=f"backend='{backend}' does not take a process_group"):
                batch = TokenBatch(p.targets)
                fused_loss(losses.get("nll"), hidden, weight, batch, backend=backend, strategy=strategy, **group)


# -- mistakes --------------------------------------------------------------------------------------------------------
def mutant(name: str):
    """Registers a context manager that plants one mistake, with the check that must fail."""

    def register(plant):
        MUTANTS[plant.__name__] = (plant, name)
        return plant

    return register


@mutant("exact-bias-even")
def offset_forgotten():
    stack = contextlib.ExitStack()
    for module in (custom, fused_module):
        wrong = lambda *args, f=module.shard_of: (s := f(*args)) and dataclasses.replace(s, offset=0)  # noqa: E731
        stack.enter_context(patch.object(module, "shard_of", wrong))
    return stack


@mutant("exact-bias-even")
def target_logit_summed_over_ranks():
    def wrong(a: State, b: State) -> State:
        zero = [x.at_target.masked_fill(x.at_target == -math.inf, 0.0) for x in (a, b)]
        return dataclasses.replace(true_join(a, b), at_target=zero[0] + zero[1] + a.at_target.clamp(max=0.0) * 0.0)

    return patch.object(shard, "join", wrong)


@mutant("regime-all_negative-float64")
def target_logit_starts_at_zero():
    def wrong(a: State, b: State) -> State:
        made = true_join(a, b)
        return dataclasses.replace(made, at_target=torch.maximum(made.at_target, torch.zeros_like(made.top)))

    return patch.object(shard, "join", wrong)


@mutant("exact-bias-even")
def hidden_gradient_not_summed():
    return patch.object(shard.Shard, "sum", lambda self, x: x)


@mutant("law-grpo-one_pass-4")
def hidden_gradient_of_one_pass_not_summed():
    return patch.object(shard.Shard, "sum", lambda self, x: x)


@mutant("exact-bias-even")
def parts_joined_without_rescaling():
    def wrong(a: State, b: State) -> State:
        sums = {n: getattr(a, n) + getattr(b, n) for n in ("count", "rest", "weighted", "squares")}
        return dataclasses.replace(true_join(a, b), **sums)

    return patch.object(shard, "join", wrong)


@mutant("a shard of nothing but -inf")
def masked_shard_poisons_the_row():
    """0 * inf: the gap to a maximum of -inf taken as it stands."""

    def wrong(a: State, b: State) -> State:
        made = true_join(a, b)
        gap = torch.where(a.top == made.top, b.top, a.top) - made.top
        return dataclasses.replace(made, weighted=made.weighted + 0.0 * gap)

    return patch.object(shard, "join", wrong)


@mutant("ties across ranks")
def last_of_equal_words():
    def wrong(a: State, b: State) -> State:
        return dataclasses.replace(true_join(a, b), first=torch.where(b.top >= a.top, b.first, a.first))

    return patch.object(shard, "join", wrong)


@mutant("rule7-bias-float32-torch")
def each_rank_joins_from_its_own_place():
    """Right numbers, but other roundings on every rank: coefficients then differ, and the ranks drift apart. Two ranks
    cannot be told apart by it: a + b = b + a."""
    gather = shard._gather

    def wrong(x, group):
        made = gather(x, group)
        return made.roll(-dist.get_rank(), 0) if made.dim() == 3 else made

    return patch.object(shard, "_gather", wrong)


@mutant("messages are O(N)")
def sizes_asked_for_every_chunk():
    def wrong(self, state, f=shard.Shard.join):
        shard.shard_of(self.group, torch.zeros(1))
        return f(self, state)

    return patch.object(shard.Shard, "join", wrong)


# -- the processes ---------------------------------------------------------------------------------------------------
def worker(rank: int, world: int, folder: str) -> None:
    """Every check, then every mutant; verdicts to rank<i>.json, rewritten as they come."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=world)
    for module in (test_operators, test_regimes):
        module.ours_run = sharded_run
    test_losses.fused = sharded_fused
    verdicts = {name: verdict(*CHECKS[name]) for name in CHECKS}
    for name, (plant, noticed) in MUTANTS.items():
        with plant():
            verdicts[name] = verdict(*CHECKS[noticed])
    with open(os.path.join(folder, f"rank{rank}.json"), "w") as file:
        json.dump(verdicts, file)
    dist.barrier()
    dist.destroy_process_group()


def verdict(function, args: tuple) -> str:
    """"" or what went wrong. A check fails on every rank or hangs the ones that wait, until the time limit."""
    problem = ""
    try:
        function(*args)
    except Exception:
        problem = traceback.format_exc()
    return "".join(everyone(problem))


@pytest.fixture(scope="module", params=WORLDS, ids=lambda w: f"{w}_processes")
def verdicts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(worker, (request.param, str(folder)), request.param, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"the ranks wait for one another after {SECONDS} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return {"ranks": request.param, **json.loads((folder / "rank0.json").read_text())}


@pytest.mark.parametrize("name", CHECKS)
def test_as_one_process(name, verdicts):
    assert not verdicts[name], verdicts[name]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name, verdicts):
    commutes = verdicts["ranks"] == 2 and name == "each_rank_joins_from_its_own_place"
    assert ("AssertionError" in verdicts[name]) != commutes

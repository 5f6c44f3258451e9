"""How the same sequences are cut into micro-batches, ordered, padded and chunked changes neither loss nor gradient."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from oracle import assert_same
from test_losses import CASES, own_group, own_pair, own_sequence, own_token

from fastrl import TokenBatch, fused_loss, losses

H, V = 12, 41
LENGTHS = (5, 2, 0, 7, 1, 3, 9, 4, 6, 1, 3, 8)  # twelve sequences: six pairs, four groups
GROUPS = (0, 0, 0, 4, 4, 4, 2, 2, 2, 9, 9, 9)
COLUMNS = ("advantages", "old_logprobs", "ref_logprobs")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass
class Step:
    """One optimizer step: every row of every sequence, and one row of garbage (the last) to pad with."""

    hidden: torch.Tensor  # [T+1, H]
    weight: torch.Tensor
    bias: torch.Tensor
    targets: torch.Tensor  # [T+1]
    mask: torch.Tensor
    columns: dict
    rewards: torch.Tensor  # [S]
    starts: list[int]

    def rows(self, i: int) -> list[int]:
        return list(range(self.starts[i], self.starts[i] + LENGTHS[i]))

    def trained(self, i: int) -> int:
        return int(self.mask[self.rows(i)].sum())


def make_step(dtype, seed=0) -> Step:
    g = torch.Generator().manual_seed(seed)
    t = sum(LENGTHS)
    hidden = torch.randn(t + 1, H, generator=g, dtype=torch.float64).to(dtype)
    weight = (0.5 * torch.randn(V, H, generator=g, dtype=torch.float64)).to(dtype)
    bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V, (t + 1,), generator=g)
    mask = torch.rand(t + 1, generator=g) < 0.8
    logp = (hidden @ weight.t() + bias).double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    noise = lambda s: s * torch.randn(t + 1, generator=g, dtype=torch.float64)  # noqa: E731
    columns = {"advantages": 0.3 + noise(1.0), "old_logprobs": logp + noise(0.3), "ref_logprobs": logp + noise(0.3)}
    hidden[~mask] = torch.nan
    for x in columns.values():
        x[~mask] = torch.inf
    hidden[t], mask[t] = torch.nan, False
    rewards = torch.randn(len(LENGTHS), generator=g, dtype=torch.float64).to(dtype)
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return Step(hidden, weight, bias, targets, mask, {k: x.to(dtype) for k, x in columns.items()}, rewards, starts)


def micro_batch(step: Step, sequences: list[int], padding: random.Random | None, counts: bool):
    """(row indices, TokenBatch) of some of the sequences, with rows of garbage strewn in where padding is given."""
    rows, cu = [], [0]
    for i in sequences:
        own = step.rows(i)
        for _ in range(padding.randint(0, 3) if padding else 0):
            own.insert(padding.randint(0, len(own)), len(step.hidden) - 1)
        rows += own
        cu.append(len(rows))
    total = {"num_tokens": int(step.mask.sum()), "num_sequences": len(LENGTHS), "num_groups": len(set(GROUPS))}
    per_group = {g: sum(step.trained(i) for i in range(len(LENGTHS)) if GROUPS[i] == g) for g in GROUPS}
    batch = TokenBatch(
        targets=step.targets[rows],
        mask=step.mask[rows],
        cu_seqlens=torch.tensor(cu),
        group_ids=torch.tensor([GROUPS[i] for i in sequences]),
        rewards=step.rewards[sequences],
        margins=step.rewards[sequences][0::2] if len(sequences) % 2 == 0 else None,
        group_tokens=torch.tensor([per_group[GROUPS[i]] for i in sequences]) if counts else None,
        **{k: x[rows] for k, x in step.columns.items()},
        **(total if counts else {}),
    )
    return rows, batch


def run(objective, step: Step, cut: list[list[int]], aggregate=None, padding=None, counts=True, **how):
    """(loss, gradients of hidden, weight, bias, metrics) summed over the micro-batches of a cut."""
    leaves = [x.detach().clone().requires_grad_() for x in (step.hidden, step.weight, step.bias)]
    total, metrics = 0, {}
    for sequences in cut:
        rows, batch = micro_batch(step, sequences, padding, counts)
        out = fused_loss(objective, leaves[0][rows], leaves[1], batch, leaves[2], aggregate=aggregate, **how)
        out.loss.backward()
        total = total + out.loss.detach()
        for name, x in out.metrics.items():
            metrics[name] = metrics.get(name, 0) + x
    return total, [x.grad for x in leaves], metrics


def random_cut(rng: random.Random, unit: int) -> list[list[int]]:
    """The sequences in random order, `unit` neighbours kept together, cut at random places."""
    units = [list(range(a, a + unit)) for a in range(0, len(LENGTHS), unit)]
    rng.shuffle(units)
    cut = [[]]
    for u in units:
        if cut[-1] and rng.random() < 0.5:
            cut.append([])
        cut[-1] += u
    return cut


OWN = {"token": own_token, "sequence": own_sequence, "pair": own_pair, "group": own_group}
EXTRAS = {"kl_coef": 0.2, "entropy_coef": 0.1}
OBJECTIVES = {
    "nll": losses.get("nll"),
    "reinforce": losses.get("reinforce", **EXTRAS),
    "ppo_clip": losses.get("ppo_clip", dual_clip=2.0, **EXTRAS),
    "grpo": losses.get("grpo", kl_coef=0.1),
    "dapo": losses.get("dapo", entropy_coef=0.1),
    "dr_grpo": losses.get("dr_grpo", max_length=16),
    "dpo": losses.get("dpo", beta=0.5, label_smoothing=0.1),
    **{f"own_{scope}": f for scope, f in OWN.items()},
}
UNIT = {"pair": 2, "group": 3}
AGGREGATES = (None, "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "prompt_mean", "constant")
CELLS = [(n, a) for n, a in itertools.product(OBJECTIVES, AGGREGATES) if a != "constant" or n == "dr_grpo"]


def check_invariance(name: str, aggregate: str | None, dtype=torch.float64, trials: int = 5) -> None:
    """Loss, gradients and metrics of random cuts, orders, paddings and workspaces equal those of one whole batch."""
    step, objective, rng = make_step(dtype), OBJECTIVES[name], random.Random(name)
    unit = UNIT.get(objective.scope, 1)
    loss, grads, metrics = run(objective, step, [list(range(len(LENGTHS)))], aggregate)
    assert loss.isfinite() and grads[1].any()
    for trial in range(trials):
        cut = [[i] for i in range(len(LENGTHS))] if trial == 0 and unit == 1 else random_cut(rng, unit)
        padding = rng if trial % 2 else None
        workspace = rng.choice([1, 3, 7, 1000]) * V * dtype.itemsize
        other, other_grads, other_metrics = run(objective, step, cut, aggregate, padding, workspace_bytes=workspace)
        assert_same("loss", other, loss, TOLERANCE[dtype])
        for n, g, t in zip(("d_hidden", "d_weight", "d_bias"), other_grads, grads, strict=True):
            assert_same(n, g[: len(step.hidden) - 1], t[: len(step.hidden) - 1], TOLERANCE[dtype])
        for n, x in metrics.items():
            assert_same(n, other_metrics[n], x, 1e-5)  # reported in float32


def test_every_loss_is_covered():
    """The first ones; the others' cuts are checked by tests/harness.py, family by family."""
    assert set(CASES) <= set(OBJECTIVES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name,aggregate", CELLS)
def test_cut_order_padding_and_workspace(name, aggregate, dtype):
    check_invariance(name, aggregate, dtype)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_negative_control_own_counts_do_depend_on_the_cut(name):
    """Without the step's counts every micro-batch divides by its own: the mean of means, which is another loss."""
    step, objective = make_step(torch.float64), OBJECTIVES[name]
    cut = (
        [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9, 10, 11]]
        if objective.scope == "group"
        else [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]
    )
    whole, grads, _ = run(objective, step, [list(range(12))], counts=False)
    for part in (1, len(cut)):
        loss, other, _ = run(objective, step, cut, counts=False)
        gap = (other[1] / part - grads[1]).norm() / grads[1].norm()
        assert gap > 1e-2, f"{name}: cutting without global counts went unnoticed ({gap:.1e})"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_global_counts_of_one_batch_are_its_own(name):
    """The defaults of TokenBatch are what a caller with a single micro-batch would have counted."""
    step, everything = make_step(torch.float64), [list(range(len(LENGTHS)))]
    for aggregate in ("token_mean", "sequence_mean_token_mean", "prompt_mean"):
        a, da, _ = run(OBJECTIVES[name], step, everything, aggregate, counts=False)
        b, db, _ = run(OBJECTIVES[name], step, everything, aggregate)
        assert torch.equal(a, b) and torch.equal(da[1], db[1])


@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_counts_may_be_tensors(name):
    """As they come out of an all-reduce."""
    step = make_step(torch.float64)
    rows, batch = micro_batch(step, [0, 1, 2, 3], None, True)
    a = fused_loss(OBJECTIVES[name], step.hidden[rows], step.weight, batch)
    for field in ("num_tokens", "num_sequences", "num_groups"):
        setattr(batch, field, torch.tensor(float(getattr(batch, field)), dtype=torch.float64))
    for aggregate in (None, "token_mean", "prompt_mean", "sequence_mean_token_sum"):
        b = fused_loss(OBJECTIVES[name], step.hidden[rows], step.weight, batch, aggregate=aggregate)
        assert b.loss.isfinite() and (aggregate is not None or torch.allclose(a.loss, b.loss, rtol=1e-14))

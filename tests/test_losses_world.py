"""Every loss on two processes, each with its own uneven share of the sequences: the same loss and gradients as on one.

One spawn runs every loss in the same order on both ranks; a test then reads the verdicts. The ranks hold different
numbers of sequences and cut them into different numbers of micro-batches; pairs and groups stay whole.
"""

from __future__ import annotations

import json
import re
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import H, V, batch_of, ours, world
from oracle import assert_same, gradients, plain_statistics
from torch import Tensor

from fastrl import Teacher, TokenStats, fused_loss, losses
from fastrl.objective import prepared
from fastrl.tokens import compact

RANKS = 2
CUTS = {
    "token": {0: [[0, 1, 2, 3, 4], [5, 6]], 1: [[7], [8, 9, 10, 11]]},
    "pair": {0: [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]], 1: [[10, 11]]},
    "group": {0: [[0, 1, 2, 3, 4, 5, 6, 7, 8]], 1: [[9, 10, 11]]},  # of three
    "batch": {0: [[0, 1, 2, 3, 4, 5]], 1: [[6, 7, 8, 9, 10, 11]]},  # pairs and groups alike
}
CUTS["sequence"] = CUTS["token"]
WHOLE = {"sft": "pair", "a2po": "group"}  # a wider unit than the scope lies on one rank whole
OPTIONS = {"dr_grpo": {"max_length": 11}}
COLUMN = re.compile(r"batch\.(per_token|per_sequence)\['(\w+)'\]")


def names() -> list[str]:
    """Losses of log-probs; those of scores and values have no statistics of the step to share."""
    return [n for n in losses.names() if getattr(losses.law(n), "reads", "logprobs") == "logprobs"]


def column(name: str, size: int, g: torch.Generator) -> Tensor:
    """What a column of this name may hold."""
    if "topk" in name:
        ids = torch.stack([torch.randperm(V, generator=g)[:5] for _ in range(size)])
        return (torch.rand(size, 5, generator=g, dtype=torch.float64) / 5).log() if "logprobs" in name else ids
    if name.endswith("logprobs"):
        return -torch.rand(size, generator=g, dtype=torch.float64) * 4
    if name.endswith(("ids", "id", "turn", "turns", "step", "steps")):
        return torch.arange(size) * 4 // size
    return torch.rand(size, generator=g, dtype=torch.float64)


def complete(name: str):
    """A world with every column that the loss asks for."""
    w, g = world(3, every_row=True), torch.Generator().manual_seed(5)
    teacher = torch.randn(len(w.targets), H, generator=g, dtype=torch.float64)
    while True:
        try:
            alone(name, w, teacher)
            return w, teacher
        except ValueError as error:
            found = COLUMN.search(str(error))
            if found is None:
                raise
            where, missing = found.groups()
            size = len(w.targets) if where == "per_token" else len(w.lengths)
            getattr(w, where)[missing] = column(missing, size, g)


def taught(objective, teacher: Tensor, rows: Tensor, w) -> dict:
    """The keyword for losses that learn from another head."""
    if "divergence" not in getattr(objective, "outputs", ()):
        return {}
    return {"teacher": Teacher(teacher[rows], w.weight.flip(0))}


def alone(name: str, w, teacher: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) of the whole step on one process."""
    objective = losses.get(name, **OPTIONS.get(name, {}))
    rows = torch.arange(len(w.targets))
    loss, grads, _ = ours(objective, {}, w, **taught(objective, teacher, rows, w))
    return loss, grads


def gather(x: Tensor) -> Tensor:
    """[n] of this rank -> [n'] of all."""
    made = [None] * dist.get_world_size()
    dist.all_gather_object(made, x)
    return torch.cat(made)


def shared(name: str, w, teacher: Tensor, cut: dict[int, list[list[int]]]) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) summed over the ranks."""
    objective = losses.get(name, **OPTIONS.get(name, {}))
    leaves = w.leaves()
    parts = [batch_of(w, order) for order in cut[dist.get_rank()]]
    batches = [compact(batch, -100)[0] for _, batch in parts]
    stats = None
    if getattr(objective, "needs_scores", False):
        with torch.no_grad():
            of = lambda r, b: plain_statistics([leaves[0][r], leaves[1], None], b.targets)  # noqa: E731
            stats = [TokenStats(**of(r, b)) for (r, _), b in zip(parts, batches, strict=True)]
    total = leaves[0].sum() * 0
    for (rows, _), batch in zip(parts, prepared(objective, batches, stats, gather), strict=True):
        more = taught(objective, teacher, rows, w)
        total = total + fused_loss(objective, leaves[0][rows], leaves[1], batch, **more).loss
    grads = gradients(total + leaves[1].sum() * 0, leaves)
    made = [total.detach(), *grads]
    for x in made:
        dist.all_reduce(x)
    return made[0], made[1:]


def verdict(name: str) -> str:
    """Empty, or what is wrong."""
    w, teacher = complete(name)
    loss, grads = alone(name, w, teacher)
    scope = WHOLE.get(name) or losses.get(name, **OPTIONS.get(name, {})).scope
    other, theirs = shared(name, w, teacher, CUTS[scope])
    assert loss.isfinite() and any(g.any() for g in grads), "the case shows nothing"
    assert_same("loss", other, loss, 1e-9)
    for n, g, t in zip(("d_hidden", "d_weight"), theirs, grads, strict=True):
        assert_same(n, g, t, 1e-9)
    return ""


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    found = {}
    for name in names():
        try:
            found[name] = verdict(name)
        except Exception:
            found[name] = traceback.format_exc(limit=4)
            if "gloo" in found[name].lower() or "distributed" in found[name].lower():
                break  # the ranks are out of step: nothing after this means anything
    if rank == 0:
        with open(f"{folder}/verdicts.json", "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("world")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return json.loads((folder / "verdicts.json").read_text())


@pytest.mark.parametrize("name", names())
def test_two_processes_are_one(name, verdicts):
    assert verdicts.get(name, "not reached") == "", verdicts.get(name)


def test_the_cases_tell_ranks_apart():
    """A share of the sequences alone does not have the step's loss: what is asked above is no tautology."""
    w = world(3, every_row=True)
    whole = ours("grpo", {}, w)[0]
    part = ours("grpo", {}, w, cut=CUTS["token"][0])[0]
    assert abs(float(whole - part)) > 1e-3 * abs(float(whole))

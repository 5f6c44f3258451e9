"""One step of sequences that any loss can be asked about, and what every loss must hold on it.

A loss is held against its paper: a function `law(seqs, o) -> scalar` written from the formula alone, in float64, over
materialised log-probs, one sequence after the other (`Seq`), o = the options as given to losses.get. Nothing here calls
an objective or an aggregation of fastrl on the paper's side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from oracle import assert_as_accurate, assert_same, gradients, plain_statistics
from torch import Tensor

from fastrl import TokenBatch, TokenStats, fused_loss, losses
from fastrl.objective import prepared, scope_of
from fastrl.tokens import compact

H, V = 12, 41
LENGTHS = (5, 2, 8, 7, 1, 3, 9, 4, 6, 1, 3, 8)  # six pairs, four groups of three
GROUPS = (0, 0, 0, 4, 4, 4, 2, 2, 2, 9, 9, 9)
TOKEN_COLUMNS = ("old", "ref", "rollout")  # log-probs of other policies
Law = Callable[["list[Seq]", dict], Tensor]


@dataclass
class Seq:
    """A sequence's trained tokens, float64 [n] each (logp and entropy carry the graph), and its own numbers."""

    logp: Tensor
    entropy: Tensor
    log_sum_sq: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    advantages: Tensor
    label: bool
    group: int
    reward: float
    margin: float  # of its pair
    token: dict[str, Tensor] = field(default_factory=dict)  # per_token columns
    number: dict[str, Tensor] = field(default_factory=dict)  # per_sequence columns, 0-dim

    @property
    def n(self) -> int:
        return len(self.logp)


@dataclass
class World:
    """Every row of every sequence, clean; rows outside `mask` are filled with garbage when a batch is made."""

    hidden: Tensor  # [T, H]
    weight: Tensor
    targets: Tensor
    mask: Tensor
    columns: dict[str, Tensor]  # old, ref, rollout, advantages: [T] float64
    rewards: Tensor  # [S]
    margins: Tensor  # [P]
    labels: Tensor  # [S]
    per_token: dict[str, Tensor]
    per_sequence: dict[str, Tensor]
    lengths: tuple[int, ...] = LENGTHS
    groups: tuple[int, ...] = GROUPS

    @property
    def starts(self) -> list[int]:
        return [sum(self.lengths[:i]) for i in range(len(self.lengths))]

    def rows(self, i: int) -> Tensor:
        return torch.arange(self.starts[i], self.starts[i] + self.lengths[i])

    def trained(self, i: int) -> Tensor:
        rows = self.rows(i)
        return rows[self.mask[rows]]

    def leaves(self, dtype=None) -> list[Tensor]:
        return [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in (self.hidden, self.weight)]


def world(
    seed: int = 0,
    dtype=torch.float64,
    *,
    per_token: tuple[str, ...] = (),
    per_sequence: tuple[str, ...] = (),
    per_sequence_advantages: bool = False,
    lengths: tuple[int, ...] = LENGTHS,
    every_row: bool = False,
    make: Callable[[World, torch.Generator], None] | None = None,
) -> World:
    """A random step. per_token, per_sequence: further columns, standard normal; `make` may change any of it.

    Log-ratios to old, ref and rollout are drawn continuously, so that none sits on a border of a clip.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    t, s = sum(lengths), len(lengths)
    hidden, weight = randn(t, H).to(dtype), (randn(V, H) / 3).to(dtype)
    targets = torch.randint(0, V, (t,), generator=g)
    mask = torch.rand(t, generator=g) < 0.8
    mask[[sum(lengths[:i]) for i in range(s) if lengths[i]]] = True  # nobody is wholly masked, but by `make`
    mask |= every_row
    logp = plain_statistics([hidden.double(), weight.double(), None], targets)["logprobs"]
    columns = {name: logp + 0.3 * randn(t) for name in TOKEN_COLUMNS}
    advantages = randn(s) if per_sequence_advantages else randn(t)
    if per_sequence_advantages:
        advantages = advantages.repeat_interleave(torch.tensor(lengths))
    columns["advantages"] = advantages
    groups = GROUPS[:s] if s <= len(GROUPS) else tuple(i // 3 for i in range(s))
    made = World(
        hidden, weight, targets, mask, columns, randn(s), randn(s // 2), torch.rand(s, generator=g) < 0.5,
        {n: randn(t) for n in per_token}, {n: randn(s) for n in per_sequence}, lengths, groups,
    )  # fmt: skip
    if make is not None:
        make(made, g)
    return made


# -- the paper's side --------------------------------------------------------------------------------------------------
def seqs_of(w: World, leaves: list[Tensor]) -> list[Seq]:
    stats = plain_statistics([*leaves, None], w.targets)
    made = []
    for i in range(len(w.lengths)):
        r = w.trained(i)
        own = {n: w.columns[n][r] for n in (*TOKEN_COLUMNS, "advantages")}
        made.append(
            Seq(
                stats["logprobs"][r], stats["entropy"][r], stats["log_sum_sq_probs"][r], **own,
                label=bool(w.labels[i]), group=w.groups[i], reward=float(w.rewards[i]),
                margin=float(w.margins[i // 2]) if i // 2 < len(w.margins) else 0.0,
                token={n: x[r] for n, x in w.per_token.items()},
                number={n: x[i] for n, x in w.per_sequence.items()},
            )  # fmt: skip
        )
    return made


def paper(law: Law, options: dict, w: World, dtype=torch.float64, upstream=1.0) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients of hidden and weight) of the paper's formula over materialised logits."""
    leaves = w.leaves(dtype)
    loss = law(seqs_of(w, leaves), options)
    return loss.detach(), gradients(loss * upstream, leaves)


# -- ours --------------------------------------------------------------------------------------------------------------
GARBAGE = (math.nan, math.inf, -math.inf)


def garbage(x: Tensor, kept: Tensor) -> Tensor:
    """x with NaN and infinities wherever `kept` is False."""
    if not x.is_floating_point():
        return x
    junk = torch.tensor(GARBAGE, dtype=x.dtype).repeat(x.numel())[: x.numel()].view(x.shape)
    return torch.where(kept.view(-1, *[1] * (x.dim() - 1)), x, junk)


def rows_of(w: World, order: list[int], padding: random.Random | None = None) -> tuple[Tensor, Tensor]:
    """([R] rows of the sequences in this order, -1 for rows of padding strewn in, boundaries [S+1])."""
    rows, ends = [], [0]
    for i in order:
        own = w.rows(i).tolist()
        for _ in range(padding.randint(0, 3) if padding else 0):
            own.insert(padding.randint(0, len(own)), -1)
        rows += own
        ends.append(len(rows))
    return torch.tensor(rows, dtype=torch.long), torch.tensor(ends, dtype=torch.int32)


def batch_of(w: World, order: list[int] | None = None, padding: random.Random | None = None, **fields):
    """(row indices [R], TokenBatch) of these sequences; the counts are the whole world's."""
    order = list(range(len(w.lengths))) if order is None else order
    rows, cu = rows_of(w, order, padding)
    kept = w.mask[rows] & (rows >= 0)
    take = lambda x: garbage(x[rows], kept)  # noqa: E731
    dtype = w.hidden.dtype if w.hidden.dtype == torch.float64 else torch.float32
    own = {"old_logprobs": "old", "ref_logprobs": "ref", "rollout_logprobs": "rollout", "advantages": "advantages"}
    sizes = {g: sum(len(w.trained(i)) for i in range(len(w.lengths)) if w.groups[i] == g) for g in set(w.groups)}
    made = dict(
        targets=w.targets[rows],
        mask=kept,
        cu_seqlens=cu,
        labels=w.labels[order],
        group_ids=torch.tensor([w.groups[i] for i in order]),
        group_tokens=torch.tensor([sizes[w.groups[i]] for i in order]),
        rewards=w.rewards[order].to(dtype),
        margins=w.margins[[i // 2 for i in order[0::2]]].to(dtype) if len(order) % 2 == 0 else None,
        num_tokens=int(w.mask.sum()),
        num_sequences=len(w.lengths),
        num_groups=len(set(w.groups)),
        per_token={n: take(x.to(dtype)) if x.is_floating_point() else x[rows] for n, x in w.per_token.items()},
        per_sequence={n: x[order].to(dtype) if x.is_floating_point() else x[order] for n, x in w.per_sequence.items()},
        **{field: take(w.columns[name].to(dtype)) for field, name in own.items()},
    )
    return rows, TokenBatch(**{**made, **fields})


def objective_of(name_or_objective, options: dict):
    return losses.get(name_or_objective, **options) if isinstance(name_or_objective, str) else name_or_objective


def ours(name, options: dict, w: World, upstream=1.0, cut: list[list[int]] | None = None, padding=None, **how):
    """(loss, gradients, metrics): one fused_loss call for each part of the cut, prepared as one step, added up."""
    objective, leaves = objective_of(name, options), w.leaves()
    parts = [batch_of(w, order, padding) for order in (cut or [list(range(len(w.lengths)))])]
    if cut is not None:
        parts = as_one_step(objective, parts, leaves)
    total, metrics = 0.0, {}
    for rows, batch in parts:
        kept = rows >= 0
        hidden = torch.full((len(rows), H), math.nan, dtype=w.hidden.dtype)
        hidden = hidden.index_copy(0, kept.nonzero().squeeze(1), leaves[0][rows[kept]])
        if batch.mask is not None:
            hidden = torch.where(batch.mask[:, None], hidden, torch.nan)
        out = fused_loss(objective, hidden, leaves[1], batch, **how)
        total = total + out.loss
        for n, x in out.metrics.items():
            metrics[n] = metrics.get(n, 0.0) + x
    return total.detach(), gradients(total * upstream, leaves), metrics


def as_one_step(objective, parts, leaves):
    """What a trainer does: drop untrained rows, score where the objective asks for it, prepare all micro-batches."""
    compacted = []
    for rows, batch in parts:
        own, kept = compact(batch, -100)
        compacted.append((rows if kept is None else rows[kept], own))
    stats = None
    if getattr(objective, "needs_scores", False):
        with torch.no_grad():
            stats = [
                TokenStats(**plain_statistics([leaves[0][r], leaves[1], None], b.targets)) for r, b in compacted
            ]
    made = prepared(objective, [b for _, b in compacted], stats)
    return [(rows, batch) for (rows, _), batch in zip(compacted, made, strict=True)]


# -- what every loss must hold ---------------------------------------------------------------------------------------
def check_paper(name, options: dict, law: Law, w: World, tolerance=1e-9, **how) -> None:
    """Loss and gradients equal the paper's formula in float64, under an upstream scalar and with garbage about."""
    loss, grads, _ = ours(name, options, w, -1.7, **how)
    true_loss, true_grads = paper(law, options, w, upstream=-1.7)
    assert loss.shape == () and loss.dtype == torch.float64
    assert any(g.any() for g in true_grads), "the case has no gradient: it would pass with none"
    assert_same("loss", loss, true_loss, tolerance)
    for n, g, t in zip(("d_hidden", "d_weight"), grads, true_grads, strict=True):
        assert_same(n, g, t, tolerance)


def check_chunks(name, options: dict, law: Law, w: World, backend=None) -> None:
    """The same with a workspace of a few rows, and by every strategy."""
    for strategy in ("one_pass", "two_pass", "cached"):
        check_paper(name, options, law, w, strategy=strategy, workspace_bytes=6 * V * 8, backend=backend)
    check_paper(name, options, law, w, backend="reference")


def check_step(name, options: dict, w: World, tolerance=1e-9) -> None:
    """Micro-batch cuts, the order of sequences and padding change neither loss nor gradients nor metrics.

    Pairs stay together where the scope asks for it, groups where it is group; a step prepared as a whole may be cut
    anywhere even by an objective of scope batch.
    """
    want, grads, metrics = ours(name, options, w)
    rng, objective = random.Random(0), objective_of(name, options)
    unit = {"pair": 2, "group": 3}.get(scope_of(objective), 2)
    units = [list(range(i, min(i + unit, len(w.lengths)))) for i in range(0, len(w.lengths), unit)]
    rng.shuffle(units)
    for size, padding in ((1, None), (2, rng), (len(units), rng)):
        cut = [[i for u in units[a : a + size] for i in u] for a in range(0, len(units), size)]
        loss, other, seen = ours(name, options, w, cut=cut, padding=padding)
        assert_same("loss", loss, want, tolerance)
        for n, g, t in zip(("d_hidden", "d_weight"), other, grads, strict=True):
            assert_same(n, g, t, tolerance)
        assert set(seen) == set(metrics)
        for n in metrics:
            assert_same(n, torch.as_tensor(seen[n]), torch.as_tensor(metrics[n]), 1e-5)


def check_far(name, options: dict, make: Callable[[], World], far=(200.0, -200.0, 60.0, 1e4, -1e4)) -> None:
    """Policies far apart (per token): everything stays finite in float32."""
    for gap in far:
        w = make()
        logp = plain_statistics([w.hidden.double(), w.weight.double(), None], w.targets)["logprobs"]
        w.columns.update({n: logp - gap for n in TOKEN_COLUMNS})
        w.hidden, w.weight = w.hidden.float(), w.weight.float()
        loss, grads, metrics = ours(name, options, w)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads), f"not finite at log-ratio {gap}"
        assert all(torch.as_tensor(m).isfinite() for m in metrics.values())


def check_accuracy(name, options: dict, law: Law, make: Callable[[int, torch.dtype], World], dtype) -> None:
    """Rule 7 over six draws together: our error <= 1.5 (2 for gradients) x materialised torch's in the same dtype."""
    every: dict[str, tuple[list, list, list]] = {}
    for seed in range(6):
        w = make(seed, dtype)
        mine = ours(name, options, w, 0.7)[:2]
        runs = (mine, paper(law, options, w, dtype, 0.7), paper(law, options, w, upstream=0.7))
        for which, (loss, grads) in enumerate(runs):
            for n, x in zip(("loss", "d_hidden", "d_weight"), (loss, *grads), strict=True):
                every.setdefault(n, ([], [], []))[which].append(x.flatten())
    for n, lists in every.items():
        a, b, truth = (torch.cat(x) for x in lists)
        assert_as_accurate(n, a.float() if n == "loss" else a, b, truth, 1.5 if n == "loss" else 2.0)


# -- aggregation, from its definition ----------------------------------------------------------------------------------
def token_mean(values: list[Tensor]) -> Tensor:
    """Sum over all trained tokens / their number."""
    return torch.cat(values).sum() / sum(len(v) for v in values)


def sequence_mean_token_mean(values: list[Tensor]) -> Tensor:
    return sum(v.mean() if len(v) else v.sum() for v in values) / len(values)


def sequence_mean_token_sum(values: list[Tensor]) -> Tensor:
    return sum(v.sum() for v in values) / len(values)


def pairs(seqs: list[Seq]) -> list[tuple[Seq, Seq]]:
    """(chosen, rejected) of each pair."""
    return list(zip(seqs[0::2], seqs[1::2], strict=True))

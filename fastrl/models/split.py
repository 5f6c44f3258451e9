"""The head of a model whose packs are shared by several ranks: each takes as many of the rows as the others.

Every rank calls with the whole micro-batch and gets the whole result. The layers have seen this rank's slice of the
tokens (fastrl.models.ulysses). The R rows that the head reads are dealt out evenly, wherever they lie in the pack;
their statistics [R] come together on every rank, where the law is evaluated on all of them. Its value is the same
everywhere; backward, each rank follows its own rows alone. So a rank's gradients are its part of the work, and they
add up to the whole gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrl.data.prefix import Layout
from fastrl.models.packing import Packing
from fastrl.models.ulysses import Ranks, SplitPacking
from fastrl.objective import LossOutput, Objective, mean_metrics, scope_of, unit_of, unit_weights
from fastrl.ops.fused import alone, apply_law
from fastrl.tokens import SIDE_NAMES, STAT_NAMES, TokenBatch, TokenStats, compact

DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp", *SIDE_NAMES)


def split_states(
    packed: nn.Module, input_ids: Tensor, bounds: Sequence[int], layout: Layout | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(final hidden states [ceil(T/p), H] of this rank's slice of the tokens, the rows [R] as indices into T)."""
    device = input_ids.device
    rows = torch.arange(bounds[-1], device=device) if rows is None else rows
    parents = None if layout is None else layout.parents
    if layout is not None and not packed.shares:
        bounds, index, back = layout.expanded()
        input_ids, rows, parents = input_ids[index.to(device)], back.to(device)[rows], None
    packing = Packing.from_bounds(tuple(bounds), device, parents)
    return packed._packed_body(packed.split.slice(input_ids), SplitPacking(packing, packed.split)), rows


# -- rows --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Share:
    """R rows, of which rank r has [r m, (r+1) m) with m = ceil(R/p)."""

    count: int
    ranks: Ranks

    @property
    def most(self) -> int:
        return self.ranks.share(self.count)

    @property
    def start(self) -> int:
        return min(self.ranks.rank * self.most, self.count)

    @property
    def stop(self) -> int:
        return min(self.start + self.most, self.count)

    def own(self, x: Any) -> Any:
        """[R, ...] -> this rank's [n, ...]; what is no tensor of one entry a row stays as it is."""
        by_row = isinstance(x, Tensor) and x.dim() and x.shape[0] == self.count
        return x[self.start : self.stop] if by_row else x

    def whole(self, x: Tensor) -> Tensor:
        """This rank's [n, ...] -> [R, ...] of all ranks. Backward: this rank's rows of the gradient, and no sum."""
        return Gather.apply(x, self) if self.count else x

    def whole_stats(self, stats: TokenStats) -> TokenStats:
        """The same of every statistic, in one exchange."""
        present = [n for n in (*STAT_NAMES, *SIDE_NAMES) if getattr(stats, n) is not None]
        parts = [getattr(stats, n) for n in present]
        flat = [x if x.dim() > 1 else x[:, None] for x in parts]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in flat) else torch.float32
        table = self.whole(torch.cat([x.to(dtype) for x in flat], dim=1))
        columns = table.split([x.shape[1] for x in flat], dim=1)
        made = {}
        for name, part, column in zip(present, parts, columns, strict=True):
            column = column if part.dim() > 1 else column[:, 0]
            made[name] = (column if part.requires_grad else column.detach()).to(part.dtype)
        return TokenStats(**made)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, share: Share) -> Tensor:
        ctx.share = share
        mine = x.new_zeros((share.most, *x.shape[1:]))
        mine[: x.shape[0]] = x
        out = x.new_empty((share.ranks.size * share.most, *x.shape[1:]))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(out, mine, group=share.ranks.group)
        return out[: share.count]  # only the last ranks' parts are not full

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream[ctx.share.start : ctx.share.stop], None


def deal(hidden: Tensor, rows: Tensor, ranks: Ranks) -> tuple[Tensor, Share]:
    """Every rank's slice [ceil(T/p), H] -> this rank's share [n, H] of the rows [R] (indices into T, in any order)."""
    share, p = Share(rows.shape[0], ranks), ranks.size
    if not share.count:
        return hidden[:0], share
    owner = rows // hidden.shape[0]
    taker = torch.arange(share.count, device=rows.device) // share.most
    counts = torch.bincount(owner * p + taker, minlength=p * p)
    *table, scattered = torch.cat([counts, (owner.diff() < 0).any().long()[None]]).tolist()
    sent = table[ranks.rank * p : (ranks.rank + 1) * p]
    received = table[ranks.rank :: p]
    mine = (owner == ranks.rank).nonzero().squeeze(1)
    at = rows[mine] - ranks.rank * hidden.shape[0]
    own = hidden[at] if hidden.is_cuda else hidden.index_select(0, at)  # rows may repeat, see packed._rows
    got = Move.apply(own, sent, received, ranks.group)
    if scattered:  # they came in the order of their owners
        order = torch.argsort(owner[share.start : share.stop], stable=True)
        got = got.index_select(0, torch.argsort(order))
    return got, share


class Move(torch.autograd.Function):
    """[sum(sent), H], sent[j] rows for rank j in a row -> [sum(received), H], received[i] rows from rank i in a row."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group) -> Tensor:
        ctx.how = sent, received, group
        return _moved(x, sent, received, group)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        sent, received, group = ctx.how
        return _moved(upstream, received, sent, group), None, None, None


def _moved(x: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


# -- the language model's head ---------------------------------------------------------------------------------------
def head_call(
    head: nn.Module,
    hidden: Tensor,
    rows: Tensor,
    ranks: Ranks,
    *,
    objective: Objective | None = None,
    batch: TokenBatch | None = None,
    **options: Any,
) -> TokenStats | LossOutput:
    """What head(hidden[rows], ...) gives for the whole pack, from every rank's slice of hidden states."""
    if options.get("support") is not None:
        raise ValueError("support= does not go with --sequence_parallel_size above 1")
    if objective is not None:
        return _loss(head, hidden, rows, ranks, objective, batch, **options)
    own, share = deal(hidden, rows, ranks)
    return share.whole_stats(head(own, **{name: share.own(x) for name, x in options.items()}))


def _loss(
    head: nn.Module,
    hidden: Tensor,
    rows: Tensor,
    ranks: Ranks,
    objective: Objective,
    batch: TokenBatch,
    *,
    aggregate: Any = None,
    ignore_index: int = -100,
    skip_inert: bool = False,  # rows that add nothing are measured all the same: they are few enough
    **options: Any,
) -> LossOutput:
    """One pass over the head where a row's coefficient needs nothing but the row (3 GEMMs), else the statistics first
    and the pass that pulls on them after the law is known (4 GEMMs). The weight is never read in the backward."""
    kept, inner = compact(batch, ignore_index)
    own, share = deal(hidden, rows if inner is None else rows[inner], ranks)
    kept = alone(objective, kept)
    weights = unit_weights(objective, kept, aggregate)
    part = kept.window(share.start, share.stop)
    options = {name: _own_option(name, x, inner, share) for name, x in options.items()}
    wanted = torch.is_grad_enabled()
    if scope_of(objective) == unit_of(objective) == "token":
        mine = head(own, objective=objective, batch=part, aggregate=lambda _: share.own(weights), **options)
        stats, pulled = share.whole_stats(mine.stats), mine.loss
        loss = apply_law(objective, stats, kept, weights)
    else:
        with torch.no_grad():
            mine = head(own, objective=Linear(objective), batch=part, **options)
        stats = share.whole_stats(mine.stats)
        kept = alone(objective, kept, stats)
        loss, columns = _coefficients(objective, stats, kept, weights)
        law = Linear(objective, tuple(columns))
        part = part.with_columns({law.column(n): share.own(c) for n, c in columns.items()})
        options["outputs"] = ()
        pulled = head(own, objective=law, batch=part, aggregate=_ones, **options).loss if wanted else None
    loss = loss.detach()
    if wanted and pulled.requires_grad:
        loss = loss + (pulled - pulled.detach())  # the value of all rows, the gradient of this rank's
    metrics = mean_metrics(objective, stats, alone(objective, kept, stats))
    if inner is not None:
        stats = stats.map(lambda x: x.new_zeros(len(batch.targets), *x.shape[1:]).index_copy(0, inner, x))
    return LossOutput(loss, metrics, stats)


def _own_option(name: str, x: Any, inner: Tensor | None, share: Share) -> Any:
    """This rank's rows of an option that has one entry a row. A teacher may have been dealt out already."""
    if name == "teacher" and x is not None:
        mine = x.hidden.shape[0] == share.stop - share.start and inner is None
        return x if mine else dataclasses.replace(x, hidden=_own_option("", x.hidden, inner, share))
    if inner is not None and isinstance(x, Tensor) and x.dim():
        x = x[inner]
    return share.own(x)


def _ones(batch: TokenBatch) -> Tensor:
    return torch.ones(batch.targets.shape, dtype=torch.float64, device=batch.targets.device)


def _coefficients(
    objective: Objective, stats: TokenStats, batch: TokenBatch, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, its derivative in each statistic that it reads), of all rows. That in a divergence is always there."""
    leaves = {n: x.detach().requires_grad_() for n in DIFFERENTIABLE if (x := getattr(stats, n)) is not None}
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    with torch.enable_grad():
        loss = apply_law(objective, dataclasses.replace(stats, **leaves), batch, weights)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    made = {n: c for n, c in zip(leaves, found, strict=True) if c is not None}
    if "divergence" in leaves:
        made.setdefault("divergence", torch.zeros_like(leaves["divergence"]))
    return loss, made


@dataclass(frozen=True)
class Linear:
    """sum_n c_n x statistic n, whose coefficients c are columns of the batch; without names it only reads.

    of: the objective whose statistics it asks for.
    """

    of: Objective
    names: tuple[str, ...] = ()
    scope: ClassVar[str] = "token"
    linear_in_divergence: ClassVar[bool] = True

    @staticmethod
    def column(name: str) -> str:
        return f"coefficient of {name}"

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(getattr(self.of, "outputs", ()))

    @property
    def reads_logprobs(self) -> bool:
        return getattr(self.of, "reads_logprobs", True)

    @property
    def divergence(self):
        return self._shared("divergence", "divergence")

    @property
    def support(self) -> str:
        return self._shared("support_logits", "support")

    def _shared(self, output: str, name: str) -> Any:
        """The attribute of the objective, or of those terms of a sum that read `output`."""
        terms = [o for _, o in getattr(self.of, "terms", ())] or [self.of]
        found = list(dict.fromkeys(getattr(o, name) for o in terms if output in getattr(o, "outputs", ())))
        if len(found) != 1:
            raise ValueError(f"a call computes one {name}, the objective has {len(found)} of them; use one of them")
        return found[0]

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        first = next(x for n in DIFFERENTIABLE if (x := getattr(stats, n)) is not None)
        total = torch.zeros(batch.targets.shape, dtype=first.dtype, device=first.device)
        for name in self.names:
            pulled = batch.token(self.column(name)) * getattr(stats, name)
            total = total + (pulled if pulled.dim() == 1 else pulled.sum(1))
        return total

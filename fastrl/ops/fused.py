"""fused_loss: the objective's gradient coefficient folded into the pass over the head.

    grad = sum_t c_t grad log pi(y_t) + h_t grad H_t,   c_t = dL/dlogp_t,   h_t = dL/dH_t

c and h come from autograd over [T] vectors, which is free; the kernels see only those vectors.
The gradient GEMMs follow the logits at once (3 GEMMs, 2 with a frozen head) where a unit of the objective's scope is
known completely while its logits are there: any row of scope token, a sequence, pair, group or batch that fits the
workspace. Of a larger unit the logits that do not fit are made again (between 3 and 4).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.objective import (
    LossOutput,
    Objective,
    is_prepared,
    mean_metrics,
    outputs_of,
    prepared,
    scope_of,
    unit_of,
    unit_weights,
    value_of,
    weighted_sum,
)
from fastrl.ops import dispatch, policy_kernel
from fastrl.ops.checks import autocast_off, check_inputs, check_targets, head_spec, settle_dtypes
from fastrl.ops.custom import DIFFERENTIABLE
from fastrl.ops.distill import Heads, Sides, Teacher, side_statistics, teacher_side
from fastrl.ops.head import Coefs, HeadSpec, Plan
from fastrl.ops.linear import head_statistics
from fastrl.ops.once import no_second_derivative
from fastrl.ops.shard import shard_of
from fastrl.tokens import SIDE_NAMES, STAT_NAMES, TokenBatch, TokenStats, compact


def fused_loss(
    objective: Objective,
    hidden: Tensor,
    weight: Tensor,
    batch: TokenBatch,
    bias: Tensor | None = None,
    *,
    teacher: Teacher | None = None,
    aggregate=None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    backend: str | None = None,
    strategy: str | None = None,
    workspace_bytes: int | None = None,
    skip_inert: bool = False,
    process_group=None,
    debug_checks: bool = False,
) -> LossOutput:
    """Loss of any objective straight from hidden states and the head, logits never formed.

    Args:
        objective: a callable with a `scope` (fastrl.losses.get(...) or your own); see fastrl.objective.
        hidden: [T, H]; hidden[t] predicts batch.targets[t]. weight: [V, H]. bias: [V] or None.
        batch: TokenBatch; rows with mask False or target ignore_index are dropped before anything is computed, so
            nothing in them can reach the loss, and they cost nothing.
        teacher: the other head of a distillation loss, fastrl.Teacher(hidden [T, H'], weight [V, H'], ...), rows as the
            batch's; those that are not trained are dropped before both heads. Logits of neither are formed.
        aggregate: None (the objective's own), one of fastrl.objective.AGGREGATES, or batch -> [T] weights.
        outputs: extra statistics to return in .stats and .metrics ("entropy", "is_argmax", ...).
        strategy: None or "one_pass" (gradients in the forward), "two_pass" or "cached", as in linear_logprobs.
        skip_inert: rows that cannot contribute whatever the model says (the objective's `inert(batch)`: advantage zero
            and no KL or entropy term) leave the forward too. Their statistics are then 0 and they add nothing to the
            metrics; without it they are measured, and leave the backward only.
        The rest: as linear_logprobs.

    Returns: LossOutput(loss scalar, metrics, stats [T] detached); the loss is differentiable once in hidden, weight
        and bias.
    Raises: ValueError, TypeError on inputs that do not fit, naming both sides.
    """
    hidden, weight = settle_dtypes(hidden, weight)
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"batch must be a TokenBatch, got {type(batch).__name__}")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [T, H] to match the packed batch, got {list(hidden.shape)}")
    check_inputs(hidden, weight, batch.targets, bias)
    names = outputs_of(objective, tuple(outputs))
    head = head_spec(weight, bias, temperature, logit_scale, softcap, hidden)
    how = How(names, backend, strategy, workspace_bytes, aggregate, ignore_index, skip_inert, process_group)
    dispatch.loss_strategy(strategy)
    if torch.compiler.is_compiling():
        from fastrl.ops import compiled

        if teacher is not None or any(n in SIDE_NAMES for n in names):
            return compiled.run_outside(objective, hidden, head, batch, how, debug_checks, teacher)
        return compiled.fused_loss(objective, hidden, head, batch, how, debug_checks)
    return run_fused(objective, hidden, head, batch, how, debug_checks, teacher)


@dataclass(frozen=True)
class How:
    """The options of a fused_loss call that are no part of the head."""

    names: tuple[str, ...]
    backend: str | None
    strategy: str | None
    workspace_bytes: int | None
    aggregate: str | Callable | None
    ignore_index: int
    skip_inert: bool
    process_group: object = None


def run_fused(
    objective: Objective,
    hidden: Tensor,
    head: HeadSpec,
    batch: TokenBatch,
    how: How,
    debug_checks: bool = False,
    teacher: Teacher | None = None,
) -> LossOutput:
    """fused_loss of checked inputs."""
    if teacher is not None and "divergence" not in how.names:
        raise ValueError(f"{type(objective).__name__} reads no divergence; drop teacher= or use a distillation loss")
    shard = shard_of(how.process_group, head.weight)
    other = teacher_side(teacher, hidden, head, None)
    kept, rows = compact(batch, how.ignore_index)
    kept = alone(objective, kept)
    weights = unit_weights(objective, kept, how.aggregate)
    if how.skip_inert and scope_of(objective) == "token" and (inert := getattr(objective, "inert", None)):
        kept, rows, weights = _drop(inert(kept), kept, rows, weights)
    names = tuple(n for n in how.names if n in STAT_NAMES)
    names = tuple(dict.fromkeys(("logprobs", *names))) if names else ()  # the walk makes them whatever it is asked for
    vocabulary = head.weight.shape[0] if shard is None else shard.vocabulary
    check_targets(kept.targets, rows, vocabulary, debug_checks)
    if rows is None:
        h = hidden
    else:
        h, head, other = hidden[rows], head.at_rows(rows), None if other is None else other.at_rows(rows)
    name = dispatch.pick(how.backend, hidden, native=True, group=shard is not None)
    wanted = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)
    )
    # Ranks must agree on it, whatever number of words each of them has.
    budget = dispatch.workspace(how.workspace_bytes, hidden, vocabulary if shard is None else 0)
    one_pass = dispatch.loss_strategy(how.strategy) == "one_pass" and name != "reference" and h.shape[0] > 0
    if shard is not None and any(n in SIDE_NAMES for n in how.names):
        raise ValueError("process_group= takes no teacher and no label smoothing: their words lie on several ranks")
    sides = side_statistics(objective, how.names, kept, weights, Heads(h, head, other, name, budget))
    if wanted and one_pass and names:
        plan = Plan(budget, shard=shard)
        law = _Law(objective, kept, weights, _units(objective, kept), name, sides)
        stats = TokenStats()
        loss = _OnePass.apply(h, head.weight, head.bias, head, (name, names, plan), law, stats)
        loss, stats = sides.pull(loss), dataclasses.replace(stats, **sides.stats).detach()
    else:
        stats = TokenStats(**sides.stats)
        if names:
            strategy = how.strategy if wanted and how.strategy != "one_pass" else None
            made = head_statistics(
                head, h, kept.targets, names, backend=how.backend, strategy=strategy,
                workspace_bytes=budget, ignore_index=how.ignore_index, process_group=how.process_group,
            )  # fmt: skip
            stats = dataclasses.replace(made, **sides.stats)
        kept = alone(objective, kept, stats)
        loss = sides.pull(apply_law(objective, stats, kept, weights))
        stats = stats.detach()
    metrics = mean_metrics(objective, stats, alone(objective, kept, stats))
    return LossOutput(loss, metrics, _uncompact(stats, rows, batch.targets.shape[0]))


def alone(objective: Objective, batch: TokenBatch, stats: TokenStats | None = None) -> TokenBatch:
    """A compact batch that nobody prepared is the whole step: with the columns that the objective takes from it.

    An objective that `needs_scores` gets them once `stats` are there (it is called with the whole batch, scope batch).
    """
    if is_prepared(objective, batch) or (stats is None and getattr(objective, "needs_scores", False)):
        return batch
    return prepared(objective, [batch], None if stats is None else [stats.detach()])[0]


def _drop(inert: Tensor | None, batch: TokenBatch, rows: Tensor | None, weights: Tensor):
    """(batch, rows, weights) without the inert rows of a compact batch; counts and weights stay what they were."""
    if inert is None:
        return batch, rows, weights
    keep = (~inert).nonzero().squeeze(1)
    if keep.shape[0] == inert.shape[0]:
        return batch, rows, weights
    ends = torch.nn.functional.pad((~inert).long().cumsum(0), (1, 0))
    cu_seqlens = ends[batch.cu_seqlens.long()].to(batch.cu_seqlens.dtype)
    return batch.select(keep, cu_seqlens), keep if rows is None else rows[keep], weights[keep]


def _units(objective: Objective, batch: TokenBatch) -> list[int] | None:
    """Boundaries [0, ..., T] of the rows that belong to one unit of the objective's scope; None: every row its own."""
    scope = scope_of(objective)
    if scope == "token":
        return None
    if scope in ("group", "batch"):  # the sequences of a group need not stand side by side
        return [0, batch.targets.shape[0]]
    ends = batch.cu_seqlens.tolist()
    return ends if scope == "sequence" else ends[::2]


def loss_from_logprobs(
    objective: Objective,
    stats_or_logprobs: TokenStats | Tensor,
    batch: TokenBatch,
    *,
    aggregate=None,
    ignore_index=-100,
) -> LossOutput:
    """The same law for trainers that already have log-probs: [T] tensor or TokenStats, differentiable as given."""
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"batch must be a TokenBatch, got {type(batch).__name__}")
    stats = stats_or_logprobs
    if isinstance(stats, Tensor):
        stats = TokenStats(logprobs=stats)
    if stats.logprobs is None or stats.logprobs.shape != batch.targets.shape:
        got = None if stats.logprobs is None else list(stats.logprobs.shape)
        raise ValueError(f"logprobs must be [T={batch.targets.shape[0]}] to match batch.targets, got {got}")
    missing = [n for n in getattr(objective, "outputs", ()) if getattr(stats, n) is None]
    if missing:
        raise ValueError(f"objective reads {missing[0]!r}, which stats lacks; pass a TokenStats that has it")
    kept, rows = compact(batch, ignore_index)
    own = stats if rows is None else stats.map(lambda x: x[rows])
    kept = alone(objective, kept, own)
    loss = apply_law(objective, own, kept, unit_weights(objective, kept, aggregate))
    own = own.detach()
    return LossOutput(loss, mean_metrics(objective, own, kept), _uncompact(own, rows, batch.targets.shape[0]))


def apply_law(objective: Objective, stats: TokenStats, batch: TokenBatch, weights: Tensor) -> Tensor:
    """sum of weight * value, attached to the graph of `stats` even when there is nothing to sum."""
    units = weights.shape[0] if weights.dim() else None
    loss = weighted_sum(value_of(objective, stats, batch, units), weights)
    if batch.targets.shape[0]:
        return loss
    return loss + sum(x.sum() * 0 for n in ("logprobs", *SIDE_NAMES) if (x := getattr(stats, n)) is not None)


class _Law:
    """Objective, compact batch and weights, asked for one piece of rows after another, in order."""

    def __init__(
        self,
        objective: Objective,
        batch: TokenBatch,
        weights: Tensor,
        units: list[int] | None,
        backend: str,
        sides: Sides | None = None,
    ):
        if units is None and batch.advantages is not None:
            batch = dataclasses.replace(batch, advantages=batch.token_advantages)
        if scope_of(objective) == "sequence":  # pieces may part the two sequences of a pair
            batch = dataclasses.replace(batch, margins=None)
        self.objective, self.batch, self.weights, self.units = objective, batch, weights, units
        self.by_kernel = backend == "triton" and units is None and unit_of(objective) == "token"
        self.next_unit = 0
        self.values: list[Tensor] = []
        self.sides = sides if sides is not None and sides.stats else None

    def coefficients(self, start: int, stop: int, stats: TokenStats) -> Coefs:
        """Of rows [start, stop): whole units, empty ones at their end among them."""
        batch, weights = self._part(start, stop)
        if self.sides is None:
            value, coefs = self._evaluate(batch, weights, stats)
        else:
            leaves = self.sides.leaves(start, stop)
            stats = dataclasses.replace(stats, **leaves)
            value, coefs, grads = _coefficients(self.objective, stats, alone(self.objective, batch, stats), weights)
            self.sides.take(start, stop, grads)
        self.values.append(value)
        return coefs

    def _part(self, start: int, stop: int) -> tuple[TokenBatch, Tensor]:
        if self.units is None:
            weights = self.weights[start:stop] if self.weights.dim() else self.weights
            return self.batch.window(start, stop), weights
        if scope_of(self.objective) in ("group", "batch"):
            return self.batch, self.weights
        a, b = self.next_unit, bisect.bisect_right(self.units, stop) - 1
        self.next_unit = b
        each, unit = 2 if scope_of(self.objective) == "pair" else 1, unit_of(self.objective)
        if unit == "total":
            weights = self.weights
        elif unit == "token":
            weights = self.weights[start:stop]
        else:  # of a pair's own sequences, or one for each unit
            finer = each if unit == "sequence" else 1
            weights = self.weights[finer * a : finer * b]
        return self.batch.sequences(each * a, each * b, start, stop), weights

    def _evaluate(self, batch: TokenBatch, weights: Tensor, stats: TokenStats) -> tuple[Tensor, Coefs]:
        batch = alone(self.objective, batch, stats)
        made = policy_kernel.coefficients(self.objective, stats, batch, weights) if self.by_kernel else None
        return _coefficients(self.objective, stats, batch, weights)[:2] if made is None else made

    def total(self) -> Tensor:
        return torch.stack(self.values).sum()


class _OnePass(torch.autograd.Function):
    """Loss and gradients in one walk over the rows; backward only scales them by dL/dloss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head: HeadSpec, how, law: _Law, stats: TokenStats):
        ctx.set_materialize_grads(False)
        name, outputs, plan = how
        needs = tuple(ctx.needs_input_grad[:3])
        with autocast_off(hidden):
            made, *grads, _ = dispatch.module(name).one_pass(
                head, hidden, law.batch.targets, outputs, law.coefficients, needs, plan, law.units
            )
        for output in outputs:
            setattr(stats, output, getattr(made, output))
        ctx.save_for_backward(*grads)
        return law.total()

    @staticmethod
    @no_second_derivative
    def backward(ctx, upstream):
        if upstream is None:  # the loss had no part in what is differentiated
            return (None,) * 7
        grads = ctx.saved_tensors
        # On the CPU the usual upstream of exactly 1 is seen for free, and saves a walk over dW.
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            grads = [None if g is None else g * upstream for g in grads]  # 0-dim: the dtype of g stays
        return *grads, None, None, None, None


def _coefficients(objective: Objective, stats: TokenStats, batch: TokenBatch, weights: Tensor):
    """(loss of these rows, its derivative in each differentiable statistic, the same of the sides by name)."""
    leaves = {n: x.detach().requires_grad_() for n in DIFFERENTIABLE if (x := getattr(stats, n)) is not None}
    sides = {n: x for n in SIDE_NAMES if (x := getattr(stats, n)) is not None and x.requires_grad}
    own = dataclasses.replace(stats, **leaves)
    with torch.enable_grad():
        units = weights.shape[0] if weights.dim() else None
        value = weighted_sum(value_of(objective, own, batch, units), weights)
        if not value.requires_grad:
            return value.detach(), Coefs(logprobs=torch.zeros_like(next(iter(leaves.values())))), {}
        grads = torch.autograd.grad(value, [*leaves.values(), *sides.values()], allow_unused=True)
    coefs = Coefs(**dict(zip(leaves, grads, strict=False)))
    coefs = coefs if coefs.present() else Coefs(logprobs=torch.zeros_like(next(iter(leaves.values()))))
    return value.detach(), coefs, dict(zip(sides, grads[len(leaves) :], strict=True))


def _uncompact(stats: TokenStats, rows: Tensor | None, length: int) -> TokenStats:
    return stats if rows is None else stats.map(lambda x: x.new_zeros(length, *x.shape[1:]).index_copy(0, rows, x))

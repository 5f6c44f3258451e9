"""What an objective reads beside the walk over the student's head: a divergence, mean logits, logits of k words.

    divergence      [T]     both heads' logits in chunks, of which only [T] numbers leave
    mean_logits     [T]     mean_v z_v = logit_scale (h . mean_v W_v + mean_v b_v) / temperature: one dot product a row
    support_logits  [T, k]  gathered dot products

They are made before the walk and enter the law as leaves; their coefficients dL/d(statistic), which come out of the law
with those of the log-probs, are sent back through their own graphs. A divergence in which the loss is linear has its
coefficient known beforehand: its gradients are made with its values (4 GEMMs; 6 where the coefficient must be awaited).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrl.objective import Divergence, Objective, value_of, weighted_sum
from fastrl.ops.checks import autocast_off, head_spec, settle_dtypes
from fastrl.ops.divergence import KINDS, Call, Law, Side, _own, check_pair, per_token
from fastrl.ops.head import HeadSpec, accumulation_dtype
from fastrl.ops.once import no_second_derivative
from fastrl.ops.support_torch import _dots, grouped_sum, transform
from fastrl.tokens import STAT_NAMES, TokenBatch, TokenStats


@dataclass(frozen=True)
class Teacher:
    """The other head: final hidden states of the rows of the batch, and what makes logits of them. No gradient reaches
    it. hidden: [T, H'], H' may differ from the student's H. weight: [V, H'], the same V. bias: [V] or None.

    logit_scale, softcap: the teacher's own. The call's temperature divides the logits of both.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass
class Sides:
    """stats: side statistics by name, with a graph where their coefficient must come out of the law.

    total: scalar with a graph, the part of the loss that is linear in a detached statistic (None: there is none).
    coefs: dL/d(statistic) of those with a graph, filled in row by row as the law is evaluated.
    """

    stats: dict[str, Tensor] = field(default_factory=dict)
    total: Tensor | None = None
    coefs: dict[str, Tensor] = field(default_factory=dict)

    def leaves(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows [start, stop) as constants and fresh leaves."""
        return {n: x[start:stop].detach().requires_grad_(x.requires_grad) for n, x in self.stats.items()}

    def take(self, start: int, stop: int, grads: dict[str, Tensor | None]) -> None:
        """Note the coefficients of rows [start, stop)."""
        for name, grad in grads.items():
            if name not in self.coefs:
                self.coefs[name] = torch.zeros_like(self.stats[name])
            if grad is not None:
                self.coefs[name][start:stop] = grad

    def pull(self, loss: Tensor) -> Tensor:
        """The loss, its value unchanged, attached to what the sides were made of."""
        parts = {self.stats[n]: coef for n, coef in self.coefs.items()}
        if self.total is not None:
            parts[self.total] = torch.ones_like(self.total)
        return _Attached.apply(loss, tuple(parts.values()), *parts) if parts else loss


class _Attached(torch.autograd.Function):
    """The loss as it is; its gradient goes to each part as well, times that part's coefficient."""

    @staticmethod
    def forward(ctx, loss, coefs: tuple, *parts):
        ctx.coefs = coefs
        return loss.clone()

    @staticmethod
    @no_second_derivative
    def backward(ctx, upstream):
        return upstream, None, *(c * upstream for c in ctx.coefs)


@dataclass(frozen=True)
class Heads:
    """What the sides are made of, rows already dropped: hidden [T, H] and the head, the teacher, and how to run."""

    hidden: Tensor
    head: HeadSpec
    teacher: Side | None
    backend: str
    workspace: int


def teacher_side(teacher: Teacher | None, hidden: Tensor, head: HeadSpec, rows: Tensor | None) -> Side | None:
    """The teacher's rows that are kept. Raises ValueError or TypeError if it does not fit the student, [T, H] whole."""
    if teacher is None:
        return None
    if not isinstance(teacher, Teacher):
        raise TypeError(f"teacher must be a fastrl.Teacher, got {type(teacher).__name__}")
    own, weight = settle_dtypes(teacher.hidden, teacher.weight)
    check_pair(hidden, head.weight, head.bias, own, weight, teacher.bias)
    bias = None if teacher.bias is None else teacher.bias.detach()
    other = head_spec(weight.detach(), bias, head.temperature, teacher.logit_scale, teacher.softcap, own)
    side = Side(own.detach(), other)
    return side if rows is None else side.at_rows(rows)


def side_statistics(
    objective: Objective, names: tuple[str, ...], batch: TokenBatch, weights: Tensor, heads: Heads
) -> Sides:
    """The statistics of `names` that are not the head's own. batch: compact, with its columns."""
    sides = Sides()
    if "mean_logits" in names:
        sides.stats["mean_logits"] = mean_logits(heads.hidden, heads.head)
    if "support_logits" in names:
        indices = batch.token(_attribute(objective, "support_logits", "support"), "the objective's support")
        with autocast_off(heads.hidden):
            sides.stats["support_logits"] = gathered_logits(heads.hidden, heads.head, indices, heads.workspace)
    if "divergence" in names:
        _divergence(sides, objective, names, batch, weights, heads)
    return sides


def _attribute(objective: Objective, output: str, name: str):
    """The objective's attribute, or that which those terms of a sum share that read `output`."""
    terms = [o for _, o in getattr(objective, "terms", ())] or [objective]
    found = list(dict.fromkeys(getattr(o, name) for o in terms if output in getattr(o, "outputs", ())))
    if len(found) != 1:
        raise ValueError(f"a call computes one {name}, the objective has {len(found)} of them; make one call for each")
    return found[0]


def _is_linear(objective: Objective) -> bool:
    terms = [o for _, o in getattr(objective, "terms", ())] or [objective]
    return all(getattr(o, "linear_in_divergence", "divergence" not in getattr(o, "outputs", ())) for o in terms)


# -- divergence ----------------------------------------------------------------------------------------------------
def _divergence(
    sides: Sides, objective: Objective, names: tuple, batch: TokenBatch, weights: Tensor, heads: Heads
) -> None:
    if heads.teacher is None:
        raise ValueError(f"{type(objective).__name__} reads a divergence; pass teacher=fastrl.Teacher(hidden, weight)")
    law = _attribute(objective, "divergence", "divergence").inner
    student, teacher = (_softened(s, law) for s in (Side(heads.hidden, heads.head), heads.teacher))
    backend = "torch" if heads.backend == "native" or (heads.backend == "triton" and law.kind not in KINDS) else None
    call = Call(Law(law.kind, law.beta), backend or heads.backend, heads.workspace)
    tensors = (student.hidden, student.head.weight, student.head.bias)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not (wanted and _is_linear(objective)) or call.backend == "reference":
        sides.stats["divergence"] = per_token(student, teacher, call)
        return
    factors = _linear_coefficient(objective, names, batch, weights, accumulation_dtype(student.hidden.dtype), sides)
    values = factors.new_empty(factors.shape)
    sides.total = _LinearPart.apply(*tensors, student, teacher, factors, call, values)
    sides.stats["divergence"] = values


def _softened(side: Side, law: Divergence) -> Side:
    if law.temperature == 1.0:
        return side
    return Side(side.hidden, dataclasses.replace(side.head, temperature=side.head.temperature * law.temperature))


def _linear_coefficient(
    objective: Objective, names: tuple, batch: TokenBatch, weights: Tensor, dtype: torch.dtype, sides: Sides
) -> Tensor:
    """[T] dL/dD of a loss that is linear in D: the same whatever the other statistics are."""
    t, device = batch.targets.shape[0], batch.targets.device
    blank = lambda: torch.zeros(t, dtype=dtype, device=device)  # noqa: E731
    stats = TokenStats(**{n: blank() for n in {*names, "logprobs"} & {*STAT_NAMES}})
    stats = dataclasses.replace(stats, **{n: x.detach() for n, x in sides.stats.items()}, divergence=blank())
    stats.divergence.requires_grad_()
    with torch.enable_grad():
        value = weighted_sum(value_of(objective, stats, batch, len(weights) if weights.dim() else None), weights)
        [grad] = torch.autograd.grad(value, [stats.divergence], allow_unused=True)
    return blank() if grad is None else grad


class _LinearPart(torch.autograd.Function):
    """Scalar sum of factors [T] times divergence, whose values go into `values` [T]; gradients in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, student: Side, teacher: Side, factors, call: Call, values: Tensor):
        needs = tuple(ctx.needs_input_grad[:3])
        with autocast_off(hidden):
            made, *grads = call.module.one_pass(
                call.law, _own(student, hidden, weight, bias), teacher, factors, needs, call.workspace
            )
        values.copy_(made)
        ctx.save_for_backward(*grads)
        return torch.where(factors != 0, made * factors, torch.zeros_like(made)).sum()

    @staticmethod
    @no_second_derivative
    def backward(ctx, upstream):
        grads = ctx.saved_tensors
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            grads = [None if g is None else g * upstream for g in grads]
        return *grads, None, None, None, None, None


# -- mean logits -----------------------------------------------------------------------------------------------------
def mean_logits(hidden: Tensor, head: HeadSpec) -> Tensor:
    """[T] mean_v z_v. Raises ValueError with a softcap, under which it is no function of mean_v W_v."""
    if head.softcap is not None:
        raise ValueError("label smoothing with softcap has no logits-free form; drop one of the two")
    acc, v = accumulation_dtype(hidden.dtype), head.weight.shape[0]
    with autocast_off(hidden):
        mean = head.weight.sum(0, dtype=acc) / v
        z = (hidden.to(acc) * mean).sum(-1)
        if head.bias is not None:
            z = z + head.bias.sum(dtype=acc) / v
    return z * head.logit_scale / head.temperature


# -- logits of k words a row -------------------------------------------------------------------------------------------
def gathered_logits(hidden: Tensor, head: HeadSpec, indices: Tensor, workspace: int) -> Tensor:
    """[T, k] z of the words indices [T, k], 2 T k H flops and as many for each gradient; differentiable once."""
    if indices.dim() != 2 or indices.shape[0] != hidden.shape[0] or indices.is_floating_point():
        raise ValueError(
            f"the support must be word indices [T={hidden.shape[0]}, k], got {list(indices.shape)} {indices.dtype}"
        )
    v = head.weight.shape[0]
    if indices.device.type == "cpu" and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < v:
        low, high = int(indices.min()), int(indices.max())
        raise ValueError(f"the support's words must be in [0, V={v}), got {low} to {high}")
    return _Gathered.apply(hidden, head.weight, head.bias, indices.long(), head, workspace)


class _Gathered(torch.autograd.Function):
    """Forward: T k dot products. Backward: two grouped sums, one for each of hidden and weight."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, indices, head: HeadSpec, workspace: int):
        rows, words = _Gathered.flat(indices)
        raw = _dots(hidden, weight, rows, words, workspace)
        if bias is not None:
            raw = raw + bias[words].to(raw.dtype)
        z, slope = transform(raw, head, rows)
        ctx.save_for_backward(hidden, weight, bias, indices, slope)
        ctx.how = head.logit_scale, head.temperature, workspace
        return z.view(indices.shape)

    @staticmethod
    def flat(indices: Tensor) -> tuple[Tensor, Tensor]:
        n, k = indices.shape
        return torch.arange(n, device=indices.device).repeat_interleave(k), indices.reshape(-1)

    @staticmethod
    @no_second_derivative
    def backward(ctx, upstream):
        hidden, weight, bias, indices, slope = ctx.saved_tensors
        scale, temperature, workspace = ctx.how
        rows, words = _Gathered.flat(indices)
        dz = upstream.reshape(-1) * (scale / (temperature[rows] if isinstance(temperature, Tensor) else temperature))
        dz = dz if slope is None else dz * slope
        at = (dz != 0).nonzero().squeeze(1)
        rows, words, dz = rows[at], words[at], dz[at]
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.zeros_like(hidden)
            grouped_sum(d_hidden, rows, weight, words, dz, workspace)
        if ctx.needs_input_grad[1]:
            words_in_order, order = words.sort(stable=True)
            d_weight = torch.zeros_like(weight)
            grouped_sum(d_weight, words_in_order, hidden, rows[order], dz[order], workspace)
        if ctx.needs_input_grad[2]:
            d_bias = torch.zeros_like(bias, dtype=dz.dtype).index_add(0, words, dz).to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None



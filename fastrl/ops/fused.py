"""fused_loss: the objective's gradient coefficient folded into the pass over the head.

    grad = sum_t c_t grad log pi(y_t) + h_t grad H_t,   c_t = dL/dlogp_t,   h_t = dL/dH_t

c and h come from autograd over [T] vectors, which is free; the kernels see only those vectors.
Token scope: c_t needs nothing but row t, so the gradient GEMMs follow the logits of each chunk at once (3 GEMMs, 2 with
a frozen head). Wider scopes: statistics first, then a second pass that recomputes the logits (4 GEMMs).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastrl.objective import (
    LossOutput,
    Objective,
    mean_metrics,
    outputs_of,
    scope_of,
    unit_weights,
    value_of,
    weighted_sum,
)
from fastrl.ops import dispatch
from fastrl.ops.checks import autocast_off, check_inputs, check_targets, head_spec, settle_dtypes
from fastrl.ops.head import Coefs
from fastrl.ops.linear import DIFFERENTIABLE, Call, head_statistics
from fastrl.ops.once import no_second_derivative
from fastrl.tokens import TokenBatch, TokenStats, compact


def fused_loss(
    objective: Objective,
    hidden: Tensor,
    weight: Tensor,
    batch: TokenBatch,
    bias: Tensor | None = None,
    *,
    aggregate=None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    backend: str | None = None,
    workspace_bytes: int | None = None,
    debug_checks: bool = False,
) -> LossOutput:
    """Loss of any objective straight from hidden states and the head, logits never formed.

    Args:
        objective: a callable with a `scope` (fastrl.losses.get(...) or your own); see fastrl.objective.
        hidden: [T, H]; hidden[t] predicts batch.targets[t]. weight: [V, H]. bias: [V] or None.
        batch: TokenBatch; rows with mask False or target ignore_index are dropped before anything is computed, so
            nothing in them can reach the loss, and they cost nothing.
        aggregate: None (the objective's own), one of fastrl.objective.AGGREGATES, or batch -> [T] weights.
        outputs: extra statistics to return in .stats and .metrics ("entropy", "is_argmax", ...).
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
    kept, rows = compact(batch, ignore_index)
    h, head = (hidden, head) if rows is None else (hidden[rows], head.at_rows(rows))
    check_targets(kept.targets, rows, weight.shape[0], debug_checks)
    weights = unit_weights(objective, kept, aggregate)
    name = dispatch.pick(backend, hidden)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (h, weight, bias))
    if scope_of(objective) == "token" and name != "reference" and wanted:
        if kept.advantages is not None:
            kept = dataclasses.replace(kept, advantages=kept.token_advantages)
        budget = dispatch.workspace(workspace_bytes, hidden, weight.shape[0])
        call = Call(names, name, budget, head.logit_scale, head.softcap, head.temperature)
        stats = TokenStats()
        law = (objective, kept, weights)
        loss = _OnePass.apply(h, weight, bias, call, law, stats)
    else:
        stats = head_statistics(head, h, kept.targets, names, backend, workspace_bytes)
        loss = apply_law(objective, stats, kept, weights)
        stats = stats.detach()
    metrics = mean_metrics(objective, stats, kept)
    return LossOutput(loss, metrics, _uncompact(stats, rows, batch.targets.shape[0]))


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
    loss = apply_law(objective, own, kept, unit_weights(objective, kept, aggregate))
    own = own.detach()
    return LossOutput(loss, mean_metrics(objective, own, kept), _uncompact(own, rows, batch.targets.shape[0]))


def apply_law(objective: Objective, stats: TokenStats, batch: TokenBatch, weights: Tensor) -> Tensor:
    """sum of weight * value, attached to the graph of `stats` even when there is nothing to sum."""
    units = weights.shape[0] if weights.dim() else None
    loss = weighted_sum(value_of(objective, stats, batch, units), weights)
    return loss + stats.logprobs.sum() * 0 if stats.logprobs.shape[0] == 0 else loss


class _OnePass(torch.autograd.Function):
    """Loss and gradients in one walk over the chunks; backward only scales them by dL/dloss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call: Call, law, stats: TokenStats):
        objective, batch, weights = law
        head, backend = call.head(weight, bias), dispatch.module(call.backend)
        needs = tuple(ctx.needs_input_grad[:3])
        total = []

        def coefficient(start: int, stop: int, own: TokenStats) -> Coefs:
            value, coefs = _coefficients(objective, own, batch.window(start, stop), weights[start:stop])
            total.append(value)
            return coefs

        with autocast_off(hidden):
            made, *grads = backend.one_pass(
                head, hidden, batch.targets, call.outputs, coefficient, needs, call.workspace
            )
        for name in call.outputs:
            setattr(stats, name, getattr(made, name))
        ctx.save_for_backward(*grads)
        loss = torch.stack(total).sum() if total else made.logprobs.new_zeros(())
        return loss

    @staticmethod
    @no_second_derivative
    def backward(ctx, upstream):
        grads = ctx.saved_tensors
        # On the CPU the usual upstream of exactly 1 is seen for free, and saves a walk over dW.
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            grads = [None if g is None else g * upstream for g in grads]  # 0-dim: the dtype of g stays
        return *grads, None, None, None


def _value(objective: Objective, stats: TokenStats, batch: TokenBatch, weights: Tensor) -> Tensor:
    return weighted_sum(value_of(objective, stats, batch, weights.shape[0]), weights)


def _coefficients(objective: Objective, stats: TokenStats, batch: TokenBatch, weights: Tensor) -> tuple[Tensor, Coefs]:
    """Loss of these rows and its derivative in each differentiable statistic."""
    leaves = {n: x.detach().requires_grad_() for n in DIFFERENTIABLE if (x := getattr(stats, n)) is not None}
    own = TokenStats(log_sum_sq_probs=stats.log_sum_sq_probs, is_argmax=stats.is_argmax, **leaves)
    with torch.enable_grad():
        value = _value(objective, own, batch, weights)
        if not value.requires_grad:
            return value.detach(), Coefs(logprobs=torch.zeros_like(stats.logprobs))
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    coefs = Coefs(**dict(zip(leaves, grads, strict=True)))
    return value.detach(), coefs if coefs.present() else Coefs(logprobs=torch.zeros_like(stats.logprobs))


def _uncompact(stats: TokenStats, rows: Tensor | None, length: int) -> TokenStats:
    return stats if rows is None else stats.map(lambda x: x.new_zeros(length).index_copy(0, rows, x))

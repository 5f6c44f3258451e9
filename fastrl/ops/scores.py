"""Losses of heads beside the language model: one number a sequence or a row, and no vocabulary anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.objective import (
    LossOutput,
    Objective,
    is_prepared,
    mean_metrics,
    prepared,
    unit_weights,
    value_of,
    weighted_sum,
)
from fastrl.tokens import HeadStats, TokenBatch, compact


def loss_from_scores(
    objective: Objective, stats: HeadStats, batch: TokenBatch, *, aggregate=None, ignore_index: int = -100
) -> LossOutput:
    """The objective's loss of a reward, process reward or value head's outputs.

    Args:
        objective: one of fastrl.losses' reward and value losses, or any callable with a scope on (HeadStats, batch).
        stats: scores [S] or [S, K], values [T] or [T, K]; low precision is taken to float32 first.
        batch: S sequences of T rows. Rows that are masked or have the target ignore_index are dropped, and may hold
            anything. A head that is read once a sequence has batches of one row each.
        aggregate: as in fused_loss; counts are the batch's num_tokens and num_sequences.

    Returns: LossOutput; its stats are the detached HeadStats of the rows that were kept.
    Raises: ValueError, TypeError on shapes that do not fit.
    """
    _check(stats, batch)
    kept, rows = compact(batch, ignore_index)
    own = stats if rows is None else _rows(stats, rows)
    own = own.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)))
    if not is_prepared(objective, kept):
        scored = [own.detach()] if getattr(objective, "needs_scores", False) else None
        [kept] = prepared(objective, [kept], scored)
    weights = unit_weights(objective, kept, aggregate)
    loss = weighted_sum(value_of(objective, own, kept, weights.shape[0] if weights.dim() else None), weights)
    for x in (own.scores, own.values):
        if x is not None and x.numel() == 0:
            loss = loss + x.sum()  # 0, with a graph
    own = own.detach()
    return LossOutput(loss, mean_metrics(objective, own, kept), own)


def _rows(stats: HeadStats, rows: Tensor) -> HeadStats:
    """Only these rows of what is given per row."""
    log_variance = stats.log_variance
    if stats.values is not None and log_variance is not None:
        log_variance = log_variance[rows]
    values = None if stats.values is None else stats.values[rows]
    return HeadStats(stats.scores, values, log_variance)


def _check(stats: HeadStats, batch: TokenBatch) -> None:
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"batch must be a TokenBatch, got {type(batch).__name__}")
    if not isinstance(stats, HeadStats):
        raise TypeError(f"stats must be a HeadStats, got {type(stats).__name__}; log-probs go to loss_from_logprobs")
    if stats.scores is None and stats.values is None:
        raise ValueError("stats has neither scores nor values")
    t, s = batch.targets.shape[0], batch.num_segments
    per_row = stats.values is not None
    sizes = {"scores": (s, "S"), "values": (t, "T"), "log_variance": (t, "T") if per_row else (s, "S")}
    for name, (size, letter) in sizes.items():
        x = getattr(stats, name)
        if x is None:
            continue
        most = 1 if name == "log_variance" else 2
        if x.shape[:1] != (size,) or x.dim() > most or not x.is_floating_point():
            shapes = f"[{letter}={size}]" + (f" or [{letter}={size}, K]" if most == 2 else "")
            raise ValueError(f"{name} must be float {shapes} to match the batch, got {list(x.shape)} {x.dtype}")

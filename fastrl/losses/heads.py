"""What losses of small heads share: reading their outputs, checking their numbers, and a few exact functions."""

from __future__ import annotations

import math
from dataclasses import fields

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.losses.kl import safe_exp
from fastrl.tokens import HeadStats, TokenBatch

LOG_VARIANCE = 30.0  # log-variances beyond +-30 are taken at the bound: the loss stays inside float32


def softplus(x: Tensor) -> Tensor:
    """sp(x) = -log sigma(-x), to full precision everywhere (torch's own softplus is x from 20 on)."""
    return -logsigmoid(-x)


def gaussian_nll(gap: Tensor, log_variance: Tensor) -> Tensor:
    """(log s^2 + gap^2 / s^2) / 2, without the constant."""
    return 0.5 * (log_variance + gap.square() * safe_exp(-log_variance))


def check_numbers(law) -> None:
    """Every number of a loss is finite. Raises ValueError naming the option, what was expected and what came."""
    for f in fields(law):
        value = getattr(law, f.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isfinite(value):
            raise ValueError(f"{f.name} must be finite, got {value}")


def check_range(law, name: str, low: float, high: float = math.inf) -> None:
    """low < option < high, or ValueError."""
    value = getattr(law, name)
    if not low < value < high:
        raise ValueError(f"{name} must be strictly between {low:g} and {high:g}, got {value}")


def scores_of(stats: HeadStats, outputs: int | None = None) -> Tensor:
    """[S] scores, or [S, K] where `outputs` says that several are read (0: any number of them)."""
    scores = getattr(stats, "scores", None)
    if scores is None:
        raise ValueError(
            "this loss reads the scores of a reward head: give HeadStats(scores=...) to fastrl.loss_from_scores"
        )
    wrong = scores.dim() != 1 if outputs is None else scores.dim() != 2 or outputs not in (0, scores.shape[1])
    if wrong:
        want = "[S]" if outputs is None else f"[S, K={outputs or 'any'}]"
        raise ValueError(f"scores must be {want} for this loss, got {list(scores.shape)}")
    return scores


def values_of(stats: HeadStats, outputs: int | None = None) -> Tensor:
    """[T] values, or [T, K] where `outputs` says that several are read (0: any number of them)."""
    values = getattr(stats, "values", None)
    if values is None:
        raise ValueError(
            "this loss reads the values of a head at every row: give HeadStats(values=...) to fastrl.loss_from_scores"
        )
    wrong = values.dim() != 1 if outputs is None else values.dim() != 2 or outputs not in (0, values.shape[1])
    if wrong:
        want = "[T]" if outputs is None else f"[T, K={outputs or 'any'}]"
        raise ValueError(f"values must be {want} for this loss, got {list(values.shape)}")
    return values


def log_variance_of(stats: HeadStats) -> Tensor:
    if stats.log_variance is None:
        raise ValueError("this loss needs the log_variance of a mean-variance head beside its mean; got None")
    return stats.log_variance.clamp(-LOG_VARIANCE, LOG_VARIANCE)


def column_of(batch: TokenBatch, name: str) -> Tensor:
    """[S] a field or a further column of the batch."""
    value = getattr(batch, name, None) if hasattr(batch, name) else batch.per_sequence.get(name)
    if value is None:
        raise ValueError(f"this loss needs batch.{name} [S]; got None")
    return value

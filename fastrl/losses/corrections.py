"""Weights for tokens that another policy sampled: stale ones, and those of an inference engine that disagrees.

o = old (the trainer's own log-prob at sampling time), b = rollout (the engine's), w = e^(o - b). A correction turns the
weight of the policy term so far, [T], into the next; a loss applies its corrections in order, to its policy term only
(not to KL and entropy). They are constants of the whole optimizer step, taken before any token is trained; OPSM alone
reads the current policy. A rejected token keeps its place in every denominator.

    TokenTruncate       w -> min(max(w, low), high)                        TIS (Yao et al. 2025)
    TokenMask           w 1[low <= w <= high]                              IcePop (Ling team 2025, arXiv:2510.18855)
    SequenceTruncate    the product (or geometric mean) of w, truncated    sequence TIS
    SequenceMask        sequences whose product (geometric mean) is out of [low, high] are dropped
    OutlierMask         sequences with one token out of [low, high] are dropped
    DivergenceReject    tokens or sequences whose k1, k2 or k3 estimate of KL(b || o) is too large are dropped
    M2PO                the tokens of largest (o - b)^2 are dropped, until the mean of the rest is below a threshold
    BatchNormalised     the weight so far / its mean over the step
    OPSM                sequences of negative advantage that the policy has left behind are dropped
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.kl import exp_above_tangent
from fastrl.tokens import TokenBatch, TokenStats, segment_mean, segment_sum

Everywhere = Callable[[Tensor], Tensor]  # [n] of this rank -> [n'] of all
LARGEST = 20.0  # of log w: beyond e^20 a constant weight says nothing but that the two policies have parted
RATIOS = ("product", "geometric")


@dataclass(frozen=True)
class Correction:
    """A factor of the policy term. weighs: whether it multiplies by w, which may happen once, or only drops tokens."""

    scope: ClassVar[str] = "token"  # what its reading of the current policy makes of the loss's scope
    needs_rollout: ClassVar[bool] = True

    @property
    def weighs(self) -> bool:
        return False

    def apply(self, weight: Tensor, log_w: Tensor | None, batch: TokenBatch, everywhere: Everywhere) -> Tensor:
        """The next weight [T] float64 of the whole step, log_w [T] float64 (None where no correction reads it)."""
        return weight

    def keeps(self, stats: TokenStats, batch: TokenBatch) -> Tensor | None:
        """[T] bool from the current policy, whole sequences at a time; None: it does not read it."""
        return None


def _check_range(who: Correction, low: float, high: float) -> None:
    if not 0 <= low <= high:
        raise ValueError(f"{type(who).__name__} needs 0 <= low <= high, got low={low} and high={high}")


def _check_choice(who: Correction, name: str, options: tuple[str, ...]) -> None:
    if getattr(who, name) not in options:
        got = getattr(who, name)
        raise ValueError(f"{name} of {type(who).__name__} is {got!r}; expected one of {', '.join(options)}")


def _within(log_x: Tensor, low: float, high: float) -> Tensor:
    """low <= e^x <= high, decided on x."""
    return (log_x >= _log(low)) & (log_x <= _log(high))


def _log(x: float) -> float:
    return -math.inf if x == 0 else math.log(x)


def _exp(log_w: Tensor) -> Tensor:
    return log_w.clamp(max=LARGEST).exp()


def _of_sequences(log_w: Tensor, batch: TokenBatch, ratio: str) -> Tensor:
    """[S] log of the product, or of the geometric mean, of each sequence's w."""
    return segment_sum(log_w, batch) if ratio == "product" else segment_mean(log_w, batch)


@dataclass(frozen=True)
class TokenTruncate(Correction):
    """min(max(w, low), high) on every token."""

    low: float = 0.0
    high: float = 2.0

    def __post_init__(self):
        _check_range(self, self.low, self.high)

    @property
    def weighs(self) -> bool:
        return True

    def apply(self, weight, log_w, batch, everywhere):
        return weight * _exp(log_w.clamp(_log(self.low), _log(self.high)))


@dataclass(frozen=True)
class TokenMask(Correction):
    """w where low <= w <= high, else 0. weighted=False: 1 instead of w (to go with a truncation)."""

    low: float = 0.5
    high: float = 5.0
    weighted: bool = True

    def __post_init__(self):
        _check_range(self, self.low, self.high)

    @property
    def weighs(self) -> bool:
        return self.weighted

    def apply(self, weight, log_w, batch, everywhere):
        kept = torch.where(_within(log_w, self.low, self.high), weight, torch.zeros_like(weight))
        return kept * _exp(log_w) if self.weighted else kept


@dataclass(frozen=True)
class SequenceTruncate(Correction):
    """The sequence's ratio, truncated to [low, high], on each of its tokens."""

    low: float = 0.0
    high: float = 2.0
    ratio: str = "product"

    def __post_init__(self):
        _check_range(self, self.low, self.high)
        _check_choice(self, "ratio", RATIOS)

    @property
    def weighs(self) -> bool:
        return True

    def apply(self, weight, log_w, batch, everywhere):
        log_s = _of_sequences(log_w, batch, self.ratio).clamp(_log(self.low), _log(self.high))
        return weight * batch.spread(_exp(log_s))


@dataclass(frozen=True)
class SequenceMask(Correction):
    """Sequences whose ratio is out of [low, high] are dropped; the others weigh by it, by each token's w, or not."""

    low: float = 0.0
    high: float = 3.0
    ratio: str = "product"
    weight: str = "sequence"

    def __post_init__(self):
        _check_range(self, self.low, self.high)
        _check_choice(self, "ratio", RATIOS)
        _check_choice(self, "weight", ("sequence", "token", "none"))

    @property
    def weighs(self) -> bool:
        return self.weight != "none"

    def apply(self, weight, log_w, batch, everywhere):
        log_s = batch.spread(_of_sequences(log_w, batch, self.ratio))
        kept = torch.where(_within(log_s, self.low, self.high), weight, torch.zeros_like(weight))
        return kept * _exp({"sequence": log_s, "token": log_w, "none": torch.zeros_like(log_w)}[self.weight])


@dataclass(frozen=True)
class OutlierMask(Correction):
    """Sequences with any token's w out of [low, high] are dropped."""

    low: float = 1e-4
    high: float = 100.0

    def __post_init__(self):
        _check_range(self, self.low, self.high)

    def apply(self, weight, log_w, batch, everywhere):
        outliers = segment_sum((~_within(log_w, self.low, self.high)).double(), batch)
        return torch.where(batch.spread(outliers) == 0, weight, torch.zeros_like(weight))


@dataclass(frozen=True)
class DivergenceReject(Correction):
    """Drop what diverges by more than `level`: x = o - b, k1 = -x, k2 = x^2/2, k3 = e^x - 1 - x estimate KL(b || o).

    over: "token" judges each token; "sequence_mean", "sequence_sum", "sequence_max" whole sequences by their tokens'.
    low: also drop what is below it (k1 has two sides); None: nothing.
    """

    metric: str = "k3"
    over: str = "sequence_mean"
    level: float = 0.01
    low: float | None = None

    def __post_init__(self):
        _check_choice(self, "metric", ("k1", "k2", "k3"))
        _check_choice(self, "over", ("token", "sequence_mean", "sequence_sum", "sequence_max"))

    def apply(self, weight, log_w, batch, everywhere):
        value = {"k1": lambda x: -x, "k2": lambda x: 0.5 * x.square(), "k3": exp_above_tangent}[self.metric](log_w)
        if self.over == "sequence_max":
            least = torch.full((batch.num_segments,), -math.inf, dtype=value.dtype, device=value.device)
            value = batch.spread(least.index_reduce(0, batch.segment_ids, value, "amax"))
        elif self.over != "token":
            value = batch.spread((segment_sum if self.over == "sequence_sum" else segment_mean)(value, batch))
        kept = value <= self.level
        if self.low is not None:
            kept = kept & (value >= self.low)
        return torch.where(kept, weight, torch.zeros_like(weight))


@dataclass(frozen=True)
class M2PO(Correction):
    """Keep the tokens of smallest (o - b)^2, as many as have a mean below `threshold` (Zheng et al. 2025, 2510.01161).

    Over the whole step; tokens of equal size stay or go together, so that no order decides.
    """

    threshold: float = 0.04

    def __post_init__(self):
        if not self.threshold > 0:
            raise ValueError(f"threshold of M2PO must be positive, got {self.threshold}")

    def apply(self, weight, log_w, batch, everywhere):
        moment = log_w.square()
        ordered = everywhere(moment).sort().values
        means = ordered.cumsum(0) / torch.arange(1, ordered.shape[0] + 1, device=ordered.device)
        dropped = ordered[means >= self.threshold]  # the means ascend: these are the largest
        first = dropped[0] if dropped.shape[0] else torch.full_like(ordered.sum(), math.inf)
        return torch.where(moment < first, weight, torch.zeros_like(weight))


@dataclass(frozen=True)
class BatchNormalised(Correction):
    """The weight so far divided by its mean over every token (or every sequence's own mean) of the step."""

    over: str = "token"
    needs_rollout: ClassVar[bool] = False

    def __post_init__(self):
        _check_choice(self, "over", ("token", "sequence"))

    def apply(self, weight, log_w, batch, everywhere):
        own = weight if self.over == "token" else segment_mean(weight, batch)[batch.lengths > 0]
        every = everywhere(own)
        mean = every.sum() / max(every.shape[0], 1)
        return torch.where(mean > 0, weight / mean.clamp(min=torch.finfo(mean.dtype).tiny), weight)


@dataclass(frozen=True)
class OPSM(Correction):
    """Drop sequences of A < 0 with mean_t (b - l) > delta (DeepSeek-V3.2, arXiv:2512.02556, section 3.1, eq. 8-9).

    l is the current policy, so the loss needs whole sequences. b: rollout, or old log-probs where there are none.
    """

    delta: float = 1e-4
    scope: ClassVar[str] = "sequence"
    needs_rollout: ClassVar[bool] = False

    def keeps(self, stats, batch):
        sampled = batch.old_logprobs if batch.rollout_logprobs is None else batch.rollout_logprobs
        logprobs = stats.logprobs.detach()
        gap = torch.zeros_like(logprobs) if sampled is None else sampled - logprobs
        return (batch.token_advantages >= 0) | (batch.spread(segment_mean(gap, batch)) <= self.delta)


CORRECTIONS = {
    "token_truncate": TokenTruncate,
    "token_mask": TokenMask,
    "sequence_truncate": SequenceTruncate,
    "sequence_mask": SequenceMask,
    "outlier_mask": OutlierMask,
    "divergence_reject": DivergenceReject,
    "m2po": M2PO,
    "batch_normalised": BatchNormalised,
    "opsm": OPSM,
}


def check_corrections(corrections: tuple) -> None:
    """TypeError or ValueError for what cannot be composed."""
    for c in corrections:
        if not isinstance(c, Correction):
            known = ", ".join(kind.__name__ for kind in CORRECTIONS.values())
            raise TypeError(f"corrections must be instances of {known} (fastrl.losses.corrections); got {c!r}")
    weighing = [type(c).__name__ for c in corrections if c.weighs]
    if len(weighing) > 1:
        raise ValueError(
            f"{' and '.join(weighing)} both multiply by the ratio w: keep one, and let the others only drop "
            "(TokenMask(weighted=False), SequenceMask(weight='none'))"
        )


def step_weight(corrections: tuple[Correction, ...], batch: TokenBatch, everywhere: Everywhere) -> Tensor:
    """[T] float64: the constant weight of each token's policy term. `batch` is the whole step of this rank, compact.

    Raises: ValueError where a correction needs old or rollout log-probs that are not there.
    """
    weight = torch.ones(batch.targets.shape, dtype=torch.float64, device=batch.targets.device)
    log_w = None
    if any(c.needs_rollout for c in corrections):
        for name in ("rollout_logprobs", "old_logprobs"):
            if getattr(batch, name) is None:
                who = next(type(c).__name__ for c in corrections if c.needs_rollout)
                raise ValueError(
                    f"{who} weighs old against rollout log-probs and needs batch.{name} [T]; got None (score the "
                    "sampled tokens with the trainer's model before the update, and keep the sampler's log-probs)"
                )
        log_w = batch.old_logprobs.double() - batch.rollout_logprobs.double()
    for c in corrections:
        weight = c.apply(weight, log_w, batch, everywhere)
    return weight

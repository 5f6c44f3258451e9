"""Alignment by optimal transport: two samples sorted over the whole optimizer step and held against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.margin import RatioPairLoss, check_numbers, interleaved, log_loss, own_length, pairs
from fastrl.tokens import TokenBatch, TokenStats


def ranks(own: Tensor, everywhere: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """([n] place of each own value among those of all ranks, ties in rank order; the [n'] gathered values)."""
    every = everywhere(own)
    place = torch.argsort(torch.argsort(every, stable=True))
    if every.shape[0] == own.shape[0]:
        return place, every
    windows = every.unfold(0, own.shape[0], 1) if own.shape[0] else every[:0, None]
    start = int((windows == own).all(1).nonzero()[0]) if own.shape[0] else 0
    return place[start : start + own.shape[0]], every


@dataclass(frozen=True)
class AOT(RatioPairLoss):
    """Alignment by optimal transport, paired (Melnyk et al. 2024, with the logistic loss). Scope: batch.

    u: the policy's log pi(w) - log pi(l), v: the reference's; both sorted over the whole optimizer step, so that the
    i-th smallest u is held against the i-th smallest v, whatever micro-batch and rank they are in.
    """

    paper: ClassVar[str] = "Melnyk et al. 2024, arXiv:2406.05882, paired AOT"
    formula: ClassVar[str] = "-(1 - e) log sigma(beta (u_(i) - v_(i))) - e log sigma(-beta (u_(i) - v_(i)))"
    label_smoothing: float = 0.0
    scope: ClassVar[str] = "batch"
    unit: ClassVar[str] = "pair"
    needs_scores: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, label_smoothing=(0.0, 0.5, "[)"))
        if self.use_weighting:
            raise ValueError(
                f"{type(self).__name__} holds answers of different pairs against each other, so a pair has no weight: "
                "use_weighting must be False, got True"
            )

    def columns(self, batch: TokenBatch, stats: TokenStats, everywhere: Callable[[Tensor], Tensor]) -> dict:
        """per_sequence "aot_shift": v_i - v_(place of u_i), the same on both sequences of pair i."""
        reference = self.reference(batch)
        reference = torch.zeros_like(stats.logprobs) if reference is None else reference
        policy, fixed = (self._gap(x, batch) for x in (stats.logprobs, reference))
        place, _ = ranks(policy, everywhere)
        shift = fixed - everywhere(fixed).sort().values[place]
        return {"per_sequence": {"aot_shift": interleaved(shift, shift)}}

    def _gap(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        summed = self.summed(logprobs, batch)
        chosen, rejected = pairs(summed / own_length(batch, summed) if self.length_normalised else summed)
        return chosen - rejected

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        # chosen - rejected = u_i - v_i: the shift exchanges v_i for the one that u_i is held against.
        shift, _ = pairs(batch.sequence("aot_shift", "aot"))
        return self.link(self.beta * (chosen - rejected + shift.to(chosen.dtype)) - self.offset(batch))

    def link(self, margin: Tensor) -> Tensor:
        return log_loss(margin, self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """Alignment by optimal transport, unpaired: log-ratios of chosen and of rejected, each sorted. Scope: batch.

    Each chosen is held against the rejected of its own place and the other way round; a pair's value is its chosen's,
    and its rejected adds a gradient only, so that the sum over the step is the sum over places.
    """

    paper: ClassVar[str] = "Melnyk et al. 2024, arXiv:2406.05882, unpaired AOT"
    formula: ClassVar[str] = "-(1 - e) log sigma(beta (c_(i) - r_(i))) - e log sigma(-beta (c_(i) - r_(i)))"

    def columns(self, batch: TokenBatch, stats: TokenStats, everywhere: Callable[[Tensor], Tensor]) -> dict:
        """per_sequence "aot_partner": the log-ratio that each sequence is held against."""
        chosen, rejected = pairs(self.scores(stats, batch))
        chosen_place, every_chosen = ranks(chosen, everywhere)
        rejected_place, every_rejected = ranks(rejected, everywhere)
        partner = interleaved(every_rejected.sort().values[chosen_place], every_chosen.sort().values[rejected_place])
        return {"per_sequence": {"aot_partner": partner}}

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        below, above = (x.to(chosen.dtype) for x in pairs(batch.sequence("aot_partner", "aot_unpaired")))
        offset = self.offset(batch)
        value = self.link(self.beta * (chosen - below) - offset)
        slope = self.link(self.beta * (above - rejected) - offset)
        return value + slope - slope.detach()

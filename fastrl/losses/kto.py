"""Losses of single answers with a label, desirable or not; u: log-ratio of an answer to the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.margin import NOT_NEGATIVE, POSITIVE, Referenced, check_numbers, log_loss
from fastrl.tokens import TokenBatch, TokenStats


@dataclass(frozen=True)
class Unpaired(Referenced):
    """weight(label) * law: subclasses write `gain`, the argument of a sigmoid that grows as the answer gets better."""

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    scope: ClassVar[str] = "sequence"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, desirable_weight=NOT_NEGATIVE, undesirable_weight=NOT_NEGATIVE)

    def labels(self, batch: TokenBatch) -> Tensor:
        if batch.labels is None:
            raise ValueError(f"{type(self).__name__} needs batch.labels [S] (True = desirable); got None")
        return batch.labels.bool()

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        """per_sequence "label_share": the part of the step's sequences that have this one's label (for metrics)."""
        desirable = self.labels(batch)
        share = everywhere(desirable.double()).mean()
        return {"per_sequence": {"label_share": torch.where(desirable, share, 1 - share)}}

    def shift(self, batch: TokenBatch, like: Tensor) -> Tensor:
        """[S] what beta u is held against."""
        return torch.zeros_like(like)

    def penalty(self, gain: Tensor) -> Tensor:
        """[S] from the signed argument."""
        return (-gain).sigmoid()

    def weights(self, batch: TokenBatch, like: Tensor) -> Tensor:
        """[S]"""
        good, bad = like.new_tensor(self.desirable_weight), like.new_tensor(self.undesirable_weight)
        return torch.where(self.labels(batch), good, bad)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [S]
        gain = self.beta * self.scores(stats, batch)
        gain = gain - self.shift(batch, gain)
        return self.weights(batch, gain) * self.penalty(torch.where(self.labels(batch), gain, -gain))

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """[S]; TRL's names: means over the desirable ("chosen") and the undesirable ("rejected") answers.

        A step with answers of one label only has no mean of the other and no margin: those names are left out.
        """
        rewards, logps, desirable = self.rewards(stats, batch), self.summed(stats.logprobs, batch), self.labels(batch)
        share = batch.sequence("label_share", type(self).__name__).to(rewards.dtype)
        good, bad = (torch.where(of, 1 / share, torch.zeros_like(share)) for of in (desirable, ~desirable))
        made = {
            "rewards/chosen": rewards * good,
            "rewards/rejected": rewards * bad,
            "rewards/margins": rewards * (good - bad),
            "logps/chosen": logps * good,
            "logps/rejected": logps * bad,
        }
        if share.numel() == 0 or not bool((share == 1).all()):
            return made
        kept = "chosen" if bool(desirable.all()) else "rejected"
        return {name: value for name, value in made.items() if name.endswith(kept)}


@dataclass(frozen=True)
class KTO(Unpaired):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 7). Scope: sequence.

    desirable: w_D (1 - sigma(beta (u - z))), undesirable: w_U (1 - sigma(beta (z - u))). z = max(0, mean over the whole
    step of batch.per_sequence["kl"]), the log-ratios [S] of prompts with other prompts' answers, without gradient; a
    NaN there is an answer without a mismatch and stays out of the mean.
    """

    paper: ClassVar[str] = "Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7"
    formula: ClassVar[str] = "w_D (1 - sigma(beta (u - z))) or w_U (1 - sigma(beta (z - u)))"

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        """per_sequence "kto_z": z on every sequence."""
        every = everywhere(batch.sequence("kl", "kto").detach())
        known = ~every.isnan()
        z = torch.where(known, every, 0).sum() / known.sum().clamp(min=1)
        made = super().columns(batch, stats, everywhere)
        made["per_sequence"]["kto_z"] = z.clamp(min=0).expand(batch.num_segments)
        return made

    def shift(self, batch: TokenBatch, like: Tensor) -> Tensor:
        return self.beta * batch.sequence("kto_z", "kto").to(like.dtype)

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {**super().metrics(stats, batch), "kl": batch.sequence("kto_z", "kto")}


@dataclass(frozen=True)
class APOZeroUnpaired(Unpaired):
    """Anchored preference optimisation of single answers (D'Oosterlinck et al. 2024, eq. 7). Scope: sequence."""

    paper: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7"
    formula: ClassVar[str] = "w_D (1 - sigma(beta u)) or w_U sigma(beta u)"


@dataclass(frozen=True)
class BCO(Unpaired):
    """Binary classifier optimisation (Jung et al. 2024). Scope: batch.

    -log sigma(beta u - delta) or -log sigma(delta - beta u). delta: given, or of this step alone: the middle between
    the mean rewards of its desirable and of its undesirable answers, without gradient. The paper's delta is a running
    mean over steps, which the caller keeps and gives.
    density_ratios=True (underlying distribution matching): an undesirable answer weighs
    clamp(batch.per_sequence["density_ratio"], min_density_ratio, max_density_ratio), p / (1 - p) of a classifier that
    tells prompts of desirable answers (p) from those of undesirable ones.
    """

    paper: ClassVar[str] = "Jung et al. 2024, arXiv:2404.04656"
    formula: ClassVar[str] = "-log sigma(beta u - delta) or -log sigma(delta - beta u)"
    delta: float | None = None
    density_ratios: bool = False
    min_density_ratio: float = 0.5
    max_density_ratio: float = 10.0
    scope: ClassVar[str] = "batch"
    unit: ClassVar[str] = "sequence"
    needs_scores: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, min_density_ratio=NOT_NEGATIVE, max_density_ratio=POSITIVE)
        if self.min_density_ratio > self.max_density_ratio:
            raise ValueError(
                f"min_density_ratio {self.min_density_ratio} must not exceed max_density_ratio {self.max_density_ratio}"
            )

    def columns(self, batch: TokenBatch, stats: TokenStats, everywhere: Callable[[Tensor], Tensor]) -> dict:
        """per_sequence "bco_delta": delta on every sequence."""
        rewards = self.rewards(stats, batch)
        delta = rewards.new_tensor(self.delta) if self.delta is not None else self._middle(rewards, batch, everywhere)
        made = super().columns(batch, stats, everywhere)
        made["per_sequence"]["bco_delta"] = delta.expand(batch.num_segments)
        return made

    def _middle(self, rewards: Tensor, batch: TokenBatch, everywhere: Callable[[Tensor], Tensor]) -> Tensor:
        rewards, desirable = everywhere(rewards), everywhere(self.labels(batch))
        means = [rewards[of].mean() for of in (desirable, ~desirable) if of.any()]
        return torch.stack(means).mean() if means else rewards.new_zeros(())

    def shift(self, batch: TokenBatch, like: Tensor) -> Tensor:
        return batch.sequence("bco_delta", "bco").to(like.dtype)

    def penalty(self, gain: Tensor) -> Tensor:
        return log_loss(gain)

    def weights(self, batch: TokenBatch, like: Tensor) -> Tensor:
        weights = super().weights(batch, like)
        if not self.density_ratios:
            return weights
        ratio = batch.sequence("density_ratio", "bco").to(like.dtype)
        ratio = ratio.clamp(self.min_density_ratio, self.max_density_ratio)
        return torch.where(self.labels(batch), weights, weights * ratio)


UNPAIRED = {"kto": KTO, "apo_zero_unpaired": APOZeroUnpaired, "bco": BCO}

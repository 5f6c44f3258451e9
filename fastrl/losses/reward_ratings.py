"""Reward models from lists, ratings and labels: losses on the scores of sequences (HeadStats.scores)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.heads import column_of, gaussian_nll, log_variance_of, scores_of, softplus
from fastrl.objective import group_index, num_groups
from fastrl.tokens import HeadStats, TokenBatch


# -- lists -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PlackettLuceReward:
    """Likelihood of a ranking, best first: -sum_k [r_k - logsumexp over those ranked k or worse]. Scope: group.

    batch.rewards rank a group's sequences (higher is better); equals compete with each other (Breslow's rule), so that
    the order in which they come says nothing. A sequence whose rank is NaN is left out.
    """

    paper: ClassVar[str] = "Plackett 1975; Ouyang et al. 2022 for K answers a prompt; Xia et al. 2008, ListMLE"
    formula: ClassVar[str] = "-sum_k [r_k - log sum_{j ranked k or worse} e^(r_j)]"
    scope: ClassVar[str] = "group"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [G]
        scores, ranks, group = scores_of(stats), column_of(batch, "rewards"), group_index(batch)
        same = group[:, None] == group[None, :]
        ranked = ~ranks.isnan()
        mine = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        rivals = mine | (same & (ranks[None, :] <= ranks[:, None]))  # [S, S]
        lost = scores[None, :].masked_fill(~rivals, -math.inf).logsumexp(1) - scores
        lost = torch.where(ranked, lost, torch.zeros_like(lost))
        return lost.new_zeros(num_groups(batch)).index_add(0, group, lost)


# -- ratings and labels ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RewardRegression:
    """(r - y)^2 of each sequence's score and its rating batch.rewards. Scope: sequence."""

    paper: ClassVar[str] = "Wang et al. 2024, HelpSteer2, arXiv:2406.08673 (one attribute)"
    formula: ClassVar[str] = "(r - y)^2"
    scope: ClassVar[str] = "sequence"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [S]
        return (scores_of(stats) - column_of(batch, "rewards").to(stats.scores.dtype)).square()

    def metrics(self, stats: HeadStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"mean_reward": stats.scores}


@dataclass(frozen=True)
class MultiAttribute:
    """Mean over the attributes that were rated of (r_k - y_k)^2. Scope: sequence.

    scores [S, K]; ratings per_sequence["attributes"] [S, K], NaN where an attribute was not rated.
    """

    paper: ClassVar[str] = "Wang et al. 2024, ArmoRM, arXiv:2406.12845, eq. 1"
    formula: ClassVar[str] = "mean over rated k of (r_k - y_k)^2"
    scope: ClassVar[str] = "sequence"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [S]
        scores, ratings = scores_of(stats, 0), column_of(batch, "attributes")
        if ratings.shape != scores.shape:
            raise ValueError(f"attributes must be {list(scores.shape)} like the scores, got {list(ratings.shape)}")
        rated = ~ratings.isnan()
        gap = torch.where(rated, scores - ratings.nan_to_num(0.0).to(scores.dtype), torch.zeros_like(scores))
        return gap.square().sum(1) / rated.sum(1).clamp(min=1)


@dataclass(frozen=True)
class QuantileReward:
    """Pinball loss of K quantiles of a rating, at levels (k + 1/2) / K. Scope: sequence.

    u = y - q_k: mean over k of max(level u, (level - 1) u). scores [S, K], y = batch.rewards.
    """

    paper: ClassVar[str] = "Dorka 2024, quantile reward models, arXiv:2409.10164"
    formula: ClassVar[str] = "mean_k max(a_k u_k, (a_k - 1) u_k), u_k = y - q_k, a_k = (k + 1/2) / K"
    scope: ClassVar[str] = "sequence"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [S]
        quantiles = scores_of(stats, 0)
        k = quantiles.shape[1]
        levels = (torch.arange(k, device=quantiles.device, dtype=quantiles.dtype) + 0.5) / k
        u = column_of(batch, "rewards").to(quantiles.dtype)[:, None] - quantiles
        return torch.where(u >= 0, levels * u, (levels - 1) * u).mean(1)


@dataclass(frozen=True)
class GaussianReward:
    """Gaussian negative log-likelihood of a rating under a mean-variance head. Scope: sequence."""

    mean_variance: ClassVar[bool] = True
    paper: ClassVar[str] = "Nix and Weigend 1994; Lou et al. 2024, uncertainty-aware reward model, arXiv:2410.00847"
    formula: ClassVar[str] = "(log s^2 + (r - y)^2 / s^2) / 2"
    scope: ClassVar[str] = "sequence"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [S]
        gap = scores_of(stats) - column_of(batch, "rewards").to(stats.scores.dtype)
        return gaussian_nll(gap, log_variance_of(stats))


@dataclass(frozen=True)
class Verifier:
    """Is the answer right? Binary cross-entropy of each score with batch.labels [S]. Scope: sequence."""

    paper: ClassVar[str] = "Cobbe et al. 2021, arXiv:2110.14168, section 4.2"
    formula: ClassVar[str] = "-log sigma(r) if right else -log sigma(-r)"
    scope: ClassVar[str] = "sequence"
    reads: ClassVar[str] = "scores"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [S]
        scores, right = scores_of(stats), column_of(batch, "labels").bool()
        return softplus(torch.where(right, -scores, scores))

    def metrics(self, stats: HeadStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"accuracy": ((stats.scores > 0) == batch.labels.bool()).float(), "mean_reward": stats.scores}


RATINGS = {
    "plackett_luce_reward": PlackettLuceReward,
    "reward_regression": RewardRegression,
    "multi_attribute": MultiAttribute,
    "quantile_reward": QuantileReward,
    "gaussian_reward": GaussianReward,
    "verifier": Verifier,
}

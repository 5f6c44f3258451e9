"""Policy losses that act on the few tokens whose covariance drives the entropy down (Cui et al. 2025, 2505.22617).

cov_t = (A_t - mean A)(log pi_t - mean log pi), means over all tokens of the optimizer step: the step is scored first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.kl import safe_exp
from fastrl.losses.policy import PolicyLoss, PPOClip, check_numbers, log_ratio
from fastrl.losses.selection import by_lot, count_of, covariance, largest
from fastrl.tokens import TokenBatch, TokenStats


@dataclass(frozen=True)
class ClipCov(PPOClip):
    """ppo_clip without a few of the tokens of high covariance: `fraction` of all tokens, drawn among those unclipped
    ones with cov_low < cov < cov_high, lose their policy term. The draw is a function of the tokens themselves."""

    paper: ClassVar[str] = "Cui et al. 2025, arXiv:2505.22617, eq. 10-11"
    formula: ClassVar[str] = "ppo_clip, 0 on a random fraction of the tokens with cov_low < cov < cov_high"
    fraction: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    reads_scores: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction of the tokens must be in (0, 1], got {self.fraction}")
        if not self.cov_low < self.cov_high:
            raise ValueError(f"cov_low must be below cov_high, got {self.cov_low} and {self.cov_high}")

    @property
    def weighted(self) -> bool:
        return True

    def step_columns(self, batch, stats, everywhere):
        advantages = batch.token_advantages
        cov = covariance(advantages, stats.logprobs, everywhere)
        above, below, dual = self.bounds(log_ratio(stats, batch), advantages)
        candidates = (cov > self.cov_low) & (cov < self.cov_high) & ~(above | below | dual)
        tokens = everywhere(cov).shape[0]
        drawn = by_lot(candidates, count_of(self.fraction, tokens), batch, everywhere)
        return {"per_token": {"kept": ~drawn}}


@dataclass(frozen=True)
class KLCov(PolicyLoss):
    """-r A without a clip, + cov_coef |d| on the `fraction` of tokens of highest covariance."""

    paper: ClassVar[str] = "Cui et al. 2025, arXiv:2505.22617, eq. 12-13"
    formula: ClassVar[str] = "-r A + cov_coef |d| 1[cov among the largest fraction]"
    fraction: float = 2e-4
    cov_coef: float = 0.1
    reads_scores: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "cov_coef")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction of the tokens must be in (0, 1], got {self.fraction}")

    def step_columns(self, batch, stats, everywhere):
        cov = covariance(batch.token_advantages, stats.logprobs, everywhere)
        return {"per_token": {"high_covariance": largest(cov, self.fraction, everywhere)}}

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        d = log_ratio(stats, batch)
        held = batch.token("high_covariance", "kl_cov").bool()
        pull = torch.where(held, self.cov_coef * d.abs(), torch.zeros_like(d))
        return -safe_exp(d) * batch.token_advantages + pull

    def metrics(self, stats, batch):
        return {**super().metrics(stats, batch), "ratio": safe_exp(log_ratio(stats, batch))}


COVARIANCE = {"clip_cov": ClipCov, "kl_cov": KLCov}

"""Policy losses that regress a sequence's log-ratio onto its advantage. S = sum_t log pi, F and O the reference's and
the old policy's sums, R = reward. Each gives its sequence's value on every token of it: under its own aggregation,
the mean over sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.policy import PolicyLoss, check_numbers, log_ratio
from fastrl.tokens import TokenBatch, TokenStats, segment_mean, segment_sum


@dataclass(frozen=True)
class A2PO(PolicyLoss):
    """(beta2 (S - F) - (R - V*))^2 (A*-PO, Brantley et al. 2025): the implicit reward onto the optimal advantage.

    V* = beta1 log mean exp(R / beta1) over completions of the reference: batch.per_sequence["optimal_value"] [S], or,
    without it, over the prompt's own completions in the step (group_ids). Reads rewards; one that is NaN adds 0.
    """

    paper: ClassVar[str] = "Brantley et al. 2025, arXiv:2505.20686, eq. 4-6"
    formula: ClassVar[str] = "(beta2 (S - F) - (R - V*))^2, V* = beta1 log mean exp(R / beta1)"
    beta1: float = 0.5
    beta2: float = 1e-3
    own_scope: ClassVar[str] = "sequence"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "beta1", "beta2", above=0)

    def step_columns(self, batch, stats, everywhere):
        if "optimal_value" in batch.per_sequence:
            return {"per_sequence": {"optimal_value": batch.per_sequence["optimal_value"]}}
        if batch.rewards is None or batch.group_ids is None:
            raise ValueError(
                "a2po needs batch.rewards [S] and, for V*, batch.per_sequence['optimal_value'] [S] or batch.group_ids "
                f"[S]; rewards are {_there(batch.rewards)}, group_ids {_there(batch.group_ids)}"
            )
        value = optimal_value(batch.rewards, batch.group_ids, self.beta1)
        return {"per_sequence": {"optimal_value": value}}

    def inert(self, batch: TokenBatch) -> Tensor | None:
        return None

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        if batch.ref_logprobs is None or batch.rewards is None:
            raise ValueError(
                "a2po needs batch.ref_logprobs [T] and batch.rewards [S]; "
                f"they are {_there(batch.ref_logprobs)} and {_there(batch.rewards)}"
            )
        gained = self.beta2 * segment_sum(stats.logprobs - batch.ref_logprobs, batch)
        target = (batch.rewards.double() - batch.sequence("optimal_value", "a2po").double()).to(gained.dtype)
        scored = ~torch.isnan(target)
        residual = gained - torch.where(scored, target, torch.zeros_like(target))
        return batch.spread(torch.where(scored, residual.square(), torch.zeros_like(residual)))


def _there(x) -> str:
    return "missing" if x is None else "there"


def optimal_value(rewards: Tensor, group_ids: Tensor, beta1: float) -> Tensor:
    """[S] float64 beta1 log mean exp(R / beta1) over each one's group; NaN rewards are left out.

    A group lies on one rank whole, and its number says nothing on another.
    """
    every = rewards.double() / beta1
    known, index = torch.unique(group_ids, return_inverse=True)
    scored = ~torch.isnan(every)
    filled = torch.where(scored, every, torch.full_like(every, -math.inf))
    top = torch.full((known.shape[0],), -math.inf, dtype=every.dtype, device=every.device)
    top = top.index_reduce(0, index, filled, "amax").nan_to_num(neginf=0.0)
    total = torch.zeros_like(top).index_add(0, index, (filled - top[index]).exp())
    count = torch.zeros_like(top).index_add(0, index, scored.double())
    value = beta1 * (top + torch.log(total) - torch.log(count))  # a group without any score: NaN, as its rewards
    return value[index]


@dataclass(frozen=True)
class OPMD(PolicyLoss):
    """Online policy mirror descent (Kimi k1.5; Trinity-RFT), A = R - mean R of the group, S - O = sum_t d.

    form="squared": (A - tau (S - O))^2. form="linear": (-A S + tau/2 (S - O)^2) / (1 + tau), the same gradient but for
    its scale 2 tau against 1 / (1 + tau).
    """

    paper: ClassVar[str] = "Kimi team 2025, arXiv:2501.12599, eq. 2-3; Trinity-RFT, arXiv:2505.17826"
    formula: ClassVar[str] = "(A - tau (S - O))^2, or (-A S + tau/2 (S - O)^2) / (1 + tau)"
    tau: float = 1.0
    form: str = "squared"
    own_scope: ClassVar[str] = "sequence"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "tau", above=0)
        if self.form not in ("squared", "linear"):
            raise ValueError(f"form of opmd is {self.form!r}; expected squared or linear")

    def inert(self, batch: TokenBatch) -> Tensor | None:
        return None

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        moved = segment_sum(log_ratio(stats, batch), batch)
        advantages = segment_mean(batch.token_advantages, batch)
        if self.form == "squared":
            return batch.spread((advantages - self.tau * moved).square())
        gained = advantages * segment_sum(stats.logprobs, batch)
        return batch.spread((0.5 * self.tau * moved.square() - gained) / (1 + self.tau))


REGRESSION = {"a2po": A2PO, "opmd": OPMD}

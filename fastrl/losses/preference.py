"""Preference losses on interleaved pairs: sequences 2p and 2p+1 are chosen and rejected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.tokens import TokenBatch, TokenStats, segment_sum


def pairs(per_sequence: Tensor) -> tuple[Tensor, Tensor]:
    """[S] -> chosen [P], rejected [P]."""
    if per_sequence.shape[0] % 2:
        raise ValueError(
            f"pairs are interleaved chosen, rejected: the batch has an odd {per_sequence.shape[0]} sequences"
        )
    return per_sequence[0::2], per_sequence[1::2]


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7). Scope: pair.

    M = (log pi - log ref)(chosen) - (log pi - log ref)(rejected), summed over completion tokens;
    loss = -(1-e) log sigma(beta M) - e log sigma(-beta M), e = label_smoothing (cDPO, Mitchell 2023).
    reference_free=True takes log ref = 0.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False
    scope: ClassVar[str] = "pair"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    def log_ratios(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [S]
        if self.reference_free:
            return segment_sum(stats.logprobs, batch)
        if batch.ref_logprobs is None:
            raise ValueError(
                "dpo needs batch.ref_logprobs [T]; got None (score with the reference or reference_free=True)"
            )
        return segment_sum(stats.logprobs - batch.ref_logprobs, batch)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [P]
        chosen, rejected = pairs(self.log_ratios(stats, batch))
        margin = self.beta * (chosen - rejected)
        return -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """[P] values of each metric; TRL's names."""
        chosen, rejected = pairs(self.beta * self.log_ratios(stats, batch))
        logps_chosen, logps_rejected = pairs(segment_sum(stats.logprobs, batch))
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": logps_chosen,
            "logps/rejected": logps_rejected,
        }

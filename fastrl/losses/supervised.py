"""Supervised fine-tuning losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastrl.tokens import TokenBatch, TokenStats


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood of the target, -log pi(y_t): c_t = -1. Scope: token."""

    scope: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "token_mean"

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -stats.logprobs

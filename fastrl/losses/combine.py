"""Sums of losses: several objectives on the same batch, each with its own weight and aggregation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.objective import Objective, mean_metrics, outputs_of, scope_of, unit_weights, value_of, weighted_sum, widest
from fastrl.tokens import HeadStats, TokenBatch, TokenStats


@dataclass(frozen=True)
class Sum:
    """sum_k weight_k loss_k, every term aggregated by its own rule (MPO, Wang et al. 2024: preference, quality, NLL).

    terms: (weight, objective) pairs. Its value is a scalar that already carries the batch's global counts.
    """

    terms: tuple[tuple[float, Objective], ...]
    unit: ClassVar[str] = "total"

    def __post_init__(self):
        if not self.terms:
            raise ValueError("a sum of losses needs at least one term")

    @property
    def scope(self) -> str:
        """The widest of the terms', and what a token's weight needs: its whole sequence's or group's length."""
        whole = {"sequence_mean_token_mean": "sequence", "prompt_mean": "group"}
        weighed = [whole.get(getattr(o, "aggregate", None), "token") for _, o in self.terms]
        return widest([scope_of(o) for _, o in self.terms] + weighed)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for _, o in self.terms for n in outputs_of(o) if n != "logprobs"))

    @property
    def needs_reference(self) -> bool:
        return any(getattr(o, "needs_reference", True) for _, o in self.terms)

    @property
    def needs_scores(self) -> bool:
        return any(getattr(o, "needs_scores", False) for _, o in self.terms)

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        """What each term takes from the whole step. Raises ValueError if two terms give one name two meanings."""
        made: dict[str, dict[str, Tensor]] = {"per_token": {}, "per_sequence": {}}
        for _, objective in self.terms:
            make = getattr(objective, "columns", None)
            for where, named in (make(batch, stats, everywhere) if make else {}).items():
                for name, x in named.items():
                    if name in made[where] and not torch.equal(made[where][name], x):
                        raise ValueError(f"two terms of the sum need different values of the column {name!r}")
                    made[where][name] = x
        return made

    @property
    def reads(self) -> str:
        """What a head's outputs are called by these terms ("scores", "values"); empty where they read log-probs."""
        return next((o.reads for _, o in self.terms if getattr(o, "reads", "")), "")

    def __call__(self, stats: TokenStats | HeadStats, batch: TokenBatch) -> Tensor:  # scalar
        total = next(x for f in fields(stats) if (x := getattr(stats, f.name)) is not None).sum() * 0
        for weight, objective in self.terms:
            weights = unit_weights(objective, batch)
            value = value_of(objective, stats, batch, weights.shape[0] if weights.dim() else None)
            total = total + weight * weighted_sum(value, weights)
        return total

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """The terms' metrics, means already."""
        made: dict[str, Tensor] = {}
        for _, objective in self.terms:
            made = {**mean_metrics(objective, stats, batch), **made}
        return made

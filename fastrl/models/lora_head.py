"""PEFT's LoRA layer around an LM head, callable as the head itself is. Imported only where PEFT is at work."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from fastrl.models.head import LogitTransform, fused_head
from fastrl.models.linear import linear_form
from fastrl.objective import LossOutput, Objective
from fastrl.tokens import TokenBatch, TokenStats


class LoraHead(LoraLinear):
    """The class that a peft.tuners.lora.Linear over an LMHead is given: the same parameters, names and plain calls.

    The fused operators get [W | B] and [h | s A h] (fastrl.models.linear): a copy of the head, [V, H + r], is made in
    each call, and its gradient is that large too.
    """

    takes_objective = True

    @property
    def transform(self) -> LogitTransform:
        return self.get_base_layer().transform

    def forward(
        self,
        hidden: Tensor,
        *args: Any,
        targets: Tensor | None = None,
        objective: Objective | None = None,
        batch: TokenBatch | None = None,
        **options: Any,
    ) -> Tensor | TokenStats | LossOutput:
        if targets is None and objective is None:
            return super().forward(hidden, *args, **options)
        law = self.transform
        form = linear_form(self, hidden if law.before == 1.0 else hidden * law.before)
        law = dataclasses.replace(law, before=1.0)  # a bias of the adapter is not scaled with the input
        return fused_head(*form, law, targets=targets, objective=objective, batch=batch, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] logits of final hidden states, formed: for checks on a few rows."""
        law = self.transform
        return law.after(super().forward(hidden.to(self.weight.dtype) * law.before))

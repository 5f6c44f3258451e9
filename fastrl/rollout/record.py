"""The log-prob of every drawn token, taken while `generate` holds the logits of its step: never more than [B, V]."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


class Record:
    """Hooks for one call of `generate`: the first scales a step's logits, the second sees which tokens were drawn.

    The temperature is applied here and not by `generate`, so that what is recorded is what is drawn from, in whatever
    order `generate` runs its processors. A row that has ended goes on being recorded; the caller cuts it.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.scores: Tensor | None = None  # [B, V] fp32, of the step under way
        self.steps: list[Tensor] = []  # [B] each

    def hooks(self) -> dict:
        """Keywords for `generate`."""
        return {
            "logits_processor": LogitsProcessorList([_Scale(self)]),
            "stopping_criteria": StoppingCriteriaList([_Drawn(self)]),
        }

    def logprobs(self) -> list[list[float]]:
        """One list for each row, a number for each step."""
        return torch.stack(self.steps, 1).tolist()


class _Scale(LogitsProcessor):
    def __init__(self, record: Record):
        self.record = record

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        temperature = self.record.temperature
        self.record.scores = scores if temperature == 1 else scores / temperature
        return self.record.scores


class _Drawn(StoppingCriteria):
    """Stops nothing."""

    def __init__(self, record: Record):
        self.record = record

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        made, self.record.scores = self.record.scores, None
        drawn = made.gather(1, input_ids[:, -1:].to(made.device))[:, 0]
        self.record.steps.append(drawn - made.logsumexp(1))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

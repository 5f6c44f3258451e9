"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastrl.train.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step; a pure function, so a resumed run cannot replay its warmup. As transformers'."""

    kind: str
    peak: float
    warmup: int
    total: int

    @classmethod
    def from_config(cls, config: TrainConfig, total_steps: int) -> Schedule:
        warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * total_steps
        if config.warmup_ratio:
            warmup = config.warmup_ratio * total_steps
        return cls(config.lr_scheduler_type, config.learning_rate, math.ceil(warmup), total_steps)

    def lr(self, step: int) -> float:
        """The rate of the update made when `step` updates are done (0, 1, ...)."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        if self.kind == "linear":
            return self.peak * (1.0 - progress)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak

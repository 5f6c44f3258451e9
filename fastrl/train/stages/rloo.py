"""RLOO: completions as single actions, each against the mean of its siblings, the KL as a price in the reward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import losses
from fastrl.advantages import estimate
from fastrl.data import Rows
from fastrl.data.types import Sample
from fastrl.models import PackedModel
from fastrl.train.metrics import MetricsLogger
from fastrl.train.stages import grpo
from fastrl.train.stages.base import Setting
from fastrl.train.stages.grpo_objective import corrections_of, reads_rollout


class RLOOStage(grpo.GRPOStage):
    """GRPO's loop; R - beta sum_t (log pi_old - log pi_ref) over leave-one-out baselines (Ahmadian et al. 2024)."""

    def make_objective(self):
        return losses.get("rloo", **self.config.numbers, corrections=corrections_of(self.config))

    def scored_by(self) -> dict[str, PackedModel]:
        setting = self.setting
        if setting.reference is None:
            old = self.config.updates_per_generation > 1 or reads_rollout(self.objective)
            return {"old_logprobs": setting.model} if old else {}
        return {"ref_logprobs": setting.reference, "old_logprobs": setting.model}

    def advantages(
        self, samples: list[Sample], rewards: Tensor, groups: Tensor, known: dict[str, Tensor], log: MetricsLogger
    ) -> Tensor:
        config, rewards = self.config, rewards.double()
        if config.reward_clip_range is not None:
            rewards = rewards.clamp(*config.reward_clip_range)
        if config.beta:
            kl = torch.tensor([log_ratio(s) for s in samples], dtype=torch.float64)
            log.add_mean({"kl": kl.sum() / max(1, sum(s.num_trained for s in samples))})  # of a token, as TRL's
            rewards = rewards - config.beta * kl
        return estimate("rloo", rewards, groups, normalise=config.normalize_advantages)


def log_ratio(sample: Sample) -> float:
    """log pi_old - log pi_ref of the whole completion (k1, unbiased); the loss needs the reference no more."""
    ref = sample.fields.pop("ref_logprobs")
    return sum(a - b for a, b in zip(sample.fields["old_logprobs"], ref, strict=True))


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> RLOOStage:
    return grpo.build(setting, train, test, notes, RLOOStage)

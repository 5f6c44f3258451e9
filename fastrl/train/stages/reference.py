"""Stages with a reference model: it may be let go once it has scored the dataset, or move after the policy."""

from __future__ import annotations

import gc

import torch

from fastrl.data.types import Sample
from fastrl.models import PackedModel
from fastrl.train.metrics import MetricsLogger
from fastrl.train.parallel import reshard
from fastrl.train.stages.base import DatasetStage, Setting, give_logprobs
from fastrl.train.step import Forward, MicroBatch


class ReferenceStage(DatasetStage):
    """steps: batches collected so far; synced: how many of them the reference has followed (sync_ref_model)."""

    def __init__(self, setting: Setting, items: list[list[Sample]], held_out: list[list[Sample]]):
        super().__init__(setting, items, held_out)
        self.steps = self.synced = 0
        self.how = Forward(1.0, ("entropy",), setting.autocast, setting.config.debug_checks)

    def collect(self, log: MetricsLogger) -> list[MicroBatch]:
        self.follow()
        self.steps += 1
        return super().collect(log)

    def evaluate(self, log: MetricsLogger) -> dict[str, float]:
        self.follow()
        return super().evaluate(log)

    def follow(self) -> None:
        """Move the reference where a move is due (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656)."""
        config = self.setting.config
        due = config.sync_ref_model and self.steps % config.ref_model_sync_steps == 0
        if due and self.synced < self.steps:
            mix(self.setting.reference, self.setting.model, config.ref_model_mixup_alpha)
            self.synced = self.steps

    def precompute(self) -> None:
        """Attach the reference's log-probs to every sample and let the reference go."""
        for split in (self.items, self.held_out):
            samples = [sample for item in split for sample in item]
            if samples:
                give_logprobs(self.setting, self.setting.reference, "ref_logprobs", samples, self.how, unit=self.unit)
        self.setting.reference = None
        gc.collect()  # sharded modules refer to each other
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "steps": self.steps, "synced": self.synced}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.steps, self.synced = state.get("steps", 0), state.get("synced", 0)


@torch.no_grad()
def mix(reference: PackedModel, policy: PackedModel, alpha: float) -> None:
    """reference <- alpha policy + (1 - alpha) reference, in place."""
    for model in (reference, policy):
        reshard(model)
    own = dict(policy.named_parameters())
    for name, x in reference.named_parameters():
        x.lerp_(own[name].detach().to(x.dtype), alpha)

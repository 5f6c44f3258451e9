"""A policy and its critic as one module: one optimizer, one checkpoint, one loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrl.data.prefix import Layout
from fastrl.models.packed import PackedModel
from fastrl.models.score import ScoreModel
from fastrl.objective import LossOutput, Objective
from fastrl.tokens import TokenBatch

CRITIC = "value_model"  # the critic's folder inside the policy's directory


class ActorCritic(nn.Module):
    """loss = policy loss + vf_coef * value loss, over the same packed rows.

    actor: a causal LM. critic: a head of one output, read where the actor's rows are: hidden[t], which predicts token
    t+1, is the state in which that token is chosen. Calls without an objective go to the actor alone.
    """

    def __init__(self, actor: PackedModel, critic: ScoreModel, value_objective: Objective, vf_coef: float):
        super().__init__()
        if critic.head.out_features != 1:
            raise ValueError(f"the critic's head has {critic.head.out_features} outputs; a value is one number")
        self.actor, self.critic = actor, critic
        self.value_objective, self.vf_coef = value_objective, vf_coef

    @property
    def model(self) -> nn.Module:
        """transformers' policy, which samples and is saved."""
        return self.actor.model

    @property
    def notes(self) -> list[str]:
        return [*self.actor.notes, *(f"critic: {note}" for note in self.critic.notes)]

    @property
    def context_length(self) -> int | None:
        known = [n for n in (self.actor.context_length, self.critic.context_length) if n is not None]
        return min(known, default=None)

    @property
    def shares(self) -> bool:
        """Whether both read completions that share a prompt."""
        return self.actor.shares and self.critic.shares

    def gradient_checkpointing_enable(self) -> None:
        self.actor.gradient_checkpointing_enable()
        self.critic.gradient_checkpointing_enable()

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | Layout,
        *,
        rows: Tensor | None = None,
        objective: Objective | None = None,
        batch: TokenBatch | None = None,
        **head_call: Any,
    ) -> Any:
        """As PackedModel; with an objective the joint LossOutput, whose stats are the policy's.

        batch carries what both read: advantages, old_logprobs, per_token["returns"] and ["old_values"]. Metrics carry
        TRL's names.
        """
        if objective is None:
            return self.actor(input_ids, cu_seqlens, rows=rows, **head_call)
        checks = head_call.get("debug_checks", False)
        policy = self.actor(input_ids, cu_seqlens, rows=rows, objective=objective, batch=batch, **head_call)
        value = self.critic(
            input_ids, cu_seqlens, rows=rows, objective=self.value_objective, batch=batch, debug_checks=checks
        )
        parts = {"loss/policy_avg": policy.loss.detach(), "loss/value_avg": value.loss.detach()}
        metrics = {**policy.metrics, **value.metrics, **parts, **_as_trl(policy, batch)}
        return LossOutput(policy.loss + self.vf_coef * value.loss, metrics, policy.stats)


def _as_trl(policy: LossOutput, batch: TokenBatch) -> dict[str, Tensor]:
    """The policy's metrics under the names of TRL's PPO trainer."""
    names = {"clip_ratio/region_mean": "policy/clipfrac_avg", "entropy": "policy/entropy_avg", "ratio": "val/ratio"}
    made = {new: policy.metrics[old] for old, new in names.items() if old in policy.metrics}
    if batch.old_logprobs is not None and policy.stats is not None:
        moved = torch.where(batch.trained, policy.stats.logprobs - batch.old_logprobs, 0.0)
        count = batch.with_counts().num_tokens
        count = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
        made["policy/approxkl_avg"] = 0.5 * moved.square().sum() / count
    return made

"""What the flags of GRPO and RLOO say about the loss: policy term, corrections, KL to the reference, entropy bonus."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastrl import losses
from fastrl.losses.corrections import CORRECTIONS, OPSM, Correction
from fastrl.losses.distillation import ReverseKL
from fastrl.losses.policy import PolicyLoss
from fastrl.objective import Objective
from fastrl.tokens import TokenBatch, TokenStats
from fastrl.train.config import GRPOConfig
from fastrl.train.configs.online import OnlineConfig
from fastrl.train.flags import ConfigError


@dataclass(frozen=True)
class FullKL(ReverseKL):
    """KL(policy || reference) over the whole vocabulary at every token, averaged as the policy loss beside it is."""

    aggregate: str | Callable[[TokenBatch], Tensor] = "token_mean"
    max_length: int | None = None

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"kl": stats.divergence}


@dataclass(frozen=True)
class EntropyBonus:
    """-H of every token, averaged over tokens whatever the policy loss beside it is averaged over."""

    scope: ClassVar[str] = "token"
    unit: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "token_mean"
    outputs: ClassVar[tuple[str, ...]] = ("entropy",)
    needs_reference: ClassVar[bool] = False

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -stats.entropy


def objective_of(config: GRPOConfig) -> Objective:
    """The objective that --loss_type names, with the flags as its numbers.

    A sum with the KL of --kl_estimator full, and with the entropy bonus where the policy loss is no mean over tokens.

    Raises ConfigError for what does not fit.
    """
    try:
        policy = losses.get(config.objective_name, **config.numbers, corrections=corrections_of(config))
    except ValueError as error:
        raise ConfigError(f"--loss_type {config.loss_type}: {error}") from error
    beside = []
    if config.full_kl:
        kl = FullKL(aggregate=policy.aggregate, max_length=getattr(policy, "max_length", None))
        beside.append((config.beta, kl))
    if policy.aggregate != "token_mean" and (policy.entropy_coef or config.use_adaptive_entropy):
        beside.append((policy.entropy_coef, EntropyBonus()))
        policy = dataclasses.replace(policy, entropy_coef=0.0)
    return losses.Sum(((1.0, policy), *beside)) if beside else policy


def corrections_of(config: OnlineConfig) -> tuple[Correction, ...]:
    """Off-policy weights and masks by TRL's flags."""
    made = []
    if config.importance_sampling_mode != "none":
        low = config.importance_sampling_clip_min or 0.0
        made.append(CORRECTIONS[config.importance_sampling_mode](low, config.importance_sampling_clip_max))
    if (threshold := getattr(config, "off_policy_mask_threshold", None)) is not None:
        made.append(OPSM(threshold))
    return tuple(made)


def policy_of(objective: Objective) -> PolicyLoss:
    """The policy term of what `objective_of` made."""
    return objective.terms[0][1] if isinstance(objective, losses.Sum) else objective


def with_entropy(objective: Objective, coef: float) -> Objective:
    """The same with another weight of the entropy bonus."""
    if not isinstance(objective, losses.Sum):
        return dataclasses.replace(objective, entropy_coef=coef)
    if any(isinstance(o, EntropyBonus) for _, o in objective.terms):
        return losses.Sum(tuple((coef if isinstance(o, EntropyBonus) else w, o) for w, o in objective.terms))
    policy = dataclasses.replace(policy_of(objective), entropy_coef=coef)
    return losses.Sum(((1.0, policy), *objective.terms[1:]))


def reads_rollout(objective: Objective) -> bool:
    """Whether it reads the sampler's log-probs: its ratio is to the sampler, or a correction weighs by them."""
    policy = policy_of(objective)
    return policy.anchor == "rollout" or any(c.needs_rollout for c in policy.every_correction)

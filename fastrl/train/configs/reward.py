"""Flags of `fastrl reward`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.configs.base import DatasetConfig
from fastrl.train.flags import ConfigError, flag

PAIR_LOSSES = (
    "bradley_terry",
    "soft_bradley_terry",
    "bradley_terry_ties",
    "hinge_reward",
    "r3m",
    "adaptive_scale",
    "pcrm",
    "mean_variance_pairs",
)
ANSWER_LOSSES = {"verifier": "label", "reward_regression": "score"}  # of single answers -> the column they read


@dataclass(kw_only=True)
class RewardConfig(DatasetConfig):
    """`fastrl reward`: a scalar head that scores the chosen answer above the rejected one."""

    stage: ClassVar[str] = "reward"
    unit: ClassVar[str] = "pairs"
    learning_rate: float = flag(1e-4, "Peak learning rate.", at_least=0)
    loss_type: str = flag(
        "bradley_terry",
        "The objective. bradley_terry reads a column `margin` if there is one; soft_bradley_terry needs `preference` "
        "(0 to 1), bradley_terry_ties `tie` (true, false). verifier and reward_regression take single answers: prompt, "
        "completion and `label` (true: right) or `score`.",
        choices=(*PAIR_LOSSES, *ANSWER_LOSSES),
    )
    center_rewards_coefficient: float | None = flag(
        None, "Weight of (r_chosen + r_rejected)^2, which keeps rewards near 0; 0.01 is usual.", at_least=0
    )
    label_smoothing: float = flag(0.0, "Assumed part of flipped pairs (bradley_terry).", at_least=0, below=0.5)
    r3m_lambda: float = flag(
        0.1, "Price of shifting a pair; no pair's gradient is larger than this (r3m).", above=0, below=0.5
    )
    disable_dropout: bool = flag(True, "Turn dropout off in the model.")

    def _check(self) -> None:
        super()._check()
        if self.label_smoothing and self.loss_type != "bradley_terry":
            raise ConfigError(
                f"--label_smoothing {self.label_smoothing:g} has no effect with --loss_type {self.loss_type}; drop it"
            )
        if self.r3m_lambda != 0.1 and self.loss_type != "r3m":
            raise ConfigError(
                f"--r3m_lambda {self.r3m_lambda:g} has no effect with --loss_type {self.loss_type}; drop it"
            )
        if self.center_rewards_coefficient and self.loss_type in ANSWER_LOSSES:
            raise ConfigError(
                f"--center_rewards_coefficient centres pairs, and --loss_type {self.loss_type} has none; drop it"
            )

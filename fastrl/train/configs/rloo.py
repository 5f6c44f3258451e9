"""Flags of `fastrl rloo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.configs.online import OnlineConfig
from fastrl.train.flags import ConfigError, flag


@dataclass(kw_only=True)
class RLOOConfig(OnlineConfig):
    """`fastrl rloo`: REINFORCE with whole completions as actions, each against the mean reward of its siblings."""

    stage: ClassVar[str] = "rloo"
    unit: ClassVar[str] = "completions"
    num_generations: int = flag(2, "Completions of each prompt (the group).", at_least=2)
    reward_clip_range: list[float] | None = flag(None, "Rewards are held between these two numbers.")
    normalize_advantages: bool = flag(False, "Advantages to mean 0 and std 1 over all completions sampled at once.")
    beta: float = flag(0.05, "Price in the reward of the KL to the starting model; 0 needs no such model.", at_least=0)
    epsilon: float = flag(0.2, "A completion's ratio is clipped below 1 - epsilon (above: 1 + epsilon_high).", above=0)
    epsilon_high: float | None = flag(None, "Upper clip; none means epsilon.", above=0)
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus, with its true gradient.")

    def _check(self) -> None:
        super()._check()
        limits = self.reward_clip_range
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            raise ConfigError(f"--reward_clip_range {' '.join(map(str, limits))}: give the lowest and highest reward")

    @property
    def numbers(self) -> dict[str, float]:
        """What the flags give the objective."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return {"clip_low": self.epsilon, "clip_high": high, "entropy_coef": self.entropy_coef}

"""Flags of `fastrl ppo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.configs.base import TrainConfig
from fastrl.train.flags import ConfigError, flag


@dataclass(kw_only=True)
class PPOConfig(TrainConfig):
    """`fastrl ppo`: sample completions, score them, and reinforce the tokens that beat a critic's expectation."""

    stage: ClassVar[str] = "ppo"
    unit: ClassVar[str] = "completions"
    learning_rate: float = flag(3e-6, "Peak learning rate, of the policy and the critic.", at_least=0)

    # sampling
    max_completion_length: int = flag(53, "Most new tokens of a completion (TRL: response_length).", at_least=1)
    max_prompt_length: int | None = flag(
        None, "Longer prompts are dropped and counted. none: what the model's context leaves.", at_least=1
    )
    temperature: float = flag(0.7, "Of sampling, and of the log-probs that are trained.", above=0)
    eval_temperature: float | None = flag(
        None, "Of sampling held-out prompts; 0 is greedy, none is temperature.", at_least=0
    )
    num_mini_batches: int = flag(1, "Optimizer steps in one pass over what is sampled at once.", at_least=1)
    num_ppo_epochs: int = flag(4, "Passes over what is sampled at once.", at_least=1)

    # reward
    reward_model_path: str | None = flag(None, "A reward model, one more of the reward_funcs.")
    reward_funcs: list[str] = flag([], "Rewards: built-in names, dotted.path, file.py:name, or a reward model.")
    reward_weights: list[float] | None = flag(None, "One weight a reward, reward_model_path last; none means 1 each.")
    missing_eos_penalty: float | None = flag(None, "Taken off the reward of completions cut at the limit.", at_least=0)
    kl_coef: float = flag(0.05, "Price of the KL to the starting model, in the reward of each token.", at_least=0)
    kl_estimator: str = flag("k1", "Estimator of that KL.", choices=("k1", "k3"))
    whiten_rewards: bool = flag(False, "Divide token rewards by their std (the mean stays).")

    # advantages and objective
    gamma: float = flag(1.0, "Discount.", at_least=0, at_most=1)
    lam: float = flag(0.95, "Lambda of generalised advantage estimation.", at_least=0, at_most=1)
    bootstrap_truncated: bool = flag(
        False, "Completions cut at the limit go on at the critic's value; false: they end there, as in TRL."
    )
    whiten_advantages: bool = flag(True, "Advantages to mean 0 and std 1 over all sampled tokens.")
    cliprange: float = flag(0.2, "The ratio is clipped to 1 - cliprange ... 1 + cliprange.", above=0, at_most=1)
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus, with its true gradient.")
    disable_dropout: bool = flag(True, "Dropout off, so that the first step's ratio is exactly 1.")

    # critic
    value_model_path: str | None = flag(
        None, "The critic's body (and head, if it has one). none: reward_model_path, or the policy's own body."
    )
    vf_coef: float = flag(0.1, "Weight of the value loss.", at_least=0)
    cliprange_value: float | None = flag(0.2, "How far a value may leave the sampled one; none: freely.", above=0)
    value_loss: str = flag("clip", "Squared error, or Huber's.", choices=("clip", "huber"))

    def __post_init__(self):
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        if not self.rewards:
            raise ConfigError("ppo needs a reward: --reward_model_path, or --reward_funcs")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            n, m = len(self.reward_weights), len(self.rewards)
            raise ConfigError(f"--reward_weights has {n} numbers for {m} rewards (reward_model_path is the last one)")

    @property
    def rewards(self) -> list[str]:
        """Every reward: functions first, then the reward model."""
        return [*self.reward_funcs, *([self.reward_model_path] if self.reward_model_path else [])]

    @property
    def beta(self) -> float:
        """What says that a reference model is needed."""
        return self.kl_coef

    @property
    def completions_per_generation(self) -> int:
        """Completions sampled at once."""
        return self.batch_size * self.num_mini_batches

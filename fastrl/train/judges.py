"""Reward-model directories among --reward_funcs, opened on the run's device."""

from __future__ import annotations

from collections.abc import Callable

from fastrl.models.judge import RewardModelFunction, load_reward_function
from fastrl.train.stages.base import Setting


def opener(setting: Setting) -> Callable[[str], RewardModelFunction]:
    """What load_rewards calls with a directory's path; packed to the run's token budget, in its precision."""
    config = setting.config

    def open_model(path: str) -> RewardModelFunction:
        return load_reward_function(
            path,
            setting.device,
            max_tokens=config.max_tokens_per_device,
            autocast=setting.autocast,
            attn_implementation=config.attn_implementation,
        )

    return open_model

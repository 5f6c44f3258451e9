"""Training: configs, the loop and what surrounds it. Importing this loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastrl.train.config import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    PPOConfig,
    PRMConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
    TrainConfig,
)
from fastrl.train.flags import ConfigError

if TYPE_CHECKING:
    from fastrl.train.loop import TrainResult

__all__ = [
    "ConfigError",
    "DPOConfig",
    "GRPOConfig",
    "KTOConfig",
    "PPOConfig",
    "PRMConfig",
    "RLOOConfig",
    "RewardConfig",
    "SFTConfig",
    "TrainConfig",
    "run",
]


def run(config: TrainConfig) -> TrainResult:
    """Train as `config` says; the stage is the config's class.

    Raises: TypeError for anything but a stage's config; what the stage raises otherwise.
    """
    if not isinstance(config, TrainConfig) or not config.stage:
        raise TypeError(f"run() takes the config of a stage (SFTConfig, DPOConfig, ...), got {type(config).__name__}")
    from fastrl.train.loop import train  # torch and transformers load here, not with the command line

    return train(config)

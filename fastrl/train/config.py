"""What each command is told: fastrl/train/configs/ has one dataclass a stage, and this is the table of them.

Names and defaults follow TRL 1.16 and transformers; where a default differs, its help says why. `flags.py` turns the
fields into command-line flags and YAML keys and checks types, choices and bounds; `_check` of each compares fields.
"""

from __future__ import annotations

from fastrl.train.configs.base import DatasetConfig, TrainConfig
from fastrl.train.configs.distill import DistillConfig
from fastrl.train.configs.dpo import DPOConfig
from fastrl.train.configs.grpo import GRPOConfig
from fastrl.train.configs.kto import KTOConfig
from fastrl.train.configs.ppo import PPOConfig
from fastrl.train.configs.prm import PRMConfig
from fastrl.train.configs.reward import RewardConfig
from fastrl.train.configs.rloo import RLOOConfig
from fastrl.train.configs.sft import SFTConfig

CLASSES = (
    SFTConfig, DPOConfig, GRPOConfig, KTOConfig, RewardConfig, PRMConfig, PPOConfig, DistillConfig, RLOOConfig,
)  # fmt: skip
CONFIGS = {cls.stage: cls for cls in CLASSES}

__all__ = [
    "CONFIGS",
    "DPOConfig",
    "DatasetConfig",
    "DistillConfig",
    "GRPOConfig",
    "KTOConfig",
    "PPOConfig",
    "PRMConfig",
    "RLOOConfig",
    "RewardConfig",
    "SFTConfig",
    "TrainConfig",
]

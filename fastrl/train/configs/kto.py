"""Flags of `fastrl kto`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.configs.dpo import ReferenceConfig
from fastrl.train.flags import ConfigError, flag


@dataclass(kw_only=True)
class KTOConfig(ReferenceConfig):
    """`fastrl kto`: single answers, desirable or not, against a frozen copy of the starting model."""

    stage: ClassVar[str] = "kto"
    learning_rate: float = flag(1e-6, "Peak learning rate.", at_least=0)
    loss_type: str = flag("kto", "The objective.", choices=("kto", "apo_zero_unpaired", "bco"))
    desirable_weight: float = flag(1.0, "Weight of desirable answers.", at_least=0)
    undesirable_weight: float = flag(1.0, "Weight of undesirable answers.", at_least=0)

    def _check(self) -> None:
        super()._check()
        if self.loss_type == "kto" and self.precompute_ref_log_probs:
            raise ConfigError(
                "--precompute_ref_log_probs: kto has the reference score other mismatched answers at every step; drop "
                "it, or use --loss_type apo_zero_unpaired or bco"
            )
        if self.loss_type == "kto" and self.batch_size < 2:
            raise ConfigError(
                "--loss_type kto measures its KL on prompts with other prompts' answers, so a step needs at least two; "
                "raise --per_device_train_batch_size or --gradient_accumulation_steps"
            )

"""Flags of `fastrl sft`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.configs.base import DatasetConfig
from fastrl.train.flags import flag


@dataclass(kw_only=True)
class SFTConfig(DatasetConfig):
    """`fastrl sft`: next-token likelihood of completions, answers or whole texts."""

    stage: ClassVar[str] = "sft"
    learning_rate: float = flag(2e-5, "Peak learning rate.", at_least=0)
    completion_only_loss: bool | None = flag(
        None, "Train the completion only (true) or the prompt too (false). none: completion only if there is a prompt."
    )
    assistant_only_loss: bool = flag(False, "Train only the assistant's turns of a conversation.")
    loss_type: str = flag("nll", "The objective.", choices=("nll",))

"""Flags of `fastrl prm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.configs.base import DatasetConfig
from fastrl.train.flags import flag


@dataclass(kw_only=True)
class PRMConfig(DatasetConfig):
    """`fastrl prm`: a token classifier that says at the end of each step whether it is right."""

    stage: ClassVar[str] = "prm"
    learning_rate: float = flag(1e-5, "Peak learning rate.", at_least=0)
    loss_type: str = flag(
        "prm_class",
        "prm_class: cross-entropy of hard labels, as TRL. prm_bce, prm_mse: labels may be numbers between 0 and 1.",
        choices=("prm_class", "prm_bce", "prm_mse"),
    )
    step_separator: str = flag("\n", "Ends each step; the head is read at its last token.")
    train_on_last_step_only: bool = flag(False, "Train the last step of each row alone; evaluation reads them all.")
    max_prompt_length: int | None = flag(512, "Keep the last tokens of a longer prompt; none keeps all.", at_least=1)
    disable_dropout: bool = flag(True, "Turn dropout off in the model.")

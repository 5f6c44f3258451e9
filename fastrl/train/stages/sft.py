"""SFT: prompts and responses of the dataset, coefficient -1 on every trained token."""

from __future__ import annotations

from fastrl import losses
from fastrl.data import Rows, encode_sft
from fastrl.data.types import Sample
from fastrl.train.config import SFTConfig
from fastrl.train.stages.base import DatasetStage, Setting, limits_of, noted
from fastrl.train.step import Forward


class SFTStage(DatasetStage):
    """Next-token likelihood; entropy and token accuracy come from the same pass."""

    def __init__(self, setting: Setting, samples: list[Sample], held_out: list[Sample]):
        super().__init__(setting, [[s] for s in samples], [[s] for s in held_out])
        self.objective = losses.get(setting.config.loss_type)
        self.how = Forward(1.0, ("entropy", "is_argmax"), setting.autocast, setting.config.debug_checks)


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> SFTStage:
    config: SFTConfig = setting.config
    options = {
        "completion_only_loss": config.completion_only_loss,
        "assistant_only_loss": config.assistant_only_loss,
    }

    def encode(rows: Rows | None, split: str) -> list:
        limits = limits_of(config, setting.model)
        return [] if rows is None else noted(notes, split, encode_sft(rows, setting.tokenizer, limits, **options))

    return SFTStage(setting, encode(train, "train"), encode(test, "test"))

"""SFT: prompts and responses of the dataset, coefficient -1 on every trained token."""

from __future__ import annotations

from fastrl import losses
from fastrl.data.types import Sample
from fastrl.train.stages.base import DatasetStage, Setting
from fastrl.train.step import Forward


class SFTStage(DatasetStage):
    """Next-token likelihood; entropy and token accuracy come from the same pass."""

    def __init__(self, setting: Setting, samples: list[Sample], held_out: list[Sample]):
        super().__init__(setting, [[s] for s in samples], [[s] for s in held_out])
        self.objective = losses.get(setting.config.loss_type)
        self.how = Forward(1.0, ("entropy", "is_argmax"), setting.autocast, setting.config.debug_checks)

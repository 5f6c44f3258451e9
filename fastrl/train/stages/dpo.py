"""DPO: preference pairs of the dataset, coefficient -+beta * sigmoid(-margin) on their tokens."""

from __future__ import annotations

from fastrl import losses
from fastrl.data.types import Sample
from fastrl.train.stages.base import DatasetStage, Setting
from fastrl.train.step import Forward


class DPOStage(DatasetStage):
    """pairs: chosen and rejected of each; the two never part, so a micro-batch always holds whole pairs."""

    unit = 2

    def __init__(self, setting: Setting, pairs: list[tuple[Sample, Sample]], held_out: list[tuple[Sample, Sample]]):
        super().__init__(setting, [list(p) for p in pairs], [list(p) for p in held_out])
        config = setting.config
        self.objective = losses.get("dpo", beta=config.beta, label_smoothing=config.label_smoothing)
        self.how = Forward(1.0, (), setting.autocast, config.debug_checks)

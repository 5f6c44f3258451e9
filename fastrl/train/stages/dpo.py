"""DPO: preference pairs of the dataset, coefficient -+beta * sigmoid(-margin) on their tokens, and its relatives."""

from __future__ import annotations

import dataclasses

from fastrl import losses
from fastrl.data import Rows, encode_dpo
from fastrl.data.types import Sample
from fastrl.objective import Objective
from fastrl.train.configs.dpo import DPOConfig
from fastrl.train.stages.base import Setting, limits_of, noted
from fastrl.train.stages.reference import ReferenceStage

# Flag -> the option of those losses that have it.
OPTIONS = {
    "beta": "beta",
    "label_smoothing": "label_smoothing",
    "reference_free": "reference_free",
    "f_divergence_type": "f_divergence",
    "f_alpha_divergence_coef": "f_alpha",
    "use_weighting": "use_weighting",
    "ld_alpha": "ld_alpha",
    "discopop_tau": "tau",
    "simpo_gamma": "gamma",
    "cpo_alpha": "nll_coef",
    "alpha": "alpha",
}


class DPOStage(ReferenceStage):
    """pairs: chosen and rejected of each; the two never part, so a micro-batch always holds whole pairs."""

    unit = 2

    def __init__(self, setting: Setting, pairs: list[tuple[Sample, Sample]], held_out: list[tuple[Sample, Sample]]):
        super().__init__(setting, [list(p) for p in pairs], [list(p) for p in held_out])
        self.objective = objective_of(setting.config)
        if setting.config.precompute_ref_log_probs and setting.reference is not None:
            self.precompute()


def objective_of(config: DPOConfig) -> Objective:
    """The sum of the losses. A flag that none of them has is passed only where it was changed, and then refused."""
    names, weights = config.losses()
    known = {f.name for name in names for f in dataclasses.fields(losses.law(name))}
    numbers = {}
    for flag, option in OPTIONS.items():
        value = getattr(config, flag)
        if option in known or value != config.__dataclass_fields__[flag].default:
            numbers[option] = value
    return losses.combined(names, weights, **numbers)


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> DPOStage:
    def encode(rows: Rows | None, split: str) -> list:
        if rows is None:
            return []
        limits = limits_of(setting.config, setting.model)
        flat = noted(notes, split, encode_dpo(rows, setting.tokenizer, limits))
        return list(zip(flat[0::2], flat[1::2], strict=True))

    return DPOStage(setting, encode(train, "train"), encode(test, "test"))

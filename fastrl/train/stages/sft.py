"""SFT: prompts and responses of the dataset, coefficient -1 on every trained token, or another law of supervised.py."""

from __future__ import annotations

import math
from numbers import Real

from fastrl import losses
from fastrl.data import Rows, encode_sft
from fastrl.data.types import DataError, Sample, excerpt
from fastrl.objective import Objective
from fastrl.train.config import SFTConfig
from fastrl.train.configs.sft import SIGNALS
from fastrl.train.flags import ConfigError
from fastrl.train.stages.base import DatasetStage, Setting, limits_of, noted
from fastrl.train.step import Forward


def objective_of(config: SFTConfig, eos_id: int | None) -> Objective:
    """The objective that --loss_type names, with the flags as its numbers. Raises ConfigError without an end token."""
    if config.loss_type == "eos_weighted" and eos_id is None:
        raise ConfigError("--loss_type eos_weighted weighs the tokenizer's eos_token, and this tokenizer has none")
    if config.label_smoothing_factor:
        return losses.get("label_smoothing", label_smoothing=config.label_smoothing_factor)
    numbers = {
        "z_loss": {"z_loss": config.z_loss},
        "focal": {"gamma": config.focal_gamma},
        "confidence_penalty": {"entropy_coef": config.entropy_coef},
        "eos_weighted": {"eos_id": eos_id, "eos_weight": config.eos_weight},
        "weighted_sft": {"normalise": config.normalise_weights},
        "unlikelihood": {"alpha": config.unlikelihood_alpha},
        "c_rlft": {"negative_weight": config.negative_weight},
        "rwr": {"tau": config.tau},
        "awr": {"tau": config.tau, "max_weight": config.max_weight},
    }
    return losses.get(config.loss_type, **numbers.get(config.loss_type, {}))


class SFTStage(DatasetStage):
    """Next-token likelihood; entropy and token accuracy come from the same pass."""

    def __init__(self, setting: Setting, samples: list[Sample], held_out: list[Sample]):
        super().__init__(setting, [[s] for s in samples], [[s] for s in held_out])
        self.objective = objective_of(setting.config, setting.tokenizer.eos_token_id)
        self.how = Forward(1.0, ("entropy", "is_argmax"), setting.autocast, setting.config.debug_checks)


def attach_signal(samples: list[Sample], rows: Rows, config: SFTConfig) -> list[Sample]:
    """Give each sample the number that the loss reads of its row. Raises DataError naming a row whose is no good."""
    if config.loss_type not in SIGNALS:
        return samples
    name, column = SIGNALS[config.loss_type]
    column = config.signal_column or column
    for sample in samples:
        row = sample.fields["row"]
        value = rows[row].get(column)
        if not signal_fits(name, value):
            kind = "true or false (1 or 0)" if name == "label" else "a finite number"
            raise DataError(
                f"{rows.where(row)}: --loss_type {config.loss_type} reads the column {column!r}, {kind}, and "
                f"found {excerpt(value)}; add it, or name another one with --signal_column"
            )
        sample.fields[name] = bool(value) if name == "label" else float(value)
    return samples


def signal_fits(name: str, value: object) -> bool:
    """Whether a row's value can be the sample's field `name`: a label is true or false, any other a finite number."""
    if not isinstance(value, Real):
        return False
    return value in (0, 1) if name == "label" else math.isfinite(value)


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> SFTStage:
    config: SFTConfig = setting.config
    options = {
        "completion_only_loss": config.completion_only_loss,
        "assistant_only_loss": config.assistant_only_loss,
    }

    def encode(rows: Rows | None, split: str) -> list:
        if rows is None:
            return []
        limits = limits_of(config, setting.model)
        return attach_signal(noted(notes, split, encode_sft(rows, setting.tokenizer, limits, **options)), rows, config)

    return SFTStage(setting, encode(train, "train"), encode(test, "test"))

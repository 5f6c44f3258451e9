"""Reward models: preference pairs of the dataset, or single answers, and a head read at each one's last token."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastrl import losses
from fastrl.data import DataError, Rows
from fastrl.data.scored import encode_answers, encode_reward
from fastrl.data.types import Sample
from fastrl.models.score import ScoreModel, load_reward_model
from fastrl.objective import LossOutput
from fastrl.train.config import RewardConfig
from fastrl.train.configs.reward import ANSWER_LOSSES
from fastrl.train.metrics import MetricsLogger
from fastrl.train.stages.base import DatasetStage, Setting, limits_of, noted
from fastrl.train.step import Forward, MicroBatch


def objective_of(config: RewardConfig):
    """The loss that --loss_type names, with the flags as its numbers."""
    numbers = {} if config.loss_type in ANSWER_LOSSES else {"center": config.center_rewards_coefficient or 0.0}
    if config.loss_type == "bradley_terry":
        numbers["label_smoothing"] = config.label_smoothing
    if config.loss_type == "r3m":
        numbers["lam"] = config.r3m_lambda
    return losses.get(config.loss_type, **numbers)


def read_here(micro: MicroBatch) -> MicroBatch:
    """The head is read at the marked tokens themselves, where a language model's rows come one token before."""
    return dataclasses.replace(micro, rows=micro.here)


def with_margins(micro: MicroBatch) -> MicroBatch:
    """The column margin, the same on both sequences of a pair, as batch.margins [P]."""
    margin = micro.batch.per_sequence.get("margin")
    if margin is None:
        return micro
    return dataclasses.replace(micro, batch=dataclasses.replace(micro.batch, margins=margin[0::2]))


class RewardStage(DatasetStage):
    """items: chosen and rejected of each pair, which never part, or single answers."""

    def __init__(self, setting: Setting, items: list[list[Sample]], held_out: list[list[Sample]]):
        super().__init__(setting, items, held_out)
        self.unit = len(items[0])
        self.objective = objective_of(setting.config)
        self.how = Forward(1.0, (), setting.autocast, setting.config.debug_checks)

    def prepare(self, samples: list[Sample], log: MetricsLogger) -> list[MicroBatch]:
        return [with_margins(read_here(m)) for m in super().prepare(samples, log)]

    def watch(self, out: LossOutput, log: MetricsLogger) -> None:
        """The extremes, which are no means over micro-batches."""
        log.add_max({"max_reward": out.stats.scores.max()})
        log.add_min({"min_reward": out.stats.scores.min()})


def load_model(config: RewardConfig, path: str, options: dict[str, Any]) -> ScoreModel:
    """A sequence classifier as it is, or the body of another model under a new head."""
    two = getattr(losses.law(config.loss_type), "mean_variance", False)
    model = load_reward_model(path, **options, num_labels=2 if two else None)
    if model.head.out_features != 1 + two:
        raise ValueError(f"{path} has a head of {model.head.out_features} outputs; {config.loss_type} reads {1 + two}")
    return model


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> RewardStage:
    def encode(rows: Rows | None, split: str) -> list[list[Sample]]:
        if rows is None:
            return []
        how = (rows, setting.tokenizer, limits_of(setting.config, setting.model), setting.model.pad_token_id)
        column = ANSWER_LOSSES.get(setting.config.loss_type)
        if column is not None:
            return [[sample] for sample in noted(notes, split, encode_answers(*how, column))]
        flat = noted(notes, split, encode_reward(*how))
        needed = {"soft_bradley_terry": "preference", "bradley_terry_ties": "tie"}.get(setting.config.loss_type)
        if needed and needed not in flat[0].fields:
            raise DataError(f"--loss_type {setting.config.loss_type} needs a column {needed!r} in the {split} split")
        return [list(pair) for pair in zip(flat[0::2], flat[1::2], strict=True)]

    return RewardStage(setting, encode(train, "train"), encode(test, "test"))

"""Process reward models: labelled steps of the dataset, a classifier read at the separator that ends each step."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastrl import losses
from fastrl.data import DataError, Rows
from fastrl.data.scored import encode_steps
from fastrl.data.types import Sample
from fastrl.models.score import ScoreModel, load_token_classifier
from fastrl.train.config import PRMConfig
from fastrl.train.metrics import MetricsLogger
from fastrl.train.stages.base import DatasetStage, Setting, limits_of, noted
from fastrl.train.stages.reward import read_here
from fastrl.train.step import Forward, MicroBatch


def with_classes(micro: MicroBatch) -> MicroBatch:
    """The class of each step in place of the token under the head: 1 where its label is at least 1/2."""
    classes = (micro.batch.per_token["step_label"] >= 0.5).long()
    return dataclasses.replace(micro, batch=dataclasses.replace(micro.batch, targets=classes))


class PRMStage(DatasetStage):
    """Rows are single: any cut into micro-batches is the same step."""

    def __init__(self, setting: Setting, samples: list[Sample], held_out: list[Sample]):
        super().__init__(setting, [[s] for s in samples], [[s] for s in held_out])
        self.objective = losses.get(setting.config.loss_type)
        self.how = Forward(1.0, (), setting.autocast, setting.config.debug_checks)

    def prepare(self, samples: list[Sample], log: MetricsLogger) -> list[MicroBatch]:
        return [with_classes(read_here(m)) for m in super().prepare(samples, log)]


def load_model(config: PRMConfig, path: str, options: dict[str, Any]) -> ScoreModel:
    """A token classifier as it is, or the body of another model under a new head of two classes."""
    model = load_token_classifier(path, **options)
    if model.head.out_features != 2:
        raise ValueError(f"{path} has a head of {model.head.out_features} classes; a step is right or wrong: 2")
    return model


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> PRMStage:
    config: PRMConfig = setting.config

    def encode(rows: Rows | None, split: str) -> list[Sample]:
        if rows is None:
            return []
        made = encode_steps(
            rows,
            setting.tokenizer,
            limits_of(config, setting.model),
            step_separator=config.step_separator,
            last_step_only=config.train_on_last_step_only and split == "train",
            max_prompt_length=config.max_prompt_length,
        )
        samples = noted(notes, split, made)
        if config.loss_type == "prm_class":
            check_hard(samples, split)
        return samples

    return PRMStage(setting, encode(train, "train"), encode(test, "test"))


def check_hard(samples: list[Sample], split: str) -> None:
    """Raises DataError where a soft label would be rounded."""
    soft = sum(any(y not in (0.0, 1.0) for y in s.fields["step_label"]) for s in samples)
    if soft:
        raise DataError(
            f"{split}: {soft} of {len(samples)} rows have labels between 0 and 1, which --loss_type prm_class cannot "
            "read; use prm_bce or prm_mse"
        )

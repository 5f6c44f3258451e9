"""What a stage is: prompt source x response source x gradient coefficient, as samples and an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fastrl.data import Limits, Report
from fastrl.data.sampler import IndexSampler
from fastrl.data.types import Sample
from fastrl.models import PackedModel
from fastrl.objective import Objective
from fastrl.ops.distill import Teacher
from fastrl.train.step import Forward, MicroBatch, attach, loss_of, plan, prepare, score

if TYPE_CHECKING:
    from fastrl.train.config import DatasetConfig, TrainConfig
    from fastrl.train.metrics import MetricsLogger


@dataclass
class Setting:
    """What every stage is built from. reference: frozen copy of the starting model, or None where it is not used."""

    config: TrainConfig
    model: PackedModel
    reference: PackedModel | None
    tokenizer: Any
    device: torch.device
    autocast: torch.dtype | None


class Stage(Protocol):
    """The loop asks a stage for the micro-batches of a step and never looks inside."""

    objective: Objective
    how: Forward
    steps_per_epoch: int

    def collect(self, log: MetricsLogger) -> list[MicroBatch]:
        """The micro-batches of the next optimizer step: samples, coefficients and global counts included."""

    def evaluate(self, log: MetricsLogger) -> dict[str, float]:
        """Held-out metrics, names starting with eval_; empty without a held-out split."""

    def state_dict(self) -> dict:
        """JSON that `load_state_dict` goes on from exactly."""

    def load_state_dict(self, state: dict) -> None: ...


class DatasetStage:
    """Stages whose prompts and responses both come from the dataset: SFT (unit 1) and pairs (unit 2).

    items: each a list of `unit` samples that stay together. Subclasses set objective, how and unit.
    """

    objective: Objective
    how: Forward
    unit = 1

    def __init__(self, setting: Setting, items: list[list[Sample]], held_out: list[list[Sample]]):
        self.setting, self.items, self.held_out = setting, items, held_out
        self.order = IndexSampler(len(items), setting.config.seed)
        self.steps_per_epoch = self.order.batches_per_epoch(setting.config.batch_size)

    def collect(self, log: MetricsLogger) -> list[MicroBatch]:
        rows = self.order.take(self.setting.config.batch_size)
        return self.prepare([sample for i in rows for sample in self.items[i]], log)

    def prepare(self, samples: list[Sample], log: MetricsLogger) -> list[MicroBatch]:
        """Pack, and score with the reference where the objective reads it."""
        samples = [Sample(s.input_ids, s.prompt_length, s.completion_mask, dict(s.fields)) for s in samples]
        return with_reference(self.setting, samples, self.unit, self.how, log)

    @torch.no_grad()
    def evaluate(self, log: MetricsLogger) -> dict[str, float]:
        """The objective's loss and metrics over the whole held-out split, normalised by its own counts."""
        if not self.held_out:
            return {}
        model, totals = self.setting.model, {}
        was_training = model.training
        model.eval()
        samples = [sample for item in self.held_out for sample in item]
        with log.timing("eval"):
            for micro in prepare(model, self.objective, self.prepare(samples, log), self.how):
                out = loss_of(model, self.objective, micro, self.how)
                for name, value in {"loss": out.loss, **out.metrics}.items():
                    totals[f"eval_{name}"] = totals.get(f"eval_{name}", 0.0) + float(value)
        model.train(was_training)
        return totals

    def state_dict(self) -> dict:
        return {"order": self.order.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])


def with_reference(
    setting: Setting, samples: list[Sample], unit: int, how: Forward, log: MetricsLogger
) -> list[MicroBatch]:
    """Micro-batches of the samples; with a reference model, its log-probs are attached first."""
    budget, device = setting.config.max_tokens_per_device, setting.device
    if setting.reference is not None:
        give_logprobs(setting.reference, "ref_logprobs", plan(samples, budget, device, unit), how, log)
    return plan(samples, budget, device, unit)


def give_logprobs(
    model: PackedModel, name: str, micro_batches: list[MicroBatch], how: Forward, log: MetricsLogger
) -> None:
    """Attach the model's log-probs to the samples, over the very micro-batches that will be trained."""
    plain = Forward(how.temperature, (), how.autocast)
    with log.timing("old_log_prob" if name == "old_logprobs" else "ref"):
        for micro in micro_batches:
            attach(micro, name, score(model, micro, plain).logprobs)


@torch.no_grad()
def teacher_of(model: PackedModel, micro: MicroBatch, words: int) -> Teacher:
    """The model as the other head of a divergence: hidden states of the trained rows, and what its architecture makes
    logits of the first `words` words with."""
    hidden, head, law = model(micro.input_ids, micro.cu_seqlens, rows=micro.rows), model.head, model.head.transform
    bias = None if head.bias is None else head.bias[:words]
    return Teacher(hidden.to(head.weight.dtype), head.weight[:words], bias, law.scale * law.before, law.softcap)


# -- rows of a dataset -> samples or prompts -------------------------------------------------------------------------
def limits_of(config: DatasetConfig, model: PackedModel) -> Limits:
    return Limits(config.max_length, model.context_length, config.truncation, config.max_dropped_fraction)


def noted(notes: list[str], split: str, made: tuple[list, Report]) -> list:
    """What was made of the rows; what happened to them on the way goes to the notes."""
    items, report = made
    notes += [f"{split}: {line}" for line in report.lines()]
    return items

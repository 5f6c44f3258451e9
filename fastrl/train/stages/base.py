"""What a stage is: prompt source x response source x gradient coefficient, as samples and an objective."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fastrl.data import Limits, Report
from fastrl.data.balance import cost_of
from fastrl.data.sampler import IndexSampler
from fastrl.data.types import Sample
from fastrl.models import PackedModel
from fastrl.models.adapters import AdapterReference
from fastrl.models.linear import linear_form
from fastrl.objective import Objective
from fastrl.ops.distill import Teacher
from fastrl.train.budget import in_parts, note_longer, scored
from fastrl.train.parallel import World, full
from fastrl.train.step import ALONE, Forward, MicroBatch, attach, exchange, loss_of, plan, prepare

if TYPE_CHECKING:
    from fastrl.train.config import DatasetConfig, TrainConfig
    from fastrl.train.metrics import MetricsLogger


@dataclass
class Setting:
    """What every stage is built from. reference: frozen copy of the starting model, or None where it is not used;
    under adapters the model itself as it was at the start, called in the same way.
    budget: most tokens of a micro-batch. notes: lines for the reader that came up meanwhile; told: what was said once.
    """

    config: TrainConfig
    model: PackedModel
    reference: PackedModel | AdapterReference | None
    tokenizer: Any
    device: torch.device
    autocast: torch.dtype | None
    world: World = ALONE
    budget: int = 0
    notes: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.budget = self.budget or self.config.max_tokens_per_device
        self.cost = cost_of(self.model.model.config)

    @property
    def shares(self) -> bool:
        """Whether neighbours of one group hold their prompt once."""
        return self.config.share_prompts and self.model.shares

    def plan(self, samples: list[Sample], unit: int = 1) -> list[MicroBatch]:
        """This rank's micro-batches of the samples, `unit` neighbours together."""
        how = {"share_prompts": self.shares, "cost": self.cost}
        micros = plan(samples, self.budget, self.device, unit, self.world, **how)
        note_longer(self, micros)
        return micros


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
            world, run = self.setting.world, partial(loss_of, model, self.objective, how=self.how)
            by = partial(scored, self.setting, unit=self.unit)
            micros = prepare(model, self.objective, self.prepare(samples, log), self.how, world, by=by)
            for out in (out for micro in micros for out in in_parts(self.setting, run, micro, self.unit)):
                for name, value in {"loss": out.loss, **out.metrics}.items():
                    totals[f"eval_{name}"] = totals.get(f"eval_{name}", 0.0) + float(value)
        model.train(was_training)
        return world.sums(totals)

    def state_dict(self) -> dict:
        return {"order": self.order.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])


def with_reference(
    setting: Setting, samples: list[Sample], unit: int, how: Forward, log: MetricsLogger
) -> list[MicroBatch]:
    """Micro-batches of the samples; with a reference model, its log-probs are attached first."""
    if setting.reference is not None:
        give_logprobs(setting, setting.reference, "ref_logprobs", samples, how, log, unit)
    return setting.plan(samples, unit)


def give_logprobs(
    setting: Setting,
    model: PackedModel,
    name: str,
    samples: list[Sample],
    how: Forward,
    log: MetricsLogger | None = None,
    unit: int = 1,
) -> None:
    """Attach the model's log-probs to the samples, over the very micro-batches that will be trained."""
    plain = Forward(how.temperature, (), how.autocast)
    micros = setting.plan(samples, unit)
    timing = contextlib.nullcontext() if log is None else log.timing(TIMED[name])
    with timing:
        for micro in micros:
            attach(micro, name, scored(setting, model, micro, plain, unit).logprobs)
        exchange(samples, micros, [name], setting.world)


TIMED = {"old_logprobs": "old_log_prob", "ref_logprobs": "ref", "teacher_logprobs": "ref"}


@torch.no_grad()
def teacher_of(model: PackedModel, micro: MicroBatch, words: int) -> Teacher:
    """The model as the other head of a divergence: hidden states of the trained rows, and what its architecture makes
    logits of the first `words` words with."""
    if isinstance(model, AdapterReference):
        with model.active() as start:
            return teacher_of(start, micro, words)
    hidden = model(micro.input_ids, micro.cu_seqlens, rows=micro.rows, own_rows=True)
    law = model.head.transform
    form = linear_form(model.head, hidden if law.before == 1.0 else hidden * law.before, read=full)
    bias = None if form.bias is None else form.bias[:words]
    return Teacher(form.hidden, form.weight[:words], bias, law.scale, law.softcap)


# -- rows of a dataset -> samples or prompts -------------------------------------------------------------------------
def limits_of(config: DatasetConfig, model: PackedModel) -> Limits:
    return Limits(config.max_length, model.context_length, config.truncation, config.max_dropped_fraction)


def noted(notes: list[str], split: str, made: tuple[list, Report]) -> list:
    """What was made of the rows; what happened to them on the way goes to the notes."""
    items, report = made
    notes += [f"{split}: {line}" for line in report.lines()]
    return items

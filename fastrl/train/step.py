"""One optimizer step's worth of samples, cut into packed micro-batches, and what the model says of each.

The cut follows `max_tokens` alone. Normalisers are counted over the whole step before the cut, so where the cut falls
changes memory and never the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.data.packing import PLURAL, collate, pack
from fastrl.data.types import Sample
from fastrl.models import PackedModel
from fastrl.objective import LossOutput, Objective, outputs_of, prepared
from fastrl.ops.distill import Teacher
from fastrl.tokens import STAT_NAMES, TokenBatch, TokenStats

# Sample.fields -> the field of TokenBatch; any other goes to per_sequence (a number) or per_token (a list).
BATCH_FIELDS = {
    "advantage": "advantages",
    "advantages": "advantages",
    "group_id": "group_ids",
    "label": "labels",
    "reward": "rewards",
    "old_logprobs": "old_logprobs",
    "ref_logprobs": "ref_logprobs",
    "rollout_logprobs": "rollout_logprobs",
}


@dataclass
class MicroBatch:
    """S packed sequences: the model reads input_ids [T]; the head runs on the R rows that predict trained tokens."""

    input_ids: Tensor  # [T]
    cu_seqlens: Tensor  # [S+1]
    rows: Tensor  # [R] indices into T: hidden[rows[r]] predicts batch.targets[r]
    batch: TokenBatch  # over R
    samples: list[Sample]


@dataclass(frozen=True)
class Forward:
    """How log-probs are taken from the model; one record for training, scoring and evaluation alike."""

    temperature: float = 1.0
    outputs: tuple[str, ...] = ()
    autocast: torch.dtype | None = None
    debug_checks: bool = False
    teacher: Callable[[MicroBatch], Teacher] | None = None  # of a loss that reads a divergence

    def context(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)


def plan(samples: list[Sample], max_tokens: int, device: torch.device, unit: int = 1) -> list[MicroBatch]:
    """Cut the samples of one optimizer step into micro-batches of at most `max_tokens`, `unit` neighbours together.

    Sample.fields become fields of the batch (BATCH_FIELDS) or columns of it: a number per_sequence, a list of one
    number per trained token per_token.
    """
    counts = global_counts(samples)
    cut = pack([len(s) for s in samples], max_tokens, unit)
    return [micro_batch([samples[i] for i in part], counts, device) for part in cut]


@dataclass(frozen=True)
class Counts:
    """Normalisers of one optimizer step, over all of its micro-batches."""

    tokens: int
    sequences: int
    group_tokens: dict[int, int]


def global_counts(samples: list[Sample]) -> Counts:
    group_tokens: dict[int, int] = {}
    for sample in samples:
        if (group := sample.fields.get("group_id")) is not None:
            group_tokens[group] = group_tokens.get(group, 0) + sample.num_trained
    return Counts(sum(s.num_trained for s in samples), len(samples), group_tokens)


def micro_batch(samples: list[Sample], counts: Counts, device: torch.device) -> MicroBatch:
    """Lay the samples end to end and attach what the objective needs of them."""
    present = [n for n in samples[0].fields if all(s.fields.get(n) is not None for s in samples)]
    laid = collate(samples, present, device)
    cu_seqlens = laid["row_cu_seqlens"]
    fields, columns = {}, {"per_token": {}, "per_sequence": {}}
    for name in present:
        value = laid[PLURAL.get(name, name)]
        if name in BATCH_FIELDS:
            fields[BATCH_FIELDS[name]] = value
        else:
            columns["per_token" if isinstance(samples[0].fields[name], list) else "per_sequence"][name] = value
    if "advantage" in present:  # one number a sequence -> one a row
        advantages = fields["advantages"].float()
        fields["advantages"] = torch.repeat_interleave(advantages, cu_seqlens.diff().long())
    group_tokens = None
    if "group_ids" in fields:
        group_tokens = torch.tensor([counts.group_tokens[s.fields["group_id"]] for s in samples], device=device)
    batch = TokenBatch(
        targets=laid["targets"],
        cu_seqlens=cu_seqlens,
        **fields,
        **columns,
        group_tokens=group_tokens,
        num_tokens=counts.tokens,
        num_sequences=counts.sequences,
        num_groups=len(counts.group_tokens) or None,
    )
    return MicroBatch(laid["input_ids"], laid["cu_seqlens"], laid["rows"], batch, samples)


def prepare(model: PackedModel, objective: Objective, micros: list[MicroBatch], how: Forward) -> list[MicroBatch]:
    """Give every micro-batch the constants that the objective takes from the whole step (fastrl.objective.prepared)."""
    if getattr(objective, "columns", None) is None:
        return micros
    stats = None
    if getattr(objective, "needs_scores", False):
        reads = tuple(n for n in outputs_of(objective) if n in STAT_NAMES and n != "logprobs")
        own = dataclasses.replace(how, outputs=reads)
        stats = [score(model, micro, own) for micro in micros]
    batches = prepared(objective, [m.batch for m in micros], stats)
    return [dataclasses.replace(m, batch=b) for m, b in zip(micros, batches, strict=True)]


def attach(micro: MicroBatch, name: str, values: Tensor) -> None:
    """Give every sample of the micro-batch its own stretch of `values` [R] as a field, one number a trained token."""
    bounds = micro.batch.cu_seqlens.tolist()
    numbers = values.tolist()
    for sample, a, b in zip(micro.samples, bounds, bounds[1:], strict=False):
        sample.fields[name] = numbers[a:b]


def loss_of(model: PackedModel, objective: Objective, micro: MicroBatch, how: Forward) -> LossOutput:
    """The objective's loss on a micro-batch, logits never formed."""
    with how.context(micro.input_ids.device):
        other = {} if how.teacher is None else {"teacher": how.teacher(micro)}
        return model(
            micro.input_ids,
            micro.cu_seqlens,
            rows=micro.rows,
            **other,
            objective=objective,
            batch=micro.batch,
            temperature=how.temperature,
            outputs=how.outputs,
            debug_checks=how.debug_checks,
        )


@torch.no_grad()
def score(model: PackedModel, micro: MicroBatch, how: Forward) -> TokenStats:
    """Log-probs [R] of a micro-batch by the same code path, rows and chunks as the loss: equal bit for bit."""
    with how.context(micro.input_ids.device):
        return model(
            micro.input_ids,
            micro.cu_seqlens,
            rows=micro.rows,
            targets=micro.batch.targets,
            temperature=how.temperature,
            outputs=("logprobs", *how.outputs),
            debug_checks=how.debug_checks,
        )

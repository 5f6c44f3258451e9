"""One optimizer step's worth of samples, cut into packed micro-batches, and what the model says of each.

The cut follows `max_tokens` alone. Normalisers are counted over the whole step before the cut, so where the cut falls
changes memory and never the result. On several ranks each plans the whole step in the same way and takes its own part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrl.data.balance import Cost, share_samples
from fastrl.data.packing import PLURAL, collate
from fastrl.data.prefix import Layout
from fastrl.data.types import Sample
from fastrl.models import PackedModel
from fastrl.objective import LossOutput, Objective, outputs_of, prepared
from fastrl.ops.distill import Teacher
from fastrl.tokens import STAT_NAMES, TokenBatch, TokenStats
from fastrl.train.parallel import World

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
    """S packed sequences: the model reads input_ids [T]; the head runs on the R rows that predict trained tokens.

    Where samples share a prompt it is in T once, and one of its rows predicts the first token of each of them.
    indices: of the samples in the step they were planned of. An empty micro-batch has one token, no row and no
    sequence: a rank without work still takes part in what all ranks do together.
    """

    input_ids: Tensor  # [T]
    cu_seqlens: Tensor | Layout  # [S+1]
    rows: Tensor  # [R] indices into T: hidden[rows[r]] predicts batch.targets[r]
    batch: TokenBatch  # over R
    samples: list[Sample]
    indices: list[int] = field(default_factory=list)
    here: Tensor | None = None  # [R] where the trained tokens themselves stand
    ends: Tensor | None = None  # [S] the last token of each sample

    @property
    def num_tokens(self) -> int:
        """Tokens of the samples, a shared prompt counted with each."""
        return sum(map(len, self.samples))

    @property
    def empty(self) -> bool:
        return not self.samples


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


ALONE = World()


def plan(
    samples: list[Sample],
    max_tokens: int,
    device: torch.device,
    unit: int = 1,
    world: World = ALONE,
    *,
    share_prompts: bool = False,
    cost: Cost | None = None,
) -> list[MicroBatch]:
    """This rank's micro-batches of one optimizer step, each of at most `max_tokens`, `unit` neighbours together.

    samples: of the whole step, the same on every rank; all ranks get the same number of micro-batches. Sample.fields
    become fields of the batch (BATCH_FIELDS) or columns of it: a number per_sequence, a list of one number per trained
    token per_token. share_prompts: neighbours of one group hold their prompt once, and the budget counts it once. cost:
    what the ranks' work is evened out by; None: tokens.
    """
    counts = global_counts(samples)
    how = {"share_prompts": share_prompts, "cost": cost}
    mine = share_samples(samples, max_tokens, unit, world.dp_size, **how)[world.dp_rank]
    return [_taken(samples, part, counts, device, share_prompts) for part in mine]


def _taken(
    samples: list[Sample], part: list[int], counts: Counts, device: torch.device, share_prompts: bool
) -> MicroBatch:
    if not part:
        return empty_micro_batch(samples, counts, device)
    micro = micro_batch([samples[i] for i in part], counts, device, share_prompts)
    micro.indices = part
    return micro


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


def micro_batch(samples: list[Sample], counts: Counts, device: torch.device, share_prompts: bool = False) -> MicroBatch:
    """Lay the samples end to end and attach what the objective needs of them."""
    present = [n for n in samples[0].fields if all(s.fields.get(n) is not None for s in samples)]
    laid = collate(samples, present, device, share_prompts)
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
    read = {"here": laid["here"], "ends": laid["ends"]}
    return MicroBatch(laid["input_ids"], laid["layout"], laid["rows"], batch, samples, **read)


def empty_micro_batch(samples: list[Sample], counts: Counts, device: torch.device) -> MicroBatch:
    """One token that nobody trains, and a batch of no sequence that has the columns of `samples`."""
    like = micro_batch(samples[:1], counts, device)
    nothing, bounds = like.rows[:0], torch.tensor([0, 1], dtype=like.cu_seqlens.dtype)
    none = like.batch.sequences(0, 0, 0, 0)
    return MicroBatch(like.input_ids[:1], bounds.to(device), nothing, none, [], here=nothing, ends=nothing)


def prepare(
    model: PackedModel,
    objective: Objective,
    micros: list[MicroBatch],
    how: Forward,
    world: World = ALONE,
    *,
    by: Callable[[PackedModel, MicroBatch, Forward], TokenStats] | None = None,
) -> list[MicroBatch]:
    """Give every micro-batch the constants that the objective takes from the whole step (fastrl.objective.prepared).

    by: what scores the step where the objective reads scores of it; None: `score`.
    """
    if getattr(objective, "columns", None) is None:
        return micros
    stats = None
    if getattr(objective, "needs_scores", False):
        reads = tuple(n for n in outputs_of(objective) if n in STAT_NAMES and n != "logprobs")
        own = dataclasses.replace(how, outputs=reads)
        stats = [(by or score)(model, micro, own) for micro in micros]
    batches = prepared(objective, [m.batch for m in micros], stats, world.everywhere)
    return [dataclasses.replace(m, batch=b) for m, b in zip(micros, batches, strict=True)]


def attach(micro: MicroBatch, name: str, values: Tensor) -> None:
    """Give every sample of the micro-batch its own stretch of `values` [R] as a field, one number a trained token."""
    bounds = micro.batch.cu_seqlens.tolist()
    numbers = values.tolist()
    for sample, a, b in zip(micro.samples, bounds, bounds[1:], strict=False):
        sample.fields[name] = numbers[a:b]


def exchange(samples: list[Sample], micros: list[MicroBatch], names: list[str], world: World) -> None:
    """Give every rank the fields that each has attached to the samples of its own micro-batches."""
    if world.dp_size == 1:
        return
    mine = {i: [samples[i].fields[name] for name in names] for micro in micros for i in micro.indices}
    for part in world.gather_data(mine):
        for i, values in part.items():
            samples[int(i)].fields.update(zip(names, values, strict=True))


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

"""What an objective is: a pure function of per-token statistics and the packed batch, and a weight for each value.

    loss = sum_u weight_u * objective(stats, batch)_u

An objective is any callable with a `scope`; its value has one entry per unit of that scope:

    scope     value     what must be known before its gradient coefficient is
    token     [T]       that token's own statistics
    sequence  [S]       the whole sequence
    pair      [P]       both sequences of the pair
    group     [G]       every sequence with the same group id (in order of first appearance of the id)
    batch     scalar    everything

Optional attributes: `aggregate` (its default), `outputs` (statistics it reads beside log-probs, e.g. ("entropy",)),
`max_length` (for aggregate="constant") and `metrics(stats, batch) -> {name: one value per unit}`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrl.tokens import STAT_NAMES, TokenBatch, TokenStats, segment_sum

SCOPES = ("token", "sequence", "pair", "group", "batch")
AGGREGATES = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "constant",
    "prompt_mean",
)
Objective = Callable[[TokenStats, TokenBatch], Tensor]


@dataclass
class LossOutput:
    """loss: scalar with a graph. metrics: name -> 0-dim tensor; summed over micro-batches they are global means.
    stats: the detached per-row statistics, [T] as the batch was given (0 in untrained rows)."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    stats: TokenStats | None = None


def scope_of(objective: Objective) -> str:
    if not callable(objective):
        raise ValueError(
            f"objective is {objective!r}; expected a callable with a scope, as fastrl.losses.get(...) returns"
        )
    scope = getattr(objective, "scope", None)
    if scope not in SCOPES:
        name = getattr(objective, "__name__", type(objective).__name__)
        raise ValueError(f"objective {name} has scope {scope!r}; set {name}.scope to one of {', '.join(SCOPES)}")
    return scope


def outputs_of(objective: Objective, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Statistics to compute: log-probs, what the objective reads, what the caller asks for."""
    names = dict.fromkeys(("logprobs", *getattr(objective, "outputs", ()), *extra))
    unknown = [n for n in names if n not in STAT_NAMES]
    if unknown:
        raise ValueError(f"outputs has unknown name {unknown[0]!r}; expected any of {', '.join(STAT_NAMES)}")
    return tuple(names)


def token_weights(batch: TokenBatch, aggregate: str | Callable[[TokenBatch], Tensor], max_length: int | None = None):
    """[T] weight of each trained token. `batch` is compact (every row trained) and has its global counts.

    token_mean                1 / num_tokens
    sequence_mean_token_mean  1 / (n_i * num_sequences)
    sequence_mean_token_sum   1 / num_sequences
    constant                  1 / (num_sequences * max_length)             (Dr. GRPO)
    prompt_mean               1 / (num_groups * tokens of the whole group) (each prompt counts once)
    or a function of the batch that gives [T].
    """
    if callable(aggregate):
        return _own_weights(batch, aggregate)
    return batch.spread(_sequence_token_weight(batch, aggregate, max_length))


def unit_weights(objective: Objective, batch: TokenBatch, aggregate=None) -> Tensor:
    """One weight per unit of the objective's scope: the sum of the weights of the unit's tokens.

    Under sequence_mean_token_mean a sequence weighs 1/num_sequences and a pair 2/num_sequences, however long
    (an empty sequence included); under token_mean they weigh as many tokens as they have.
    """
    scope = scope_of(objective)
    if aggregate is None:
        aggregate = getattr(objective, "aggregate", "token_mean" if scope == "token" else "sequence_mean_token_mean")
    max_length = getattr(objective, "max_length", None)
    if scope == "token":
        return token_weights(batch, aggregate, max_length)
    if aggregate == "sequence_mean_token_mean":
        per_sequence = _like(batch, 1.0 / _at_least_one(batch.num_sequences))
    elif callable(aggregate):
        per_sequence = segment_sum(_own_weights(batch, aggregate), batch)
    else:
        per_sequence = _sequence_token_weight(batch, aggregate, max_length) * batch.lengths
    if scope == "sequence":
        return per_sequence
    if scope == "pair":
        if batch.num_segments % 2:
            raise ValueError(
                f"scope='pair' needs chosen, rejected, chosen, ...; got an odd {batch.num_segments} sequences"
            )
        return per_sequence.view(-1, 2).sum(1)
    if scope == "batch":
        return per_sequence.sum()
    return per_sequence.new_zeros(num_groups(batch)).index_add(0, group_index(batch), per_sequence)


def _own_weights(batch: TokenBatch, aggregate: Callable[[TokenBatch], Tensor]) -> Tensor:
    weights = aggregate(batch)
    if not isinstance(weights, Tensor) or weights.shape != batch.targets.shape:
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"aggregate must return one weight per trained token [T={batch.targets.shape[0]}], got {got}")
    return weights


def _like(batch: TokenBatch, value) -> Tensor:
    """[S] float64 of one number (a float or a 0-dim tensor)."""
    return torch.ones(batch.num_segments, device=batch.targets.device, dtype=torch.float64) * value


def _sequence_token_weight(batch: TokenBatch, aggregate: str, max_length: int | None) -> Tensor:
    """[S] float64: the weight that every token of a sequence carries."""
    sequences = _at_least_one(batch.num_sequences)
    if aggregate == "token_mean":
        return _like(batch, 1.0 / _at_least_one(batch.num_tokens))
    if aggregate == "sequence_mean_token_mean":
        return _like(batch, 1.0 / sequences) / batch.lengths.clamp(min=1)
    if aggregate == "sequence_mean_token_sum":
        return _like(batch, 1.0 / sequences)
    if aggregate == "constant":
        if not max_length:
            raise ValueError("aggregate='constant' divides by a fixed length: give the objective max_length > 0")
        return _like(batch, 1.0 / (sequences * max_length))
    if aggregate == "prompt_mean":
        return _prompt_weight(batch)
    near = difflib.get_close_matches(str(aggregate), AGGREGATES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"aggregate is {aggregate!r}{hint}; expected one of {', '.join(AGGREGATES)} or a function of the batch"
    )


def _prompt_weight(batch: TokenBatch) -> Tensor:
    index = group_index(batch)
    tokens = batch.group_tokens
    if tokens is None:
        tokens = torch.zeros(num_groups(batch), dtype=torch.long, device=index.device)
        tokens = tokens.index_add(0, index, batch.lengths)[index]
    prompts = num_groups(batch) if batch.num_groups is None else batch.num_groups
    return _like(batch, 1.0 / _at_least_one(prompts)) / tokens.clamp(min=1)


def _at_least_one(count):
    """A step without trained tokens or sequences has loss 0, not 0/0."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def group_index(batch: TokenBatch) -> Tensor:
    """[S] position of each sequence's group among the batch's distinct group ids, in order of first appearance."""
    if batch.group_ids is None:
        raise ValueError("scope='group' and aggregate='prompt_mean' need batch.group_ids [S]; got None")
    ids, inverse = torch.unique(batch.group_ids, return_inverse=True)
    first = torch.full_like(ids, batch.num_segments, dtype=torch.long)
    order = torch.arange(batch.num_segments, device=inverse.device)
    first = first.scatter_reduce(0, inverse, order, "amin")
    return torch.argsort(torch.argsort(first))[inverse]


def num_groups(batch: TokenBatch) -> int:
    return int(group_index(batch).max()) + 1 if batch.num_segments else 0


def value_of(objective: Objective, stats: TokenStats, batch: TokenBatch, units: int | None) -> Tensor:
    """Call the objective and check that it gave one value per unit. `batch` is compact."""
    value = objective(stats, batch)
    scope, name = scope_of(objective), getattr(objective, "__name__", type(objective).__name__)
    want = [] if scope == "batch" else [units]
    if not isinstance(value, Tensor) or list(value.shape) != want:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"objective {name} of scope {scope!r} must return a tensor of shape {want}, got {got}")
    return value


def weighted_sum(value: Tensor, weights: Tensor) -> Tensor:
    """Scalar loss in the value's dtype. A unit of weight zero contributes nothing, whatever its value."""
    return torch.where(weights != 0, value * weights.to(value.dtype), torch.zeros_like(value)).sum()


def mean_metrics(objective: Objective, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
    """The objective's own metrics as sums over this batch / global count: adding micro-batches gives global means."""
    report = getattr(objective, "metrics", None)
    metrics: dict[str, Tensor] = {}
    tokens = _at_least_one(batch.num_tokens)
    if stats.entropy is not None:
        metrics["entropy"] = stats.entropy.detach().sum() / tokens
    if stats.is_argmax is not None:
        metrics["mean_token_accuracy"] = stats.is_argmax.sum() / tokens
    if report is None:
        return metrics
    count = _unit_count(scope_of(objective), batch)
    with torch.no_grad():
        for name, value in report(stats.detach(), batch).items():
            metrics[name] = value.to(torch.promote_types(value.dtype, torch.float32)).sum() / count
    return metrics


def _unit_count(scope: str, batch: TokenBatch):
    """How many units of this scope the whole optimizer step has."""
    if scope == "token":
        return _at_least_one(batch.num_tokens)
    if scope == "group":
        return _at_least_one(num_groups(batch) if batch.num_groups is None else batch.num_groups)
    sequences = _at_least_one(batch.num_sequences)
    return {"sequence": sequences, "pair": sequences / 2, "batch": 1}[scope]

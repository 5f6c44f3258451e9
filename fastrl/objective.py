"""What an objective is: a pure function of per-token statistics and the packed batch, and a weight for each value.

    loss = sum_u weight_u * objective(stats, batch)_u

An objective is any callable with a `scope`; its value has one entry per unit of that scope:

    scope     value     what must be known before its gradient coefficient is
    token     [T]       that token's own statistics
    sequence  [S]       the whole sequence
    pair      [P]       both sequences of the pair
    group     [G]       every sequence with the same group id (in order of first appearance of the id)
    batch     scalar    everything

Optional attributes:
    unit        what its values are one of, where that is finer than its scope ("token": GSPO reads whole sequences and
                gives [T]), or "total": a scalar that is already weighted by the batch's global counts (sums of losses)
    aggregate   its default aggregation
    outputs     statistics that it reads beside log-probs, e.g. ("entropy",)
    max_length  for aggregate="constant"
    metrics     (stats, batch) -> {name: one value per unit}
    columns     (batch, stats or None, everywhere) -> {"per_token": {name: [T]}, "per_sequence": {name: [S]}}: constants
                taken from the whole optimizer step, which it then reads as columns of its batch; see `prepared`
    needs_scores  True where those columns read statistics of the whole step, so that the step must be scored first
    reads_logprobs  False where log-probs are not read, so that they need not be made
    divergence  the Divergence that "divergence" among its outputs means
    linear_in_divergence  True where its value's derivative in the divergence is a constant: both heads' logits are then
                made once (4 GEMMs, otherwise 6)
    support     the [T, k] column of word indices whose logits "support_logits" among its outputs are
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrl.tokens import SIDE_NAMES, STAT_NAMES, TokenBatch, TokenStats, segment_sum

SCOPES = ("token", "sequence", "pair", "group", "batch")
AGGREGATES = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "constant",
    "prompt_mean",
)
UNITS = (*SCOPES, "total")
Objective = Callable[[TokenStats, TokenBatch], Tensor]


DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "mixed", "skew_forward_kl", "skew_reverse_kl")


@dataclass(frozen=True)
class Divergence:
    """Which divergence of the student's softmax p from the teacher's q.

    kind  forward_kl KL(q||p), reverse_kl KL(p||q), tvd sum |p - q| / 2, and with m = beta q + (1 - beta) p:
          jsd beta KL(q||m) + (1 - beta) KL(p||m), skew_forward_kl KL(q||m), skew_reverse_kl KL(p||m);
          mixed beta KL(q||p) + (1 - beta) KL(p||q)
    beta  in [0, 1]. At the ends jsd means TRL's limits: 0 forward_kl, 1 reverse_kl.
    temperature  divides the logits of both heads, on top of the call's own.
    """

    kind: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        if self.kind not in DIVERGENCES:
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(DIVERGENCES)}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    @property
    def inner(self) -> Divergence:
        """The same with a kind that needs no beta where beta is an end of [0, 1]. Of no use for a skew KL to itself."""
        ends = {
            "jsd": ("forward_kl", "reverse_kl"),
            "mixed": ("reverse_kl", "forward_kl"),
            "skew_forward_kl": ("forward_kl", None),
            "skew_reverse_kl": (None, "reverse_kl"),
        }
        kind = ends[self.kind][int(self.beta)] if self.kind in ends and self.beta in (0, 1) else self.kind
        if kind is None:
            raise ValueError(f"{self.kind} with beta {self.beta} compares a distribution with itself; it is always 0")
        return dataclasses.replace(self, kind=kind)


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


def unit_of(objective: Objective) -> str:
    """What the objective's values are one of: its scope, or the finer unit that it names."""
    scope = scope_of(objective)
    unit = getattr(objective, "unit", scope)
    if unit not in UNITS:
        raise ValueError(f"objective {type(objective).__name__} has unit {unit!r}; expected one of {', '.join(UNITS)}")
    return unit


def widest(scopes) -> str:
    """The scope that holds all of these."""
    return max(scopes, key=SCOPES.index, default="token")


# -- constants of the whole step ---------------------------------------------------------------------------------------
def is_prepared(objective: Objective, batch: TokenBatch) -> bool:
    """Whether the batch already has the columns that the objective takes from the whole step (or there are none)."""
    return getattr(objective, "columns", None) is None or batch.prepared_for == objective


def prepared(
    objective: Objective,
    batches: list[TokenBatch],
    stats: list[TokenStats] | None = None,
    everywhere: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[TokenBatch]:
    """The micro-batches of one optimizer step with the columns that the objective reads from the whole of it.

    Args:
        batches: every micro-batch of this rank, without untrained rows. stats: detached, one for each batch, where the
            objective `needs_scores`. everywhere: [n] of this rank -> [n'] of all ranks, in rank order; default: alone.

    A batch that was not prepared is taken for the whole step by fused_loss and loss_from_logprobs.
    """
    make = getattr(objective, "columns", None)
    if make is None:
        return batches
    if getattr(objective, "needs_scores", False) and stats is None:
        raise ValueError(f"{type(objective).__name__} reads statistics of the whole step: give stats, one per batch")
    columns = make(TokenBatch.joined(batches), None if stats is None else type(stats[0]).joined(stats), everywhere)
    made, row, sequence = [], 0, 0
    for batch in batches:
        t, s = batch.targets.shape[0], batch.num_segments
        token = {n: x[row : row + t] for n, x in columns.get("per_token", {}).items()}
        each = {n: x[sequence : sequence + s] for n, x in columns.get("per_sequence", {}).items()}
        made.append(dataclasses.replace(batch.with_columns(token, each), prepared_for=objective))
        row, sequence = row + t, sequence + s
    return made


def outputs_of(objective: Objective, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Statistics to compute: log-probs, what the objective reads, what the caller asks for."""
    names = dict.fromkeys(("logprobs", *getattr(objective, "outputs", ()), *extra))
    own = getattr(objective, "outputs", ())  # what is made beside the head only an objective can ask for
    unknown = [n for n in names if n not in STAT_NAMES and not (n in SIDE_NAMES and n in own)]
    if unknown:
        raise ValueError(f"outputs has unknown name {unknown[0]!r}; expected any of {', '.join(STAT_NAMES)}")
    if not (getattr(objective, "reads_logprobs", True) or "logprobs" in extra):
        names.pop("logprobs")
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
    """One weight per unit of the objective (see unit_of): the sum of the weights of the unit's tokens.

    Under sequence_mean_token_mean a sequence weighs 1/num_sequences and a pair 2/num_sequences, however long
    (an empty sequence included); under token_mean they weigh as many tokens as they have.
    """
    unit = unit_of(objective)
    if unit == "total":
        if aggregate is not None:
            raise ValueError("aggregate has no meaning for a sum of losses; give each of its terms its own")
        return torch.ones((), dtype=torch.float64, device=batch.targets.device)
    if aggregate is None:
        aggregate = getattr(objective, "aggregate", "token_mean" if unit == "token" else "sequence_mean_token_mean")
    max_length = getattr(objective, "max_length", None)
    if unit == "token":
        return token_weights(batch, aggregate, max_length)
    if aggregate == "sequence_mean_token_mean":
        per_sequence = _like(batch, 1.0 / _at_least_one(batch.num_sequences))
    elif callable(aggregate):
        per_sequence = segment_sum(_own_weights(batch, aggregate), batch)
    else:
        per_sequence = _sequence_token_weight(batch, aggregate, max_length) * batch.lengths
    if unit == "sequence":
        return per_sequence
    if unit == "pair":
        if batch.num_segments % 2:
            raise ValueError(
                f"unit 'pair' needs chosen, rejected, chosen, ...; got an odd {batch.num_segments} sequences"
            )
        return per_sequence.view(-1, 2).sum(1)
    if unit == "batch":
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
    unit, name = unit_of(objective), getattr(objective, "__name__", type(objective).__name__)
    want = [] if unit in ("batch", "total") else [units]
    if not isinstance(value, Tensor) or list(value.shape) != want:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"objective {name} with a value for each {unit} must return shape {want}, got {got}")
    return value


def weighted_sum(value: Tensor, weights: Tensor) -> Tensor:
    """Scalar loss in the value's dtype. A unit of weight zero contributes nothing, whatever its value."""
    return torch.where(weights != 0, value * weights.to(value.dtype), torch.zeros_like(value)).sum()


def mean_metrics(objective: Objective, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
    """The objective's own metrics as sums over this batch / global count: adding micro-batches gives global means."""
    report = getattr(objective, "metrics", None)
    metrics: dict[str, Tensor] = {}
    tokens = _at_least_one(batch.num_tokens)
    if getattr(stats, "entropy", None) is not None:
        metrics["entropy"] = stats.entropy.detach().sum() / tokens
    if getattr(stats, "is_argmax", None) is not None:
        metrics["mean_token_accuracy"] = stats.is_argmax.sum() / tokens
    if report is None:
        return metrics
    count = unit_count(unit_of(objective), batch)
    with torch.no_grad():
        for name, value in report(stats.detach(), batch).items():
            metrics[name] = value.to(torch.promote_types(value.dtype, torch.float32)).sum() / count
    return metrics


def unit_count(unit: str, batch: TokenBatch):
    """How many of these units the whole optimizer step has."""
    if unit == "token":
        return _at_least_one(batch.num_tokens)
    if unit == "group":
        return _at_least_one(num_groups(batch) if batch.num_groups is None else batch.num_groups)
    sequences = _at_least_one(batch.num_sequences)
    return {"sequence": sequences, "pair": sequences / 2, "batch": 1, "total": 1}[unit]

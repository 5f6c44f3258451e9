"""fused_loss under torch.compile: one custom op, `fastrl::fused_loss`, around the eager walk.

The graph sees tensors and a key. What cannot be in a graph (the objective, how the loss is aggregated, the options) is
kept in a table under that key while the graph is traced. The op makes the gradients with the loss, as in eager mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.objective import LossOutput, Objective, mean_metrics, unit_weights, value_of
from fastrl.ops import dispatch
from fastrl.ops.fused import How, alone, run_fused
from fastrl.ops.head import HeadSpec, accumulation_dtype
from fastrl.ops.once import no_second_derivative
from fastrl.tokens import STAT_NAMES, TokenBatch, TokenStats, compact

TABLES = ("per_token", "per_sequence")  # fields that are tables of tensors by name
FIELDS = tuple(f.name for f in dataclasses.fields(TokenBatch) if f.name not in (*TABLES, "prepared_for"))
PER_SEQUENCE = ("labels", "group_ids", "rewards", "group_tokens")
NUMBERS = ("num_tokens", "num_sequences", "num_groups")


@torch.compiler.assume_constant_result
def has(name: str) -> bool:
    """Whether `triton` is installed or `native` compiled."""
    return dispatch.has_triton() if name == "triton" else dispatch.has_native()


# -- what stands behind a key ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """kinds: of each field of TokenBatch, its dtype, "number" for a Python number, or None where it is absent.
    extras: (table, name, kind) of each entry of its tables. prepared: the columns of the whole step are among them.

    loss: dtype of the loss. metrics: (name, dtype) of each.
    """

    objective: Objective
    how: How
    debug_checks: bool
    prepared: bool
    kinds: tuple
    extras: tuple
    loss: torch.dtype
    metrics: tuple


JOBS: dict[str, Job] = {}
_THINGS: list = []
_PLACES: dict = {}


def _place(thing) -> int:
    """Index of an equal thing in the table: equal objectives share a key, and so a graph."""
    try:
        key = type(thing), thing
        if key in _PLACES:
            return _PLACES[key]
        _PLACES[key] = len(_THINGS)
    except TypeError:  # not hashable: never shared
        pass
    _THINGS.append(thing)
    return len(_THINGS) - 1


@torch.compiler.assume_constant_result
def _place_of(thing) -> int:
    return _place(thing)


@torch.compiler.assume_constant_result
def _place_of_parts(kind: type, *parts: int) -> int:
    return _place(kind(**dict(zip(_parts(kind), (_THINGS[i] for i in parts), strict=True))))


def _parts(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.init]


@torch.compiler.assume_constant_result
def _names(kind: type) -> str:
    return ",".join(_parts(kind))


def _index(thing) -> int:
    """A dataclass travels as its numbers: they are guarded, and one made inside the compiled function is no object yet.

    Anything else (a function, an object made outside) is known by its identity.
    """
    if hasattr(type(thing), "__dataclass_fields__"):
        kind = type(thing)
        names = _names(kind)
        return _place_of_parts(kind, *[_index(getattr(thing, n)) for n in names.split(",") if n])
    if isinstance(thing, float):
        thing = float.fromhex(thing.hex())  # after a change of value dynamo would hold it for a variable
    elif isinstance(thing, int) and not isinstance(thing, bool):
        thing = operator.index(thing)
    return _place_of(thing)


@torch.compiler.assume_constant_result
def _key(objective: int, how: int, debug_checks: bool, prepared: bool, precision: torch.dtype, *kinds) -> str:
    """Registers the job. The key tells all that shapes the op's outputs, for graphs cached across processes.

    kinds: those of FIELDS, then table, name and kind of each entry of the tables.
    """
    law, options = _THINGS[objective], _THINGS[how]
    kinds, rest = kinds[: len(FIELDS)], kinds[len(FIELDS) :]
    extras = tuple(zip(rest[0::3], rest[1::3], rest[2::3], strict=True))
    loss, metrics = _probe(law, options, precision, kinds, extras)
    parts = ",".join(f"{name}:{dtype}" for name, dtype in metrics)
    name = getattr(law, "__qualname__", repr(law))
    key = f"{name} {options} {debug_checks} {kinds} {extras} {prepared} {loss} {parts} #{objective} #{how}"
    JOBS[key] = Job(law, options, debug_checks, prepared, kinds, extras, loss, metrics)
    return key


@torch.compiler.assume_constant_result
def _metric_names(key: str) -> str:
    return "\n".join(name for name, _ in JOBS[key].metrics)


@torch.compiler.assume_constant_result
def _metric_dtype(key: str, i: int) -> torch.dtype:
    return JOBS[key].metrics[i][1]


def _probe(
    objective: Objective, how: How, precision: torch.dtype, kinds: tuple, extras: tuple
) -> tuple[torch.dtype, tuple]:
    """(dtype of the loss, (name, dtype) of each metric): asked of two sequences of one token each, made up here."""
    fields = {}
    for name, kind in zip(FIELDS, kinds, strict=True):
        shape = {"margins": (1,), **dict.fromkeys(NUMBERS, ())}.get(name, (2,))
        made = 2 if kind == "number" else None if kind is None else torch.ones(shape, dtype=kind)
        fields[name] = made
    fields["cu_seqlens"] = torch.arange(3, dtype=fields["cu_seqlens"].dtype)
    made = [torch.ones(2, dtype=kind) for *_, kind in extras]
    batch, _ = compact(TokenBatch(**fields, **_tables(extras, made)), how.ignore_index)
    stats = TokenStats()
    for name in how.names:
        dtype = torch.bool if name == "is_argmax" else precision
        setattr(stats, name, torch.full((2,), -0.5 if name == "logprobs" else 0.5).to(dtype))
    with torch.no_grad(), _autograd_keys():
        batch = alone(objective, batch, stats)
        weights = unit_weights(objective, batch, how.aggregate)
        value = value_of(objective, stats, batch, weights.shape[0] if weights.dim() else None)
        metrics = mean_metrics(objective, stats, batch)
    return value.dtype, tuple((name, x.dtype) for name, x in metrics.items())


def _tables(extras: tuple, values: list) -> dict[str, dict]:
    """The tables of a TokenBatch again, from their entries one after the other."""
    made: dict[str, dict] = {table: {} for table in TABLES}
    for (table, name, _), x in zip(extras, values, strict=True):
        made[table][name] = x
    return made


# -- the op ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _autograd_keys():
    """Inside a custom op autograd is out of reach, even under enable_grad; objectives are differentiated by it."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        yield


@torch.library.custom_op(
    "fastrl::fused_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? temperatures, "
    + ", ".join(f"Tensor? {name}" for name in FIELDS)
    + ", Tensor[] extras, str key, float logit_scale, float? softcap, float temperature, bool need_hidden, "
    f"bool need_weight, bool need_bias) -> ({', '.join(['Tensor'] * 10)})",
)
def fused_loss_op(hidden, weight, bias, temperatures, *rest):
    """(loss, metrics [M] float64, the five statistics [T], dH, dW, db); what is not asked for is empty."""
    tensors, (extras, key, scale, softcap, temperature, *needs) = rest[: len(FIELDS)], rest[len(FIELDS) :]
    job = JOBS[key]
    leaves = [None if x is None else x.detach() for x in (hidden, weight, bias)]
    wanted = [x.requires_grad_() for x, need in zip(leaves, needs, strict=True) if need]
    fields = {n: x.item() if kind == "number" else x for n, x, kind in zip(FIELDS, tensors, job.kinds, strict=True)}
    head = HeadSpec(leaves[1], leaves[2], scale, softcap, temperature if temperatures is None else temperatures)
    with _autograd_keys(), torch.set_grad_enabled(bool(wanted)):
        given = job.objective if job.prepared else None
        batch = TokenBatch(**fields, **_tables(job.extras, extras), prepared_for=given)
        out = run_fused(job.objective, leaves[0], head, batch, job.how, job.debug_checks)
        attached = out.loss.requires_grad
        grads = torch.autograd.grad(out.loss, wanted, allow_unused=True) if attached else [None] * len(wanted)
    empty, grads = hidden.new_empty(0), iter(grads)
    metrics = [x.detach().double().to(hidden.device) for x in out.metrics.values()]
    made = [out.loss.detach().to(job.loss), torch.stack(metrics) if metrics else empty.double()]
    for name in STAT_NAMES:
        made.append(empty.clone() if name not in job.how.names else getattr(out.stats, name).detach())
    for x, need in zip(leaves, needs, strict=True):
        grad = next(grads) if need else empty.clone()
        made.append(torch.zeros_like(x) if grad is None else grad.contiguous())
    return tuple(made)


@fused_loss_op.register_fake
def _(hidden, weight, bias, temperatures, *rest):
    _, key, _, _, _, *needs = rest[len(FIELDS) :]
    job, t, empty = JOBS[key], hidden.shape[0], lambda: hidden.new_empty(0)
    made = [hidden.new_empty((), dtype=job.loss), hidden.new_empty(len(job.metrics), dtype=torch.float64)]
    for name in STAT_NAMES:
        dtype = torch.bool if name == "is_argmax" else accumulation_dtype(hidden.dtype)
        made.append(hidden.new_empty(t, dtype=dtype) if name in job.how.names else empty())
    like = zip((hidden, weight, bias), needs, strict=True)
    return *made, *(x.new_empty(x.shape) if need else empty() for x, need in like)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[-3:])
    extras = 4 + len(FIELDS)
    ctx.rest = [None] * (extras - 3), [None] * len(inputs[extras]), [None] * (len(inputs) - extras - 1)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


@no_second_derivative
def _backward(ctx, upstream, *_):
    before, extras, after = ctx.rest
    grads = [None] * 3
    if upstream is not None:  # 0-dim: the dtype of g stays.
        needs = ctx.needs_input_grad[:3]
        grads = [g * upstream if need else None for g, need in zip(ctx.saved_tensors, needs, strict=True)]
    return (*grads, *before, extras, *after)


fused_loss_op.register_autograd(_backward, setup_context=_setup)
_call = torch.ops.fastrl.fused_loss


def _kind(x) -> torch.dtype | str | None:
    return None if x is None else x.dtype if isinstance(x, Tensor) else "number"


# Teachers and other statistics beside the head: the graph is broken around the eager call.
run_outside = torch.compiler.disable(run_fused)


# -- the door --------------------------------------------------------------------------------------------------------
def fused_loss(
    objective: Objective, hidden: Tensor, head: HeadSpec, batch: TokenBatch, how: How, debug_checks: bool = False
) -> LossOutput:
    """fused_loss of checked inputs, as torch.compile traces it."""
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)]
    fields = [getattr(batch, name) for name in FIELDS]
    extras = [(table, name, x) for table in TABLES for name, x in getattr(batch, table).items()]
    kinds = [_kind(x) for x in fields]
    for table, name, x in extras:
        kinds += [table, name, x.dtype]
    # Numbers stay on the host: reading them there waits for nothing.
    tensors = [torch.full((), x, dtype=torch.float64) if _kind(x) == "number" else x for x in fields]
    more = [x for *_, x in extras]
    per_token = isinstance(head.temperature, Tensor)
    prepared = batch.prepared_for is not None
    key = _key(_index(objective), _index(how), debug_checks, prepared, accumulation_dtype(hidden.dtype), *kinds)
    loss, metrics, *rest = _call(
        hidden, head.weight, head.bias, head.temperature if per_token else None, *tensors, more,
        key, head.logit_scale, head.softcap, 1.0 if per_token else float(head.temperature), *needs,
    )  # fmt: skip
    names = [n for n in _metric_names(key).split("\n") if n]
    reported = {name: metrics[i].to(_metric_dtype(key, i)) for i, name in enumerate(names)}
    stats = TokenStats(**{name: rest[STAT_NAMES.index(name)] for name in how.names})
    return LossOutput(loss, reported, stats)

"""The head as torch custom ops: `fastrl::linear_statistics` and `fastrl::linear_gradients`.

torch.compile sees one node with a fake implementation where the eager code drops ignored rows, walks over chunks and
launches kernels. What a call carries beside tensors travels as a Call, whose fields the schema lists one by one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.ops import dispatch
from fastrl.ops.checks import autocast_off, check_targets, check_temperatures
from fastrl.ops.head import Coefs, HeadSpec, Plan, Saved, accumulation_dtype
from fastrl.ops.once import refuse
from fastrl.ops.shard import shard_of
from fastrl.tokens import STAT_NAMES, TokenStats, capturing

DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp")


@dataclass(frozen=True)
class Call:
    """How a head call is to run: one record instead of a dozen arguments on every level.

    outputs: names joined by commas. temperature: of all rows where no [N] temperatures are given.
    group: name of the process group over which the head is cut, or "".
    """

    outputs: str
    backend: str
    strategy: str
    workspace: int
    logit_scale: float
    softcap: float | None
    temperature: float
    ignore_index: int = -100
    invariant: bool = False
    debug_checks: bool = False
    group: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.outputs.split(","))

    def head(self, weight: Tensor, bias: Tensor | None, temperatures: Tensor | None) -> HeadSpec:
        temperature = self.temperature if temperatures is None else temperatures
        return HeadSpec(weight, bias, self.logit_scale, self.softcap, temperature)

    def plan(self, weight: Tensor) -> Plan:
        group = torch.distributed.distributed_c10d._resolve_process_group(self.group) if self.group else None
        return Plan(self.workspace, self.invariant, shard_of(group, weight))

    def arguments(self) -> tuple:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))


_CALL = (
    "str outputs, str backend, str strategy, int workspace, float logit_scale, float? softcap, float temperature, "
    "int ignore_index, bool invariant, bool debug_checks, str group"
)
# logprobs, entropy, logsumexp, log_sum_sq_probs, is_argmax, max, log_sum [N]; kept logits [V, K and padding]; unit
# dH [K, H]. What is not asked for is empty.
MADE = (*STAT_NAMES, "max", "log_sum", "kept", "unit")


# -- forward -------------------------------------------------------------------------------------------------------
@torch.library.custom_op(
    "fastrl::linear_statistics",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? temperatures, {_CALL}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_statistics(hidden, weight, bias, targets, temperatures, *call):
    """Statistics [N] of rows [N, H]; those whose target is ignore_index are 0 and take part in nothing."""
    call = Call(*call)
    rows = kept_rows(targets, call.ignore_index)
    plan = call.plan(weight)
    vocabulary = weight.shape[0] if plan.shard is None else plan.shard.vocabulary
    head = call.head(weight, bias, temperatures)
    own = targets
    h = hidden
    if rows is not None:
        h, own, head = hidden[rows], targets[rows], head.at_rows(rows)
    check_targets(own, rows, vocabulary, call.debug_checks)
    check_temperatures(head.temperature, rows)
    backend, unit, kept = dispatch.module(call.backend), None, None
    with autocast_off(hidden):
        if call.strategy == "frozen":
            ones = lambda a, b, stats: Coefs(logprobs=torch.ones_like(stats.logprobs))  # noqa: E731
            needs = (True, False, False)
            stats, unit, _, _, saved = backend.one_pass(head, h, own, call.names, ones, needs, plan)
        else:
            stats, saved, kept = backend.statistics(head, h, own, call.names, plan, call.strategy == "cached")
    n, empty = hidden.shape[0], h.new_empty(0)
    made = []
    for name in STAT_NAMES:
        wanted = name in call.names or name == "logprobs"
        made.append(spread(getattr(stats, name), rows, n) if wanted else empty.clone())
    made += [spread(saved.max, rows, n), spread(saved.log_sum, rows, n)]
    if kept is not None:  # with its padding: a compiled graph wants to know the strides
        columns = kept.shape[1]
        kept = kept.as_strided((weight.shape[0], kept.stride(0)), (kept.stride(0), 1))
        kept[:, columns:] = 0
    made += [empty.clone() if kept is None else kept, empty.clone() if unit is None else unit]
    return tuple(made)


@linear_statistics.register_fake
def _(hidden, weight, bias, targets, temperatures, *call):
    call, n = Call(*call), hidden.shape[0]
    acc = accumulation_dtype(hidden.dtype)
    made = []
    for name in STAT_NAMES:
        wanted = name in call.names or name == "logprobs"
        dtype = torch.bool if name == "is_argmax" and wanted else acc if wanted else hidden.dtype
        made.append(hidden.new_empty(n if wanted else 0, dtype=dtype))
    made += [hidden.new_empty(n, dtype=acc), hidden.new_empty(n, dtype=acc)]
    # How many rows are kept depends on how many are ignored.
    size = torch.library.get_ctx().new_dynamic_size
    kept = hidden.new_empty((weight.shape[0], size()), dtype=acc) if call.strategy == "cached" else hidden.new_empty(0)
    unit = hidden.new_empty((size(), hidden.shape[1])) if call.strategy == "frozen" else hidden.new_empty(0)
    return (*made, kept, unit)


def kept_rows(targets: Tensor, ignore_index: int) -> Tensor | None:
    """[K] rows whose target counts, or None if all do.

    All are taken to while a CUDA graph is captured, when they cannot be counted: an ignored row is NaN there.
    """
    if capturing(targets):
        return None
    rows = (targets != ignore_index).nonzero().squeeze(1)
    return None if rows.shape[0] == targets.shape[0] else rows


def spread(x: Tensor, rows: Tensor | None, n: int) -> Tensor:
    """[K] -> [N], 0 elsewhere."""
    return x if rows is None else x.new_zeros(n, *x.shape[1:]).index_copy_(0, rows, x)


# -- backward ------------------------------------------------------------------------------------------------------
@torch.library.custom_op(
    "fastrl::linear_gradients",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? temperatures, Tensor logprobs, "
    "Tensor entropy, Tensor top, Tensor log_sum, Tensor kept, Tensor unit, Tensor? d_logprobs, Tensor? d_entropy, "
    f"Tensor? d_logsumexp, bool need_hidden, bool need_weight, bool need_bias, {_CALL}) -> (Tensor, Tensor, Tensor)",
)
def linear_gradients(
    hidden, weight, bias, targets, temperatures, logprobs, entropy, top, log_sum, kept, unit, d_logprobs, d_entropy,
    d_logsumexp, need_hidden, need_weight, need_bias, *call,
):  # fmt: skip
    """(dH, dW, db) in the dtypes of their inputs, empty where not asked for."""
    call, n = Call(*call), hidden.shape[0]
    acc, rows = accumulation_dtype(hidden.dtype), kept_rows(targets, call.ignore_index)
    pick = lambda x: x if rows is None or x is None else x[rows]  # noqa: E731
    coefs = Coefs(*(None if x is None else pick(x.to(acc)) for x in (d_logprobs, d_entropy, d_logsumexp)))
    if unit.dim() == 2:
        # A zero coefficient drops its row, whatever stands there.
        c = coefs.logprobs.unsqueeze(1)
        d_hidden = torch.where(c != 0, unit.to(acc) * c, 0.0).to(hidden.dtype)
        return spread(d_hidden, rows, n), weight.new_empty(0), weight.new_empty(0)
    head = call.head(weight, bias, temperatures)
    head = head if rows is None else head.at_rows(rows)
    saved = Saved(pick(top), pick(log_sum), pick(logprobs), pick(entropy) if "entropy" in call.names else None)
    needs = (need_hidden, need_weight, need_bias)
    with autocast_off(hidden):
        d_hidden, d_weight, d_bias = dispatch.module(call.backend).gradients(
            head, pick(hidden), pick(targets), saved, coefs, needs, call.plan(weight), kept if kept.dim() == 2 else None
        )
    blank = weight.new_empty(0)
    made = (None if d_hidden is None else spread(d_hidden, rows, n), d_weight, d_bias)
    return tuple(blank.clone() if x is None else x for x in made)


@linear_gradients.register_fake
def _(hidden, weight, bias, *rest):
    need_hidden, need_weight, need_bias = rest[11:14]
    like = zip((hidden, weight, bias), (need_hidden, need_weight, need_bias), strict=True)
    return tuple(x.new_empty(x.shape) if need else weight.new_empty(0) for x, need in like)


linear_gradients.register_autograd(refuse)


# -- the two joined by autograd --------------------------------------------------------------------------------------
def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, temperatures, *call = inputs
    logprobs, entropy, _, squares, hits, top, log_sum, kept, unit = output
    ctx.save_for_backward(hidden, weight, bias, targets, temperatures, logprobs, entropy, top, log_sum, kept, unit)
    ctx.call = tuple(call)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(squares, hits, top, log_sum, kept, unit)


def _backward(ctx, d_logprobs, d_entropy, d_logsumexp, *_):
    nothing = (None,) * (5 + len(ctx.call))
    call = Call(*ctx.call)
    asked = {"logprobs": d_logprobs, "entropy": d_entropy, "logsumexp": d_logsumexp}
    given = {name: g if name in call.names else None for name, g in asked.items()}
    if not any(g is not None for g in given.values()):
        return nothing
    hidden, weight, bias, targets, temperatures, logprobs, entropy, top, log_sum, kept, unit = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
    made = torch.ops.fastrl.linear_gradients(
        hidden, weight, bias, targets, temperatures, logprobs, entropy, top, log_sum, kept, unit,
        given["logprobs"], given["entropy"], given["logsumexp"], *needs, *ctx.call,
    )  # fmt: skip
    grads = (x if need else None for x, need in zip(made, needs, strict=True))
    return (*grads, *nothing[3:])


linear_statistics.register_autograd(_backward, setup_context=_setup)


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperatures: Tensor | None, call: Call
) -> TokenStats:
    """Differentiable statistics [N] that `call` names."""
    made = torch.ops.fastrl.linear_statistics(hidden, weight, bias, targets, temperatures, *call.arguments())
    return TokenStats(**{name: made[STAT_NAMES.index(name)] for name in call.names})

"""Log-softmax over a recorded support (top-p, top-k or grammar sets): gathered dot products, never [N, V]."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastrl.ops import dispatch
from fastrl.ops.checks import autocast_off
from fastrl.ops.head import Coefs, HeadSpec, accumulation_dtype
from fastrl.ops.once import no_second_derivative
from fastrl.ops.support_torch import Kept, SupportSaved, transform
from fastrl.tokens import TokenStats

DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp")
_MODULES = {"torch": "fastrl.ops.support_torch", "triton": "fastrl.ops.support_triton"}


def support_statistics(
    head: HeadSpec,
    hidden: Tensor,
    targets: Tensor,
    support: tuple[Tensor, Tensor],
    outputs: tuple,
    ignore_index: int,
    *,
    backend: str | None = None,
    workspace_bytes: int | None = None,
) -> TokenStats:
    """Statistics [N] of softmax restricted to each row's kept tokens.

    Cost 2*nnz*H flops forward and as many for each gradient asked for; memory 4*nnz bytes and the workspace.

    Args:
        head, hidden [N, H], targets [N]: as linear_logprobs.
        support: (indices [nnz], offsets [N+1]) int; row n keeps indices[offsets[n]:offsets[n+1]], distinct words.
        backend: None (by device), "reference", "torch" or "triton". workspace_bytes: bytes of gathered rows at once.
    Returns: TokenStats, differentiable once in hidden, weight and bias (any number of times with "reference"). A
        target outside its row's support has log-prob -inf and no gradient; an empty support the same, entropy 0 and
        logsumexp -inf; ignored rows give 0.
    Raises: ValueError on a support that does not fit. An index outside [0, V) is refused on the CPU; elsewhere
        "triton" makes its row NaN.
    """
    name = dispatch.pick(backend, hidden)
    keep = targets != ignore_index
    kept = _checked(support, keep, head.weight.shape[0], hidden.device)
    if name == "reference":
        with autocast_off(hidden):
            made = _reference(head, hidden, targets, kept)
        stats = [made[m] for m in outputs]
    else:
        call = Call(
            outputs,
            name,
            dispatch.workspace(workspace_bytes, hidden, head.weight.shape[0]),
            head.logit_scale,
            head.softcap,
            head.temperature,
        )
        stats = _SupportStatistics.apply(hidden, head.weight, head.bias, targets, kept, call)
    return TokenStats(**{m: torch.where(keep, x, torch.zeros_like(x)) for m, x in zip(outputs, stats, strict=True)})


def _checked(support: tuple[Tensor, Tensor], keep: Tensor, v: int, device: torch.device) -> Kept:
    """The support as int64 on the device, ignored rows emptied; ValueError naming what does not fit."""
    indices, offsets = (x.to(device).long() for x in support)
    n = keep.shape[0]
    if offsets.shape != (n + 1,):
        raise ValueError(f"support offsets must be [N+1={n + 1}], got {list(offsets.shape)}")
    first, last, falls = torch.stack([offsets[0], offsets[-1], (offsets.diff() < 0).any().long()]).tolist()
    if first != 0 or falls:
        raise ValueError(f"support offsets must be ascending from 0, got {offsets.tolist()[:20]}")
    if indices.dim() != 1 or last != indices.shape[0]:
        raise ValueError(f"support offsets end at {last} but indices has {indices.shape[0]} entries")
    if indices.device.type == "cpu" and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < v:
        raise ValueError(f"support indices must be in [0, V={v}), got {int(indices.min())} to {int(indices.max())}")
    # Nothing in an ignored row can reach dW, and it costs nothing.
    return Kept(indices, offsets[:-1], torch.where(keep, offsets[1:], offsets[:-1]))


@dataclass(frozen=True)
class Call:
    """How a call is to run; everything but the tensors that take a gradient."""

    outputs: tuple[str, ...]
    backend: str
    workspace: int
    logit_scale: float
    softcap: float | None
    temperature: float | Tensor

    def head(self, weight: Tensor, bias: Tensor | None) -> HeadSpec:
        return HeadSpec(weight, bias, self.logit_scale, self.softcap, self.temperature)

    def module(self) -> ModuleType:
        return importlib.import_module(_MODULES[self.backend])


class _SupportStatistics(torch.autograd.Function):
    """Forward: nnz dot products, saved [nnz]. Backward: two gathered sums, one for each of hidden and weight."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, kept: Kept, call: Call):
        with autocast_off(hidden):
            head = call.head(weight, bias)
            stats, saved = call.module().statistics(head, hidden, targets, kept, call.outputs, call.workspace)
        ctx.save_for_backward(hidden, weight, bias, targets, *saved.tensors())
        ctx.kept, ctx.call = kept, call
        ctx.set_materialize_grads(False)
        made = tuple(getattr(stats, name) for name in call.outputs)
        ctx.mark_non_differentiable(*(x for n, x in zip(call.outputs, made, strict=True) if n not in DIFFERENTIABLE))
        return made

    @staticmethod
    @no_second_derivative
    def backward(ctx, *upstream):
        hidden, weight, bias, targets, *rest = ctx.saved_tensors
        saved, call, acc = SupportSaved.of(tuple(rest)), ctx.call, accumulation_dtype(hidden.dtype)
        given = dict(zip(call.outputs, upstream, strict=True))
        given = {n: g.to(acc) for n, g in given.items() if g is not None and n in DIFFERENTIABLE}
        if not given:
            return (None,) * 6
        if "logprobs" in given:  # -inf of a target that was not kept is a constant
            given["logprobs"] = torch.where(saved.found, given["logprobs"], 0.0)
        head, needs = call.head(weight, bias), tuple(ctx.needs_input_grad[:3])
        inputs = hidden, targets, ctx.kept, saved, Coefs(**given), needs, call.workspace
        with autocast_off(hidden):
            grads = call.module().gradients(head, *inputs)
        return *grads, None, None, None


def _reference(head: HeadSpec, hidden: Tensor, targets: Tensor, kept: Kept) -> dict[str, Tensor]:
    """The definition, in torch operations that autograd follows: nnz*H memory."""
    rows, indices, bounds = kept.flat()
    n, acc = targets.shape[0], accumulation_dtype(hidden.dtype)
    z = (hidden[rows].to(acc) * head.weight[indices].to(acc)).sum(-1)
    if head.bias is not None:
        z = z + head.bias[indices].to(acc)
    z, _ = transform(z, head, rows)

    def total(x: Tensor) -> Tensor:
        return z.new_zeros(n).index_add(0, rows, x.to(acc))

    top = z.new_full((n,), -torch.inf).scatter_reduce(0, rows, z.detach(), "amax")
    relative = z - top[rows]
    # 0 * log 0 = 0: a word of logit -inf gives neither NaN values nor NaN gradients.
    seen = ~(relative == -torch.inf)
    safe = torch.where(seen, relative, torch.zeros_like(relative))
    e = torch.where(seen, safe.exp(), torch.zeros_like(relative))
    log_sum = total(e).log()
    logp = relative - log_sum[rows]
    p = e / total(e)[rows]
    is_target = indices == targets[rows]
    found = total(is_target) > 0
    logprobs = total(torch.where(is_target, logp, torch.zeros_like(logp)))
    return {
        "logprobs": torch.where(found, logprobs, torch.full_like(logprobs, -torch.inf)),
        "entropy": -total(p * (safe - log_sum[rows])),
        "logsumexp": top + log_sum,
        "log_sum_sq_probs": total(p.square()).log().detach(),
        "is_argmax": total(is_target & (relative == 0)) > 0,
    }

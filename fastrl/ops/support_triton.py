"""Sampled support by its Triton kernels: the same two functions as support_torch, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.kernels.segments import segment_sum
from fastrl.kernels.support_stats import Entries, gather_sum, support_dlogits, support_stats
from fastrl.ops.head import Coefs, HeadSpec, Saved
from fastrl.ops.support_torch import Kept, SupportSaved
from fastrl.ops.triton_backend import _check, _logit_scale, _on_its_device, _row_gradient
from fastrl.tokens import TokenStats


@_on_its_device
def statistics(
    head: HeadSpec, hidden: Tensor, targets: Tensor, kept: Kept, outputs: tuple, workspace: int
) -> tuple[TokenStats, SupportSaved]:
    """As support_torch.statistics; the gathered rows exist only in registers, so `workspace` bounds nothing."""
    _check(head, hidden)
    asked = dict(entropy="entropy" in outputs, squares="log_sum_sq_probs" in outputs)
    made = support_stats(hidden, head.weight, targets, _entries(kept), head.bias, _logit_scale(head), **asked)
    stats = TokenStats(made.logprobs, made.entropy, made.logsumexp, made.log_sum_sq_probs, made.is_argmax)
    saved = Saved(made.max, made.log_sum, made.logprobs, made.entropy if asked["entropy"] else None)
    return stats, SupportSaved(made.raw, made.found, saved)


@_on_its_device
def gradients(
    head: HeadSpec,
    hidden: Tensor,
    targets: Tensor,
    kept: Kept,
    saved: SupportSaved,
    coefs: Coefs,
    needs: tuple,
    workspace: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As support_torch.gradients: dz [nnz], then one gathered sum a gradient, dW's after a sort by word."""
    live = torch.stack([x != 0 for x in coefs.present()]).any(0)
    own = Entries(kept.indices, kept.starts, torch.where(live, kept.stops, kept.starts))
    law = _row_gradient(head, saved.rows, coefs)
    scale = _logit_scale(head)
    dz = support_dlogits(saved.raw, targets, own, scale, law, entropy=coefs.entropy is not None)
    d_hidden = d_weight = d_bias = None
    if needs[0]:
        d_hidden = gather_sum(head.weight, dz, own, _like(hidden))
    if needs[1] or needs[2]:
        words, order = kept.indices.sort(stable=True)
        bounds = torch.searchsorted(words, torch.arange(head.weight.shape[0] + 1, device=words.device))
        coef = dz[order]
        if needs[1]:
            rows = torch.searchsorted(kept.starts, order, right=True) - 1  # the last row that starts at or before it
            d_weight = gather_sum(hidden, coef, Entries(rows, bounds[:-1], bounds[1:]), _like(head.weight))
        if needs[2]:
            d_bias = segment_sum(coef, bounds).to(head.bias.dtype)
    return d_hidden, d_weight, d_bias


def _entries(kept: Kept) -> Entries:
    return Entries(kept.indices, kept.starts, kept.stops)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)

"""The elementwise work on one chunk of logits [C, V], in place: raw logits -> exp(z - max) -> dL/d(raw logits).

On the CPU it walks the chunk in blocks of a few rows that stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastrl.ops.head import Coefs, HeadSpec, Saved, accumulation_dtype, target_dlogit
from fastrl.tokens import TokenStats


def chunk_stats(z: Tensor, head: HeadSpec, targets: Tensor, outputs: tuple, block: int):
    """Turn raw logits [C, V] into e = exp(z - max), in place, and return their (TokenStats, Saved)."""
    parts = [
        _block_stats(z[a:b], head.at_rows(slice(a, b)), targets[a:b], outputs) for a, b in ranges(z.shape[0], block)
    ]
    return concatenate(parts, outputs, z)


def _block_stats(z: Tensor, head: HeadSpec, targets: Tensor, outputs: tuple):
    _transform(z, head)
    top, where_top = z.max(1)
    index = targets.long().unsqueeze(1)
    valid = ((index >= 0) & (index < z.shape[1])).squeeze(1)
    index = index.clamp(0, z.shape[1] - 1)
    at_target = (z.gather(1, index).squeeze(1) - top).masked_fill(~valid, torch.nan)
    z.sub_(top.unsqueeze(1))
    weighted = None
    if "entropy" in outputs:
        # sum_v e_v (max - z_v): every term >= 0, so nothing cancels. e underflows to 0 long before -1000.
        weighted = z.clamp(min=-1000.0)
        z.exp_()
        weighted = -weighted.mul_(z).sum(1)
    else:
        z.exp_()
    # The largest term is exactly 1; log1p of the others keeps the tail when one token holds nearly all the mass.
    column = where_top.unsqueeze(1)
    one = z.gather(1, column)
    z.scatter_(1, column, 0.0)
    tail = z.sum(1)
    log_sum = torch.log1p(tail)
    logprobs = at_target - log_sum
    entropy = None if weighted is None else (log_sum + weighted / (1 + tail)).clamp_(max=math.log(z.shape[1]))
    log_sum_sq = None
    if "log_sum_sq_probs" in outputs:
        log_sum_sq = torch.log1p(torch.linalg.vecdot(z, z)) - 2 * log_sum
    z.scatter_(1, column, one)
    hit = (where_top == targets) if "is_argmax" in outputs else None
    lse = top + log_sum if "logsumexp" in outputs else None
    return TokenStats(logprobs, entropy, lse, log_sum_sq, hit), Saved(top, log_sum, logprobs, entropy)


def chunk_exp(z: Tensor, head: HeadSpec, top: Tensor, block: int) -> None:
    """Raw logits [C, V] -> exp(z - max) in place, with the row maxima already known."""
    for a, b in ranges(z.shape[0], block):
        _transform(z[a:b], head.at_rows(slice(a, b)))
        z[a:b].sub_(top[a:b].unsqueeze(1)).exp_()


def chunk_dlogits(
    e: Tensor, head: HeadSpec, targets: Tensor, saved: Saved, coefs: Coefs, keep: Tensor | None, block: int
) -> Tensor:
    """exp(z - max) [C, V] -> dL/d(raw logits), in place; with `keep`, the kept rows move to the front. Returns them."""
    if keep is not None:
        head, targets, saved, coefs = head.at_rows(keep), targets[keep], saved.at_rows(keep), coefs.at_rows(keep)
    n = e.shape[0] if keep is None else keep.shape[0]
    at_target = target_dlogit(coefs, saved.logprobs, saved.entropy) * head.logit_scale / head.temperature
    if head.softcap is not None:
        z_target = (saved.logprobs + saved.log_sum + saved.max) * head.temperature
        at_target = at_target * (1 - (z_target / head.softcap).square())
    index = targets.long().clamp(0, e.shape[1] - 1).unsqueeze(1)
    for a, b in ranges(n, block):
        # keep is ascending, so row keep[j] >= j is never overwritten before it is read.
        source = e[a:b] if keep is None else e[keep[a:b]]
        part = slice(a, b)
        out = _block_dlogits(source, head.at_rows(part), saved.at_rows(part), coefs.at_rows(part))
        out.scatter_(1, index[a:b], at_target[a:b].unsqueeze(1))
        if keep is not None:
            e[a:b] = out
    return e[:n]


def _block_dlogits(e: Tensor, head: HeadSpec, saved: Saved, coefs: Coefs) -> Tensor:
    """Off-target columns: dz_v = p_v (s - c - h (log p_v + H)), times the slope of the logit transform. In place."""
    slope = None
    if head.softcap is not None or coefs.entropy is not None:
        # log e_v gives z_v back; where e underflowed p_v = 0 and the product below is 0 whatever stands here.
        z = torch.log(e.clamp(min=torch.finfo(e.dtype).tiny))
    if head.softcap is not None:
        t = head.temperature.unsqueeze(1) if isinstance(head.temperature, Tensor) else head.temperature
        slope = 1 - ((z + saved.max.unsqueeze(1)) * t / head.softcap).square_()
    scale = torch.exp(-saved.log_sum) * head.logit_scale / head.temperature
    const = torch.zeros_like(scale)
    if coefs.logprobs is not None:
        const = const - coefs.logprobs
    if coefs.logsumexp is not None:
        const = const + coefs.logsumexp
    if coefs.entropy is None:
        e.mul_((const * scale).unsqueeze(1))
    else:
        bracket = z.sub_((saved.log_sum - saved.entropy).unsqueeze(1)).mul_(-coefs.entropy.unsqueeze(1))
        bracket.add_(const.unsqueeze(1)).mul_(scale.unsqueeze(1))
        e.mul_(bracket)
    return e if slope is None else e.mul_(slope)


def _transform(z: Tensor, head: HeadSpec) -> None:
    """Raw h.W + b -> scaled logits, in place."""
    if head.softcap is not None:
        z.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap)
    elif head.logit_scale != 1.0:
        z.mul_(head.logit_scale)
    if isinstance(head.temperature, Tensor):
        z.div_(head.temperature.unsqueeze(1))
    elif head.temperature != 1.0:
        z.div_(head.temperature)


def ranges(n: int, step: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + step, n)) for a in range(0, n, max(1, step)))


def concatenate(parts: list, outputs: tuple, like: Tensor) -> tuple[TokenStats, Saved]:
    """Join per-chunk (TokenStats, Saved) along the rows; with no rows, make empty ones."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        acc = accumulation_dtype(like.dtype)
        # A tensor of its own for each, by which autograd tells the outputs apart.
        fields = {n: like.new_empty(0, dtype=torch.bool if n == "is_argmax" else acc) for n in ("logprobs", *outputs)}
        top, log_sum = like.new_empty(0, dtype=acc), like.new_empty(0, dtype=acc)
        return TokenStats(**fields), Saved(top, log_sum, fields["logprobs"], fields.get("entropy"))

    def join(pieces):
        return None if pieces[0] is None else torch.cat(pieces)

    stats = TokenStats(*(join([getattr(s, f) for s, _ in parts]) for f in TokenStats.__dataclass_fields__))
    saved = Saved(*(join([getattr(s, f) for _, s in parts]) for f in Saved.__dataclass_fields__))
    return stats, saved

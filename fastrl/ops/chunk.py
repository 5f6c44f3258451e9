"""The elementwise work on one chunk of raw logits [C, V]: its statistics, then raw logits -> their gradient, in place.

The buffer holds raw logits from one step to the other. What each needs of them (z, exp(z - max), the slope of the
softcap) is made afresh in scratch: one exponential more, and nothing is recovered from a value that was rounded.
On the CPU the walk is in blocks of a few rows that stay in cache, with scratch [2, B, V] allocated once for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastrl.ops.head import Coefs, HeadSpec, Saved, accumulation_dtype, target_dlogit
from fastrl.tokens import TokenStats

FLOOR = -1000.0  # of z - max: exp underflows to 0 long before, and 0 * FLOOR is 0 where 0 * -inf is not


def chunk_stats(raw: Tensor, head: HeadSpec, targets: Tensor, outputs: tuple, scratch: Tensor):
    """(TokenStats, Saved) of raw logits [C, V], which stay as they are."""
    parts = [
        _block_stats(raw[a:b], head.at_rows(slice(a, b)), targets[a:b], outputs, scratch[:, : b - a])
        for a, b in ranges(raw.shape[0], scratch.shape[1])
    ]
    return concatenate(parts, outputs, raw)


def _block_stats(raw: Tensor, head: HeadSpec, targets: Tensor, outputs: tuple, scratch: Tensor):
    z = _transform(raw, head, scratch[0])
    top, where_top = z.max(1)
    index = targets.long().unsqueeze(1)
    # As torch: a logit of +inf leaves no log-prob in its row. Nor does a target outside the vocabulary.
    valid = ((index >= 0) & (index < z.shape[1])).squeeze(1) & (top < torch.inf)
    at_target = z.gather(1, index.clamp(0, z.shape[1] - 1)).squeeze(1).sub(top).masked_fill(~valid, torch.nan)
    e = torch.sub(z, top.unsqueeze(1), out=scratch[0])
    gap = torch.clamp(e, min=FLOOR, out=scratch[1]) if "entropy" in outputs else None
    e.exp_()
    # sum_v e_v (max - z_v): every term >= 0, so nothing cancels.
    weighted = None if gap is None else -gap.mul_(e).sum(1)
    # The largest term is exactly 1; log1p of the others keeps the tail when one token holds nearly all the mass.
    e.scatter_(1, where_top.unsqueeze(1), 0.0)
    tail = e.sum(1)
    log_sum = torch.log1p(tail)
    logprobs = at_target - log_sum
    entropy = None if weighted is None else (log_sum + weighted / (1 + tail)).clamp_(max=math.log(z.shape[1]))
    log_sum_sq = None
    if "log_sum_sq_probs" in outputs:
        log_sum_sq = torch.log1p(torch.linalg.vecdot(e, e)) - 2 * log_sum
    hit = (where_top == targets) if "is_argmax" in outputs else None
    lse = top + log_sum if "logsumexp" in outputs else None
    return TokenStats(logprobs, entropy, lse, log_sum_sq, hit), Saved(top, log_sum, logprobs, entropy)


def chunk_dlogits(
    raw: Tensor, head: HeadSpec, targets: Tensor, saved: Saved, coefs: Coefs, keep: Tensor | None, scratch: Tensor
) -> Tensor:
    """Raw logits [C, V] -> dL/d(raw logits), in place; with `keep`, those rows move to the front. Returns them."""
    if keep is not None:
        head, targets, saved, coefs = head.at_rows(keep), targets[keep], saved.at_rows(keep), coefs.at_rows(keep)
    n = raw.shape[0] if keep is None else keep.shape[0]
    for a, b in ranges(n, scratch.shape[1]):
        part, room = slice(a, b), scratch[:, : b - a]
        # keep ascends, so row keep[j] >= j is read here before any later block overwrites it.
        source = raw[part] if keep is None else torch.index_select(raw, 0, keep[part], out=room[1])
        rows = head.at_rows(part), targets[part], saved.at_rows(part), coefs.at_rows(part)
        _block_dlogits(source, *rows, room, out=raw[part])
    return raw[:n]


def _block_dlogits(
    raw: Tensor, head: HeadSpec, targets: Tensor, saved: Saved, coefs: Coefs, scratch: Tensor, out: Tensor
) -> None:
    """dz_v = p_v (s - c - h (log p_v + H)) off the target, times the slope of the logit transform; into `out`."""
    z = _transform(raw, head, scratch[0])
    index = targets.long().clamp(0, raw.shape[1] - 1).unsqueeze(1)
    scale = head.logit_scale / head.temperature
    at_target = target_dlogit(coefs, saved.logprobs, saved.entropy) * scale
    slope = None
    if head.softcap is not None:
        slope = _tanh(raw, head, scratch[1]).square_().neg_().add_(1)
        at_target = at_target * slope.gather(1, index).squeeze(1)
    z = torch.sub(z, saved.max.unsqueeze(1), out=scratch[0])
    e = torch.exp(z, out=out)
    weight = torch.exp(-saved.log_sum) * scale
    const = torch.zeros_like(weight)
    if coefs.logprobs is not None:
        const = const - coefs.logprobs
    if coefs.logsumexp is not None:
        const = const + coefs.logsumexp
    if coefs.entropy is None:
        e.mul_((const * weight).unsqueeze(1))
    else:
        bracket = z.clamp_(min=FLOOR).sub_((saved.log_sum - saved.entropy).unsqueeze(1))
        bracket.mul_(-coefs.entropy.unsqueeze(1)).add_(const.unsqueeze(1)).mul_(weight.unsqueeze(1))
        e.mul_(bracket)
    if slope is not None:
        e.mul_(slope)
    e.scatter_(1, index, at_target.unsqueeze(1))


def _transform(raw: Tensor, head: HeadSpec, out: Tensor) -> Tensor:
    """Scaled logits z of raw ones, in `out`; or `raw` itself where there is nothing to do."""
    z = raw
    if head.softcap is not None:
        z = _tanh(raw, head, out).mul_(head.softcap)
    elif head.logit_scale != 1.0:
        z = torch.mul(raw, head.logit_scale, out=out)
    if isinstance(head.temperature, Tensor):
        return torch.div(z, head.temperature.unsqueeze(1), out=out)
    return z if head.temperature == 1.0 else torch.div(z, head.temperature, out=out)


def _tanh(raw: Tensor, head: HeadSpec, out: Tensor) -> Tensor:
    return torch.mul(raw, head.logit_scale / head.softcap, out=out).tanh_()


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

"""Sampled support in plain torch: gathered dot products and bag sums, in chunks that fit the workspace.

    forward    raw_e = h_n . W_k              rows of W gathered chunk by chunk, 2*nnz*H flops
    backward   dH_n = sum_e dz_e W_k, dW_k = sum_e dz_e h_n      grouped sums, each in one fixed order
Everything else is over [nnz] vectors, which are kept: the forward's logits are the backward's.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.ops.head import Coefs, HeadSpec, Saved, accumulation_dtype, target_dlogit
from fastrl.tokens import TokenStats

FLOOR = -1000.0  # of z - max: exp underflows to 0 long before, and 0 * FLOOR is 0 where 0 * -inf is not
BAG = 128  # terms added one after the other; longer sums are sums of such sums, whose error does not grow with them
BAG_DOTS = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
CACHE = 8 << 20  # on the CPU a larger chunk is no faster


@dataclass(frozen=True)
class Kept:
    """The support of N rows: row n keeps indices[starts[n]:stops[n]] (nothing where it is ignored).

    indices: [nnz] int64. starts, stops: [N] int64.
    """

    indices: Tensor
    starts: Tensor
    stops: Tensor

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [nnz'], indices [nnz'], bounds [N+1]) of the entries that some row keeps."""
        bounds = F.pad((self.stops - self.starts).cumsum(0), (1, 0))
        rows = torch.repeat_interleave(torch.arange(len(self.starts), device=bounds.device), bounds.diff())
        at = torch.arange(len(rows), device=bounds.device) + (self.starts - bounds[:-1])[rows]
        return rows, self.indices[at], bounds


@dataclass(frozen=True)
class SupportSaved:
    """What the backward needs of the forward. raw: [nnz'] h.W + b of each kept entry; found: [N] bool, target kept."""

    raw: Tensor
    found: Tensor
    rows: Saved

    def tensors(self) -> tuple:
        return self.raw, self.found, self.rows.max, self.rows.log_sum, self.rows.logprobs, self.rows.entropy

    @classmethod
    def of(cls, tensors: tuple) -> SupportSaved:
        return cls(tensors[0], tensors[1], Saved(*tensors[2:]))


# -- the two functions of a backend ----------------------------------------------------------------------------------
def statistics(
    head: HeadSpec, hidden: Tensor, targets: Tensor, kept: Kept, outputs: tuple, workspace: int
) -> tuple[TokenStats, SupportSaved]:
    """Every statistic of `outputs` [N]; rows without entries have log-prob and logsumexp -inf and entropy 0."""
    rows, indices, bounds = kept.flat()
    raw = _dots(hidden, head.weight, rows, indices, workspace)
    if head.bias is not None:
        raw = raw + head.bias[indices].to(raw.dtype)
    z, _ = transform(raw, head, rows)
    is_target = indices == targets[rows]

    def total(x: Tensor) -> Tensor:  # float64: a sum over a support of any length costs no digits
        return torch.segment_reduce(x.double(), "sum", offsets=bounds).to(raw.dtype)

    top = torch.segment_reduce(z, "max", offsets=bounds) if len(bounds) > 1 else z.new_empty(0)
    relative = z - top[rows]
    e = relative.exp()
    # The largest term is exactly 1; log1p of the others keeps the tail when one token holds nearly all the mass.
    entry = torch.arange(len(z), device=z.device)
    first = torch.full_like(bounds[1:], len(z)).scatter_reduce(
        0, rows, torch.where(relative == 0, entry, len(z)), "amin"
    )
    tail_terms = torch.where(entry == first[rows], 0.0, e)
    tail = total(tail_terms)
    log_sum = torch.log1p(tail)
    found = total(is_target.to(z.dtype)) > 0
    at_target = total(torch.where(is_target, relative, 0.0)) - log_sum
    logprobs = torch.where(found, at_target, -torch.inf)
    entropy = None
    if "entropy" in outputs:  # every term >= 0, so nothing cancels
        entropy = log_sum + total(e * -relative.clamp(min=FLOOR)) / (1 + tail)
        entropy = torch.minimum(entropy, bounds.diff().clamp(min=1).to(z.dtype).log())
    stats = TokenStats(
        logprobs,
        entropy,
        top + log_sum,
        torch.where(bounds.diff() > 0, torch.log1p(total(tail_terms.square())) - 2 * log_sum, -torch.inf),
        total((is_target & (relative == 0)).to(z.dtype)) > 0,
    )
    return stats, SupportSaved(raw, found, Saved(top, log_sum, logprobs, entropy))


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
    """(d_hidden, d_weight, d_bias), None where `needs` says so. Rows with zero coefficients cost nothing."""
    live = torch.stack([x != 0 for x in coefs.present()]).any(0)
    rows, indices, _ = kept.flat()
    at = live[rows].nonzero().squeeze(1)
    rows, indices, raw = rows[at], indices[at], saved.raw[at]
    dz = _dlogits(head, targets, rows, indices, raw, saved.rows, coefs)
    d_hidden = d_weight = d_bias = None
    if needs[0]:
        d_hidden = torch.zeros_like(hidden)
        grouped_sum(d_hidden, rows, head.weight, indices, dz, workspace)
    if needs[1] or needs[2]:
        words, order = indices.sort(stable=True)
        if needs[1]:
            d_weight = torch.zeros_like(head.weight)
            grouped_sum(d_weight, words, hidden, rows[order], dz[order], workspace)
        if needs[2]:
            words, counts = words.unique_consecutive(return_counts=True)
            sums = torch.segment_reduce(dz[order].double(), "sum", lengths=counts) if len(words) else dz.double()
            d_bias = torch.zeros_like(head.bias).index_copy_(0, words, sums.to(head.bias.dtype))
    return d_hidden, d_weight, d_bias


# -- pieces ------------------------------------------------------------------------------------------------------------
def transform(raw: Tensor, head: HeadSpec, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """(scaled logits of the entries, d(softcap)/d(its argument) or None)."""
    z, slope = raw * head.logit_scale, None
    if head.softcap is not None:
        t = torch.tanh(z / head.softcap)
        z, slope = head.softcap * t, 1 - t.square()
    return z / head.row_temperature(rows), slope


def _dlogits(
    head: HeadSpec, targets: Tensor, rows: Tensor, indices: Tensor, raw: Tensor, saved: Saved, coefs: Coefs
) -> Tensor:
    """[nnz'] dL/d(raw): p (s - c - h (log p + H)) off the target, times the slope of the logit transform."""
    z, slope = transform(raw, head, rows)
    logp = (z - saved.max[rows]) - saved.log_sum[rows]
    pull = torch.zeros_like(saved.log_sum)
    if coefs.logsumexp is not None:
        pull = pull + coefs.logsumexp
    if coefs.logprobs is not None:
        pull = pull - coefs.logprobs
    pull = pull[rows]
    if coefs.entropy is not None:
        pull = pull - coefs.entropy[rows] * (logp.clamp(min=FLOOR) + saved.entropy[rows])
    at_target = target_dlogit(coefs, saved.logprobs, saved.entropy)[rows]
    dz = torch.where(indices == targets[rows], at_target, logp.exp() * pull)
    dz = dz * (head.logit_scale / head.row_temperature(rows))
    return dz if slope is None else dz * slope


def _dots(hidden: Tensor, weight: Tensor, rows: Tensor, indices: Tensor, workspace: int) -> Tensor:
    """[nnz'] hidden[rows] . weight[indices] in the accumulation dtype; only half-precision rows are copied, to widen.

    These dot products are what embedding_bag's backward gives for its per-sample weights, and torch has them as an
    operator that reads the rows in place.
    """
    acc = accumulation_dtype(hidden.dtype)
    out = torch.empty(len(rows), dtype=acc, device=hidden.device)
    step = len(rows) if acc == hidden.dtype and BAG_DOTS else _entries(hidden, workspace, copies=2)
    for a, b in _spans(len(rows), step):
        out[a:b] = _chunk_dots(hidden, weight, rows[a:b], indices[a:b], acc)
    return out


def _chunk_dots(hidden: Tensor, weight: Tensor, rows: Tensor, indices: Tensor, acc: torch.dtype) -> Tensor:
    if BAG_DOTS is None:
        return torch.linalg.vecdot(hidden[rows].to(acc), weight[indices].to(acc))
    if acc != hidden.dtype:
        own, rows = rows.unique_consecutive(return_inverse=True)
        hidden = hidden[own].to(acc)
        weight, indices = weight[indices].to(acc), torch.arange(len(indices), device=indices.device)
    return BAG_DOTS(hidden.contiguous(), weight, indices, indices[:0], rows, mode=0)  # rows say whose each entry is


def grouped_sum(out: Tensor, keys: Tensor, source: Tensor, index: Tensor, coef: Tensor, workspace: int) -> None:
    """out[keys[e]] = sum_e coef[e] * source[index[e]] for ascending keys [nnz]; rows of `out` without a key stay.

    Deterministic: bags of at most BAG entries, then the bags of each key, each sum in the order of the entries and in
    the dtype of coef; one rounding to out's.
    """
    words, counts = keys.unique_consecutive(return_counts=True)
    bags = -(-counts // BAG)
    per_word = F.pad(bags.cumsum(0), (1, 0))
    within = torch.arange(int(per_word[-1]), device=keys.device) - per_word[:-1].repeat_interleave(bags)
    starts = (counts.cumsum(0) - counts).repeat_interleave(bags) + BAG * within
    per_bag, host_starts = per_word.tolist(), [*starts.tolist(), len(keys)]
    most = max(1, _entries(source, workspace // 2, copies=1))
    a = 0
    while a < len(words):  # keys [a, b): at most `most` bags, or one key
        b = max(a + 1, bisect_right(per_bag, per_bag[a] + most) - 1)
        first, last = per_bag[a], per_bag[b]
        partial = coef.new_empty(last - first, source.shape[1])
        while first < last:  # bags [first, stop): at most `most` entries, or one bag
            stop = max(first + 1, bisect_right(host_starts, host_starts[first] + most, hi=last + 1) - 1)
            own = slice(host_starts[first], host_starts[stop])
            own_starts = starts[first:stop] - host_starts[first]
            partial[first - per_bag[a] : stop - per_bag[a]] = _bags(source, index[own], own_starts, coef[own])
            first = stop
        if last - per_bag[a] > b - a:
            every = torch.arange(len(partial), device=keys.device)
            partial = F.embedding_bag(every, partial, per_word[a:b] - per_bag[a], mode="sum")
        out.index_copy_(0, words[a:b], partial.to(out.dtype))
        a = b


def _bags(source: Tensor, index: Tensor, starts: Tensor, coef: Tensor) -> Tensor:
    """[B, H] sums of coef * source[index] over bags that begin at starts [B]; half-precision rows are widened first."""
    if source.dtype != coef.dtype:
        source, index = source[index].to(coef.dtype), torch.arange(len(index), device=index.device)
    return F.embedding_bag(index, source, starts, mode="sum", per_sample_weights=coef)


def _entries(x: Tensor, workspace: int, copies: int) -> int:
    """How many gathered rows of x [., H] fit, with their widened copies."""
    acc = accumulation_dtype(x.dtype)
    size = x.element_size() + (acc.itemsize if acc != x.dtype else 0)
    room = min(workspace, CACHE) if x.device.type == "cpu" else workspace
    return max(1, room // max(1, copies * size * x.shape[1]))


def _spans(n: int, step: int):
    return ((a, min(a + step, n)) for a in range(0, n, max(1, step)))

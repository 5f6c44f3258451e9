"""Chunked head in plain torch: any device, never more than `workspace` bytes of logits at a time.

Rows are taken in chunks. Within a chunk the [C, V] buffer holds, one after the other and in place,
    raw logits  ->  e_v = exp(z_v - max)  ->  dL/d(raw logits).
On the CPU the elementwise work walks the chunk in blocks of a few rows that stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastrl.ops.head import Coefs, HeadSpec, Saved, accumulation_dtype, target_dlogit
from fastrl.tokens import TokenStats

BLOCK_ELEMENTS = 1 << 19  # logits per cache-resident block on the CPU (2 MiB in fp32)
HALF = (torch.bfloat16, torch.float16)
Coefficient = Callable[[int, int, TokenStats], Coefs]


def statistics(head: HeadSpec, hidden: Tensor, targets: Tensor, outputs: tuple, workspace: int):
    """Forward only: 1 GEMM. Returns (TokenStats, Saved), every field [N]."""
    run = _Run(head, hidden, workspace)
    parts = [
        chunk_stats(run.project(a, b), head.at_rows(slice(a, b)), targets[a:b], outputs, run.block) for a, b in run.chunks()
    ]
    return _concatenate(parts, outputs, hidden)


def gradients(
    head: HeadSpec, hidden: Tensor, targets: Tensor, saved: Saved, coefs: Coefs, needs: tuple, workspace: int
):
    """Second pass: recompute the logits of the rows with a nonzero coefficient, then the gradient GEMMs."""
    rows = coefs.nonzero_rows()
    everything = rows.shape[0] == hidden.shape[0]
    if not everything:
        head, hidden_kept, targets = head.at_rows(rows), hidden[rows], targets[rows]
        saved, coefs = saved.at_rows(rows), coefs.at_rows(rows)
    else:
        hidden_kept = hidden
    run = _Run(head, hidden_kept, workspace)
    grads = _Gradients(run, needs)
    for a, b in run.chunks():
        z = run.project(a, b)
        part = slice(a, b)
        chunk_exp(z, head.at_rows(part), saved.max[part], run.block)
        piece = Saved(*(None if x is None else x[part] for x in (saved.max, saved.log_sum, saved.logprobs, saved.entropy)))
        chunk_dlogits(z, head.at_rows(part), targets[part], piece, coefs.at_rows(part), None, run.block)
        grads.add(z, a, b)
    d_hidden, d_weight, d_bias = grads.finish()
    if not everything and d_hidden is not None:
        d_hidden = torch.zeros_like(hidden).index_copy_(0, rows, d_hidden)
    return d_hidden, d_weight, d_bias


def one_pass(
    head: HeadSpec,
    hidden: Tensor,
    targets: Tensor,
    outputs: tuple,
    coefficient: Coefficient,
    needs: tuple,
    workspace: int,
):
    """Gradients in the forward: 3 GEMMs, or 2 with a frozen head. `coefficient(start, stop, stats)` gives Coefs."""
    run = _Run(head, hidden, workspace)
    grads = _Gradients(run, needs)
    parts = []
    for a, b in run.chunks():
        z, part = run.project(a, b), head.at_rows(slice(a, b))
        stats, saved = chunk_stats(z, part, targets[a:b], outputs, run.block)
        parts.append((stats, saved))
        coefs = coefficient(a, b, stats)
        rows = coefs.nonzero_rows()
        keep = None if rows.shape[0] == b - a else rows
        dz = chunk_dlogits(z, part, targets[a:b], saved, coefs, keep, run.block)
        grads.add(dz, a, b, keep)
    stats, _ = _concatenate(parts, outputs, hidden)
    return stats, *grads.finish()


# -- one chunk: raw logits -> exp -> dlogits, in place ------------------------------------------------------------
def chunk_stats(z: Tensor, head: HeadSpec, targets: Tensor, outputs: tuple, block: int):
    """Turn raw logits [C, V] into e = exp(z - max), in place, and return their (TokenStats, Saved)."""
    parts = [
        _block_stats(z[a:b], head.at_rows(slice(a, b)), targets[a:b], outputs) for a, b in _ranges(z.shape[0], block)
    ]
    return _concatenate(parts, outputs, z)


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
    entropy = None if weighted is None else log_sum + weighted / (1 + tail)
    log_sum_sq = None
    if "log_sum_sq_probs" in outputs:
        log_sum_sq = torch.log1p(torch.linalg.vecdot(z, z)) - 2 * log_sum
    z.scatter_(1, column, one)
    hit = (where_top == targets) if "is_argmax" in outputs else None
    lse = top + log_sum if "logsumexp" in outputs else None
    return TokenStats(logprobs, entropy, lse, log_sum_sq, hit), Saved(top, log_sum, logprobs, entropy)


def chunk_exp(z: Tensor, head: HeadSpec, top: Tensor, block: int) -> None:
    """Raw logits [C, V] -> exp(z - max) in place, with the row maxima already known."""
    for a, b in _ranges(z.shape[0], block):
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
    for a, b in _ranges(n, block):
        # keep is ascending, so row keep[j] >= j is never overwritten before it is read.
        source = e[a:b] if keep is None else e[keep[a:b]]
        part = slice(a, b)
        piece = Saved(saved.max[part], saved.log_sum[part], saved.logprobs[part], None if saved.entropy is None else saved.entropy[part])
        out = _block_dlogits(source, head.at_rows(part), piece, coefs.at_rows(part))
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


# -- GEMMs and buffers ---------------------------------------------------------------------------------------------
class _Run:
    """The chunk plan, the one [C, V] buffer and the forward GEMM."""

    def __init__(self, head: HeadSpec, hidden: Tensor, workspace: int):
        self.head, self.hidden = head, hidden
        self.acc = accumulation_dtype(hidden.dtype)
        n, v = hidden.shape[0], head.weight.shape[0]
        on_cpu = hidden.device.type == "cpu"
        self.block = max(1, BLOCK_ELEMENTS // v) if on_cpu else max(1, n)
        row_bytes = v * (8 if self.acc == torch.float64 else 4) * (1 if on_cpu else 2)
        most = max(1, min(n, workspace // row_bytes))
        count = max(1, -(-n // most))
        self.rows = -(-n // count) if n else 0
        self.buffer = hidden.new_empty((self.rows, v), dtype=self.acc)
        # Half inputs on the CPU: tiles of W are widened one at a time, so that no fp32 copy of W ever exists.
        self.tile = v if hidden.dtype == self.acc or not on_cpu else max(1, min(v, (8 << 20) // (4 * hidden.shape[1])))

    def chunks(self) -> Iterator[tuple[int, int]]:
        return _ranges(self.hidden.shape[0], self.rows)

    def project(self, a: int, b: int) -> Tensor:
        """Raw logits of rows [a, b) in the accumulation dtype."""
        h, w, z = self.hidden[a:b], self.head.weight, self.buffer[: b - a]
        if h.dtype == self.acc:
            torch.mm(h, w.t(), out=z)
        elif self.tile < w.shape[0] or h.device.type == "cpu":
            h = h.to(self.acc)
            for v0, v1 in _ranges(w.shape[0], self.tile):
                z[:, v0:v1] = h @ w[v0:v1].to(self.acc).t()
        else:
            torch.mm(h, w.t(), out_dtype=self.acc, out=z)
        return z if self.head.bias is None else z.add_(self.head.bias.to(self.acc))


class _Gradients:
    """Accumulates dH, dW and db over chunks in the accumulation dtype; `finish` casts once."""

    def __init__(self, run: _Run, needs: tuple[bool, bool, bool]):
        self.run, self.needs = run, needs
        h, w = run.hidden, run.head.weight
        self.d_hidden = h.new_zeros(h.shape, dtype=run.acc) if needs[0] else None
        self.d_weight = w.new_empty(w.shape, dtype=run.acc) if needs[1] else None
        self.d_bias = w.new_zeros(w.shape[0], dtype=run.acc) if needs[2] else None
        self.fresh = True

    def add(self, dz: Tensor, a: int, b: int, keep: Tensor | None = None) -> None:
        """Take in dL/d(raw logits) [K, V] of rows [a, b), or of the rows `keep` among them."""
        if dz.shape[0] == 0:
            return
        h = self.run.hidden[a:b] if keep is None else self.run.hidden[a:b][keep]
        w = self.run.head.weight
        if self.d_bias is not None:
            self.d_bias += dz.sum(0)
        narrow = h.dtype in HALF and h.device.type != "cpu"
        dz_in = dz.to(h.dtype) if narrow else dz
        wide = dict(out_dtype=self.run.acc) if narrow else {}
        if self.d_hidden is not None:
            d_h = self.d_hidden[a:b] if keep is None else dz.new_zeros(h.shape)
            for v0, v1 in _ranges(w.shape[0], self.run.tile):
                w_tile = w[v0:v1] if narrow else w[v0:v1].to(self.run.acc)
                if narrow:
                    d_h += torch.mm(dz_in[:, v0:v1], w_tile, **wide)
                elif self.run.tile >= w.shape[0]:
                    torch.mm(dz, w_tile, out=d_h)
                else:
                    d_h.addmm_(dz[:, v0:v1], w_tile)
            if keep is not None:
                self.d_hidden[a:b].index_copy_(0, keep, d_h)
        if self.d_weight is not None:
            if narrow:
                update = torch.mm(dz_in.t(), h, **wide)
                self.d_weight.copy_(update) if self.fresh else self.d_weight.add_(update)
            else:
                self.d_weight.addmm_(dz.t(), h.to(self.run.acc), beta=0 if self.fresh else 1)
            self.fresh = False

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.fresh and self.d_weight is not None:
            self.d_weight.zero_()
        head = self.run.head
        like = (self.run.hidden, head.weight, head.bias)
        made = (self.d_hidden, self.d_weight, self.d_bias)
        return tuple(None if d is None else d.to(x.dtype) for d, x in zip(made, like, strict=True))


def _ranges(n: int, step: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + step, n)) for a in range(0, n, max(1, step)))


def _concatenate(parts: list, outputs: tuple, like: Tensor) -> tuple[TokenStats, Saved]:
    """Join per-chunk (TokenStats, Saved) along the rows; with no rows, make empty ones."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        empty = like.new_empty(0, dtype=accumulation_dtype(like.dtype))
        fields = {n: (empty.bool() if n == "is_argmax" else empty) for n in outputs}
        return TokenStats(**{"logprobs": empty, **fields}), Saved(empty, empty, empty, empty)

    def join(pieces):
        return None if pieces[0] is None else torch.cat(pieces)

    stats = TokenStats(*(join([getattr(s, f) for s, _ in parts]) for f in TokenStats.__dataclass_fields__))
    saved = Saved(*(join([getattr(s, f) for _, s in parts]) for f in Saved.__dataclass_fields__))
    return stats, saved

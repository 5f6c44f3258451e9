"""Chunked head in plain torch: any device, never more than `workspace` bytes of logits at a time.

Rows are taken in chunks of C. One [C, V] buffer holds first their raw logits and then, in place, dL/d(raw logits):
fastrl.ops.chunk does that step, this file the walk over the chunks and the GEMMs around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastrl.ops.chunk import chunk_dlogits, chunk_stats, concatenate, ranges
from fastrl.ops.head import Coefs, HeadSpec, Saved, accumulation_dtype
from fastrl.tokens import TokenStats

BLOCK_ELEMENTS = 1 << 19  # logits per cache-resident block on the CPU (2 MiB in fp32)
WIDENED_BYTES = {"cpu": 8 << 20}  # of a half-precision W held in the accumulation dtype at once
Coefficient = Callable[[int, int, TokenStats], Coefs]


def statistics(head: HeadSpec, hidden: Tensor, targets: Tensor, outputs: tuple, workspace: int):
    """Forward only: 1 GEMM. Returns (TokenStats, Saved), every field [N]."""
    run = _Run(head, hidden, workspace)
    parts = [
        chunk_stats(run.project(a, b), head.at_rows(slice(a, b)), targets[a:b], outputs, run.scratch)
        for a, b in run.chunks()
    ]
    return concatenate(parts, outputs, hidden)


def gradients(
    head: HeadSpec, hidden: Tensor, targets: Tensor, saved: Saved, coefs: Coefs, needs: tuple, workspace: int
):
    """Second pass: recompute the logits of the rows with a nonzero coefficient, then the gradient GEMMs."""
    rows = coefs.nonzero_rows()
    dropped = rows.shape[0] < hidden.shape[0]
    kept = hidden
    if dropped:
        kept, head, targets = hidden[rows], head.at_rows(rows), targets[rows]
        saved, coefs = saved.at_rows(rows), coefs.at_rows(rows)
    run = _Run(head, kept, workspace)
    grads = _Gradients(run, needs)
    for a, b in run.chunks():
        part = slice(a, b)
        own = head.at_rows(part), targets[part], saved.at_rows(part), coefs.at_rows(part)
        grads.add(chunk_dlogits(run.project(a, b), *own, None, run.scratch), a, b)
    d_hidden, d_weight, d_bias = grads.finish()
    if dropped and d_hidden is not None:
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
        stats, saved = chunk_stats(z, part, targets[a:b], outputs, run.scratch)
        parts.append((stats, saved))
        coefs = coefficient(a, b, stats)
        rows = coefs.nonzero_rows()
        keep = None if rows.shape[0] == b - a else rows
        dz = chunk_dlogits(z, part, targets[a:b], saved, coefs, keep, run.scratch)
        grads.add(dz, a, b, keep)
    stats, _ = concatenate(parts, outputs, hidden)
    return stats, *grads.finish()


# -- GEMMs and buffers ---------------------------------------------------------------------------------------------
class _Run:
    """The chunk plan, the one [C, V] buffer and the forward GEMM.

    GEMMs are in place or `out=`: no hidden copies, and torch.autocast, which rounds the others, leaves them alone.
    """

    def __init__(self, head: HeadSpec, hidden: Tensor, workspace: int):
        self.head, self.hidden = head, hidden
        self.acc = accumulation_dtype(hidden.dtype)
        n, v = hidden.shape[0], head.weight.shape[0]
        on_cpu = hidden.device.type == "cpu"
        # Off the CPU a block is the whole chunk, so its scratch counts as workspace too.
        row_bytes = v * self.acc.itemsize * (1 if on_cpu else 3)
        most = max(1, min(n, workspace // row_bytes))
        count = max(1, -(-n // most))
        self.rows = -(-n // count)
        self.buffer = hidden.new_empty((self.rows, v), dtype=self.acc)
        block = min(self.rows, max(1, BLOCK_ELEMENTS // v)) if on_cpu else self.rows
        self.scratch = hidden.new_empty((2, block, v), dtype=self.acc)
        # bf16 GEMMs accumulate in fp32 on a GPU. Elsewhere, and for fp16 (whose range the gradients leave), tiles of W
        # are widened one at a time, so that no fp32 copy of W ever exists.
        self.narrow = hidden.dtype == torch.bfloat16 and not on_cpu
        tile = WIDENED_BYTES.get(hidden.device.type, 256 << 20) // (self.acc.itemsize * max(1, hidden.shape[1]))
        self.tile = v if self.narrow or hidden.dtype == self.acc else max(1, min(v, tile))

    def chunks(self) -> Iterator[tuple[int, int]]:
        return ranges(self.hidden.shape[0], self.rows)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary and the rows of W that belong to them, as the GEMMs take them."""
        for a, b in ranges(self.head.weight.shape[0], self.tile):
            w = self.head.weight[a:b]
            yield slice(a, b), w if self.narrow else w.to(self.acc)

    def project(self, a: int, b: int) -> Tensor:
        """Raw logits of rows [a, b) in the accumulation dtype."""
        h, z = self.hidden[a:b], self.buffer[: b - a]
        if self.narrow:
            torch.mm(h, self.head.weight.t(), out_dtype=self.acc, out=z)
        else:
            h = h.to(self.acc)
            for part, w in self.tiles():
                torch.mm(h, w.t(), out=z[:, part])
        return z if self.head.bias is None else z.add_(self.head.bias.to(self.acc))


class _Gradients:
    """Accumulates dH, dW and db over chunks in the accumulation dtype; `finish` casts once."""

    def __init__(self, run: _Run, needs: tuple[bool, bool, bool]):
        self.run = run
        h, w = run.hidden, run.head.weight
        self.d_hidden = h.new_zeros(h.shape, dtype=run.acc) if needs[0] else None
        self.d_weight = w.new_empty(w.shape, dtype=run.acc) if needs[1] else None
        self.d_bias = w.new_zeros(w.shape[0], dtype=run.acc) if needs[2] else None
        self.fresh = True

    def add(self, dz: Tensor, a: int, b: int, keep: Tensor | None = None) -> None:
        """Take in dL/d(raw logits) [K, V] of rows [a, b), or of the rows `keep` among them."""
        if dz.shape[0] == 0:
            return
        if self.d_bias is not None:
            self.d_bias += dz.sum(0)
        if self.run.narrow:
            dz = dz.to(self.run.hidden.dtype)
        if self.d_hidden is not None:
            if keep is None:
                self._add_hidden(dz, self.d_hidden[a:b])
            else:
                d_h = self.d_hidden.new_zeros((keep.shape[0], self.d_hidden.shape[1]))
                self._add_hidden(dz, d_h)
                self.d_hidden[a:b].index_copy_(0, keep, d_h)
        if self.d_weight is not None:
            h = self.run.hidden[a:b]
            self._add_weight(dz, h if keep is None else h[keep])

    def _add_hidden(self, dz: Tensor, out: Tensor) -> None:
        """out [K, H] += dz . W"""
        for part, w in self.run.tiles():
            if self.run.narrow:
                out += torch.mm(dz[:, part], w, out_dtype=self.run.acc)
            else:
                out.addmm_(dz[:, part], w)

    def _add_weight(self, dz: Tensor, h: Tensor) -> None:
        """dW [V, H] += dz^T . h; the first time it is written, which saves clearing it."""
        if self.run.narrow and self.fresh:
            torch.mm(dz.t(), h, out_dtype=self.run.acc, out=self.d_weight)
        elif self.run.narrow:
            self.d_weight += torch.mm(dz.t(), h, out_dtype=self.run.acc)
        else:
            self.d_weight.addmm_(dz.t(), h.to(self.run.acc), beta=0 if self.fresh else 1)
        self.fresh = False

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dH, dW, db) in the dtypes of their inputs, None where not asked for."""
        if self.fresh and self.d_weight is not None:
            self.d_weight.zero_()
        like = (self.run.hidden, self.run.head.weight, self.run.head.bias)
        made = (self.d_hidden, self.d_weight, self.d_bias)
        return tuple(None if d is None else d.to(x.dtype) for d, x in zip(made, like, strict=True))

"""Divergences in plain torch: any device. Both heads' logits of a chunk of rows lie in `workspace`, the rest is O(N).

With whole rows at hand everything follows from the raw logits, so nothing but the inputs need be saved: the backward is
the one pass with the upstream gradient as its weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastrl.ops.divergence import Law, Side
from fastrl.ops.head import HeadSpec, accumulation_dtype

FLOOR = -1000.0  # of log p: exp underflows to 0 long before, and 0 * FLOOR is 0 where 0 * -inf is not
BLOCK_ELEMENTS = {"cpu": 1 << 17}  # logits whose temporaries exist at once, about 16 of that size
WIDENED_BYTES = {"cpu": 8 << 20}  # of a half-precision W held in the accumulation dtype at once


# -- the three functions of a backend ----------------------------------------------------------------------------------
def values(law: Law, student: Side, teacher: Side, workspace: int) -> tuple[Tensor, tuple]:
    """([N] divergences, nothing to save): one GEMM a head."""
    return one_pass(law, student, teacher, None, (False, False, False), workspace)[0], ()


def gradients(law: Law, student: Side, teacher: Side, saved: tuple, upstream: Tensor, needs: tuple, workspace: int):
    """(dH, dW, db) of sum_n upstream_n D_n: one GEMM a head again, and those that `needs` names."""
    return one_pass(law, student, teacher, upstream, needs, workspace)[1:]


def one_pass(law: Law, student: Side, teacher: Side, weights: Tensor | None, needs: tuple, workspace: int):
    """([N] divergences, dH, dW, db of sum_n weights_n D_n). Without weights or needs no gradient is made."""
    made, grads = [], _Gradients(student, needs)
    wanted = weights is not None and any(needs)
    for a, b, raw, other in _chunks(student, teacher, workspace):
        for c, d in _ranges(b - a, _block_rows(raw)):
            rows = slice(a + c, a + d)
            parts = (raw[c:d], other[c:d], student.head.at_rows(rows), teacher.head.at_rows(rows))
            made.append(block(law, *parts, weights[rows].to(raw.dtype) if wanted else None))
        if wanted:
            grads.add(raw, a, b)
    acc = accumulation_dtype(student.hidden.dtype)
    return torch.cat(made) if made else student.hidden.new_empty(0, dtype=acc), *grads.finish()


# -- elementwise: a block of whole rows --------------------------------------------------------------------------------
def block(law: Law, raw: Tensor, other: Tensor, head: HeadSpec, other_head: HeadSpec, weights: Tensor | None) -> Tensor:
    """[B] divergences of raw logits [B, V] of student and teacher, which are overwritten: the student's by
    weights_n dD/d(raw) when weights [B] are given."""
    a, slope, top = _log_softmax(raw, head, weights is not None)
    b, _, _ = _log_softmax(other, other_head, False)
    p, q = a.exp(), b.exp()
    # log p = -inf beside log q = -inf: the one whose probability multiplies the ratio is bounded, 0 * ratio = 0.
    if law.kind != "forward_kl":
        a.clamp_(min=FLOOR)
    if law.kind != "reverse_kl":
        b.clamp_(min=FLOOR)
    ratio = a.sub_(b)
    shrink = torch.expm1(-ratio.abs())  # min(p, q) / max(p, q) - 1
    # p - q without cancellation: the larger times -shrink, with the sign of log p/q.
    gap = torch.copysign(torch.maximum(p, q).mul_(shrink), ratio)
    made, g = _terms(law, p, q, ratio, shrink, gap)
    if weights is not None:
        _dlogits(p, gap if g is None else None, g, top, out=raw)
        if law.kind == "mixed":  # beta KL(q||p) + (1 - beta) KL(p||q)
            raw.mul_(1 - law.beta).add_(gap, alpha=law.beta)
        raw.mul_((weights * (head.logit_scale / head.temperature)).unsqueeze(1))
        if slope is not None:
            raw.mul_(slope)
    return made.sum(1).clamp_(min=0, max=law.bound)


def _terms(law: Law, p: Tensor, q: Tensor, ratio: Tensor, shrink: Tensor, gap: Tensor) -> tuple[Tensor, Tensor | None]:
    """(terms of D [B, V], g = dD/dp up to a constant a row; None where dz = p - q)."""
    if law.kind == "forward_kl":
        # sum q log(q/p) = sum (q log(q/p) + p - q): every term >= 0, and blind to an error of either normaliser.
        return _times(q, -ratio).add_(gap), None
    if law.kind == "reverse_kl":
        return _times(p, ratio).sub_(gap), ratio
    if law.kind == "tvd":
        return gap.abs() / 2, gap.sign() / 2
    if law.kind == "mixed":
        forward, backward = _times(q, -ratio).add_(gap), _times(p, ratio).sub_(gap)
        return law.beta * forward + (1 - law.beta) * backward, ratio
    # m = b q + (1-b) p. Where p >= q, log p/m is taken straight; elsewhere log q/m; the other lies log p/q apart.
    beta, above = law.beta, ratio >= 0
    lost = torch.where(above, beta * shrink, (1 - beta) * shrink)  # m / max(p, q) - 1, good while it is small
    e = torch.exp(-ratio.abs())
    whole = torch.where(above, (1 - beta) + beta * e, beta + (1 - beta) * e)  # m / max(p, q), good where that is small
    own = torch.where(lost > -0.5, lost.log1p(), whole.log()).neg_()
    p_to_m = torch.where(above, own, own + ratio)
    q_to_m = torch.where(above, own - ratio, own)
    if law.kind == "skew_forward_kl":
        # sum q log(q/m) = sum (q log(q/m) + m - q), every term >= 0, with m - q = (1-b) (p - q).
        return q * q_to_m + (1 - beta) * gap, q_to_m.exp().mul_(beta - 1)
    if law.kind == "skew_reverse_kl":
        return p * p_to_m - beta * gap, p_to_m - (1 - beta) * p_to_m.exp()
    return (1 - beta) * p * p_to_m + beta * q * q_to_m, p_to_m.mul_(1 - beta)


def _times(x: Tensor, log_ratio: Tensor) -> Tensor:
    """x * log_ratio with 0 * inf = 0."""
    return (x * log_ratio).masked_fill_(x == 0, 0.0)


def _dlogits(p: Tensor, gap: Tensor | None, g: Tensor | None, top: Tensor, out: Tensor) -> None:
    """dz_v = p_v (g_v - E_p[g]) into out. Both g are taken relative to that of the row's likeliest word, whose own
    gradient, of the order 1 - p, would otherwise be lost in a difference of numbers of order 1."""
    if g is None:
        out.copy_(gap)
        return
    g = g - g.gather(1, top.unsqueeze(1))
    mean = _times(p, g).sum(1, keepdim=True)
    torch.mul(p, g.sub_(mean), out=out).masked_fill_(p == 0, 0.0)


def _log_softmax(raw: Tensor, head: HeadSpec, need_slope: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(log p [B, V], slope of the softcap or None, column of the largest logit [B]); raw may be overwritten."""
    slope = None
    if head.softcap is not None:
        t = torch.tanh(raw * (head.logit_scale / head.softcap))
        slope = 1 - t * t if need_slope else None
        z = t.mul_(head.softcap)
    else:
        z = raw if head.logit_scale == 1.0 else raw.mul_(head.logit_scale)
    if isinstance(head.temperature, Tensor):
        z = z.div_(head.temperature.unsqueeze(1))
    elif head.temperature != 1.0:
        z = z.div_(head.temperature)
    largest, top = z.max(1, keepdim=True)
    z = z.sub_(largest)
    # The largest term is exactly 1; log1p of the others keeps the tail when one word holds nearly all the mass.
    tail = z.exp().scatter_(1, top, 0.0).sum(1, keepdim=True)
    return z.sub_(tail.log1p_()), slope, top.squeeze(1)


# -- GEMMs and buffers -------------------------------------------------------------------------------------------------
def _chunks(student: Side, teacher: Side, workspace: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, raw logits of the student [C, V], of the teacher [C, V]), in two buffers used again and again."""
    n, v = student.hidden.shape[0], student.head.weight.shape[0]
    acc = accumulation_dtype(student.hidden.dtype)
    if student.hidden.device.type not in BLOCK_ELEMENTS:
        workspace //= 2  # the temporaries of a block take the other half
    most = max(1, min(n, workspace // (2 * v * acc.itemsize)))
    rows = -(-n // max(1, -(-n // most)))
    buffers = student.hidden.new_empty((2, rows, v), dtype=acc)
    for a, b in _ranges(n, rows):
        for side, out in ((student, buffers[0]), (teacher, buffers[1])):
            _project(Side(side.hidden[a:b], side.head), out[: b - a])
        yield a, b, buffers[0, : b - a], buffers[1, : b - a]


def _block_rows(raw: Tensor) -> int:
    """Rows of a block: cache-sized on the CPU, elsewhere so that 16 temporaries are as large as both buffers."""
    rows, v = raw.shape
    return max(1, BLOCK_ELEMENTS.get(raw.device.type, rows * v // 8) // v)


def _narrow(hidden: Tensor) -> bool:
    """Whether GEMMs take bfloat16 operands as they are: on a GPU, which accumulates them in float32. Elsewhere, and for
    float16 (whose range the gradients leave), tiles of W are widened one at a time; no float32 copy of W exists."""
    return hidden.dtype == torch.bfloat16 and hidden.device.type == "cuda"


def _tiles(side: Side) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary and the rows of W that belong to them, as the GEMMs take them."""
    weight, acc = side.head.weight, accumulation_dtype(side.hidden.dtype)
    if _narrow(side.hidden) or weight.dtype == acc:
        yield slice(0, weight.shape[0]), weight
        return
    room = WIDENED_BYTES.get(weight.device.type, 256 << 20) // (acc.itemsize * max(1, weight.shape[1]))
    for a, b in _ranges(weight.shape[0], room):
        yield slice(a, b), weight[a:b].to(acc)


def _project(side: Side, out: Tensor) -> None:
    """Raw logits into out [C, V]. In place or `out=`: torch.autocast, which rounds other GEMMs, leaves these alone."""
    if _narrow(side.hidden):
        torch.mm(side.hidden, side.head.weight.t(), out_dtype=out.dtype, out=out)
    else:
        h = side.hidden.to(out.dtype)
        for part, w in _tiles(side):
            torch.mm(h, w.t(), out=out[:, part])
    if side.head.bias is not None:
        out.add_(side.head.bias.to(out.dtype))


class _Gradients:
    """Accumulates dH, dW and db of the student over chunks in the accumulation dtype; `finish` casts once."""

    def __init__(self, student: Side, needs: tuple[bool, bool, bool]):
        h, w = student.hidden, student.head.weight
        self.student, self.acc, self.narrow = student, accumulation_dtype(h.dtype), _narrow(h)
        self.d_hidden = h.new_zeros(h.shape, dtype=self.acc) if needs[0] else None
        self.d_weight = w.new_empty(w.shape, dtype=self.acc) if needs[1] else None
        self.d_bias = w.new_zeros(w.shape[0], dtype=self.acc) if needs[2] else None
        self.fresh = True  # dW is written first and added to later, which saves clearing it

    def add(self, dz: Tensor, a: int, b: int) -> None:
        """Take in dL/d(raw logits) [C, V] of rows [a, b)."""
        if self.d_bias is not None:
            self.d_bias += dz.sum(0)
        h = self.student.hidden[a:b]
        dz, h = (dz.to(h.dtype), h) if self.narrow else (dz, h.to(self.acc))
        if self.d_hidden is not None:
            for part, w in _tiles(self.student):
                _add_product(self.d_hidden[a:b], dz[:, part], w, False)
        if self.d_weight is not None:
            _add_product(self.d_weight, dz.t(), h, self.fresh)
            self.fresh = False

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dH, dW, db) in the dtypes of their inputs, None where not asked for."""
        if self.fresh and self.d_weight is not None:
            self.d_weight.zero_()
        like = (self.student.hidden, self.student.head.weight, self.student.head.bias)
        made = (self.d_hidden, self.d_weight, self.d_bias)
        return tuple(None if d is None else d.to(x.dtype) for d, x in zip(made, like, strict=True))


def _add_product(out: Tensor, x: Tensor, y: Tensor, fresh: bool) -> None:
    """out += x . y, or out = x . y when fresh."""
    if x.dtype == out.dtype:
        out.addmm_(x, y, beta=0 if fresh else 1)
    elif fresh:
        torch.mm(x, y, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(x, y, out_dtype=out.dtype)


def _ranges(n: int, step: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + step, n)) for a in range(0, n, max(1, step)))

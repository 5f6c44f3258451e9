"""Divergences on NVIDIA and AMD GPUs: Triton kernels for what touches logits, library GEMMs for what touches weights.

bfloat16, float16   values: the normalisers of each head, then both heads' tiles together (two GEMMs a head)
                    gradients: dlogits of a vocabulary slice at a time, then dH += dz @ W_slice, dW_slice = dz.T @ H
float32, and one_pass in any dtype: library GEMMs into a chunk of both heads' logits, row kernels on it (one GEMM a
head, then dH and dW). float64 is refused: dispatch sends it to `torch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastrl.kernels.divergence_dlogits import DivergenceLaw, divergence_dlogits, divergence_row_dlogits
from fastrl.kernels.divergence_stats import DivergenceStats, divergence_row_stats, divergence_stats
from fastrl.kernels.divergence_tile import Operand
from fastrl.kernels.gemm import product, spans
from fastrl.kernels.launch import LogitScale
from fastrl.kernels.linear_dlogits import RowGradient
from fastrl.kernels.linear_stats import linear_stats
from fastrl.kernels.row_stats import row_stats
from fastrl.ops.divergence import Law, Side
from fastrl.ops.head import HeadSpec
from fastrl.ops.triton_backend import _slice_plan
from fastrl.ops.triton_sink import HALF, Grads, Sink

NOTHING = dict(entropy=False, squares=False, argmax=False)


def _on_its_device(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be the one that the student is on."""

    @functools.wraps(function)
    def wrapped(law, student, *rest):
        with torch.cuda.device_of(student.hidden):
            return function(law, student, *rest)

    return wrapped


# -- the three functions of a backend ------------------------------------------------------------------------------
@_on_its_device
def values(law: Law, student: Side, teacher: Side, workspace: int) -> tuple[Tensor, tuple]:
    """([N] float32 divergences, what `gradients` needs of them: norms [4, N] and rows [3, N])."""
    _check(student, teacher)
    if _tiled(student, teacher):
        norms = torch.cat([_linear_norms(side) for side in (student, teacher)])
        return _finish(law, norms, divergence_stats(_operand(student), _operand(teacher), norms, law.kind, law.beta))
    chunks = _Chunks(student, teacher, workspace)
    return _join([chunks.values(law, a, b) for a, b in chunks.spans()], student.hidden)


@_on_its_device
def gradients(
    law: Law, student: Side, teacher: Side, saved: tuple, upstream: Tensor, needs: tuple, workspace: int
) -> Grads:
    """Second pass: recompute both heads' logits, then the GEMMs that `needs` names."""
    _check(student, teacher)
    sink = Sink(student.head, student.hidden, needs)
    rule = _rule(law, student.head, saved, upstream, sink)
    if _tiled(student, teacher):
        _slices(student, teacher, rule, sink, workspace)
        return sink.finish()
    chunks = _Chunks(student, teacher, workspace)
    for a, b in chunks.spans():
        chunks.project(a, b)
        sink.add_rows(chunks.dlogits(_at_rows(rule, a, b), a, b), a, b, None)
    return sink.finish()


@_on_its_device
def one_pass(law: Law, student: Side, teacher: Side, weights: Tensor, needs: tuple, workspace: int):
    """([N] float32 divergences, dH, dW, db of sum_n weights_n D_n)."""
    _check(student, teacher)
    sink, chunks, made = Sink(student.head, student.hidden, needs), _Chunks(student, teacher, workspace), []
    for a, b in chunks.spans():
        made.append(chunks.values(law, a, b))
        if any(needs):
            rule = _rule(law, student.head.at_rows(slice(a, b)), made[-1][1], weights[a:b], sink)
            sink.add_rows(chunks.dlogits(rule, a, b), a, b, None)
    return _join(made, student.hidden)[0], *sink.finish()


# -- two walks over the logits ---------------------------------------------------------------------------------------
def _slices(student: Side, teacher: Side, rule: DivergenceLaw, sink: Sink, workspace: int) -> None:
    """Vocabulary slices (outer) by row chunks (inner): dW of a slice is complete, in float32, before it is rounded."""
    hidden, v = student.hidden, student.head.weight.shape[0]
    n = hidden.shape[0]
    rows, columns = _slice_plan(n, v, hidden.shape[1], sink.needs[1], workspace)
    buffer = hidden.new_empty(rows * columns)
    for v0, v1 in spans(v, columns if n else v):
        for a, b in spans(n, rows):
            pair = (_operand(side.at_rows(slice(a, b)), slice(v0, v1)) for side in (student, teacher))
            out = buffer[: (b - a) * (v1 - v0)].view(b - a, v1 - v0)
            dz, sums = divergence_dlogits(*pair, _at_rows(rule, a, b), need_bias=sink.needs[2], out=out)
            sink.add_slice(dz, sums, hidden[a:b], (a, b), (v0, v1))
        sink.end_slice(v0, v1)


class _Chunks:
    """The plan of row chunks and both heads' float32 buffers [rows, pitch]; a pitch of 64 keeps every row aligned."""

    def __init__(self, student: Side, teacher: Side, workspace: int):
        self.sides, hidden = (student, teacher), student.hidden
        n, self.vocabulary = hidden.shape[0], student.head.weight.shape[0]
        pitch = -(-self.vocabulary // 64) * 64
        most = max(1, min(n, workspace // (8 * pitch)))
        self.rows = most // 128 * 128 or most
        self.buffers = hidden.new_empty((2, self.rows if n else 0, pitch), dtype=torch.float32)
        self.biases = (student.head.bias, teacher.head.bias)

    def spans(self) -> Iterator[tuple[int, int]]:
        return spans(self.sides[0].hidden.shape[0], self.rows)

    def raw(self, n: int) -> tuple[Tensor, Tensor]:
        return self.buffers[0, :n, : self.vocabulary], self.buffers[1, :n, : self.vocabulary]

    def scales(self, a: int, b: int) -> tuple[LogitScale, LogitScale]:
        return tuple(_logit_scale(side.head.at_rows(slice(a, b))) for side in self.sides)

    def project(self, a: int, b: int) -> None:
        """Both heads' logits of rows [a, b) into the buffers, biases not yet added."""
        for side, out in zip(self.sides, self.raw(b - a), strict=True):
            product(side.hidden[a:b], side.head.weight.t(), out)

    def values(self, law: Law, a: int, b: int) -> tuple[Tensor, tuple]:
        """As the backend's `values`, for rows [a, b); leaves the logits in the buffers."""
        self.project(a, b)
        raw, scales = self.raw(b - a), self.scales(a, b)
        norms = [_row_norms(*x) for x in zip(raw, self.biases, scales, strict=True)]
        norms = torch.cat(norms)
        return _finish(law, norms, divergence_row_stats(raw, self.biases, scales, norms, law.kind, law.beta))

    def dlogits(self, rule: DivergenceLaw, a: int, b: int) -> Tensor:
        """[b - a, V] in the student's dtype over its logits, in their memory."""
        out = self.buffers[0].view(self.sides[0].hidden.dtype)[: b - a, : self.vocabulary]
        return divergence_row_dlogits(self.raw(b - a), self.biases, self.scales(a, b), rule, out)


# -- from the package's words to the kernels' ------------------------------------------------------------------------
def _check(student: Side, teacher: Side) -> None:
    for name, side in (("hidden", student), ("teacher_hidden", teacher)):
        if side.hidden.dtype not in (*HALF, torch.float32):
            kinds = "bfloat16, float16 or float32"
            raise TypeError(f"{name} is {side.hidden.dtype}; backend='triton' takes {kinds}; use backend='torch'")


def _tiled(student: Side, teacher: Side) -> bool:
    """Whether both heads' tiles go through the kernels; float32 operands go through library GEMMs."""
    return student.hidden.dtype in HALF and teacher.hidden.dtype in HALF


def _logit_scale(head: HeadSpec) -> LogitScale:
    """z = softcap / T * tanh(logit_scale / softcap * raw), or logit_scale / T * raw."""
    if head.softcap is None:
        return LogitScale(head.logit_scale / head.temperature)
    return LogitScale(head.softcap / head.temperature, head.logit_scale / head.softcap, softcap=True)


def _operand(side: Side, columns: slice = slice(None)) -> Operand:
    """The side as the kernels take it, on a slice of the vocabulary."""
    head = side.head
    bias = None if head.bias is None else head.bias[columns]
    return Operand(side.hidden, head.weight[columns], bias, _logit_scale(head))


def _linear_norms(side: Side) -> Tensor:
    """[2, N] float32: maximum and log-sum of the logits."""
    x = _operand(side)
    anything = torch.zeros(x.hidden.shape[0], dtype=torch.int64, device=x.hidden.device)
    made = linear_stats(x.hidden, x.weight, anything, x.bias, x.scale, **NOTHING)
    return torch.stack([made.max, made.log_sum])


def _row_norms(raw: Tensor, bias: Tensor | None, scale: LogitScale) -> Tensor:
    """The same of raw logits in memory."""
    anything = torch.zeros(raw.shape[0], dtype=torch.int64, device=raw.device)
    made = row_stats(raw, anything, bias, scale, **NOTHING)
    return torch.stack([made.max, made.log_sum])


def _finish(law: Law, norms: Tensor, stats: DivergenceStats) -> tuple[Tensor, tuple]:
    """(values [N], (norms [4, N], rows [3, N]: reference, mean, value)). An undefined softmax of either is NaN."""
    value = torch.where(norms.sum(0).isnan(), torch.nan, stats.value.clamp(min=0, max=law.bound))
    return value, (norms, torch.stack([stats.reference, stats.mean, value]))


def _rule(law: Law, head: HeadSpec, saved: tuple, upstream: Tensor, sink: Sink) -> DivergenceLaw:
    """The rows' numbers for the dlogits kernels, in the sink's units."""
    norms, rows = saved
    reference, mean, value = rows
    coefficient = upstream.float() * (head.logit_scale / head.temperature)
    # |dz_v| <= |c| (2 D + 1), since p_v log(p_v / q_v) <= D + 1/e and the other kinds' g is bounded likewise.
    most, zero = coefficient.abs() * (2 * value + 1), torch.zeros_like(value)
    sink.rescale(RowGradient(norms[0], most, zero, zero))
    coefficient = torch.where(value.isnan(), torch.nan, coefficient) * sink.scale
    return DivergenceLaw(norms.contiguous(), torch.stack([reference, mean, coefficient]), law.kind, law.beta)


def _at_rows(rule: DivergenceLaw, a: int, b: int) -> DivergenceLaw:
    return DivergenceLaw(rule.norms[:, a:b].contiguous(), rule.rows[:, a:b].contiguous(), rule.kind, rule.beta)


def _join(parts: list[tuple[Tensor, tuple]], like: Tensor) -> tuple[Tensor, tuple]:
    """Values and what is saved with them, of chunk after chunk."""
    if not parts:
        empty = like.new_empty(7, 0, dtype=torch.float32)
        return empty[0].clone(), (empty[:4], empty[4:])
    saved = zip(*(x for _, x in parts), strict=True)
    return torch.cat([x for x, _ in parts]), tuple(torch.cat(x, 1) for x in saved)

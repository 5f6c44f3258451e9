"""The head on NVIDIA and AMD GPUs: Triton kernels for what touches logits, library GEMMs for what touches weights.

bfloat16, float16   statistics: one kernel, logits only in registers (1 GEMM)
                    gradients: dlogits of a vocabulary slice at a time, then dH += dz @ W_slice, dW_slice = dz.T @ H;
                    each row of dW is accumulated in float32 and rounded once
float32             library GEMMs into a [chunk, V] buffer, row kernels on it (full float32 unless torch allows TF32)
one_pass, both      float32 logits of a chunk from a library GEMM; statistics and dlogits in place (3 GEMMs)
float64 is refused: dispatch sends it to `torch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.kernels.gemm import product, spans
from fastrl.kernels.launch import LogitScale
from fastrl.kernels.linear_dlogits import RowGradient, linear_dlogits
from fastrl.kernels.linear_stats import RowStats, linear_stats
from fastrl.kernels.row_dlogits import compact_rows, row_dlogits
from fastrl.kernels.row_stats import row_stats
from fastrl.ops.head import Coefs, HeadSpec, Plan, Saved, target_dlogit
from fastrl.ops.triton_sink import HALF, Grads, Sink
from fastrl.ops.walk import pieces
from fastrl.tokens import TokenStats

INVARIANT_SPLITS = 8
Coefficient = Callable[[int, int, TokenStats], Coefs]


def _on_its_device(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be the one that `hidden`, the second argument, is on."""

    @functools.wraps(function)
    def wrapped(head, hidden, *rest):
        with torch.cuda.device_of(hidden):
            return function(head, hidden, *rest)

    return wrapped


# -- the three functions of a backend ------------------------------------------------------------------------------
@_on_its_device
def statistics(
    head: HeadSpec, hidden: Tensor, targets: Tensor, outputs: tuple, plan: Plan, cache: bool = False
) -> tuple[TokenStats, Saved, None]:
    """Forward only: 1 GEMM. Every field [N] float32 (is_argmax bool). Logits are never kept (`cache` is not for us)."""
    _check(head, hidden)
    asked = _asked(outputs)
    if hidden.dtype in HALF or plan.invariant:
        # With one number of column ranges, a row's bits depend on its own numbers alone.
        splits = INVARIANT_SPLITS if plan.invariant else None
        made = linear_stats(hidden, head.weight, targets, head.bias, _logit_scale(head), splits=splits, **asked)
        return _token_stats(made, outputs), _saved(made, outputs), None
    chunks = _Chunks(head, hidden, plan.workspace)
    parts = []
    for a, b in chunks.spans():
        part = head.at_rows(slice(a, b))
        parts.append(row_stats(chunks.logits(a, b), targets[a:b], head.bias, _logit_scale(part), **asked))
    made = _join(parts, hidden)
    return _token_stats(made, outputs), _saved(made, outputs), None


@_on_its_device
def gradients(
    head: HeadSpec, hidden: Tensor, targets: Tensor, saved: Saved, coefs: Coefs, needs: tuple, plan: Plan, kept=None
) -> Grads:
    """Second pass over the rows with a nonzero coefficient: recompute the logits, then the GEMMs that `needs` names."""
    _check(head, hidden)
    rows, n = coefs.nonzero_rows(), hidden.shape[0]
    if rows.shape[0] < n:
        head, hidden, targets = head.at_rows(rows), hidden[rows], targets[rows]
        saved, coefs = saved.at_rows(rows), coefs.at_rows(rows)
    law = _row_gradient(head, saved, coefs)
    sink = Sink(head, hidden, needs)
    law = sink.rescale(law)
    walk = _slices if hidden.dtype in HALF else _row_chunks
    walk(head, hidden, targets, law, sink, coefs.entropy is not None, plan.workspace)
    d_hidden, d_weight, d_bias = sink.finish()
    if d_hidden is not None and rows.shape[0] < n:
        d_hidden = hidden.new_zeros((n, hidden.shape[1])).index_copy_(0, rows, d_hidden)
    return d_hidden, d_weight, d_bias


@_on_its_device
def one_pass(
    head: HeadSpec,
    hidden: Tensor,
    targets: Tensor,
    outputs: tuple,
    coefficient: Coefficient,
    needs: tuple,
    plan: Plan,
    units: list[int] | None = None,
) -> tuple[TokenStats, Tensor | None, Tensor | None, Tensor | None, Saved]:
    """Gradients in the forward: 3 GEMMs, 2 with a frozen head. `coefficient(start, stop, stats)` gives Coefs.

    units: as walk.one_pass; of a unit whose logits do not fit the workspace, all but the last rows' are made again.
    """
    _check(head, hidden)
    chunks, sink = _Chunks(head, hidden, plan.workspace), Sink(head, hidden, needs)
    parts = []
    for a, b in pieces(hidden.shape[0], max(chunks.rows, 1), units):
        inside = [(a + c, a + d) for c, d in spans(b - a, chunks.rows)]
        made = [_chunk_stats(chunks, c, d, targets, outputs) for c, d in inside]
        joined = _join(made, hidden)
        parts.append(joined)
        coefs = coefficient(a, b, _token_stats(joined, outputs))
        if not any(needs):
            continue
        saved = _saved(joined, outputs)
        for c, d in reversed(inside):  # the last one's logits are still there
            if d < b:
                chunks.logits(c, d)
            part = slice(c - a, d - a)
            _add_chunk(chunks, sink, (c, d), targets, saved.at_rows(part), coefs.at_rows(part))
    joined = _join(parts, hidden)
    return _token_stats(joined, outputs), *sink.finish(), _saved(joined, outputs)


def _chunk_stats(chunks: _Chunks, a: int, b: int, targets: Tensor, outputs: tuple) -> RowStats:
    head = chunks.head.at_rows(slice(a, b))
    return row_stats(chunks.logits(a, b), targets[a:b], head.bias, _logit_scale(head), **_asked(outputs))


def _add_chunk(chunks: _Chunks, sink: Sink, rows: tuple, targets: Tensor, saved: Saved, coefs: Coefs) -> None:
    """Backward of the rows [a, b) whose logits the buffer holds."""
    a, b = rows
    chosen = coefs.nonzero_rows()
    if chosen.shape[0] == 0:
        return
    head = chunks.head.at_rows(slice(a, b))
    law = sink.rescale(_row_gradient(head, saved, coefs))
    dz = chunks.dlogits(a, b, targets[a:b], head, law, coefs.entropy is not None)
    keep = chosen if chosen.shape[0] < b - a else None
    sink.add_rows(chunks.compact(dz, keep), a, b, keep)


# -- two walks over the logits of the second pass --------------------------------------------------------------------
def _slices(
    head: HeadSpec, hidden: Tensor, targets: Tensor, law: RowGradient, sink: Sink, entropy: bool, workspace: int
) -> None:
    """Vocabulary slices (outer) by row chunks (inner): dW of a slice is complete, in float32, before it is rounded."""
    n, v = hidden.shape[0], head.weight.shape[0]
    rows, columns = _slice_plan(n, v, hidden.shape[1], sink.needs[1], workspace)
    buffer = hidden.new_empty(rows * columns)
    for v0, v1 in spans(v, columns if n else v):
        weight = head.weight[v0:v1]
        bias = None if head.bias is None else head.bias[v0:v1]
        for a, b in spans(n, rows):
            part = slice(a, b)
            dz, sums = linear_dlogits(
                hidden[part], weight, targets[part], bias, _logit_scale(head.at_rows(part)),
                RowGradient(*(x[part] for x in law.arguments())),
                column0=v0, entropy=entropy, need_bias=sink.needs[2], out=_carve(buffer, b - a, v1 - v0),
            )  # fmt: skip
            sink.add_slice(dz, sums, hidden[part], (a, b), (v0, v1))
        sink.end_slice(v0, v1)


def _row_chunks(
    head: HeadSpec, hidden: Tensor, targets: Tensor, law: RowGradient, sink: Sink, entropy: bool, workspace: int
) -> None:
    """float32: a chunk's logits by a library GEMM, dlogits in place."""
    chunks = _Chunks(head, hidden, workspace)
    for a, b in chunks.spans():
        part = RowGradient(*(x[a:b] for x in law.arguments()))
        chunks.logits(a, b)
        sink.add_rows(chunks.dlogits(a, b, targets[a:b], head.at_rows(slice(a, b)), part, entropy), a, b, None)


def _slice_plan(n: int, v: int, h: int, need_weight: bool, workspace: int, align: int = 256) -> tuple[int, int]:
    """(rows, columns) of a dz block: 2 bytes an entry and, for dW, one float32 row of H a column fit in `workspace`."""
    per_column = 2 * n + (4 * h if need_weight else 0)
    columns = max(workspace // max(per_column, 1) // align * align, align)
    count = -(-v // columns)
    columns = min(-(-v // (count * align)) * align, v)
    rows = max(1, (workspace - (4 * h * columns if need_weight else 0)) // (2 * columns))
    return min(n, max(rows, 128)), columns


def _carve(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


class _Chunks:
    """The plan of row chunks and their one float32 buffer [rows, pitch]; a pitch of 64 keeps every row aligned."""

    def __init__(self, head: HeadSpec, hidden: Tensor, workspace: int):
        self.head, self.hidden = head, hidden
        n, self.vocabulary = hidden.shape[0], head.weight.shape[0]
        self.pitch = -(-self.vocabulary // 64) * 64
        # float32 dlogits leave no room in their own rows: compacting them takes a copy.
        row_bytes = self.pitch * (4 if hidden.dtype in HALF else 8)
        most = max(1, min(n, workspace // row_bytes))
        most = most // 128 * 128 or most
        self.rows = most
        self.buffer = hidden.new_empty((most if n else 0, self.pitch), dtype=torch.float32)

    def spans(self):
        return spans(self.hidden.shape[0], self.rows)

    def logits(self, a: int, b: int) -> Tensor:
        """hidden[a:b] @ W.T, float32, bias not yet added."""
        return product(self.hidden[a:b], self.head.weight.t(), self.buffer[: b - a, : self.vocabulary])

    def dlogits(self, a: int, b: int, targets: Tensor, head: HeadSpec, law: RowGradient, entropy: bool) -> Tensor:
        """[b - a, V] in hidden's dtype over the chunk's logits, in their memory."""
        raw = self.buffer[: b - a, : self.vocabulary]
        out = self.buffer.view(self.hidden.dtype)[: b - a, : self.vocabulary]
        return row_dlogits(raw, targets, head.bias, _logit_scale(head), law, out, entropy=entropy)

    def compact(self, dz: Tensor, rows: Tensor | None) -> Tensor:
        """dz[rows]; half-precision rows go to the free second halves of the buffer's rows."""
        if rows is None:
            return dz
        if dz.dtype not in HALF:
            return dz[rows]
        free = self.buffer.view(dz.dtype)[: rows.shape[0], self.pitch : self.pitch + self.vocabulary]
        return compact_rows(dz, rows, free)


# -- from the package's words to the kernels' ------------------------------------------------------------------------
def _check(head: HeadSpec, hidden: Tensor) -> None:
    if hidden.dtype not in (*HALF, torch.float32):
        kinds = "bfloat16, float16 or float32"
        raise TypeError(f"hidden is {hidden.dtype}; backend='triton' takes {kinds}; use backend='torch'")


def _asked(outputs: tuple) -> dict[str, bool]:
    return dict(
        entropy="entropy" in outputs, squares="log_sum_sq_probs" in outputs, argmax="is_argmax" in outputs
    )  # fmt: skip


def _logit_scale(head: HeadSpec) -> LogitScale:
    """z = softcap / T * tanh(logit_scale / softcap * raw), or logit_scale / T * raw."""
    if head.softcap is None:
        return LogitScale(head.logit_scale / head.temperature)
    return LogitScale(head.softcap / head.temperature, head.logit_scale / head.softcap, softcap=True)


def _row_gradient(head: HeadSpec, saved: Saved, coefs: Coefs) -> RowGradient:
    """dz_v = p_v (s - c - h (log p_v + H)), p_v = exp(z_v - max - log_sum), as e_v (rise - fall (z_v - max))."""
    slope = head.logit_scale / head.temperature
    inverse = torch.exp(-saved.log_sum) * slope
    rise = torch.zeros_like(inverse)
    if coefs.logsumexp is not None:
        rise = rise + coefs.logsumexp
    if coefs.logprobs is not None:
        rise = rise - coefs.logprobs
    fall = torch.zeros_like(inverse)
    if coefs.entropy is not None:
        rise = rise + coefs.entropy * (saved.log_sum - saved.entropy)
        fall = coefs.entropy * inverse
    # A row without a log-prob (unknown target, undefined softmax) has no gradient either: NaN, never a wrong number.
    rise = torch.where(saved.logprobs.isnan(), torch.nan, rise * inverse)
    return RowGradient(saved.max, rise, fall, target_dlogit(coefs, saved.logprobs, saved.entropy) * slope)


def _token_stats(made: RowStats, outputs: tuple) -> TokenStats:
    return TokenStats(**{name: getattr(made, name) for name in {*outputs, "logprobs"}})


def _saved(made: RowStats, outputs: tuple) -> Saved:
    return Saved(made.max, made.log_sum, made.logprobs, made.entropy if "entropy" in outputs else None)


def _join(parts: list[RowStats], like: Tensor) -> RowStats:
    if len(parts) == 1:
        return parts[0]
    names = RowStats.__dataclass_fields__
    if not parts:
        # A tensor of its own for each, by which autograd tells the outputs apart.
        dtypes = {n: torch.bool if n == "is_argmax" else torch.float32 for n in names}
        return RowStats(**{n: like.new_empty(0, dtype=d) for n, d in dtypes.items()})
    return RowStats(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})

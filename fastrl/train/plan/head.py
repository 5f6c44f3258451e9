"""What the head takes for its work: the operators' own plan of tiles and chunks, asked without running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.models.score import ScoreHead
from fastrl.ops import dispatch
from fastrl.ops.checks import settle_dtypes
from fastrl.ops.head import HeadSpec, Plan, accumulation_dtype


@dataclass(frozen=True)
class HeadShape:
    """R rows through a head [V, H]; dtype: what the GEMMs see. trained: whether its weight wants a gradient."""

    rows: int
    hidden: int
    words: int
    dtype: torch.dtype
    kind: str  # cuda or cpu
    trained: bool


def workspace(shape: HeadShape) -> int:
    """Bytes that live while the loss is taken, beside hidden states and the gradients that leave it."""
    return _on_gpu(shape) if shape.kind == "cuda" else _walk(shape)


def _walk(shape: HeadShape) -> int:
    """The chunk of logits, a tile of dlogits and the sums of a chunk's dH (fastrl.ops.walk)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fastrl.ops import rows_native, rows_torch
    from fastrl.ops.walk import LEAST_WORDS, Walk, pieces

    with FakeTensorMode():
        hidden = torch.empty(shape.rows, shape.hidden, dtype=shape.dtype)
        head = HeadSpec(torch.empty(shape.words, shape.hidden, dtype=shape.dtype))
        rows = rows_native if dispatch.pick(None, hidden, native=True) == "native" else rows_torch
        walk = Walk(rows, head, hidden, Plan(dispatch.workspace(None, hidden, shape.words)))
        widest = max(b - a for a, b in pieces(shape.rows, walk.capacity))
        words = max(LEAST_WORDS, *(d - c for c, d in walk.tiles(widest)))
        size, pitch = walk.acc.itemsize, walk.pitch(widest)
    tile = min(words, shape.words) * pitch * size
    sums = widest * shape.hidden * size
    states = 32 * shape.rows * size
    wide = shape.dtype == walk.acc
    if not shape.trained:  # statistics alone: logits are dropped tile by tile
        return tile + states + (0 if wide else sums + words * shape.hidden * size)
    widened = 0 if wide else 2 * sums + words * shape.hidden * size  # rows of a chunk, and the words of a tile
    return shape.words * pitch * size + tile + sums + states + widened


def _on_gpu(shape: HeadShape) -> int:
    """fastrl.ops.triton_backend: the chunk's logits; the products of a chunk before they are added."""
    budget = 1 << 30
    half = shape.dtype in (torch.bfloat16, torch.float16)
    pitch = -(-shape.words // 64) * 64
    rows = max(1, min(shape.rows, budget // (pitch * (4 if half else 8))))
    rows = rows // 128 * 128 or rows
    if half and not shape.trained:  # statistics alone: logits stay in registers
        return 32 * shape.rows * 4
    return rows * pitch * (4 if half else 8) + rows * shape.hidden * 4 + 32 * shape.rows * 4


class Twin(torch.autograd.Function):
    """Stands in for the loss of a head: makes and keeps what the one-pass operator does, and computes nothing."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, enter, leave) -> Tensor:
        enter()
        acc = accumulation_dtype(hidden.dtype)
        needs = ctx.needs_input_grad[:2]
        like = (hidden, weight)
        made = [torch.empty(x.shape, dtype=acc) if need else None for x, need in zip(like, needs, strict=True)]
        cast = [None if d is None else d.to(x.dtype) for d, x in zip(made, like, strict=True)]
        ctx.save_for_backward(*cast)
        del made, cast
        leave()
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return *ctx.saved_tensors, None, None


def twin_loss(head: torch.nn.Module, hidden: Tensor, enter, leave) -> Tensor:
    """A loss of hidden [R, H] that keeps what fused_loss would."""
    if isinstance(head, ScoreHead):
        return head(hidden, reads="values").values.sum()
    hidden, weight = settle_dtypes(hidden.to(head.weight.dtype), head.weight)
    return Twin.apply(hidden, weight, enter, leave)

"""Attention of completions that share a prompt: the prompt's keys are there once, each completion sees them.

A completion's softmax runs over two blocks of keys, its prompt's and its own. Each block alone has an output o_b and a
log-sum-exp l_b; with l = log(exp(l_1) + exp(l_2)) the whole is o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2. The gradient
needs no more than the blocks' own kernels: with P = exp(S - l) and D = rowsum(dO * O),

    dV_b = P_b' dO,   dS_b = P_b * (dO V_b' - D),   dQ = sum_b dS_b K_b,   dK_b = dS_b' Q

is what a flash backward computes for block b when it is handed o and l of the whole in place of its own.

Where no such kernel computes these scores (windows, caps, sinks, dropout, chunks, other head sizes), completions are
attended in blocks of queries under a mask, through autograd (exact.attend_masked).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl.models.exact import Scores, attend_masked
from fastrl.models.packing import Packing

aten = torch.ops.aten


def attend_tree(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scores: Scores) -> Tensor:
    """query [1, heads, T, d], key [1, kv heads, T, d], value [1, kv heads, T, e] -> [1, T, heads, e]."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:  # as scaled_dot_product_attention does
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    kernels = kernels_for(query, value, packing, scores)
    if kernels is None:
        return attend_masked(query, key, value, packing, scores)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return TreeAttention.apply(q, k, v, packing, scores.scaling, kernels).unsqueeze(0)


def kernels_for(query: Tensor, value: Tensor, packing: Packing, scores: Scores):
    """What gives a block's log-sum-exp and takes the whole's in its backward, or None."""
    whole = packing.chunk is None and (scores.window is None or packing.longest <= scores.window)
    size = query.shape[-1]
    if not whole or not scores.plain or scores.dropout or size != value.shape[-1]:
        return None
    if query.device.type == "cpu":
        return OnCPU
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type != "cuda" or not half or size > 256 or size % 8:
        return None
    new = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return OnCUDA if new and torch.backends.cuda.is_flash_attention_available() else None


class TreeAttention(torch.autograd.Function):
    """q [T, heads, d], k and v [T, kv heads, d] -> [T, heads, d]."""

    @staticmethod
    def forward(ctx, q, k, v, packing: Packing, scale: float | None, kernels):
        out, lse = kernels.own(q, k, v, packing, scale)
        rows = packing.crossing.rows
        out_b, lse_b = kernels.crossing(q, k, v, packing, scale)
        out_a, lse_a = out.index_select(0, rows), lse.index_select(0, rows)
        both = torch.logaddexp(lse_a, lse_b)
        merged = (lse_a - both).exp().unsqueeze(-1) * out_a + (lse_b - both).exp().unsqueeze(-1) * out_b
        out, lse = out.index_copy(0, rows, merged.to(out.dtype)), lse.index_copy(0, rows, both)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.packing, ctx.scale, ctx.kernels = packing, scale, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        saved = Saved(d_out.contiguous(), *ctx.saved_tensors)
        d_q, d_k, d_v = ctx.kernels.own_backward(saved, ctx.packing, ctx.scale)
        parts = ctx.kernels.crossing_backward(saved, ctx.packing, ctx.scale)
        rows, keys, *_ = ctx.packing.crossing
        for whole, part, at in zip((d_q, d_k, d_v), parts, (rows, keys, keys), strict=True):
            whole.index_copy_(0, at, whole.index_select(0, at) + part)  # rows come once: no order of additions
        return d_q, d_k, d_v, None, None, None


class Saved(NamedTuple):
    """What the backward of a block reads. out, lse: of the whole softmax, [T, heads, d] and [T, heads]."""

    d_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


# -- kernels: own and crossing give (out [R, heads, d], lse [R, heads]), of all rows and of all completions' -----------
class OnCPU:
    """The flash kernel of the CPU, one batch of equal lengths at a time, and one family at a time."""

    @staticmethod
    def own(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float | None) -> tuple[Tensor, Tensor]:
        made = []
        for (n, length), *qkv in _batches(packing, q, *_repeated(q, k, v)):
            made.append(_flash_cpu(*(_stacked(x, n, length) for x in qkv), True, scale))
        return _in_place(packing, [o for o, _ in made]), _in_place(packing, [lse for _, lse in made])

    @staticmethod
    def own_backward(saved: Saved, packing: Packing, scale: float | None) -> list[Tensor]:
        d_out, q, k, v, out, lse = saved
        k, v = _repeated(q, k, v)
        made = []
        for (n, length), *parts in _batches(packing, d_out, q, k, v, out, lse):
            stacked = [_stacked(x, n, length) for x in parts]
            made.append(_flash_cpu_backward(stacked, True, scale))
        d_q, d_k, d_v = (_in_place(packing, list(x)) for x in zip(*made, strict=True))
        copies = q.shape[1] // saved.k.shape[1]
        if copies > 1:
            d_k, d_v = (x.unflatten(1, (-1, copies)).sum(2) for x in (d_k, d_v))
        return [d_q, d_k, d_v]

    @staticmethod
    def crossing(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float | None) -> tuple[Tensor, Tensor]:
        heads, made = k.shape[1], []
        for start, stop, end in packing.families:
            keys = (_stacked(x[start:stop], 1, stop - start) for x in (k, v))
            out, lse = _flash_cpu(_folded(q[stop:end], heads), *keys, False, scale)
            made.append((_unfolded(out, end - stop), _unfolded(lse, end - stop)))
        outs, lses = zip(*made, strict=True)
        return torch.cat(outs), torch.cat(lses)

    @staticmethod
    def crossing_backward(saved: Saved, packing: Packing, scale: float | None) -> list[Tensor]:
        d_out, q, k, v, out, lse = saved
        heads, made = k.shape[1], []
        for start, stop, end in packing.families:
            d_o, queries, o, total = (_folded(x[stop:end], heads) for x in (d_out, q, out, lse))
            keys = [_stacked(x[start:stop], 1, stop - start) for x in (k, v)]
            d_q, d_k, d_v = _flash_cpu_backward([d_o, queries, *keys, o, total], False, scale)
            made.append((_unfolded(d_q, end - stop), d_k, d_v))
        return [torch.cat(x) for x in zip(*made, strict=True)]


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """[n, heads, L, d] -> out [n L, heads, d], lse [n L, heads]."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return _flat(out), _flat(lse)


def _flash_cpu_backward(parts: list[Tensor], causal: bool, scale: float | None) -> tuple[Tensor, ...]:
    """d_out, q, k, v, out, lse [n, heads, L, ...] -> d_q, d_k, d_v [n L, heads, d]."""
    made = aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, 0.0, causal, scale=scale)
    return tuple(_flat(x) for x in made)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the queries."""
    copies = q.shape[1] // k.shape[1]
    return (k, v) if copies == 1 else (k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1))


def _batches(packing: Packing, *tensors: Tensor):
    """((n, L), rows [n L, ...] of each tensor) for the segments of each length."""
    sizes = [n * length for n, length in packing.groups]
    ordered = [x if packing.order is None else x.index_select(0, packing.order) for x in tensors]
    return zip(packing.groups, *(x.split(sizes) for x in ordered), strict=True)


def _in_place(packing: Packing, parts: list[Tensor]) -> Tensor:
    """The batches' rows [n L, ...], back in the order of the pack."""
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out if packing.back is None else out.index_select(0, packing.back)


def _stacked(x: Tensor, n: int, length: int) -> Tensor:
    """[n L, heads, ...] -> [n, heads, L, ...]."""
    return x.unflatten(0, (n, length)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[n, heads, L, ...] -> [n L, heads, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _folded(x: Tensor, heads: int) -> Tensor:
    """[C, g heads, ...] -> [1, heads, g C, ...]: without a causal mask, the g queries of a key's head are just rows."""
    return x.unflatten(1, (heads, -1)).movedim(0, 2).flatten(1, 2).unsqueeze(0)


def _unfolded(x: Tensor, count: int) -> Tensor:
    """[g count, heads, ...] -> [count, g heads, ...]: the inverse, of flat rows."""
    return x.unflatten(0, (-1, count)).movedim(0, 2).flatten(1, 2)


class OnCUDA:
    """Flash attention over boundaries, in torch. Half precision, compute capability 8.0 and up."""

    @staticmethod
    def own(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float | None) -> tuple[Tensor, Tensor]:
        return _flash_cuda(q, k, v, *_own_bounds(packing), True, scale)

    @staticmethod
    def own_backward(saved: Saved, packing: Packing, scale: float | None) -> list[Tensor]:
        return _flash_cuda_backward(saved, *_own_bounds(packing), True, scale)

    @staticmethod
    def crossing(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float | None) -> tuple[Tensor, Tensor]:
        rows, keys, *bounds = packing.crossing
        return _flash_cuda(q[rows], k[keys], v[keys], *_at_least_two(bounds), False, scale)

    @staticmethod
    def crossing_backward(saved: Saved, packing: Packing, scale: float | None) -> list[Tensor]:
        rows, keys, *bounds = packing.crossing
        at = Saved(rows, rows, keys, keys, rows, rows)
        part = Saved(*(x.index_select(0, i) for x, i in zip(saved, at, strict=True)))
        return _flash_cuda_backward(part, *_at_least_two(bounds), False, scale)


def _own_bounds(packing: Packing) -> list:
    cu, longest = packing.cu_seqlens, packing.max_seqlen
    return _at_least_two([cu, cu, longest, longest])


def _at_least_two(bounds: list) -> list:
    """A longest sequence of one query makes the kernel lay out its log-sum-exp in another way."""
    return [*bounds[:2], *(max(2, x) for x in bounds[2:])]


def _flash_cuda(q, k, v, cu_q, cu_k, most_q: int, most_k: int, causal: bool, scale: float | None):
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, most_q, most_k, 0.0, causal, False, scale=scale
    )  # fmt: skip
    return out, lse.transpose(0, 1)  # the kernel's is [heads, T]


def _flash_cuda_backward(saved: Saved, cu_q, cu_k, most_q: int, most_k: int, causal: bool, scale: float | None):
    d_out, q, k, v, out, lse = (x.contiguous() for x in saved)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
    unused = torch.empty(0, device=q.device)
    made = aten._flash_attention_backward(
        d_out, q, k, v, out, lse.transpose(0, 1).contiguous(), cu_q, cu_k, most_q, most_k, 0.0, causal, seed, unused,
        scale=scale,
    )  # fmt: skip
    return list(made)

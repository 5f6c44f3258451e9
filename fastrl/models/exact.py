"""Causal attention of packed sequences, each by itself: exact on any device, and no [T, T] mask.

Sequences of equal length form one batch. Windows, score caps and sinks are taken in blocks of queries, each against
only the keys that it can see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

from fastrl.models.packing import Packing

BLOCK = 512  # queries that share one mask


@dataclass(frozen=True)
class Scores:
    """How scores are made and which are seen. window: keys t-window < s <= t. sinks: [heads] extra logits."""

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0


def attend_packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scores: Scores) -> Tensor:
    """query [1, heads, T, d], key [1, kv heads, T, d], value [1, kv heads, T, e] -> [1, T, heads, e]."""
    # One permutation and one split for all sequences: their backward is O(T), that of S slices would be O(S T).
    sizes = [n * length for n, length in packing.groups]
    parts = [_rows(x, packing.order).split(sizes) for x in (query, key, value)]
    made = []
    for (n, length), *qkv in zip(packing.groups, *parts, strict=True):
        q, k, v = (x.unflatten(0, (n, length)).transpose(1, 2) for x in qkv)  # [n, heads, L, d]
        made.append(attend(q, k, v, scores).transpose(1, 2).reshape(n * length, query.shape[1], value.shape[3]))
    out = made[0] if len(made) == 1 else torch.cat(made)
    return (out if packing.back is None else out.index_select(0, packing.back)).unsqueeze(0)


def _rows(x: Tensor, order: Tensor | None) -> Tensor:
    x = x[0].transpose(0, 1)  # [T, heads, d]
    return x if order is None else x.index_select(0, order)


def attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Causal attention [n, heads, L, e] of n sequences of equal length."""
    length = q.shape[2]
    plain = scores.softcap is None and scores.sinks is None
    if plain and (scores.window is None or length <= scores.window):
        gqa = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(
            q, k, v, dropout_p=scores.dropout, is_causal=True, scale=scores.scaling, enable_gqa=gqa
        )
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    made = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        first = 0 if scores.window is None else max(0, start - scores.window + 1)
        seen = _seen(start, stop, first, scores.window, q.device)
        block = q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], seen
        made.append(_masked(*block, scores) if plain else _by_hand(*block, scores))
    return torch.cat(made, dim=2)


def _seen(start: int, stop: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """[stop-start, stop-first] bool: query t sees key s."""
    back = torch.arange(start, stop, device=device)[:, None] - torch.arange(first, stop, device=device)
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Scores) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=scores.dropout, scale=scores.scaling)


def _by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Scores) -> Tensor:
    """Softmax attention with capped scores and sinks, softmax in at least float32."""
    z = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling)
    if scores.softcap is not None:
        z = scores.softcap * torch.tanh(z / scores.softcap)
    z = z.masked_fill(~seen, -torch.inf)
    if scores.sinks is not None:  # one more column: it takes probability and gives nothing
        sink = scores.sinks.view(1, -1, 1, 1).to(z.dtype).expand(*z.shape[:3], 1)
        z = torch.cat([z, sink], dim=-1)
    p = torch.softmax(z, dim=-1, dtype=torch.promote_types(z.dtype, torch.float32)).to(v.dtype)
    return dropout(p[..., : k.shape[2]], scores.dropout) @ v

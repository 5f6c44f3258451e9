"""Causal attention of packed sequences, each by itself: exact on any device, and no [T, T] mask.

Sequences of equal length form one batch. Windows, score caps and sinks are taken in blocks of queries, each against
only the keys that it can see; so are completions that share a prompt, where no kernel does it (tree_attention).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

from fastrl.models.packing import Family, Packing

BLOCK = 512  # queries that share one mask


@dataclass(frozen=True)
class Scores:
    """How scores are made and which are seen. window: keys t-window < s <= t. sinks: [heads] extra logits."""

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """A softmax of scaled products and nothing else."""
        return self.softcap is None and self.sinks is None


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
    if scores.plain and (scores.window is None or length <= scores.window):
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
        made.append(attend_seen(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], seen, scores))
    return torch.cat(made, dim=2)


def attend_seen(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Scores) -> Tensor:
    """[n, heads, L, e] of L queries and M keys of as many heads; seen: [L, M] bool."""
    return _masked(q, k, v, seen, scores) if scores.plain else _by_hand(q, k, v, seen, scores)


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


# -- completions that share a prompt -----------------------------------------------------------------------------------
def attend_masked(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scores: Scores) -> Tensor:
    """As attend_packed, of a tree: prompts and lone sequences as a pack, then the completions of each prompt."""
    kinds = _pieces(packing)
    sizes = [stop - start for start, stop, _ in kinds]
    q, k, v = (x.split(sizes, dim=2) for x in (query, key, value))
    alone = [i for i, (_, _, family) in enumerate(kinds) if family is None]
    roots = attend_packed(*(torch.cat([x[i] for i in alone], dim=2) for x in (q, k, v)), packing.roots, scores)
    made = dict(zip(alone, roots.split([sizes[i] for i in alone], dim=1), strict=True))
    for i, (_, _, family) in enumerate(kinds):
        if family is not None:
            own = [b for b in packing.bounds if family.stop <= b < family.end]
            seen = (k[i - 1], k[i]), (v[i - 1], v[i])
            made[i] = _completions(q[i], *seen, [b - family.stop for b in own], packing.chunk, scores).transpose(1, 2)
    return torch.cat([made[i] for i in range(len(kinds))], dim=1)


def _pieces(packing: Packing) -> list[tuple[int, int, Family | None]]:
    """(start, stop, None) of prompts and lone sequences, (start, stop, family) of all completions of a prompt."""
    after = {family.start: family for family in packing.families}
    made: list[tuple[int, int, Family | None]] = []
    for (start, stop), parent in zip(packing.segments(), packing.parents, strict=True):
        if parent < 0:
            made.append((start, stop, None))
            if start in after:
                made.append((stop, after[start].end, after[start]))
    return made


def _completions(
    q: Tensor, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], starts: list[int], chunk: int | None, scores: Scores
) -> Tensor:
    """[1, heads, C, e] of the completions of one prompt, which begin at `starts`; k, v: the prompt's and their own."""
    count, before, device = q.shape[2], k[0].shape[2], q.device
    if q.shape[1] != k[0].shape[1]:
        k, v = (tuple(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in pair) for pair in (k, v))
    lengths = torch.tensor([*starts, count]).diff()
    first = torch.repeat_interleave(torch.tensor(starts), lengths).to(device)  # [C] where its completion begins
    position = before + torch.arange(count, device=device) - first
    near = 0 if scores.window is None else max(0, before - scores.window + 1)  # no completion sees further back
    made = []
    for a in range(0, count, BLOCK):
        b = min(a + BLOCK, count)
        c = max(x for x in starts if x <= a)
        at = torch.cat([torch.arange(near, before, device=device), position[c:b]])
        of = torch.cat([first.new_full((before - near,), -1), first[c:b]])
        back = position[a:b, None] - at
        seen = ((of == -1) | (of == first[a:b, None])) & (back >= 0)
        if scores.window is not None:
            seen &= back < scores.window
        if chunk is not None:
            seen &= position[a:b, None] // chunk == at // chunk
        keys, values = (torch.cat([x[:, :, near:], y[:, :, c:b]], dim=2) for x, y in (k, v))
        made.append(attend_seen(q[:, :, a:b], keys, values, seen, scores))
    return torch.cat(made, dim=2)

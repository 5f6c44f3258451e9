"""Attention over packed sequences, told by their boundaries, through transformers' attention interface.

`fastrl_packed` reads a `Packing` that the model's forward hands down as a keyword. Without one (generation with a KV
cache, plain calls) it is transformers' SDPA. On the CPU, and wherever no varlen kernel fits, every sequence is attended
by itself, sequences of one length together: no token is padded and no [T, T] mask exists.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "fastrl_packed"


@dataclass(frozen=True)
class Packing:
    """Boundaries of S sequences in T packed tokens. groups: sequences of equal length, attended in one call."""

    cu_seqlens: Tensor  # [S+1] int32 on the device
    bounds: tuple[int, ...]  # the same on the host
    groups: tuple[tuple[Tensor, int, int], ...] = ()  # (rows [n*L], n, L)
    inverse: Tensor | None = None  # [T]: puts the concatenated groups back in order; None if they are in order
    max_seqlen: int = field(default=0)

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> Packing:
        bounds = tuple(cu_seqlens.tolist())
        starts = defaultdict(list)
        for a, b in zip(bounds, bounds[1:], strict=False):
            if b > a:
                starts[b - a].append(a)
        groups, order = [], []
        for length, at in starts.items():
            rows = (torch.tensor(at)[:, None] + torch.arange(length)).reshape(-1)
            groups.append((rows.to(cu_seqlens.device), len(at), length))
            order.append(rows)
        rows = torch.cat(order) if order else torch.zeros(0, dtype=torch.long)
        in_order = bool((rows == torch.arange(rows.shape[0])).all())
        inverse = None if in_order else torch.argsort(rows).to(cu_seqlens.device)
        return cls(cu_seqlens.to(torch.int32), bounds, tuple(groups), inverse, max(starts, default=0))


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, kv heads, T, d]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packing: Packing | None = None,
    **others,
) -> tuple[Tensor, None]:
    """transformers' attention signature; returns [1, T, heads, d]."""
    if packing is None:
        return _unpacked(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, others)
    if others.get("position_bias") is not None:
        raise ValueError("packed attention knows no position_bias; load the model with attn_implementation='eager'")
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and half and s_aux is None:
        made = _varlen(query, key, value, dropout, scaling, sliding_window, softcap, packing)
        if made is not None:
            return made, None
    return _by_sequence(query, key, value, dropout, scaling, sliding_window, (softcap, s_aux), packing), None


def _by_sequence(query, key, value, dropout, scaling, window, extras: tuple, packing: Packing) -> Tensor:
    """Each sequence by itself; those of one length are the batch of one call."""
    parts = []
    for rows, n, length in packing.groups:
        whole = len(packing.groups) == 1 and packing.inverse is None
        q, k, v = (_unpack(x, None if whole else rows, n, length) for x in (query, key, value))
        mask = None
        if window is not None and length > window:
            near = torch.arange(length, device=query.device)
            near = near[:, None] - near[None, :]
            mask = (near >= 0) & (near < window)
        if any(x is not None for x in extras):
            out = _eager(q, k, v, mask, dropout, scaling, *extras)
        else:
            gqa = q.shape[1] != k.shape[1]
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
            )
        parts.append(out.transpose(1, 2).reshape(n * length, out.shape[1], out.shape[3]))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (joined if packing.inverse is None else joined[packing.inverse]).unsqueeze(0)


def _unpack(x: Tensor, rows: Tensor | None, n: int, length: int) -> Tensor:
    """[1, heads, T, d] -> [n, heads, L, d] of the given rows."""
    x = x[0] if rows is None else x[0].index_select(1, rows)
    return x.reshape(x.shape[0], n, length, x.shape[2]).transpose(0, 1)


def _eager(q, k, v, mask: Tensor | None, dropout: float, scaling: float | None, softcap: float | None, sinks) -> Tensor:
    """Softmax attention with capped scores and sinks [heads]. mask: bool (True = attend), additive, or None: causal."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        rows, columns = scores.shape[-2:]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:  # one more column that takes probability and gives nothing
        sink = sinks.view(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    p = p.nan_to_num(0.0)[..., : k.shape[2]]  # a row of padding attends to nothing
    return torch.nn.functional.dropout(p, dropout) @ v


def _varlen(query, key, value, dropout, scaling, window, softcap, packing: Packing) -> Tensor | None:
    """flash-attn if installed, else torch's varlen kernel, else None. Half precision on CUDA only."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d]
    cu, longest = packing.cu_seqlens, packing.max_seqlen
    near = (-1 if window is None else window - 1, 0)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        options = {"dropout_p": dropout, "softmax_scale": scaling, "causal": True, "softcap": softcap or 0.0}
        window_size = (near[0], 0 if window else -1)
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, window_size=window_size, **options).unsqueeze(0)
    if softcap is not None or dropout or q.shape[-1] > 256:
        return None
    from torch.nn.attention.varlen import varlen_attn

    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=near).unsqueeze(0)


def _unpacked(module, query, key, value, mask, dropout, scaling, softcap, sinks, others: dict) -> tuple[Tensor, None]:
    """Padded batches, with or without a cache."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if softcap is not None or sinks is not None:
        out = _eager(query, key, value, mask, dropout, scaling, softcap, sinks)
        return out.transpose(1, 2).contiguous(), None
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, **others)


def register() -> str:
    """Make the implementation known to transformers; returns its name. Padded calls get SDPA's masks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME

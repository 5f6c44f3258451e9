"""Attention over packed sequences, told by their boundaries, through transformers' attention interface.

The implementation reads a `Packing` that the model's forward hands down to every layer as a keyword, so that it is
there again when gradient checkpointing recomputes a layer. Without one (generation with a KV cache, plain calls) it is
what transformers would have used: two names are registered, one over SDPA and one over eager attention.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys

import torch
from torch import Tensor, nn

from fastrl.models.exact import Scores, attend_packed
from fastrl.models.packing import Packing
from fastrl.models.tree_attention import attend_tree
from fastrl.models.ulysses import SplitPacking

NAME = "fastrl_packed"
NAMES = {"sdpa": NAME, "eager": f"{NAME}_eager"}  # transformers' own -> ours over it
# Keywords that layers pass and that change nothing here. Any other one that is set is refused by name.
HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal",
    "position_embeddings", "past_key_values", "layer_idx", "deterministic", "logits_to_keep", "labels",
    "token_type_ids", "mm_token_type_ids", "cache",
}  # fmt: skip


class UnsupportedModelError(ValueError):
    """The architecture cannot be trained here: the message names it and what disagrees."""


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, kv heads, T, d]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    packing: Packing | SplitPacking | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:
    """transformers' signature for attention -> ([1, T, heads, d], None). What it does not know it refuses by name."""
    if packing is None:
        present = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        others |= {name: x for name, x in present.items() if x is not None}
        plain = _plain(module)
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    if isinstance(packing, SplitPacking):  # slices of all heads -> all tokens of some heads, and back
        query, key, value, s_aux = packing.to_heads(query, key, value, s_aux)
        told = {"packing": packing.whole, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        out, _ = packed_attention(module, query, key, value, attention_mask, dropout, scaling, **told, **others)
        return packing.to_tokens(out), None
    _refuse_unknown(module, query, key, packing, others)
    packing, window = _visible(module, packing, sliding_window)
    scores = Scores(scaling, window, softcap, s_aux, dropout)
    if packing.parents is not None:
        return attend_tree(query, key, value, packing, scores), None
    kernel = _varlen_kernel(query, value, scores)
    if kernel is None:
        return attend_packed(query, key, value, packing, scores), None
    return kernel(*(x[0].transpose(0, 1) for x in (query, key, value)), packing, scores).unsqueeze(0), None


def _refuse_unknown(module: nn.Module, query: Tensor, key: Tensor, packing: Packing, others: dict) -> None:
    name = type(module).__name__
    for argument, x in others.items():
        if x is not None and argument not in HARMLESS:
            raise UnsupportedModelError(f"{name} passes {argument!r}, which packed attention does not know")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{name} is not causal; packed attention is")
    if not query.shape[0] == 1 or not query.shape[2] == key.shape[2] == packing.bounds[-1]:
        raise UnsupportedModelError(
            f"{name} attends from {list(query.shape)} to {list(key.shape)}; packed attention needs [1, heads, "
            f"T={packing.bounds[-1]}, d] on both sides"
        )


def _visible(module: nn.Module, packing: Packing, sliding_window: int | None) -> tuple[Packing, int | None]:
    """What a layer may see. Where the config lists the kind of each layer, that is what transformers' masks follow."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds is not None and index is not None and index < len(kinds) else None
    if kind == "full_attention":
        return packing, None
    if kind == "chunked_attention":
        return packing.chunked(config.attention_chunk_size), None
    if kind == "sliding_attention":
        return packing, sliding_window or config.sliding_window
    return packing, sliding_window


def _plain(module: nn.Module):
    """The implementation that ours stands in for."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if module.config._attn_implementation != NAMES["eager"]:
        return ALL_ATTENTION_FUNCTIONS["sdpa"]
    homes = (sys.modules[c.__module__] for c in type(module).__mro__)
    return next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))


# -- varlen kernels: half precision on CUDA --------------------------------------------------------------------------
def _varlen_kernel(query: Tensor, value: Tensor, scores: Scores):
    """flash-attn's if installed, else torch's, else None where neither computes these scores."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type != "cuda" or not half or scores.sinks is not None:
        return None
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or query.shape[-1] % 8:
        return None
    if _has("flash_attn"):
        return _flash_attn
    if _has("torch.nn.attention.varlen") and scores.softcap is None and scores.dropout == 0.0:
        return _torch_varlen if scores.window is None or "window_size" in _varlen_options() else None
    return None


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scores: Scores) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu, longest = packing.cu_seqlens, packing.max_seqlen
    return flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest,
        dropout_p=scores.dropout, softmax_scale=scores.scaling, causal=True,
        window_size=(-1, -1) if scores.window is None else (scores.window - 1, 0), softcap=scores.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest, known = packing.cu_seqlens, packing.max_seqlen, _varlen_options()
    back = -1 if scores.window is None else scores.window - 1
    options = {"window_size": (back, 0)} if "window_size" in known else {"is_causal": True}
    if q.shape[1] != k.shape[1] and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scores.scaling, **options)


@functools.cache
def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _varlen_options() -> frozenset[str]:
    """What this torch's varlen_attn can be told: its options grew between 2.11 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


# -- transformers ----------------------------------------------------------------------------------------------------
def register() -> str:
    """Make both names known to transformers; returns the one over SDPA. Plain calls get the masks of what it covers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    # A compiler, if there is one, breaks off here: the lists of a packing would make it start anew with every pack.
    entry = torch.compiler.disable(packed_attention) if "torch._dynamo" in sys.modules else packed_attention
    for plain, mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        AttentionInterface.register(NAMES[plain], entry)
        AttentionMaskInterface.register(NAMES[plain], mask)
    return NAME

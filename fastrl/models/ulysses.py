"""Attention of a pack whose tokens lie on several ranks (Ulysses, Jacobs et al. 2023, arXiv:2309.14509).

Each of p ranks holds T/p tokens of every layer. Attention needs all tokens and treats its heads one by one, so an
all-to-all turns [heads, T/p] into [heads/p, T], the packed attention runs as it is, and a second one turns its output
back. Backward the same two run the other way round. A layer sends about 4 T H / p numbers from a rank, whatever p is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from fastrl.models.packing import Packing


@dataclass(frozen=True)
class Ranks:
    """The processes that share every pack, and which of them this one is."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Ranks:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def share(self, total: int) -> int:
        """Tokens of each rank's slice; the last one is filled up with tokens that nobody reads."""
        return -(-total // self.size)

    def slice(self, x: Tensor) -> Tensor:
        """[T, ...] -> this rank's [ceil(T/p), ...], zeros after the end."""
        each = self.share(x.shape[0])
        start, stop = self.rank * each, (self.rank + 1) * each
        missing = stop - max(start, x.shape[0])
        return x[start:stop] if missing <= 0 else pad(x[start:stop], (0, 0) * (x.dim() - 1) + (0, missing))


@dataclass(frozen=True)
class SplitPacking:
    """What layers are handed in place of a Packing: `whole`, that of all T tokens, and the ranks that hold them."""

    whole: Packing
    ranks: Ranks

    @property
    def cu_seqlens(self) -> Tensor:
        return self.whole.cu_seqlens

    @property
    def max_seqlen(self) -> int:
        return self.whole.max_seqlen

    @property
    def position_ids(self) -> Tensor:
        """[ceil(T/p)] of this rank's tokens in their sequences."""
        return self.ranks.slice(self.whole.position_ids)

    def to_heads(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[1, heads, T/p, d] of this rank's tokens -> [1, heads/p, T, d]: all tokens, this rank's heads.

        sinks: [heads] -> [heads/p]. Key and value heads that several ranks need are sent to each of them.
        Raises ValueError where the heads do not divide.
        """
        p, heads = self.ranks.size, query.shape[1]
        check_heads(heads, p)
        index = kv_heads(heads, key.shape[1], p)
        if index != list(range(key.shape[1])):
            at = torch.tensor(index, device=key.device)
            key, value = key.index_select(1, at), value.index_select(1, at)
        parts = [x[0].unflatten(0, (p, -1)).transpose(1, 2) for x in _settled(query, key, value)]  # [p, T/p, h, d]
        sent = torch.cat([x.flatten(2) for x in parts], dim=2)
        got = Exchange.apply(sent, self.ranks.group).flatten(0, 1)[: self.whole.bounds[-1]]
        widths = [x.shape[2] * x.shape[3] for x in parts]
        q, k, v = (
            x.unflatten(1, part.shape[2:]).transpose(0, 1)[None]
            for x, part in zip(got.split(widths, dim=1), parts, strict=True)
        )
        own = heads // p
        return q, k, v, None if sinks is None else sinks[self.ranks.rank * own : (self.ranks.rank + 1) * own]

    def to_tokens(self, out: Tensor) -> Tensor:
        """[1, T, heads/p, e] of this rank's heads -> [1, T/p, heads, e]: all heads, this rank's tokens."""
        p, total = self.ranks.size, out.shape[1]
        missing = p * self.ranks.share(total) - total
        x = out[0] if not missing else pad(out[0], (0, 0, 0, 0, 0, missing))
        got = Exchange.apply(x.unflatten(0, (p, -1)), self.ranks.group)  # [p, T/p, heads/p, e], heads in rank order
        return got.transpose(0, 1).flatten(1, 2)[None]


def check_heads(heads: int, size: int) -> None:
    """Raises ValueError where `size` ranks cannot share the heads evenly."""
    if heads % size:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise ValueError(
            f"{heads} attention heads do not divide among --sequence_parallel_size {size} ranks; use one of {fitting}"
        )


def kv_heads(heads: int, kv: int, size: int) -> list[int]:
    """Which key and value head each place of the exchange carries, ranks one after the other, in the fewest copies.

    Query head i reads key head i // (heads / kv). A rank has heads / size of them in a row, so in steps of the greatest
    common divisor of both numbers every step reads one key head.
    """
    each = heads // kv
    step = math.gcd(heads // size, each)
    return [i // each for i in range(0, heads, step)]


def _settled(*tensors: Tensor) -> list[Tensor]:
    """One dtype for one exchange: autocast's, to which attention would turn them anyway, or the widest of them."""
    device = tensors[0].device.type
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) for x in tensors]


class Exchange(torch.autograd.Function):
    """[p, ...]: part j goes to rank j, what rank i sent comes back as part i. The same is its own backward."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _swapped(x, group)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return _swapped(upstream, ctx.group), None


def _swapped(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


# -- at load -----------------------------------------------------------------------------------------------------------
def split_sequences(packed: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Let the ranks of `group` share every pack of a PackedModel from here on; None: it stays as it is.

    Every rank of the group has to call it, with the same weights; where these are sharded, all that hold a part. The
    model is believed only if its hidden states on two documents that cross the slices are those of one rank alone.
    Raises UnsupportedModelError, naming what does not fit.
    """
    if group is None or packed.split is not None:
        return
    from fastrl.models.attention import NAMES, UnsupportedModelError

    ranks = Ranks.of(group)
    flag = f"--sequence_parallel_size {ranks.size}"
    if not packed.packed or packed.model.config._attn_implementation not in NAMES.values():
        why = "; ".join(packed.notes) or f"its attention is {packed.model.config._attn_implementation!r}"
        raise UnsupportedModelError(
            f"{flag} needs fastrl's packed attention, which {packed.name} does not use ({why}); drop the flag, or "
            "--attn_implementation where it was given"
        )
    config = packed.model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False):
        raise UnsupportedModelError(
            f"{packed.name} counts positions inside its layers, from a slice's start; drop {flag}"
        )
    heads = getattr(config, "num_attention_heads", None)
    try:
        for n in [heads] if isinstance(heads, int) else heads or ():
            check_heads(n, ranks.size)
        trouble = _trouble(packed, ranks)
    except Exception as error:  # heads that do not divide, layers that take no slice of a sequence, ...
        trouble = str(error).splitlines()[0]
    if trouble:
        packed.split = None
        raise UnsupportedModelError(f"{packed.name} cannot be split over ranks: {trouble}; drop {flag}")


def _trouble(packed: nn.Module, ranks: Ranks) -> str | None:
    """Run two documents whole and split; what is wrong, or None. Leaves the model split."""
    from fastrl.models.check import AGREES, ON_DEVICE, evaluating, row_error

    embedding = packed.model.get_input_embeddings().weight
    config, generator = packed.model.config.get_text_config(), torch.Generator().manual_seed(0)
    near = [getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size")]
    length = 9 + max([w for w in near if isinstance(w, int) and w <= 64], default=0)
    length = max(2, min(length, packed.context_length or length))
    bounds = torch.tensor([0, min(7, length), min(7, length) + length], dtype=torch.int32)
    ids = torch.randint(embedding.shape[0], (int(bounds[-1]),), generator=generator).to(embedding.device)
    with evaluating(packed):
        want = packed.hidden(ids, bounds)
        packed.split = ranks
        got = packed.hidden(ids, bounds)
    dtype = want.dtype  # sharded weights may be used in another one than they are kept in
    limit = AGREES[dtype] if want.device.type == "cpu" else max(AGREES[dtype], ON_DEVICE.get(dtype, 0.0))
    error = row_error(got, want)
    worst = error.max() if dtype in (torch.float32, torch.float64) else error.median()
    if not worst <= limit:
        return f"its hidden states are {worst:.1e} (relative) from those of one rank, allowed {limit:.0e}"
    return None

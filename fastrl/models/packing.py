"""Where packed sequences begin and end, worked out once per forward, on the host and on the device.

A pack may be a tree: the completions of a prompt are segments that see the prompt's tokens before their own
(fastrl.data.prefix.Layout). What follows here are the pieces that attention takes it apart into.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Family(NamedTuple):
    """A prompt of rows [start, stop) and the completions that see it, [stop, end)."""

    start: int
    stop: int
    end: int


class Crossing(NamedTuple):
    """From completions to prompts: rows [C] of all completions' queries, keys [P] of all prompts' tokens.

    cu_queries, cu_keys: [F+1] int32 boundaries of the families on either; longest of both.
    """

    rows: Tensor
    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class Packing:
    """Boundaries of sequences laid end to end in T tokens. Empty ones are dropped: attention has nothing to do there.

    cu_seqlens: [S+1] int32 on the device. bounds: the same on the host.
    groups: (n, L): n sequences of equal length L, attended in one call as a batch.
    order: [T] rows so that the groups lie one after the other, or None if they already do. back: its inverse.
    parents: of a tree, [S] the segment whose tokens each sees before its own, -1: none. None where nothing is shared.
    chunk: of a tree, positions that see each other in chunked attention.
    """

    cu_seqlens: Tensor
    bounds: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    order: Tensor | None = None
    back: Tensor | None = None
    parents: tuple[int, ...] | None = None
    chunk: int | None = None
    _cut: dict[int, Packing] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> Packing:
        """From [S+1] boundaries; reads them back to the host if they are on a device."""
        return cls.from_bounds(tuple(cu_seqlens.tolist()), cu_seqlens.device)

    @classmethod
    def from_bounds(
        cls, bounds: tuple[int, ...], device: torch.device, parents: tuple[int, ...] | None = None
    ) -> Packing:
        """parents: as those of a Layout, one for each segment, the empty ones too."""
        parents = None if parents is None else _of_filled(bounds, parents)
        bounds = (bounds[0], *(b for a, b in zip(bounds, bounds[1:], strict=False) if b > a))
        starts = defaultdict(list)
        for a, b in zip(bounds, bounds[1:], strict=False):
            starts[b - a].append(a)
        groups = tuple((len(at), length) for length, at in starts.items())
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        rows = [(torch.tensor(at)[:, None] + torch.arange(length)).reshape(-1) for length, at in starts.items()]
        order = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
        if bool((order == torch.arange(order.shape[0])).all()):
            return cls(cu_seqlens, bounds, groups, parents=parents)
        return cls(cu_seqlens, bounds, groups, order.to(device), torch.argsort(order).to(device), parents)

    @property
    def max_seqlen(self) -> int:
        return max((length for _, length in self.groups), default=0)

    @cached_property
    def longest(self) -> int:
        """Tokens that the last one of a sequence sees: of a tree, prompt and completion together."""
        paths = (b - a + before for (a, b), before in zip(self.segments(), self.before, strict=True))
        return max(paths, default=0)

    @cached_property
    def before(self) -> tuple[int, ...]:
        """[S] tokens that each segment sees before its own."""
        parents = self.parents or (-1,) * (len(self.bounds) - 1)
        return tuple(0 if p < 0 else self.bounds[p + 1] - self.bounds[p] for p in parents)

    @property
    def position_ids(self) -> Tensor:
        """[T] int64, restarting at 0 in every sequence; a completion's go on from its prompt's end."""
        cu = self.cu_seqlens.long()
        total = self.bounds[-1]
        first = cu[:-1] if self.parents is None else cu[:-1] - torch.tensor(self.before, device=cu.device)
        return torch.arange(total, device=cu.device) - torch.repeat_interleave(first, cu.diff(), output_size=total)

    def segments(self) -> list[tuple[int, int]]:
        """(start, stop) of every sequence that is not empty."""
        return list(zip(self.bounds, self.bounds[1:], strict=False))

    def chunked(self, size: int) -> Packing:
        """Every sequence cut at multiples of `size` from its start: chunked attention is a pack of more sequences.

        In a tree a chunk may begin in the prompt: it stays whole and says its chunk.
        """
        if self.longest <= size:
            return self
        if size not in self._cut and self.parents is not None:
            self._cut[size] = dataclasses.replace(self, chunk=size, _cut={})
        elif size not in self._cut:
            starts = (x for a, b in self.segments() for x in range(a, b, size))
            self._cut[size] = Packing.from_bounds((*starts, self.bounds[-1]), self.cu_seqlens.device)
        return self._cut[size]

    # -- of a tree -----------------------------------------------------------------------------------------------------
    @cached_property
    def families(self) -> tuple[Family, ...]:
        """Prompts that are shared, with their completions."""
        made: dict[int, Family] = {}
        for i, parent in enumerate(self.parents or ()):
            if parent >= 0:
                made[parent] = Family(self.bounds[parent], self.bounds[parent + 1], self.bounds[i + 1])
        return tuple(made.values())

    @cached_property
    def roots(self) -> Packing:
        """The prompts and whatever shares nothing, as a pack of their own."""
        sizes = [b - a for (a, b), parent in zip(self.segments(), self.parents, strict=True) if parent < 0]
        cu_seqlens = torch.tensor([0, *sizes]).cumsum(0)
        packing = Packing.from_bounds(tuple(cu_seqlens.tolist()), self.cu_seqlens.device)
        return packing if self.chunk is None else packing.chunked(self.chunk)

    @cached_property
    def crossing(self) -> Crossing:
        device, queries, keys = self.cu_seqlens.device, [0], [0]
        for start, stop, end in self.families:
            queries.append(queries[-1] + end - stop)
            keys.append(keys[-1] + stop - start)
        cu_queries, cu_keys = (torch.tensor(x, dtype=torch.int32) for x in (queries, keys))
        return Crossing(
            torch.cat([torch.arange(f.stop, f.end) for f in self.families]).to(device),
            torch.cat([torch.arange(f.start, f.stop) for f in self.families]).to(device),
            cu_queries.to(device),
            cu_keys.to(device),
            int(cu_queries.diff().max()),
            int(cu_keys.diff().max()),
        )


def _of_filled(bounds: tuple[int, ...], parents: tuple[int, ...]) -> tuple[int, ...] | None:
    """The parents of the segments that are not empty, counted among those; None if there is no parent left."""
    filled = [b > a for a, b in zip(bounds, bounds[1:], strict=False)]
    counted = itertools.accumulate(filled, initial=0)
    at = [n if there else -1 for n, there in zip(counted, filled, strict=False)]
    kept = tuple(at[p] if p >= 0 else -1 for p, there in zip(parents, filled, strict=True) if there)
    return kept if max(kept, default=-1) >= 0 else None

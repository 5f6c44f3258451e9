"""Where packed sequences begin and end, worked out once per forward, on the host and on the device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Boundaries of sequences laid end to end in T tokens. Empty ones are dropped: attention has nothing to do there.

    cu_seqlens: [S+1] int32 on the device. bounds: the same on the host.
    groups: (n, L): n sequences of equal length L, attended in one call as a batch.
    order: [T] rows so that the groups lie one after the other, or None if they already do. back: its inverse.
    """

    cu_seqlens: Tensor
    bounds: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    order: Tensor | None = None
    back: Tensor | None = None
    _cut: dict[int, Packing] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> Packing:
        """From [S+1] boundaries; reads them back to the host if they are on a device."""
        return cls.from_bounds(tuple(cu_seqlens.tolist()), cu_seqlens.device)

    @classmethod
    def from_bounds(cls, bounds: tuple[int, ...], device: torch.device) -> Packing:
        bounds = (bounds[0], *(b for a, b in zip(bounds, bounds[1:], strict=False) if b > a))
        starts = defaultdict(list)
        for a, b in zip(bounds, bounds[1:], strict=False):
            starts[b - a].append(a)
        groups = tuple((len(at), length) for length, at in starts.items())
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        rows = [(torch.tensor(at)[:, None] + torch.arange(length)).reshape(-1) for length, at in starts.items()]
        order = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
        if bool((order == torch.arange(order.shape[0])).all()):
            return cls(cu_seqlens, bounds, groups)
        return cls(cu_seqlens, bounds, groups, order.to(device), torch.argsort(order).to(device))

    @property
    def max_seqlen(self) -> int:
        return max((length for _, length in self.groups), default=0)

    @property
    def position_ids(self) -> Tensor:
        """[T] int64, restarting at 0 in every sequence."""
        cu = self.cu_seqlens.long()
        total = self.bounds[-1]
        return torch.arange(total, device=cu.device) - torch.repeat_interleave(cu[:-1], cu.diff(), output_size=total)

    def segments(self) -> list[tuple[int, int]]:
        """(start, stop) of every sequence that is not empty."""
        return list(zip(self.bounds, self.bounds[1:], strict=False))

    def chunked(self, size: int) -> Packing:
        """Every sequence cut at multiples of `size` from its start: chunked attention is a pack of more sequences."""
        if self.max_seqlen <= size:
            return self
        if size not in self._cut:
            starts = (x for a, b in self.segments() for x in range(a, b, size))
            self._cut[size] = Packing.from_bounds((*starts, self.bounds[-1]), self.cu_seqlens.device)
        return self._cut[size]

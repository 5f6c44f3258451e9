"""Which storages live, birth by birth and death by death, while training code runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Liveness(TorchDispatchMode):
    """Counts the storages that operators make inside it; works on tensors with data and without.

    log: (segment, number of the storage, bytes), positive for a birth and negative for a death, in order.
    segment, past_forward: set by who runs the code: the part of it that an event belongs to, and whether its backward
    has begun.
    What an operator allocates and frees by itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.segment, self.past_forward = "start", False
        self.log: list[tuple[str, int, int]] = []
        self._numbers: dict[int, int] = {}  # address -> number, of those alive
        self._watched: dict[int, weakref.ref] = {}
        self._next = 0

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """These were there before and do not count."""
        for x in tensors:
            self._enter(x, count=False)

    def number(self, x: Tensor) -> int:
        """Of the storage of `x`, which is alive."""
        return self._numbers.get(x.untyped_storage()._cdata, -1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._enter, out)
        return out

    def _enter(self, x: Tensor, count: bool = True) -> Tensor:
        if x.layout != torch.strided:
            return x
        storage = x.untyped_storage()
        address = storage._cdata
        if address not in self._numbers:
            number, self._next = self._next, self._next + 1
            size = storage.nbytes() if count else 0
            self._numbers[address] = number
            self._watched[number] = weakref.ref(storage, lambda _: self._leave(address, number, size))
            if size:
                self.log.append((self.segment, number, size))
        return x

    def _leave(self, address: int, number: int, size: int) -> None:
        self._numbers.pop(address, None)
        self._watched.pop(number, None)
        if size:
            self.log.append((self.segment, number, -size))


def births(log: list[tuple[str, int, int]], gradients: set[int]) -> dict[str, list[tuple[int, int]]]:
    """segment -> (bytes of gradients, bytes of everything else) that live right after each birth in it."""
    out: dict[str, list[tuple[int, int]]] = {}
    kept = other = 0
    for segment, number, size in log:
        if number in gradients:
            kept += size
        else:
            other += size
        if size > 0:
            out.setdefault(segment, []).append((kept, other))
    return out

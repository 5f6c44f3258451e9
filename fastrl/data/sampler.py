"""In which order the rows come: a function of (seed, epoch, offset) and nothing else, so resuming is exact anywhere."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


class IndexSampler:
    """Endless passes over `size` rows, each in an order of its own; state is three numbers.

    >>> sampler = IndexSampler(10, seed=0)
    >>> batch = sampler.take(4)          # 4 row numbers; the last batch of a pass holds what is left

    No row is dropped or repeated within a pass, and no batch spans two passes.
    """

    def __init__(self, size: int, seed: int = 0, shuffle: bool = True):
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}: the dataset is empty")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.epoch, self.offset = 0, 0
        self._order: tuple[int, list[int]] | None = None

    def order(self, epoch: int) -> list[int]:
        """The row numbers of pass `epoch`."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self.size, self.seed, epoch) if self.shuffle else list(range(self.size)))
        return self._order[1]

    def take(self, count: int) -> list[int]:
        """The next `count` row numbers, or fewer at the end of a pass; never none."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        rows = self.order(self.epoch)[self.offset : self.offset + count]
        self.offset += len(rows)
        if self.offset == self.size:
            self.epoch, self.offset = self.epoch + 1, 0
        return rows

    def batches_per_epoch(self, count: int) -> int:
        """How many `take(count)` one pass is, the partial one included."""
        return -(-self.size // count)

    @property
    def progress(self) -> float:
        """Passes done, e.g. 1.25."""
        return self.epoch + self.offset / self.size

    def state_dict(self) -> dict[str, Any]:
        """JSON: what `load_state_dict` needs to go on with the very next row."""
        return {
            "size": self.size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "offset": self.offset,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if it belongs to another dataset or seed."""
        for name in ("size", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved data order has {name}={state[name]}, this run has {getattr(self, name)}; resume with "
                    "the same dataset and seed, or start a new run"
                )
        epoch, offset = state["epoch"], state["offset"]
        if not (epoch >= 0 and 0 <= offset < self.size):
            raise ValueError(f"the saved data order is at epoch {epoch}, offset {offset}, outside {self.size} rows")
        self.epoch, self.offset = epoch, offset


def permutation(size: int, seed: int, epoch: int) -> list[int]:
    """A shuffle of range(size) that depends on (seed, epoch) only: SHA-256 of both seeds torch's CPU generator."""
    digest = hashlib.sha256(f"fastrl data order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(size, generator=generator).tolist()

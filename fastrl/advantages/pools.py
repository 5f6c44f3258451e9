"""Numbers that share their statistics: the scores of a group, of a batch, or of all ranks' batches together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Everywhere = Callable[[Tensor], Tensor]  # [n] of this rank -> [ranks * n] of all, in rank order


def alone(x: Tensor) -> Tensor:
    """The only rank there is."""
    return x


@dataclass(frozen=True)
class Pools:
    """n numbers in `count` pools. What is not `seen` (unscored, masked) takes no part and comes back as 0.

    seen: [n] bool. index: [n] which pool. everywhere: joins equal pools of all ranks.
    """

    seen: Tensor
    index: Tensor
    count: int
    everywhere: Everywhere = alone

    @classmethod
    def of_groups(cls, seen: Tensor, group_ids: Tensor) -> Pools:
        """One pool for each id, on this rank alone: a group is sampled as a whole in one place."""
        ids, index = torch.unique(group_ids, return_inverse=True)
        return cls(seen, index, ids.numel())

    @classmethod
    def of_all(cls, seen: Tensor, everywhere: Everywhere = alone) -> Pools:
        """One pool for the numbers of all ranks."""
        return cls(seen, torch.zeros_like(seen, dtype=torch.long), 1, everywhere)

    def total(self, x: Tensor) -> Tensor:
        """[n] the sum over each number's pool."""
        if self.count == 0:
            return x
        own = x.new_zeros(self.count).index_add(0, self.index, torch.where(self.seen, x, 0.0))
        return self.everywhere(own).view(-1, self.count).sum(0)[self.index]

    def least(self, x: Tensor) -> Tensor:
        """[n] the smallest of each number's pool; inf where nobody is seen."""
        return -self.greatest(-x)

    def greatest(self, x: Tensor) -> Tensor:
        """[n] the largest of each number's pool; -inf where nobody is seen."""
        if self.count == 0:
            return x
        own = x.new_full((self.count,), -torch.inf)
        own = own.scatter_reduce(0, self.index, torch.where(self.seen, x, -torch.inf), "amax")
        return self.everywhere(own).view(-1, self.count).amax(0)[self.index]

    def size(self, like: Tensor) -> Tensor:
        """[n] how many seen numbers the pool has."""
        return self.total(torch.ones_like(like))

    def centred(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """x - mean of the pool, exactly 0 where all of it is equal: the least is taken off before anything is summed.

        weights: [n] >= 0 of a weighted mean; a pool without weight has mean 0 above its least.
        """
        y = torch.where(self.seen, x - self.least(x), 0.0)
        w = torch.ones_like(y) if weights is None else weights
        mass = self.total(w)
        mean = self.total(w * y) / torch.where(mass > 0, mass, 1.0)
        return torch.where(self.seen, y - mean, 0.0)

    def std(self, x: Tensor, unbiased: bool = True, weights: Tensor | None = None) -> Tensor:
        """[n] standard deviation of the pool; 0 where it is undefined.

        unbiased divides by the total weight - 1 (by the number of members - 1 without weights).
        """
        c = self.centred(x, weights)
        w = torch.ones_like(c) if weights is None else weights
        freedom = self.total(w) - (1 if unbiased else 0)
        variance = self.total(w * c.square()) / torch.where(freedom > 0, freedom, 1.0)
        return torch.where(self.seen & (freedom > 0), variance, 0.0).sqrt()

    def std_of_others(self, x: Tensor, unbiased: bool = True) -> Tensor:
        """[n] standard deviation of the pool without the number itself; 0 where it is undefined.

        sum_{j != i} (x_j - mean_{-i})^2 = sum_j c_j^2 - n/(n-1) c_i^2; what is left of it by rounding alone is 0.
        """
        c, n = self.centred(x), self.size(x)
        whole = self.total(c.square())
        rest = whole - n / (n - 1).clamp(min=1) * c.square()
        freedom = n - (2 if unbiased else 1)
        rest = torch.where(self.seen & (freedom > 0) & (rest > 1e-12 * whole), rest, 0.0)
        return (rest / freedom.clamp(min=1)).sqrt()


def z_score(
    x: Tensor,
    pool: Pools,
    *,
    weights: Tensor | None = None,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the pool, in float64; with shift_mean=False the mean is put back afterwards."""
    r = x.double()
    c, std = pool.centred(r, weights), pool.std(r, unbiased, weights)
    scale = (std.square() + eps).sqrt()
    made = torch.where(std > 0, c / torch.where(std > 0, scale, 1.0), 0.0)
    return made if shift_mean else torch.where(pool.seen, made + r - c, 0.0)


def scored(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Pools]:
    """rewards [S] as float64 (near ties such as 1 and 1.00001 keep sign and size), and the groups of the scored."""
    if rewards.shape != group_ids.shape or rewards.dim() != 1:
        raise ValueError(f"rewards is {list(rewards.shape)} but group_ids {list(group_ids.shape)}; expected [S] both")
    r = rewards.detach().double()
    return r, Pools.of_groups(~torch.isnan(r), group_ids)


def given(made: Tensor, rewards: Tensor) -> Tensor:
    """The result in the dtype of the rewards (at least float32), 0 where it is undefined."""
    return torch.where(torch.isnan(made), 0.0, made).to(torch.promote_types(rewards.dtype, torch.float32))

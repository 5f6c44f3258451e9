"""A head that is cut over the ranks of a process group by its vocabulary (tensor parallelism).

Every rank has all rows of hidden and its own words of the weight. The state of a row is joined over the ranks in the
order of their words, from numbers that all ranks have: log-probs, entropies and therefore coefficients are the same
bits everywhere. dW stays where its words are; dH is summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl.ops.rows import State, join


@dataclass(frozen=True)
class Shard:
    """offset: the first word of this rank. vocabulary: words of all ranks. widest: words of the largest shard."""

    group: dist.ProcessGroup
    offset: int
    vocabulary: int
    widest: int

    def join(self, state: State) -> State:
        """The state over all ranks' words from this rank's, [C] each."""
        first = state.first
        numbers = torch.stack(state.tensors()[:-1])
        made = [torch.empty_like(numbers) for _ in range(self.group.size())]
        words = [torch.empty_like(first) for _ in made]
        dist.all_gather(made, numbers.contiguous(), group=self.group)
        dist.all_gather(words, first.contiguous(), group=self.group)
        whole = None
        for part, word in zip(made, words, strict=True):
            own = State(*part.unbind(0), word)
            whole = own if whole is None else join(whole, own)
        return whole

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x


def shard_of(group: dist.ProcessGroup | None, weight: Tensor) -> Shard | None:
    """Where this rank's words stand; asks the other ranks how many they have."""
    if group is None:
        return None
    own = torch.tensor([weight.shape[0]], device=weight.device)
    counts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(counts, own, group=group)
    sizes = [int(c) for c in counts]
    rank = dist.get_rank(group)
    return Shard(group, sum(sizes[:rank]), sum(sizes), max(sizes))

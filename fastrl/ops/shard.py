"""A head that is cut over the ranks of a process group by its vocabulary (tensor parallelism).

Every rank has all rows of hidden and its own words of the weight. The state of a row is joined over the ranks in the
order of their words, from numbers that all ranks have: log-probs, entropies and therefore coefficients are the same
bits everywhere. dW stays where its words are; dH is summed. Messages are O(N): 7 numbers a row from every rank in the
forward, [N, H] in the backward.

The ranks must agree on hidden, targets, options, requires_grad and the row work (compiled or not): nothing is compared,
because comparing would cost more than the call. Where hidden differs, each rank gets an answer to a question that
nobody asked; where the number of rows or the dtype differs, the collective itself fails or waits.
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
        """The state over all ranks' words from this rank's, [C] each: one message."""
        *numbers, first = state.tensors()
        # Gathered as integers of the numbers' size: a word index need not be exact as a float.
        bits = torch.int64 if numbers[0].dtype == torch.float64 else torch.int32
        own = torch.stack([*(x.contiguous().view(bits) for x in numbers), first.to(bits)])
        parts = _gather(own, self.group)
        whole = None
        for part in parts:
            *theirs, word = part.unbind(0)
            state = State(*(x.view(numbers[0].dtype) for x in theirs), word.to(first.dtype))
            whole = state if whole is None else join(whole, state)
        return whole

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the ranks, in place."""
        if x.numel():
            dist.all_reduce(x, group=self.group)
        return x


def shard_of(group: dist.ProcessGroup | None, weight: Tensor) -> Shard | None:
    """Where this rank's words stand; asks the other ranks how many they have.

    Asked anew in every pass: an answer kept from earlier would be stale on some ranks and fresh on others as soon as
    one shard changes its size, and then some would wait for a message that the others never send.
    """
    if group is None:
        return None
    sizes = _gather(torch.tensor([weight.shape[0]], device=weight.device), group).flatten().tolist()
    rank = dist.get_rank(group)
    return Shard(group, sum(sizes[:rank]), sum(sizes), max(sizes))


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] of every rank's x [...], which all have the shape of this rank's."""
    made = x.new_empty((group.size(), *x.shape))
    dist.all_gather(list(made), x, group=group)
    return made

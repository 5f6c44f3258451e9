"""Which tokens of the whole optimizer step a policy loss trains: by entropy, by covariance, or by lot.

Everything here is a function of all tokens of the step, on all ranks, and of no order among them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.tokens import TokenBatch, segment_sum

Everywhere = Callable[[Tensor], Tensor]


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of [n] values, linearly between neighbours (torch.quantile stops at 16 million). NaN of none."""
    n = values.shape[0]
    if n == 0:
        return values.new_full((), torch.nan)
    ordered, place = values.sort().values, q * (n - 1)
    below = min(int(place), n - 1)
    above = min(below + 1, n - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)


def high_entropy(entropy: Tensor, fraction: float, everywhere: Everywhere) -> Tensor:
    """[T] bool: entropy at or above the (1 - fraction)-quantile of all tokens (Wang et al. 2025, arXiv:2506.01939)."""
    own = entropy.detach().double()
    return own >= quantile(everywhere(own), 1 - fraction)


def covariance(advantages: Tensor, logprobs: Tensor, everywhere: Everywhere) -> Tensor:
    """[T] float64 (A - mean A)(log pi - mean log pi), means over all tokens (Cui et al. 2025, 2505.22617, eq. 9)."""
    centred = []
    for own in (advantages.double(), logprobs.detach().double()):
        every = everywhere(own)
        centred.append(own - every.sum() / max(every.shape[0], 1))
    return centred[0] * centred[1]


def count_of(fraction: float, tokens: int) -> int:
    """fraction of the tokens, at least one of any."""
    return min(max(int(fraction * tokens), 1), tokens)


def largest(values: Tensor, fraction: float, everywhere: Everywhere) -> Tensor:
    """[T] bool: the largest `fraction` of all values, at least one; equal values are chosen together."""
    every = everywhere(values)
    if every.shape[0] == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    return values >= every.topk(count_of(fraction, every.shape[0])).values[-1]


def by_lot(candidates: Tensor, count: int, batch: TokenBatch, everywhere: Everywhere) -> Tensor:
    """[T] bool: `count` of the candidates [T] bool, drawn by each token's own lot; equal lots are drawn together."""
    lots = token_lots(batch)
    every = everywhere(lots[candidates])
    if every.shape[0] <= count:
        return candidates
    return candidates & (lots <= every.sort().values[count - 1])


def token_lots(batch: TokenBatch) -> Tensor:
    """[T] int64, evenly spread: a hash of a token's sequence (all of its tokens) and of its place in it.

    The same whatever the order of the sequences, how they are cut into micro-batches and over ranks, and in every run.
    """
    starts = batch.cu_seqlens[:-1].long()
    place = torch.arange(batch.targets.shape[0], device=batch.targets.device) - batch.spread(starts)
    own = _mix(batch.targets.long() + _mix(place))
    return _mix(own + _mix(batch.spread(segment_sum(own, batch))))


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 whose every output bit depends on every input bit (splitmix64, Steele et al. 2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shifted(x: Tensor, n: int) -> Tensor:
    """x >> n with zeros shifted in."""
    return (x >> n) & ((1 << (64 - n)) - 1)

"""What is kept of a row of logits: its running softmax statistics, how two of them join, and what follows from them.

Logits lie transposed, [words, tokens]: the state of C tokens is a handful of [C] vectors, all relative to `top`, the
largest logit so far. The terms equal to top are counted, not summed (each is exactly 1), so that a confident row keeps
its whole tail; and every sum has terms >= 0 only, so that nothing cancels.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.ops.head import Coefs, HeadSpec, Saved, target_dlogit
from fastrl.tokens import TokenStats

FAR = 1000.0  # of a gap to top: its exponential is 0 long before, and 0 * FAR is 0 where 0 * inf is not
NO_WORD = 2**31 - 1


@dataclass
class State:
    """Each [C] in the accumulation dtype, first int32.

    top: largest logit. count: how many equal it. rest: sum of exp(z - top) over the others.
    weighted: sum of exp(z - top) (top - z). squares: sum of exp(z - top)^2 over the others.
    first: lowest word that holds top. at_target: the target's logit (-inf where its word has not come yet).
    """

    top: Tensor
    count: Tensor
    rest: Tensor
    weighted: Tensor
    squares: Tensor
    at_target: Tensor
    first: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))


def new_state(columns: int, like: Tensor) -> State:
    """The state before the first word; `like` gives dtype and device."""
    floor, zero = like.new_full((2, columns), -torch.inf), like.new_zeros((4, columns))
    first = torch.full((columns,), NO_WORD, dtype=torch.int32, device=like.device)
    return State(floor[0], zero[0], zero[1], zero[2], zero[3], floor[1], first)


def join(a: State, b: State) -> State:
    """The statistics of a's words and of b's, to the right of a's (softmax merge, Milakov and Gimelshein 2018)."""
    top = torch.maximum(a.top, b.top)
    base = top.masked_fill(top == -torch.inf, 0.0)  # nothing but -inf so far: any finite base gives exp = 0
    parts = []
    for x in (a, b):
        stays = x.top == top
        gap = (base - x.top).masked_fill(stays, 0.0)
        scale = torch.exp(-gap)
        gap = gap.clamp(max=FAR)
        sunk = torch.where(stays, 0.0, x.count)  # terms that were exactly 1 join the others
        rest = scale * (x.rest + sunk)
        weighted = scale * (x.weighted + gap * (x.count + x.rest))
        squares = scale.square() * (x.squares + sunk)
        parts.append((torch.where(stays, x.count, 0.0), rest, weighted, squares))
    count, rest, weighted, squares = (p + q for p, q in zip(*parts, strict=True))
    first = torch.where(a.top == top, a.first, b.first)
    return State(top, count, rest, weighted, squares, torch.maximum(a.at_target, b.at_target), first)


def finish(state: State, targets: Tensor, vocabulary: int, outputs: tuple) -> tuple[TokenStats, Saved]:
    """State of whole rows -> (TokenStats, Saved), each [C].

    As torch: a logit of +inf leaves no log-prob in its row, nor does a row of nothing but -inf. A target outside
    [0, vocabulary) has none either: NaN.
    """
    undefined = state.top.isinf()
    tail = state.count - 1 + state.rest
    log_sum = torch.log1p(tail).masked_fill(undefined, torch.nan)
    at_target = (state.at_target - state.top).clamp(max=0.0)
    at_target = at_target.masked_fill((targets < 0) | (targets >= vocabulary), torch.nan)
    logprobs = at_target - log_sum
    # Rounding alone could carry a flat row's entropy above log V.
    entropy = (log_sum + state.weighted / (1 + tail)).clamp(max=math.log(vocabulary)) if "entropy" in outputs else None
    squares = torch.log(state.count + state.squares) - 2 * log_sum if "log_sum_sq_probs" in outputs else None
    hit = state.first == targets if "is_argmax" in outputs else None
    lse = state.top + log_sum if "logsumexp" in outputs else None
    return TokenStats(logprobs, entropy, lse, squares, hit), Saved(state.top, log_sum, logprobs, entropy)


@dataclass(frozen=True)
class Law:
    """The gradient of C rows: dL/d(raw) = exp(z - top) (rise - fall (z - top)) off the target, at_target on it, times
    the slope of the softcap. Each [C] in the accumulation dtype; fall is None without entropy."""

    top: Tensor
    rise: Tensor
    fall: Tensor | None
    at_target: Tensor

    def at_rows(self, rows: slice | Tensor) -> Law:
        return Law(*(None if x is None else x[rows] for x in (self.top, self.rise, self.fall, self.at_target)))


def row_law(head: HeadSpec, saved: Saved, coefs: Coefs) -> Law:
    """dz_v = p_v (s - c - h (log p_v + H)), p_v = exp(z_v - top - log_sum), with c, h, s the coefficients of log-prob,
    entropy and logsumexp."""
    slope = head.logit_scale / head.temperature
    inverse = torch.exp(-saved.log_sum) * slope
    rise = torch.zeros_like(inverse)
    if coefs.logsumexp is not None:
        rise = rise + coefs.logsumexp
    if coefs.logprobs is not None:
        rise = rise - coefs.logprobs
    fall = None
    if coefs.entropy is not None:
        rise = rise + coefs.entropy * (saved.log_sum - saved.entropy)
        fall = coefs.entropy * inverse
    # A row without a log-prob (unknown target, undefined softmax) has no gradient either: NaN, never a wrong number.
    rise = torch.where(saved.logprobs.isnan(), torch.nan, rise * inverse)
    return Law(saved.max, rise, fall, target_dlogit(coefs, saved.logprobs, saved.entropy) * slope)

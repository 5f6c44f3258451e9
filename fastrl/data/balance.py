"""Which rank takes which sequences of a step, and in which micro-batches: the same plan on every rank.

Ranks go through their micro-batches in step (they share weights and gradients), so that each round of micro-batches
lasts as long as its costliest. Bins of equal cost make every round even.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fastrl.data.packing import _units, pack
from fastrl.data.prefix import measured
from fastrl.data.types import Sample

FINER = (1, 2, 4, 8)  # parts of groups that are tried: as large as an even share of the tokens, half of it, ...
EVEN = 1.05  # of the time of an even split: not worth another try
GATED = ("silu", "swish", "gelu_pytorch_tanh")  # activations of MLPs with three matrices; others have two


# -- cost --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cost:
    """Multiplications of a forward, each of which a backward repeats alike: a L + b L^2, and the head's share.

    token: of each token of a sequence; row: of each trained token; pair: of each (query, key) that causal attention
    looks at. near, window: the same of layers that see `window` keys at most.
    """

    token: float = 1.0
    row: float = 0.0
    pair: float = 0.0
    near: float = 0.0
    window: int = 0

    def of(self, length: int, rows: int = 0) -> float:
        """Cost of one sequence of `length` tokens, `rows` of them trained."""
        every = length * (length + 1) / 2
        out = max(0, length - self.window)  # queries beyond the window's first keys miss 1, 2, ... keys
        seen = every - out * (out + 1) / 2
        return self.token * length + self.row * rows + self.pair * every + self.near * seen


def cost_of(config: Any) -> Cost:
    """From the shape in a transformers config: linear layers, attention, head. What it does not say counts as usual.

    Of a mixture of experts, those that a token visits. A layer without attention costs its linear part alone.
    """
    text = config.get_text_config()

    def read(*names: str, otherwise: float = 0) -> float:
        found = next((x for n in names if (x := getattr(text, n, None)) is not None), otherwise)
        return sum(found) / len(found) if isinstance(found, (list, tuple)) else found  # one number a layer

    hidden, layers = read("hidden_size", otherwise=1), read("num_hidden_layers", otherwise=1)
    heads = read("num_attention_heads")
    wide = heads * read("head_dim", otherwise=hidden // max(heads, 1))
    keys = wide * read("num_key_value_heads", otherwise=heads) / max(heads, 1)
    visited = read("num_experts_per_tok", "moe_topk")
    inner = read("intermediate_size", otherwise=4 * hidden)
    if visited:
        inner = visited * read("moe_intermediate_size", otherwise=inner) + read("shared_expert_intermediate_size")
    gated = getattr(text, "hidden_act", getattr(text, "hidden_activation", "")) in GATED
    body = hidden * (2 * wide + 2 * keys) + (3 if gated else 2) * hidden * inner
    near = _windowed(text, layers)
    each = 4.0 * wide  # a multiplication and an addition a number, of q k and of p v
    window = read("sliding_window") if near else 0
    return Cost(2.0 * layers * body, 2.0 * hidden * read("vocab_size"), each * (layers - near), each * near, window)


def _windowed(text: Any, layers: int) -> int:
    """Layers that see a window of keys."""
    kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    if not window:
        return 0
    if kinds:
        return sum(kind == "sliding_attention" for kind in kinds)
    return layers if getattr(text, "use_sliding_window", True) else 0


# -- shares ------------------------------------------------------------------------------------------------------------
def share(
    lengths: Sequence[int],
    max_tokens: int,
    unit: int | Sequence[int] = 1,
    ranks: int = 1,
    costs: Sequence[float] | None = None,
) -> list[list[list[int]]]:
    """Micro-batches of every rank: [rank][micro-batch] -> indices into `lengths`, every index exactly once.

    lengths, max_tokens, unit: as `pack`. costs: of each sequence, default its tokens.

    All ranks get the same number of micro-batches, as few as `pack` allows; those that are left empty (each rank takes
    part in every collective) come last. On one rank it is what `pack` gives. The same input gives the same output.
    """
    cut = pack(lengths, max_tokens, unit)
    if ranks == 1:
        return [cut]
    members = _units(len(lengths), unit)
    work = lengths if costs is None else costs
    units = [(sum(lengths[i] for i in u), sum(work[i] for i in u)) for u in members]
    rounds = -(-len(cut) // ranks)
    bins = _best(units, _bins_of(cut, members), max_tokens, (rounds, ranks))
    made: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for start in range(0, len(bins), ranks):  # neighbours in cost make a round; who is behind takes the most
        order = sorted(range(ranks), key=lambda r: (load[r], r))
        for rank, units_in in zip(order, bins[start : start + ranks], strict=False):
            made[rank].append(sorted(chain.from_iterable(members[u] for u in units_in)))
            load[rank] += _cost(units, units_in)
    return [parts + [[]] * (rounds - len(parts)) for parts in made]


def share_samples(
    samples: Sequence[Sample],
    max_tokens: int,
    unit: int = 1,
    ranks: int = 1,
    *,
    share_prompts: bool = False,
    cost: Cost | None = None,
) -> list[list[list[int]]]:
    """`share` of samples by their cost, a prompt that neighbours share counted once (fastrl.data.prefix).

    A group is as large a part as the budget allows, on one rank. On several it is cut into smaller ones, which each
    carry the prompt, where the evener work is worth that. cost: None: tokens.
    """
    cost = cost or Cost()
    if ranks == 1:
        lengths, units = measured(samples, max_tokens, unit, share_prompts)
        return share(lengths, max_tokens, units)

    def tried(limit: int) -> tuple[float, list[list[list[int]]], list[float]]:
        lengths, units = measured(samples, limit, unit, share_prompts, ranks)
        # What a sample adds to the ones before it that hold the same beginning.
        own = [cost.of(len(s), s.num_trained) - cost.of(len(s) - n) for s, n in zip(samples, lengths, strict=True)]
        cut = share(lengths, max_tokens, units, ranks, own)
        return lasting(cut, own), cut, own

    best = tried(max_tokens)
    if share_prompts and unit == 1 and best[0] > EVEN * sum(best[2]) / ranks:
        each = sum(map(len, samples)) // (ranks * len(best[1][0]))
        finer = (tried(min(max_tokens, max(1, each // n))) for n in FINER)
        best = min((best, *finer), key=lambda made: made[0])
    return best[1]


def lasting(cut: list[list[list[int]]], costs: Sequence[float]) -> float:
    """How long the ranks work: each round of micro-batches as long as its costliest."""
    rounds = zip(*cut, strict=True)
    return sum(max(sum(costs[i] for i in part) for part in parts) for parts in rounds)


# -- bins of units, each (tokens, cost) --------------------------------------------------------------------------------
Units = list[tuple[float, float]]


def _best(units: Units, packed: list[list[int]], budget: int, shape: tuple[int, int]) -> list[list[int]]:
    """rounds x ranks bins (fewer where there are fewer units), costliest first, that are done soonest.

    packed: bins that fit for certain.
    """
    rounds, ranks = shape
    count = min(rounds * ranks, len(units))
    ways = [_even(units, count, budget, by=1), _even(units, count, budget, by=0)]
    if count * max((cost for _, cost in units), default=0) > sum(cost for _, cost in units):
        ways.append(_by_rounds(units, budget, shape))
    found = [bins for bins in ways if bins is not None] or [_divided(units, packed, count)]
    for bins in found:
        bins.sort(key=lambda b: (-_cost(units, b), b))
    return min(found, key=lambda bins: sum(_cost(units, b) for b in bins[::ranks]))


def _cost(units: Units, held: list[int]) -> float:
    return sum(units[u][1] for u in held)


def _even(units: Units, count: int, budget: int, by: int) -> list[list[int]] | None:
    """Largest unit first into the emptiest of `count` bins that has room; None where a unit finds none.

    by: 0 evens out tokens, 1 cost.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [budget] * count
    heap = [(0.0, 0, b) for b in range(count)]  # load, units, bin
    for u in sorted(range(len(units)), key=lambda u: (-units[u][by], u)):
        size = units[u][0]
        passed = []
        while heap and heap[0][1] and room[heap[0][2]] < size:  # an empty bin takes even what is too long
            passed.append(heapq.heappop(heap))
        if not heap:
            return None
        load, held, b = heapq.heappop(heap)
        bins[b].append(u)
        room[b] -= size
        for entry in (*passed, (load + units[u][by], held + 1, b)):
            heapq.heappush(heap, entry)
    return bins


def _by_rounds(units: Units, budget: int, shape: tuple[int, int]) -> list[list[int]] | None:
    """Round by round, where a unit costs more than an even bin: while one is worked on, the other ranks do as much.

    None where a unit finds no room in the last round, or a bin stays empty.
    """
    rounds, ranks = shape
    left = sorted(range(len(units)), key=lambda u: (-units[u][1], u))
    bins: list[list[int]] = []
    for k in range(rounds):
        if len(left) < ranks:
            return None
        target = max(_cost(units, left) / ((rounds - k) * ranks), units[left[0]][1])
        heap = [(0.0, b, budget) for b in range(ranks)]
        here: list[list[int]] = [[] for _ in range(ranks)]
        later = []
        for u in left:
            size, cost = units[u]
            fits = (e for e in sorted(heap) if not here[e[1]] or (size <= e[2] and e[0] + cost <= target))
            entry = next(fits, None) if k < rounds - 1 else next((e for e in sorted(heap) if size <= e[2]), None)
            if entry is None:
                later.append(u)
                continue
            heap.remove(entry)
            heap.append((entry[0] + cost, entry[1], entry[2] - size))
            here[entry[1]].append(u)
        bins += here
        left = later
    return None if left or not all(bins) else bins


def _bins_of(cut: list[list[int]], members: list[range]) -> list[list[int]]:
    """The same micro-batches as lists of units."""
    owner = {i: u for u, range_ in enumerate(members) for i in range_}
    return [sorted({owner[i] for i in part}) for part in cut]


def _divided(units: Units, bins: list[list[int]], count: int) -> list[list[int]]:
    """The costliest bin of several units in two even ones, until there are `count` or none can be divided."""
    done = [b for b in bins if len(b) == 1]
    heap = [(-_cost(units, b), b) for b in bins if len(b) > 1]
    heapq.heapify(heap)
    while heap and len(done) + len(heap) < count:
        _, largest = heapq.heappop(heap)
        halves: list[list[int]] = [[], []]
        for u in sorted(largest, key=lambda u: (-units[u][1], u)):
            min(halves, key=lambda b: (_cost(units, b), len(b))).append(u)
        for half in halves:
            if len(half) > 1:
                heapq.heappush(heap, (-_cost(units, half), half))
            else:
                done.append(half)
    return done + [b for _, b in heap]

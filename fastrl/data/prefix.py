"""Shared prompts: neighbours of one group hold the tokens that they begin with once, and what they cost then.

A group is the completions of a prompt (the same group_id) or the sides of a pair (the same row). What its members share
is the longest run of untrained tokens with which all of them begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.data.types import Sample


class Run(NamedTuple):
    """Neighbours [first, first + count) that share their first `shared` tokens; a lone sample shares none."""

    first: int
    count: int
    shared: int


@dataclass(frozen=True)
class Layout:
    """N segments laid end to end in T tokens, some of which see another one's tokens before their own.

    bounds: [N+1] from 0 to T, on the host. parents: [N] the segment that is seen first, -1: none. A parent comes right
    before its children, which lie side by side, and has no parent itself. Positions of a child go on from its parent's
    end. Raises ValueError where that does not hold.
    """

    bounds: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self):
        if len(self.bounds) != len(self.parents) + 1:
            raise ValueError(f"{len(self.bounds)} bounds do not part {len(self.parents)} segments")
        for i, parent in enumerate(self.parents):
            if parent >= 0 and (self.parents[parent] >= 0 or not (i == parent + 1 or self.parents[i - 1] == parent)):
                raise ValueError(f"segment {i} cannot follow {parent}: a root with its children side by side after it")

    @property
    def before(self) -> tuple[int, ...]:
        """[N] tokens that each segment sees before its own."""
        return tuple(0 if p < 0 else self.bounds[p + 1] - self.bounds[p] for p in self.parents)

    def expanded(self) -> tuple[list[int], Tensor, Tensor]:
        """The same without sharing: (bounds', index [T'] into T, back [T] into T'), every child after a copy of its
        parent. A parent is found again in the copy that its first child has."""
        bounds, index, back = [0], [], torch.empty(self.bounds[-1], dtype=torch.long)
        families = set(self.parents)
        for i, parent in enumerate(self.parents):
            if i in families:
                continue
            own = torch.arange(self.bounds[i], self.bounds[i + 1])
            before = torch.arange(*self.bounds[parent : parent + 2]) if parent >= 0 else own[:0]
            start = bounds[-1]
            if parent >= 0 and i == parent + 1:
                back[before] = torch.arange(start, start + len(before))
            back[own] = torch.arange(start + len(before), start + len(before) + len(own))
            index += [before, own]
            bounds.append(start + len(before) + len(own))
        return bounds, torch.cat(index) if index else back, back


# -- who shares --------------------------------------------------------------------------------------------------------
def runs(samples: Sequence[Sample]) -> list[Run]:
    """Neighbours of one group, as long as another one saves tokens: n that share s tokens save (n - 1) s."""
    made: list[Run] = []
    for i, sample in enumerate(samples):
        if made and (group := group_of(sample)) is not None and group == group_of(samples[made[-1].first]):
            first, count, shared = made[-1]
            common = common_prefix(samples[first], sample, shared if count > 1 else len(sample))
            if count * common > (count - 1) * shared:
                made[-1] = Run(first, count + 1, common)
                continue
        made.append(Run(i, 1, 0))
    return made


def group_of(sample: Sample) -> int | None:
    """What tells the samples of one prompt from those of another; None: nothing is known of it."""
    return sample.fields.get("group_id", sample.fields.get("row"))


def common_prefix(a: Sample, b: Sample, most: int) -> int:
    """How many untrained tokens both begin with, at most `most`."""
    most = min(most, untrained(a), untrained(b))
    left, right = a.input_ids[:most], b.input_ids[:most]
    if left == right:
        return most
    return next(i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y)


def untrained(sample: Sample) -> int:
    """Tokens before the first trained one."""
    mask = sample.completion_mask
    return mask.index(True, sample.prompt_length) if True in mask else len(mask)


# -- what it costs -----------------------------------------------------------------------------------------------------
def tokens_of(samples: Sequence[Sample], indices: Sequence[int], share: bool) -> int:
    """Tokens of a micro-batch of these samples, in this order; with `share`, shared ones counted once."""
    chosen = [samples[i] for i in indices]
    saved = sum((run.count - 1) * run.shared for run in runs(chosen)) if share else 0
    return sum(map(len, chosen)) - saved


def measured(
    samples: Sequence[Sample], max_tokens: int, unit: int | Sequence[int] = 1, share: bool = True, ranks: int = 1
) -> tuple[list[int], int | Sequence[int]]:
    """What `pack` is to be told of samples that share prompts: (lengths, units).

    lengths: tokens that each adds to the unit it is in: all of its own in the first that shares, else without the
    shared ones. units: sizes of the parts that stay together: those asked for, or with unit 1 every run, cut where it
    would pass the budget or leave one of the ranks without work; each part then carries the prompt.
    """
    if not share:
        return [len(s) for s in samples], unit
    if unit == 1:
        sizes = _enough([n for run in runs(samples) for n in _cut(samples, run, max_tokens)], ranks)
    else:
        sizes = [unit] * (len(samples) // unit) if isinstance(unit, int) else list(unit)
    lengths, start = [], 0
    for size in sizes:
        members = samples[start : start + size]
        for run in runs(members):
            lengths += [len(s) - (run.shared if k else 0) for k, s in enumerate(members[run.first :][: run.count])]
        start += size
    lengths += [len(s) for s in samples[start:]]  # units that do not fit the samples are for `pack` to refuse
    return lengths, unit if isinstance(unit, int) and unit != 1 else sizes


def _cut(samples: Sequence[Sample], run: Run, max_tokens: int) -> list[int]:
    """Sizes of neighbouring parts of a run, each within the budget where one sample is."""
    sizes, total = [0], run.shared
    for sample in samples[run.first : run.first + run.count]:
        own = len(sample) - run.shared
        if sizes[-1] and total + own > max_tokens:
            sizes.append(0)
            total = run.shared
        sizes[-1] += 1
        total += own
    return sizes


def _enough(sizes: list[int], parts: int) -> list[int]:
    """The largest halved until there are so many."""
    while len(sizes) < parts and (most := max(sizes, default=0)) > 1:
        at = sizes.index(most)
        sizes[at : at + 1] = [most - most // 2, most // 2]
    return sizes


# -- where the tokens go -----------------------------------------------------------------------------------------------
def lay_out(samples: Sequence[Sample]) -> tuple[Layout, Tensor]:
    """The segments of a micro-batch, and [sum of lengths] where each token of each sample stands among their T.

    A run is its prompt and then what each member has of its own (which may be nothing); a lone sample is one segment.
    """
    bounds, parents, places = [0], [], []

    def add(length: int, parent: int) -> Tensor:
        start = bounds[-1]
        bounds.append(start + length)
        parents.append(parent)
        return torch.arange(start, start + length)

    for first, count, shared in runs(samples):
        prompt = len(parents)
        before = add(shared, -1) if count > 1 else None
        for sample in samples[first : first + count]:
            places += [add(len(sample), -1)] if before is None else [before, add(len(sample) - shared, prompt)]
    return Layout(tuple(bounds), tuple(parents)), torch.cat(places)

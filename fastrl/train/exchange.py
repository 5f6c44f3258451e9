"""Sampling and scoring on several ranks: each makes its share, every rank gets all of it in order of the prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.rewards import RewardError, Scores
from fastrl.rollout import Completion, Sampler, Sampling
from fastrl.train.parallel import World
from fastrl.train.together import together, whole


def share_of(count: int, world: World) -> tuple[int, int]:
    """[start, stop) of `count` things that this rank takes: even shares, in rank order."""
    return count * world.rank // world.size, count * (world.rank + 1) // world.size


@contextlib.contextmanager
def emptied(device: torch.device) -> Iterator[None]:
    """What the phase before has cached is free for this one, and what this one has cached for the next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- completions -------------------------------------------------------------------------------------------------------
@dataclass
class SharedSampler:
    """A sampler whose prompts are split over all ranks (also those that share a sequence); each gets every completion.

    model: what it samples from, whose weights may be split: every rank holds them whole while it samples.
    """

    sampler: Sampler
    model: nn.Module
    world: World
    reshard_after_forward: bool = True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int | Sequence[int] = 1,
        seed: int | None = None,
        first: int = 0,
    ) -> list[list[Completion]]:
        """As `Sampler`. On several ranks the draws need a seed that all of them know."""
        with emptied(self.world.device):
            if self.world.size == 1:
                return self.sampler.generate(prompts, sampling, n, seed, first)
            if seed is None and not sampling.greedy:
                raise ValueError("sampling on several ranks needs a seed: their random states are not the same")
            start, stop = share_of(len(prompts), self.world)
            counts = [n] * len(prompts) if isinstance(n, int) else list(n)
            ask = (prompts[start:stop], sampling, counts[start:stop], seed, first + start)
            with whole(self.model, self.reshard_after_forward):
                mine = together(self.world, lambda: self.sampler.generate(*ask), (ValueError,))
        flat = iter(everyones([c for group in mine for c in group], self.world))
        return [[next(flat) for _ in range(count)] for count in counts]


def shared_sampler(sampler: Sampler, model: nn.Module, setting: Any) -> SharedSampler:
    """On the ranks of a stage's setting."""
    return SharedSampler(sampler, model, setting.world, setting.config.reshard_after_forward)


def everyones(mine: list[Completion], world: World) -> list[Completion]:
    """The completions of every rank, in rank order."""
    told = world.gather([[len(c.ids), c.truncated, c.logprobs is not None] for c in mine])
    facts = [fact for part in told for fact in part]
    ids = torch.cat(world.parts(torch.tensor([t for c in mine for t in c.ids], dtype=torch.int64))).tolist()
    logprobs = [x for c in mine for x in c.logprobs or ()]
    if any(known for *_, known in facts):
        logprobs = torch.cat(world.parts(torch.tensor(logprobs, dtype=torch.float64))).tolist()
    out, at, seen = [], 0, 0
    for length, truncated, known in facts:
        out.append(Completion(ids[at : at + length], truncated, logprobs[seen : seen + length] if known else None))
        at, seen = at + length, seen + length * known
    return out


# -- rewards -----------------------------------------------------------------------------------------------------------
@dataclass
class SharedScorer:
    """A scorer that is asked once for each completion, on one rank: reward functions see whole groups, not whole steps.

    scorer: has `score` and `functions`, as `fastrl.rewards.Scorer`.
    """

    scorer: Any
    world: World

    def score(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> Scores:
        """As `Scorer`. The completions of one prompt are neighbours, and their prompts one and the same object."""
        if self.world.size == 1:
            return self.scorer.score(prompts, completions)
        starts = [i for i, p in enumerate(prompts) if i == 0 or p is not prompts[i - 1]]
        start, stop = share_of(len(starts), self.world)
        bounds = [*starts, len(prompts)]
        mine = slice(bounds[start], bounds[stop])
        table = together(self.world, lambda: self._table(prompts[mine], completions[mine]), (RewardError,))
        table = torch.cat(self.world.parts(table))
        return Scores(table[:, 0], {name: table[:, 1 + i] for i, name in enumerate(self._names)})

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(f.name for f in self.scorer.functions))

    def _table(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> Tensor:
        """[N, 1 + functions] float64: total, then what each function gave."""
        if not prompts:
            return torch.zeros((0, 1 + len(self._names)), dtype=torch.float64)
        scores = self.scorer.score(prompts, completions)
        return torch.stack([scores.total, *scores.by_function.values()], 1)

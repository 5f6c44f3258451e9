"""What the trainer asks of whatever samples for it: token ids in, the exact token ids out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How to draw a completion.

    temperature 0 is greedy. `top_p < 1` and `top_k > 0` cut the distribution: the log-probs of the model are then not
    those the tokens were drawn with, and every policy-gradient ratio is off by log(kept mass). They are refused unless
    `allow_cut` says that nothing will be trained on these samples.

    logprobs: ask for the log-prob of every drawn token under softmax(logits / temperature), the distribution it was
    drawn from; greedy and cut draws have none. It costs one more pass over the logits of a step.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    allow_cut: bool = False
    logprobs: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and >= 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps every token), got {self.top_k}")
        if (self.top_p < 1 or self.top_k > 0) and not self.allow_cut:
            raise ValueError(
                f"top_p={self.top_p:g}, top_k={self.top_k} cut the distribution and bias every ratio in training; use "
                "top_p=1, top_k=0, or allow_cut=True for samples that are only looked at"
            )
        if self.logprobs and (self.greedy or self.top_p < 1 or self.top_k > 0):
            raise ValueError(
                f"logprobs=True with temperature={self.temperature:g}, top_p={self.top_p:g}, top_k={self.top_k}: only "
                "draws from the whole distribution have log-probs; use temperature > 0, top_p=1, top_k=0"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass
class Completion:
    """The ids after the prompt, the end-of-sequence token included; `truncated` = the length limit came first.

    logprobs: one for each id, as the sampler drew it (at its temperature); None: it was not asked, or does not say.
    """

    ids: list[int]
    truncated: bool
    logprobs: list[float] | None = None


class Sampler(Protocol):
    """Anything that completes prompts."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int | Sequence[int] = 1,
        seed: int | None = None,
        first: int = 0,
    ) -> list[list[Completion]]:
        """`n` completions (or n[i]) of each prompt, in the order of the prompts. Same seed, same completions.

        first: the number of prompts[0] among those that are drawn under this seed. Completion k of prompt i is drawn
        from the stream `seed_of(seed, first + i, k)`, whoever else is drawn with it.
        """
        ...


def seed_of(*key: int | str) -> int:
    """A seed in [0, 2^63) for whatever goes by this key: SHA-256, so that keys that are alike share nothing."""
    digest = hashlib.sha256(" ".join(["fastrl draws", *map(str, key)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

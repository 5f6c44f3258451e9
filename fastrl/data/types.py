"""The records that data, rollout and train hand to each other: rows of a dataset, prompts, token-exact samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SHOWN = 20  # an error or report lists at most this many rows


class DataError(ValueError):
    """The data is wrong: the message names the file and line (or the row), what came, what was expected, the fix."""


@dataclass
class Sample:
    """One sequence, token by token as it was tokenised or sampled; nothing is ever decoded and encoded again.

    input_ids        prompt and completion, one after the other
    prompt_length    tokens [0, prompt_length) are context and never trained
    completion_mask  one bool per token, True = trained; by position, so pad == eos does no harm. Token 0 has nothing
                     before it to be predicted from and is always False
    fields           what else belongs to the sequence: a number ("advantage", "reward", "label", "group_id") or a
                     list with one number per *trained* token ("advantages", "old_logprobs", "ref_logprobs")
    """

    input_ids: list[int]
    prompt_length: int
    completion_mask: list[bool]
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        n, m = len(self.input_ids), len(self.completion_mask)
        if n != m:
            raise ValueError(f"input_ids has {n} tokens but completion_mask {m}; give one bool per token")
        if not 0 <= self.prompt_length <= n:
            raise ValueError(
                f"prompt_length is {self.prompt_length}, must be between 0 and the {n} tokens of input_ids"
            )
        if any(self.completion_mask[: max(1, self.prompt_length)]):
            at = self.completion_mask.index(True)
            raise ValueError(
                f"completion_mask is True at token {at}, inside the context (prompt_length {self.prompt_length}; token "
                "0 is always context); set it False"
            )

    @classmethod
    def from_parts(cls, prompt: Sequence[int], completion: Sequence[int], **fields: Any) -> Sample:
        """Prompt ids and the completion ids that were sampled (or encoded) after them, all of the latter trained."""
        ids, k = [*prompt, *completion], len(prompt)
        mask = [False] * k + [True] * len(completion)
        if ids:
            mask[0] = False
        return cls(ids, k, mask, fields)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """Trained tokens."""
        return sum(self.completion_mask)


@dataclass
class Prompt:
    """A prompt to sample from: its ids, the text or messages they came from, the row's other columns, its origin."""

    ids: list[int]
    source: str | list[dict]
    columns: dict[str, Any]
    where: str


@dataclass
class Dropped:
    """A row that was left out, and why. `where` is file:line or the row's number."""

    where: str
    reason: str
    length: int


@dataclass
class Report:
    """What tokenising did to the rows: nothing is dropped or cut without standing here."""

    total: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    truncated: int = 0
    moved_boundaries: int = 0

    @property
    def dropped_fraction(self) -> float:
        return len(self.dropped) / max(1, self.total)

    def lines(self) -> list[str]:
        """Human-readable notes, empty if nothing happened."""
        notes = []
        if self.dropped:
            notes.append(f"dropped {len(self.dropped)} of {self.total} rows: {listed(self.dropped)}")
        if self.truncated:
            notes.append(f"cut the end of {self.truncated} of {self.total} sequences (truncation='keep_start')")
        if self.moved_boundaries:
            notes.append(
                f"in {self.moved_boundaries} of {self.total} rows prompt and completion merge into one token at their "
                "border; the completion starts where the tokens diverge. End prompts at a token border to avoid it"
            )
        return notes


def listed(dropped: list[Dropped]) -> str:
    """The first rows, with their reasons."""
    shown = "; ".join(f"{d.where} ({d.reason})" for d in dropped[:SHOWN])
    return shown + (f"; and {len(dropped) - SHOWN} more" if len(dropped) > SHOWN else "")


def excerpt(value: Any, size: int = 60) -> str:
    """`value` on one line, shortened, safe to print in an error."""
    text = repr(value)
    return text if len(text) <= size else text[: size - 3] + "..."

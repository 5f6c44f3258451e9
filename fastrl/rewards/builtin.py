"""Reward functions that can be asked for by name. Each is a plain function of the batch, as a user's own would be.

    exact_answer                     1 if the completion is the answer and nothing else
    accuracy (accuracy_reward)       1 if the answer it states (\\boxed{}, "####", "answer:", last number) is right
    think_format (think_format_reward)   1 if it is <think>...</think> and then something
    length:max_length=N              1 for an empty completion falling to 0 at N tokens
    soft_overlong:max_length=N,buffer=B  0, falling from 0 to -1 over the last B tokens before N (DAPO eq. 13)

The answer is read from the column answer, solution or ground_truth; a row where it is null is not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastrl.rewards.answers import final_answer, same_answer

ANSWER_COLUMNS = ("answer", "solution", "ground_truth")


def text_of(completion: str | Sequence[dict]) -> str:
    """A completion's text, whether it is a string or messages."""
    if isinstance(completion, str):
        return completion
    return "".join(m["content"] for m in completion if isinstance(m.get("content"), str))


def _answers(columns: dict[str, Any], count: int) -> list[str | None]:
    name = next((c for c in ANSWER_COLUMNS if c in columns), None)
    if name is None:
        raise ValueError(f"the dataset needs a column {', '.join(ANSWER_COLUMNS)}; it has {sorted(columns) or 'none'}")
    values = columns[name]
    if len(values) != count:
        raise ValueError(f"column {name} has {len(values)} values for {count} completions")
    return [None if v is None else str(v) for v in values]


def exact_answer(completions: list, **columns: Any) -> list[float | None]:
    """1.0 where the completion equals the answer, surrounding space apart; else 0.0."""
    pairs = zip(completions, _answers(columns, len(completions)), strict=True)
    return [None if truth is None else float(text_of(c).strip() == truth.strip()) for c, truth in pairs]


def accuracy(completions: list, **columns: Any) -> list[float | None]:
    """1.0 where the stated final answer equals the final answer in the column (numbers as numbers); else 0.0."""
    out: list[float | None] = []
    for completion, truth in zip(completions, _answers(columns, len(completions)), strict=True):
        if truth is None:
            out.append(None)
            continue
        given = final_answer(text_of(completion))
        wanted = final_answer(truth) if "\\boxed" in truth or "####" in truth else truth
        out.append(float(given is not None and wanted is not None and same_answer(given, wanted)))
    return out


def think_format(completions: list, **columns: Any) -> list[float]:
    """1.0 for <think>, thoughts without another <think>, </think>, and anything after (TRL's rule); else 0.0."""
    texts = [text_of(c) for c in completions]
    return [float(t.startswith("<think>") and t.count("<think>") == 1 and "</think>" in t) for t in texts]


def length(max_length: int) -> Callable:
    """Brevity: 1 - tokens / max_length, not below 0."""
    _positive("length", max_length=max_length)

    def length_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [max(0.0, 1.0 - len(ids) / max_length) for ids in completion_ids]

    return length_reward


def soft_overlong(max_length: int, buffer: int) -> Callable:
    """Soft overlong punishment (Yu et al. 2025, DAPO, eq. 13): 0 to max_length - buffer, -1 from max_length."""
    _positive("soft_overlong", max_length=max_length, buffer=buffer)
    if buffer > max_length:
        raise ValueError(f"soft_overlong: buffer={buffer} is more than max_length={max_length}")

    def soft_overlong_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [min(0.0, max(-1.0, (max_length - buffer - len(ids)) / buffer)) for ids in completion_ids]

    return soft_overlong_reward


def _positive(name: str, **numbers: int) -> None:
    for key, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: {key} must be at least 1, got {value}")


PLAIN = {
    "exact_answer": exact_answer,
    "accuracy": accuracy,
    "accuracy_reward": accuracy,
    "think_format": think_format,
    "think_format_reward": think_format,
}
WITH_NUMBERS = {"length": length, "soft_overlong": soft_overlong}

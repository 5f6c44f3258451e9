"""Calling reward functions on completions, and refusing what they may not return.

A function gets prompts, completions, completion_ids and every column of the dataset, as many as its parameters name,
each as a list with one entry per completion. It returns one float per completion, or None where it does not apply.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SEARCH_SECONDS = 5.0  # how long to look for the sample on which a function raised


class RewardError(ValueError):
    """A reward function is missing or did what it may not: the message names it and the sample."""


@dataclass
class RewardFunction:
    """name: of its metrics. one_by_one: verl's compute_score, called with one completion at a time."""

    name: str
    call: Callable
    one_by_one: bool = False
    is_async: bool = field(init=False)

    def __post_init__(self):
        call = self.call
        self.is_async = any(map(inspect.iscoroutinefunction, (call, type(call).__call__)))

    def arguments(self, batch: dict[str, list]) -> dict[str, list]:
        """What of the batch the function takes, copied: it may do with its arguments what it likes."""
        parameters = inspect.signature(self.call).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return copy.deepcopy(batch)
        named = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
        missing = [p.name for p in named if p.default is p.empty and p.name not in batch]
        if missing:
            raise RewardError(
                f"reward function {self.name} needs {', '.join(missing)}, but the dataset has columns "
                f"{sorted(set(batch) - {'prompts', 'completions', 'completion_ids'})}"
            )
        return {p.name: copy.deepcopy(batch[p.name]) for p in named if p.name in batch}


@dataclass
class Scores:
    """total: [N] float64 weighted sum over the functions that applied, NaN where none did. by_function: [N] each, NaN
    where it did not apply."""

    total: Tensor
    by_function: dict[str, Tensor]


class Scorer:
    """Scores completions with one or more functions.

    Args:
        functions: see `load_rewards`.
        weights: one number each; None means 1 each.
        tokenizer: decodes completions (special tokens left out).
    """

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] | None, tokenizer: Any):
        if not functions:
            raise RewardError("no reward function was given")
        self.functions = list(functions)
        self.weights = [1.0] * len(self.functions) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(self.functions) or not all(map(math.isfinite, self.weights)):
            raise RewardError(f"weights must be {len(self.functions)} finite numbers, got {list(weights)}")
        self.tokenizer = tokenizer
        self._loop: asyncio.AbstractEventLoop | None = None

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Scores:
        """Rewards of N completions.

        Args:
            prompts: N `Prompt`s, the prompt of each completion: `.source` and `.columns` are read.
            completions: N `Completion`s: `.ids` are read.

        Raises RewardError: a function raises, or returns the wrong number of rewards, NaN, an infinity or no number.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions; give each its prompt")
        ids = [list(c.ids) for c in completions]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        chat = [not isinstance(p.source, str) for p in prompts]
        columns = dict.fromkeys(name for p in prompts for name in p.columns)
        batch = {name: [p.columns.get(name) for p in prompts] for name in columns} | {
            "prompts": [p.source for p in prompts],
            "completions": [
                [{"role": "assistant", "content": t}] if c else t for t, c in zip(texts, chat, strict=True)
            ],
            "completion_ids": ids,
        }
        return self.score_batch(batch)

    def score_batch(self, batch: dict[str, list]) -> Scores:
        """As `score`, from the lists that reward functions get: prompts, completions, completion_ids, columns."""
        pending = [self._start(f, batch) for f in self.functions]
        by_function = {}
        for function, result in zip(self.functions, pending, strict=True):
            values = result.result() if isinstance(result, Future) else result
            by_function[function.name] = torch.tensor(checked(function, values, batch), dtype=torch.float64)
        stacked = torch.stack(list(by_function.values()))  # [functions, N]
        applied = ~stacked.isnan()
        weighted = stacked.nan_to_num(0.0) * torch.tensor(self.weights, dtype=torch.float64)[:, None]
        total = weighted.sum(0).masked_fill(~applied.any(0), torch.nan)
        return Scores(total, by_function)

    def _start(self, function: RewardFunction, batch: dict[str, list]) -> Any:
        """The values of a plain function; the future of an async one, so that several wait at the same time."""
        if function.one_by_one:
            return [_verl_score(function, batch, i) for i in range(len(batch["completions"]))]
        arguments = function.arguments(batch)
        if function.is_async:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="fastrl-rewards", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(_awaited(function, arguments, batch), self._loop)
        try:
            return function.call(**arguments)
        except (Exception, SystemExit) as error:
            raise _raised(function, error, batch, _culprit(function, batch)) from error


async def _awaited(function: RewardFunction, arguments: dict, batch: dict[str, list]) -> Any:
    try:
        return await function.call(**arguments)
    except (Exception, SystemExit) as error:
        raise _raised(function, error, batch, None) from error


def _verl_score(function: RewardFunction, batch: dict[str, list], i: int) -> Any:
    """verl's compute_score(data_source, solution_str, ground_truth, extra_info) -> float or {"score": float}."""
    row = {name: values[i] for name, values in batch.items()}
    completion, reward_model = row["completions"], row.get("reward_model") or {}
    text = completion if isinstance(completion, str) else completion[0]["content"]
    truth = row.get("ground_truth", reward_model.get("ground_truth"))
    one = {**row, "solution_str": text, "ground_truth": truth, "data_source": row.get("data_source")}
    one.setdefault("extra_info", None)
    arguments = function.arguments(one)
    try:
        value = function.call(**arguments)
    except (Exception, SystemExit) as error:
        raise _raised(function, error, batch, i) from error
    return value.get("score", value) if isinstance(value, dict) else value


# -- what may come back --------------------------------------------------------------------------------------------
def checked(function: RewardFunction, values: Any, batch: dict[str, list]) -> list[float]:
    """One float per completion, NaN for None. Raises RewardError for all else."""
    count = len(batch["completions"])
    if hasattr(values, "tolist"):  # tensors and arrays
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"reward function {function.name} returned {_short(values)}, expected a list of {count} floats"
        )
    if len(values) != count:
        raise RewardError(
            f"reward function {function.name} returned {len(values)} rewards for {count} completions; return one for "
            f"each, None where it does not apply. First completion: {_sample(batch, 0)}"
        )
    out = []
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, (int, float)) and hasattr(value, "item"):
            value = value.item()
        if value is None:
            out.append(math.nan)
        elif isinstance(value, (int, float)) and math.isfinite(value):
            out.append(float(value))
        else:
            raise RewardError(
                f"reward function {function.name} returned {_short(value)} for {_sample(batch, i)}; return a finite "
                "number, or None where it does not apply"
            )
    return out


def _raised(function: RewardFunction, error: BaseException, batch: dict[str, list], index: int | None) -> RewardError:
    if isinstance(error, RewardError):
        return error
    at = _sample(batch, index) if index is not None else f"a batch that begins with {_sample(batch, 0)}"
    return RewardError(f"reward function {function.name} raised {type(error).__name__}: {error} on {at}")


def _culprit(function: RewardFunction, batch: dict[str, list]) -> int | None:
    """The first sample on which the function raises by itself; None if there is none, or the search takes too long."""
    began = time.monotonic()
    for i in range(len(batch["completions"])):
        if time.monotonic() - began > SEARCH_SECONDS:
            return None
        try:
            function.call(**function.arguments({name: [values[i]] for name, values in batch.items()}))
        except (Exception, SystemExit):
            return i
    return None


def _sample(batch: dict[str, list], i: int) -> str:
    if not batch["completions"]:
        return "an empty batch"
    return f"sample {i} (prompt {_short(batch['prompts'][i])}, completion {_short(batch['completions'][i])})"


def _short(value: Any, size: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= size else text[: size - 3] + "..."

"""Rows for heads that score: pairs for reward models, labelled steps for process reward models, as TRL tokenises them.

Such a head is read at a token and not before it: completion_mask is True at the tokens whose own hidden state is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastrl.data.load import Rows
from fastrl.data.tokenize import Limits, encode_dpo, encode_sft
from fastrl.data.types import SHOWN, DataError, Dropped, Report, Sample, excerpt, listed

STEP_COLUMNS = ("prompt", "completions", "labels")
PAIR_COLUMNS = {  # what a preference dataset may say of a pair beside its answers, and what that must be
    "margin": ("a finite number", lambda x: _is_number(x) and math.isfinite(x)),
    "preference": ("a number between 0 and 1", lambda x: _is_number(x) and 0 <= x <= 1),
    "tie": ("true or false", lambda x: isinstance(x, bool)),
}


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


# -- reward models -----------------------------------------------------------------------------------------------------
def encode_reward(
    rows: Rows | Sequence[dict], tokenizer: Any, limits: Limits | None = None, pad_token_id: int | None = None
) -> tuple[list[Sample], Report]:
    """Samples of a preference dataset, interleaved chosen, rejected; prompt and answer tokenised together.

    Each is read at its last token that is not pad_token_id (where transformers reads its score).
    Sample.fields: "length" (tokens of the answer), and of PAIR_COLUMNS those that the dataset has: "margin" (by how
    much the chosen answer is better), "preference" (how surely it is), "tie" (neither is).
    Raises DataError as encode_dpo, and for a column that is wrong or given for some pairs only.
    """
    table = rows if isinstance(rows, Rows) else Rows(rows)
    samples, report = encode_dpo(table, tokenizer, limits)
    made = []
    for sample in samples:
        i = sample.fields["row"]
        fields = {"row": i, "length": float(sample.num_trained)}
        for name, (wanted, fits) in PAIR_COLUMNS.items():
            value = table[i].get(name)
            if value is not None and not fits(value):
                raise DataError(f"{table.where(i)}: {name} is {excerpt(value)}, expected {wanted}")
            if value is not None:
                fields[name] = float(value)
        made.append(read_at(sample.input_ids, [last_token(sample.input_ids, pad_token_id)], fields))
    for name in PAIR_COLUMNS:
        given = sum(name in s.fields for s in made)
        if 0 < given < len(made):
            lacking = f"{(len(made) - given) // 2} of {len(made) // 2} pairs have no {name}"
            raise DataError(f"{lacking}; give all or none")
    return made, report


ANSWER_COLUMNS = {  # column -> (field of the sample, what it must be, whether it is)
    "label": ("label", *PAIR_COLUMNS["tie"]),
    "score": ("reward", *PAIR_COLUMNS["margin"]),
}


def encode_answers(
    rows: Rows | Sequence[dict],
    tokenizer: Any,
    limits: Limits | None = None,
    pad_token_id: int | None = None,
    column: str = "label",
) -> tuple[list[Sample], Report]:
    """Samples of single answers (prompt, completion) with a `label` (true: it is right) or a `score`, read as a pair's.

    Sample.fields: "label" or "reward". Raises DataError as encode_sft, and for a column that is missing or wrong.
    """
    table = rows if isinstance(rows, Rows) else Rows(rows)
    samples, report = encode_sft(table, tokenizer, limits)
    field, wanted, fits = ANSWER_COLUMNS[column]
    made = []
    for sample in samples:
        i = sample.fields["row"]
        value = table[i].get(column)
        if not fits(value):
            raise DataError(f"{table.where(i)}: {column} is {excerpt(value)}, expected {wanted}")
        at = last_token(sample.input_ids, pad_token_id)
        made.append(read_at(sample.input_ids, [at], {"row": i, field: value if field == "label" else float(value)}))
    return made, report


def last_token(ids: Sequence[int], pad_token_id: int | None) -> int:
    """Position of the last token that is not padding; token 0 where all are."""
    return next((t for t in range(len(ids) - 1, 0, -1) if ids[t] != pad_token_id), 0)


def read_at(ids: Sequence[int], places: Sequence[int], fields: dict[str, Any]) -> Sample:
    """A sample whose head is read at these positions. Raises DataError for position 0: nothing would be before it."""
    if 0 in places:
        raise DataError(f"the sequence {excerpt(list(ids))} would be scored at its first token; give it a prompt")
    wanted = set(places)
    mask = [t in wanted for t in range(len(ids))]
    return Sample(list(ids), min(wanted, default=len(ids)), mask, fields)


# -- process reward models ---------------------------------------------------------------------------------------------
def encode_steps(
    rows: Rows | Sequence[dict],
    tokenizer: Any,
    limits: Limits | None = None,
    *,
    step_separator: str = "\n",
    last_step_only: bool = False,
    max_prompt_length: int | None = None,
) -> tuple[list[Sample], Report]:
    """Samples of a dataset with prompt, completions (a list of steps) and labels (one a step: bool, or in [0, 1]).

    Each step is tokenised by itself and followed by the separator; the head is read at the separator's last token.
    Sample.fields: "step_label", one number for each such token.

    Args:
        last_step_only: train the last step of each row alone.
        max_prompt_length: keep the last tokens of a longer prompt.
        limits: as encode_sft; "keep_start" cuts the end, and the steps in it.
    Raises DataError: unknown columns, a row of another sort, a separator without a token, too many rows dropped.
    """
    limits = limits or Limits()
    table = rows if isinstance(rows, Rows) else Rows(rows)
    check_steps(table)
    separator = tokenizer(step_separator, add_special_tokens=False)["input_ids"]
    if not separator:
        raise DataError(f"step_separator {step_separator!r} has no token, so no step would end; give another")
    report, samples = Report(total=len(table)), []
    for i in range(len(table)):
        ids, ends = _steps(table[i], tokenizer, separator, max_prompt_length)
        labels = dict(zip(ends, map(float, table[i]["labels"]), strict=True))
        if last_step_only:
            labels = {ends[-1]: labels[ends[-1]]}
        samples += _fit(ids, labels, {"row": i}, table.where(i), limits, report)
    return samples, _accept(report, limits, samples)


def _steps(row: dict, tokenizer: Any, separator: list[int], longest_prompt: int | None) -> tuple[list[int], list[int]]:
    """Token ids of a row, and the position of each step's last separator token."""
    texts = [row["prompt"], *row["completions"]]
    prompt, *steps = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    ids = ([] if bos is None else [bos]) + prompt
    ids = ids if longest_prompt is None else ids[-longest_prompt:]
    ends = []
    for step in steps:
        ids = [*ids, *step, *separator]
        ends.append(len(ids) - 1)
    return ids, ends


def check_steps(table: Rows) -> None:
    """Raises DataError listing the rows that are not a prompt with labelled steps."""
    if not len(table):
        raise DataError(f"{table.name} is empty; give at least one row")
    missing = [c for c in STEP_COLUMNS if c not in table[0]]
    if missing:
        raise DataError(
            f"{table.name} has columns {sorted(table[0])}; prm needs (prompt, completions, labels): a string, a list "
            "of steps and a list with one label a step; rename its columns"
        )
    problems = [f"{table.where(i)}: {p}" for i in range(len(table)) if (p := _problem(table[i]))]
    if problems:
        raise DataError(f"{len(problems)} rows are no labelled steps:\n" + "\n".join(problems[:SHOWN]))


def _problem(row: dict) -> str | None:
    steps, labels = row["completions"], row["labels"]
    if not isinstance(row["prompt"], str):
        return f"column 'prompt' is {excerpt(row['prompt'])}, expected a string"
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        return f"column 'completions' is {excerpt(steps)}, expected a list of one string a step"
    if not isinstance(labels, list) or len(labels) != len(steps):
        return f"column 'labels' is {excerpt(labels)}, expected a list of {len(steps)} labels, one a step"
    for x in labels:
        if not isinstance(x, (bool, int, float)) or not 0 <= x <= 1:
            return f"label {excerpt(x)} is neither true or false nor a number between 0 and 1"
    return None


def _fit(ids: list[int], labels: dict[int, float], fields: dict, where: str, limits: Limits, report: Report) -> list:
    """The row's sample within the limits: as it is, cut, or none."""
    longest = limits.longest
    if longest is not None and len(ids) > longest:
        kept = {t: y for t, y in labels.items() if t < longest}
        if limits.truncation == "drop" or not kept:
            report.dropped.append(Dropped(where, f"{len(ids)} tokens, limit {longest}", len(ids)))
            return []
        report.truncated += 1
        ids, labels = ids[:longest], kept
    return [read_at(ids, list(labels), {**fields, "step_label": list(labels.values())})]


def _accept(report: Report, limits: Limits, kept: Sequence) -> Report:
    if not kept or report.dropped_fraction > limits.max_dropped_fraction:
        raise DataError(
            f"{len(report.dropped)} of {report.total} rows do not fit (at most {limits.max_dropped_fraction:.0%} may "
            f"be dropped); raise max_length or shorten the data: {listed(report.dropped)}"
        )
    return report

"""Which columns a dataset has, and what each stage needs: TRL's names, strings or conversations, detected.

    kind                  columns                          stages
    text                  text                             sft
    messages              messages                         sft
    prompt_completion     prompt, completion               sft, grpo (the prompts)
    prompt                prompt (+ any)                   grpo
    preference            (prompt,) chosen, rejected       dpo, kto (one answer desirable, one not)
    unpaired_preference   prompt, completion, label        kto

Each of these columns is a string or a list of {"role", "content"} messages. Other columns go to the reward functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastrl.data.types import SHOWN, DataError, excerpt

EXPECTED = {
    "sft": ("text", "messages", "prompt, completion"),
    "dpo": ("prompt, chosen, rejected", "chosen, rejected"),
    "grpo": ("prompt",),
    "kto": ("prompt, completion, label", "prompt, chosen, rejected"),
}
WRITTEN = ("text", "messages", "prompt", "completion", "chosen", "rejected")
_SIGNS = (
    ("preference", {"chosen", "rejected"}),
    ("unpaired_preference", {"prompt", "completion", "label"}),
    ("prompt_completion", {"prompt", "completion"}),
    ("prompt", {"prompt"}),
    ("messages", {"messages"}),
    ("text", {"text"}),
)
_STAGE_KINDS = {
    "sft": ("prompt_completion", "messages", "text"),
    "dpo": ("preference",),
    "grpo": ("prompt",),
    "kto": ("unpaired_preference", "preference"),
}


@dataclass(frozen=True)
class Format:
    """kind: see the table above. conversational: its columns hold messages, not strings."""

    kind: str
    conversational: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold text of this kind."""
        needed = dict(_SIGNS)[self.kind]
        return tuple(c for c in WRITTEN if c in needed or (c == "prompt" and self.kind == "preference"))


def is_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], dict) and "role" in value[0]


def detect(row: dict[str, Any], stage: str | None = None) -> Format:
    """The format of a (normalised) row: for `stage`, or the richest one it fits.

    Raises DataError naming the columns found and those expected.
    """
    found = {name for name, value in row.items() if value is not None}
    kinds = _STAGE_KINDS[stage] if stage else tuple(kind for kind, _ in _SIGNS)
    kind = next((k for k in kinds if dict(_SIGNS)[k] <= found), None)
    if kind is None:
        wanted = " or ".join(f"({columns})" for columns in (EXPECTED[stage] if stage else sum(EXPECTED.values(), ())))
        for_whom = f"{stage} needs" if stage else "expected"
        raise DataError(
            f"the dataset has columns {sorted(found)}; {for_whom} {wanted}, each a string or a list of messages; "
            "rename its columns"
        )
    columns = [c for c in Format(kind, False).columns if c in found]
    return Format(kind, any(is_messages(row[c]) for c in columns))


def normalise(row: dict[str, Any]) -> dict[str, Any]:
    """A copy of the row in the names used here.

    `conversations` of {"from", "value"} become `messages` of {"role", "content"}; verl's `reward_model.ground_truth`
    becomes `ground_truth`; the prompt that `chosen` and `rejected` begin with alike becomes `prompt`.
    """
    row = dict(row)
    if "conversations" in row and "messages" not in row:
        row["messages"] = row.pop("conversations")
    for name in WRITTEN:
        if isinstance(row.get(name), list):
            row[name] = [_as_message(m) for m in row[name]]
    reward_model = row.get("reward_model")
    if isinstance(reward_model, dict) and "ground_truth" in reward_model and row.get("ground_truth") is None:
        row["ground_truth"] = reward_model["ground_truth"]
    if row.get("chosen") and row.get("rejected") and _prompt_is_implicit(row):
        row["prompt"], row["chosen"], row["rejected"] = split_prompt(row["chosen"], row["rejected"])
    return row


def _as_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    message = {k: v for k, v in message.items() if v is not None or k == "content"}
    if "from" in message and "role" not in message:
        message["role"] = message.pop("from")
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    return message


def _prompt_is_implicit(row: dict[str, Any]) -> bool:
    """No prompt, or a string prompt beside whole conversations (TRL's UltraFeedback layout)."""
    return row.get("prompt") is None or (isinstance(row["prompt"], str) and is_messages(row["chosen"]))


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected): the common beginning, and what is left of each (TRL `extract_prompt`).

    Strings keep the space before the first difference with the completions. Where one is the beginning of the other,
    the last common element stays in both, so that neither is empty.
    """
    shared = min(len(chosen), len(rejected))
    at = next((i for i in range(shared) if chosen[i] != rejected[i]), max(0, shared - 1))
    if isinstance(chosen, str) and at < shared and chosen[at] != rejected[at] and at > 0 and chosen[at - 1] == " ":
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:]


def check_rows(rows: Iterable[tuple[str, dict[str, Any]]], form: Format) -> None:
    """Every row has the columns of `form`, of the same sort throughout. Raises DataError listing the rows that do not.

    rows: (where, normalised row) pairs.
    """
    errors: list[str] = []
    count = 0
    for where, row in rows:
        problem = row_problem(row, form)
        if problem:
            count += 1
            if len(errors) < SHOWN:
                errors.append(f"{where}: {problem}")
    if count:
        raise DataError(f"{count} rows do not fit the format {form.kind}:\n" + "\n".join(errors))


def row_problem(row: dict[str, Any], form: Format) -> str | None:
    """What is wrong with one row, or None."""
    for column in form.columns:
        value = row.get(column)
        if value is None:
            return f"column {column!r} is missing"
        problem = _messages_problem(value) if form.conversational else _string_problem(value)
        if problem:
            return f"column {column!r} {problem}"
    if form.kind == "unpaired_preference" and row["label"] not in (True, False):
        return f"column 'label' is {excerpt(row['label'])}, expected true or false"
    if row.get("images") or row.get("image"):
        return "has images, which are not supported"
    return None


def _string_problem(value: Any) -> str | None:
    if isinstance(value, str):
        return None
    sort = "messages" if is_messages(value) else type(value).__name__
    return f"is {sort} ({excerpt(value)}), expected a string as in the first row"


def _messages_problem(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"is {type(value).__name__} ({excerpt(value)}), expected a list of messages as in the first row"
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'message {i} is {excerpt(message)}, expected {{"role": ..., "content": ...}}'
        content = message.get("content")
        if content is not None and not isinstance(content, str) and not _text_parts(content):
            return f"message {i} has content {excerpt(content)}, expected a string"
    return None


def _text_parts(content: Any) -> bool:
    """Content given as a list of text parts."""
    return isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content)

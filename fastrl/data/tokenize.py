"""Rows to token-exact samples, as TRL 1.16 tokenises them, so that the first loss of a run is the same.

Strings: the end-of-sequence token is appended to a text or completion; prompt + completion are tokenised together and
the completion starts where its tokens leave those of the prompt alone. Conversations: the chat template says all.
Masks are by position, never by id. What does not fit is dropped whole and reported; an end is cut only on request.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.data.formats import Format, check_rows, detect, normalise
from fastrl.data.load import Rows
from fastrl.data.types import DataError, Dropped, Prompt, Report, Sample, listed

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CHUNK = 1024  # strings tokenised in one call


@dataclass(frozen=True)
class Limits:
    """How long a sequence may be.

    max_length: most tokens of prompt + completion; None: no limit but the model's.
    context_length: the model's positions.
    truncation: "drop" leaves a longer sequence out, "keep_start" cuts its end (as TRL does), the end-of-sequence token
        with it; a sequence with no trained token left is dropped.
    max_dropped_fraction: more than this is an error.
    """

    max_length: int | None = None
    context_length: int | None = None
    truncation: str = "drop"
    max_dropped_fraction: float = 0.5

    def __post_init__(self):
        if self.truncation not in ("drop", "keep_start"):
            raise ValueError(f"truncation must be 'drop' or 'keep_start', got {self.truncation!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {self.max_length}")

    @property
    def longest(self) -> int | None:
        known = [n for n in (self.max_length, self.context_length) if n is not None]
        return min(known) if known else None


# -- the stages --------------------------------------------------------------------------------------------------
def encode_sft(
    rows: Rows | Sequence[dict],
    tokenizer: Any,
    limits: Limits | None = None,
    *,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> tuple[list[Sample], Report]:
    """Samples of a dataset with `text`, `messages` or `prompt` + `completion`.

    Args:
        completion_only_loss: train the completion only, or the prompt too; None: the completion only if there is a
            prompt column.
        assistant_only_loss: train the tokens inside the template's {% generation %} blocks only.

    Raises DataError: unknown columns, rows of another sort, chat data without a template, a doubled BOS, an empty
    dataset, too many rows dropped.
    """
    limits = limits or Limits()
    table, form = _prepare(rows, tokenizer, "sft")
    if assistant_only_loss:
        _check_assistant_masks(tokenizer, form)
    completion_only = form.kind == "prompt_completion" if completion_only_loss is None else completion_only_loss
    report, samples = Report(total=len(table)), []
    for i, (where, parts) in enumerate(_sequences(table, tokenizer, form, assistant_only_loss)):
        [(ids, prompt_length, moved, assistant)] = parts
        report.moved_boundaries += moved
        mask = [t >= prompt_length for t in range(len(ids))] if completion_only else [True] * len(ids)
        if assistant is not None:
            if not any(assistant):
                raise DataError(f"{where}: assistant_only_loss is on, but the template marks no assistant token")
            mask = [m and bool(a) for m, a in zip(mask, assistant, strict=True)]
        sample = _fit([_sample(ids, mask, {"row": i})], where, limits, report)
        samples += sample
    return samples, _accept(report, limits, samples)


def encode_dpo(
    rows: Rows | Sequence[dict], tokenizer: Any, limits: Limits | None = None
) -> tuple[list[Sample], Report]:
    """Samples of a preference dataset, interleaved: 2p is chosen, 2p+1 rejected. A pair is dropped as a whole.

    Numbers in columns `score_chosen` and `score_rejected` become the field "reward".
    Raises DataError as `encode_sft`, and where the first row has both scores and another has not.
    """
    limits = limits or Limits()
    table, form = _prepare(rows, tokenizer, "dpo")
    report, samples, scored = Report(total=len(table)), [], _scores(table, 0) is not None
    for i, (where, parts) in enumerate(_sequences(table, tokenizer, form)):
        # Both completions start at the same token: the earlier of the two borders (TRL `tokenize_fn`).
        start = min(prompt_length for _, prompt_length, _, _ in parts)
        report.moved_boundaries += any(moved for _, _, moved, _ in parts)
        pair = [_sample(ids, [t >= start for t in range(len(ids))], {"row": i}) for ids, _, _, _ in parts]
        if scored:
            scores = _scores(table, i)
            if scores is None:
                raise DataError(f"{where}: score_chosen and score_rejected must be numbers, as in the first row")
            for sample, score in zip(pair, scores, strict=True):
                sample.fields["reward"] = score
        samples += _fit(pair, where, limits, report)
    return samples, _accept(report, limits, samples)


def _scores(table: _Table, i: int) -> tuple[float, float] | None:
    """What row i says its chosen and its rejected are worth, where it says so in finite numbers."""
    row = table.rows[i]
    scores = tuple(row.get(name) for name in ("score_chosen", "score_rejected"))
    numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in scores)
    return tuple(map(float, scores)) if numbers else None


def encode_kto(
    rows: Rows | Sequence[dict], tokenizer: Any, limits: Limits | None = None
) -> tuple[list[Sample], Report]:
    """Samples with a field "label" (True: desirable), of `prompt` + `completion` + `label` rows, one each, or of
    preference rows, two each: chosen True, then rejected False.

    Raises DataError as `encode_sft`.
    """
    limits = limits or Limits()
    table, form = _prepare(rows, tokenizer, "kto")
    paired = form.kind == "preference"
    report, samples = Report(total=len(table) * (2 if paired else 1)), []
    for i, (where, parts) in enumerate(_sequences(table, tokenizer, form)):
        labels = (True, False) if paired else (bool(table.normal(i)["label"]),)
        for (ids, start, moved, _), label in zip(parts, labels, strict=True):
            report.moved_boundaries += moved
            sample = _sample(ids, [t >= start for t in range(len(ids))], {"row": i, "label": label})
            samples += _fit([sample], where, limits, report)
    return samples, _accept(report, limits, samples)


def encode_prompts(
    rows: Rows | Sequence[dict], tokenizer: Any, max_length: int | None = None, max_dropped_fraction: float = 0.5
) -> tuple[list[Prompt], Report]:
    """Prompts to sample from. `max_length`: most prompt tokens (the context less what will be sampled).

    Every other column but `completion` is kept for the reward functions. Raises DataError as `encode_sft`, and for a
    prompt without any token.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length leaves {max_length} tokens for the prompt; lower the completion length")
    table, form = _prepare(rows, tokenizer, "grpo")
    _check_prompt_end(tokenizer, form)
    report, prompts, empty = Report(total=len(table)), [], []
    for i, (where, [ids]) in enumerate(_prompt_ids(table, tokenizer, form)):
        if not ids:
            empty.append(where)
        elif max_length is not None and len(ids) > max_length:
            report.dropped.append(Dropped(where, f"prompt of {len(ids)} tokens, limit {max_length}", len(ids)))
        else:
            row = table.normal(i)
            columns = {k: v for k, v in row.items() if k not in ("prompt", "completion", "completion_ids")}
            prompts.append(Prompt(ids, row["prompt"], columns, where))
    if empty:
        raise DataError(f"{len(empty)} prompts are empty, there is nothing to go on from: {', '.join(empty[:20])}")
    return prompts, _accept(report, Limits(max_dropped_fraction=max_dropped_fraction), prompts)


# -- rows --------------------------------------------------------------------------------------------------------
class _Table:
    """Rows in normal form, made again at each reading so that a large dataset is not held twice."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def normal(self, i: int) -> dict[str, Any]:
        return normalise(self.rows[i])

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((self.rows.where(i), self.normal(i)) for i in range(len(self)))


def _prepare(rows: Rows | Sequence[dict], tokenizer: Any, stage: str) -> tuple[_Table, Format]:
    """Rows in normal form and their format, everything that can be wrong with them checked."""
    rows = rows if isinstance(rows, Rows) else Rows(rows)
    if not len(rows):
        raise DataError(f"{rows.name} is empty; give at least one row")
    table = _Table(rows)
    form = detect(table.normal(0), stage)
    check_rows(table, form)
    if form.conversational and not tokenizer.chat_template:
        raise DataError(
            f"{rows.name} holds conversations, but the tokenizer has no chat template; save one with the tokenizer, or "
            "give string columns"
        )
    if not form.conversational and tokenizer.eos_token is None:
        raise DataError("the tokenizer has no eos token, so no completion would ever end; set tokenizer.eos_token")
    return table, form


def _check_assistant_masks(tokenizer: Any, form: Format) -> None:
    if not form.conversational:
        raise DataError("assistant_only_loss needs conversations (messages), this dataset holds strings; turn it off")
    if not _GENERATION.search(tokenizer.get_chat_template()):
        raise DataError(
            "assistant_only_loss needs a chat template with {% generation %} ... {% endgeneration %} around what the "
            "assistant says, the tokenizer's has none; edit it, or use prompt + completion columns"
        )


def _check_prompt_end(tokenizer: Any, form: Format) -> None:
    """A tokenizer that ends every text with EOS would ask the model to go on after the end."""
    if not form.conversational and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise DataError(
            f"the tokenizer ends every text with {tokenizer.eos_token!r}, so nothing can follow a prompt; set "
            "tokenizer.add_eos_token=False and save it again"
        )


# -- tokens ------------------------------------------------------------------------------------------------------
def _sequences(table: _Table, tokenizer: Any, form: Format, assistant_masks: bool = False) -> Iterator[tuple]:
    """(where, [(ids, prompt_length, moved, assistant mask or None), ...]) of each row, one entry per completion."""
    columns = ["chosen", "rejected"] if form.kind == "preference" else ["completion"]
    encode = _Encoder(tokenizer, form, assistant_masks)
    for chunk in _chunks(table):
        if form.kind in ("text", "messages"):
            encoded = encode([row[form.kind] for _, row in chunk], chunk, eos=True)
            for (where, _), (ids, assistant) in zip(chunk, encoded, strict=True):
                yield where, [(ids, 0, False, assistant)]
            continue
        prompts = encode([row["prompt"] for _, row in chunk], chunk, prompt=True)
        wholes = [encode([(row["prompt"], row[c]) for _, row in chunk], chunk, eos=True) for c in columns]
        for i, (where, _) in enumerate(chunk):
            prompt = prompts[i][0]
            parts = []
            for whole in wholes:
                ids, assistant = whole[i]
                shared = _common_prefix(prompt, ids)
                parts.append((ids, shared, shared < len(prompt), assistant))
            yield where, parts


def _prompt_ids(table: _Table, tokenizer: Any, form: Format) -> Iterator[tuple[str, list[list[int]]]]:
    encode = _Encoder(tokenizer, form, False)
    for chunk in _chunks(table):
        for (where, _), (ids, _) in zip(
            chunk, encode([row["prompt"] for _, row in chunk], chunk, prompt=True), strict=True
        ):
            yield where, [ids]


def _chunks(table: _Table) -> Iterator[list[tuple[str, dict]]]:
    chunk = []
    for item in table:
        chunk.append(item)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass
class _Encoder:
    """Strings through the tokenizer, conversations through its chat template; (ids, assistant mask or None) each."""

    tokenizer: Any
    form: Format
    assistant_masks: bool

    def __call__(self, values: list, chunk: list, prompt: bool = False, eos: bool = False) -> list[tuple]:
        if self.form.conversational:
            out = [self._chat(v, row, prompt) for v, (_, row) in zip(values, chunk, strict=True)]
        else:
            out = [(ids, None) for ids in self._text(values, eos)]
        bos = self.tokenizer.bos_token_id
        for (ids, _), (where, _) in zip(out, chunk, strict=True):
            if bos is not None and ids[:2] == [bos, bos]:
                raise DataError(
                    f"{where}: begins with two BOS tokens ({self.tokenizer.bos_token!r}), one from the text or "
                    "template and one from the tokenizer; remove it from the text, or set tokenizer.add_bos_token=False"
                )
        return out

    def _text(self, values: list, eos: bool) -> list[list[int]]:
        end = self.tokenizer.eos_token
        texts = []
        for value in values:
            head, tail = value if isinstance(value, tuple) else ("", value)
            texts.append(head + tail + (end if eos and not tail.endswith(end) else ""))
        return self.tokenizer(text=texts)["input_ids"]

    def _chat(self, value: list | tuple, row: dict, prompt: bool) -> tuple[list[int], list[int] | None]:
        messages = [*value[0], *value[1]] if isinstance(value, tuple) else value
        tools = row.get("tools")
        masks = self.assistant_masks and not prompt
        encoded = self.tokenizer.apply_chat_template(
            messages,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            add_generation_prompt=prompt,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=masks,
            **(row.get("chat_template_kwargs") or {}),
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"]) if masks else None


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Tokens that a and b begin with alike."""
    if b[: len(a)] == a:
        return len(a)
    return next(i for i, (x, y) in enumerate(zip(a, [*b, -1], strict=False)) if x != y)


def _sample(ids: list[int], mask: list[bool], fields: dict) -> Sample:
    """A sample whose context reaches up to its first trained token; token 0 is never trained."""
    if mask:
        mask[0] = False
    start = mask.index(True) if True in mask else len(ids)
    return Sample(list(ids), start, mask, fields)


def _fit(unit: list[Sample], where: str, limits: Limits, report: Report) -> list[Sample]:
    """The samples of one row within the limits: as they are, cut, or none of them."""
    longest, size = limits.longest, max(len(s) for s in unit)
    if longest is None or size <= longest:
        return unit
    if limits.truncation == "drop":
        report.dropped.append(Dropped(where, f"{size} tokens, limit {longest}", size))
        return []
    # Nothing to learn from a row whose prompt alone fills the limit (TRL drops it too).
    if any(not any(s.completion_mask[:longest]) for s in unit):
        report.dropped.append(Dropped(where, f"no trained token in the first {longest} of {size}", size))
        return []
    report.truncated += sum(len(s) > longest for s in unit)
    return [_sample(s.input_ids[:longest], s.completion_mask[:longest], s.fields) for s in unit]


def _accept(report: Report, limits: Limits, kept: Sequence) -> Report:
    """The report, if enough is left to train on."""
    if not kept or report.dropped_fraction > limits.max_dropped_fraction:
        fix = "raise max_length, shorten the data, or allow more with max_dropped_fraction"
        raise DataError(
            f"{len(report.dropped)} of {report.total} rows do not fit (at most "
            f"{limits.max_dropped_fraction:.0%} may be dropped); {fix}: {listed(report.dropped)}"
        )
    return report

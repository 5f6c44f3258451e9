"""Token budgets: which sequences go into which micro-batch, and how they are laid end to end.

Packing decides memory and speed, never the result: every loss is normalised by counts over the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastrl.data.prefix import lay_out
from fastrl.data.types import Sample

# Sample.fields name -> name in the batch (fastrl.TokenBatch). A number per sequence gives [S], a list per token [R].
PLURAL = {"advantage": "advantages", "label": "labels", "reward": "rewards", "group_id": "group_ids"}


def pack(lengths: Sequence[int], max_tokens: int, unit: int | Sequence[int] = 1) -> list[list[int]]:
    """Cut sequences into micro-batches of at most `max_tokens` tokens, without padding.

    Args:
        lengths: tokens of each sequence.
        max_tokens: the budget of a micro-batch. A unit that is longer gets a micro-batch of its own.
        unit: this many consecutive sequences stay together (1: any cut, 2: preference pairs, G: groups), or a list of
            unit sizes that add up to len(lengths).

    Returns:
        Lists of indices into `lengths`, ascending in each; every index exactly once. The number of micro-batches is
        that of first-fit decreasing; where they can be made even, they are. Fullest first, so that a budget too large
        for the machine shows at once. The same input always gives the same output.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    members = _units(len(lengths), unit)
    sizes = [sum(lengths[i] for i in unit_) for unit_ in members]
    order = sorted(range(len(members)), key=lambda u: (-sizes[u], u))
    bins = _first_fit(sizes, order, max_tokens)
    bins = _level(sizes, order, len(bins), max_tokens) or bins
    bins.sort(key=lambda units: (-sum(sizes[u] for u in units), min(units)))
    return [sorted(chain.from_iterable(members[u] for u in units)) for units in bins]


def _units(n: int, unit: int | Sequence[int]) -> list[range]:
    """Index ranges of the units."""
    if isinstance(unit, int):
        if unit < 1 or n % unit:
            raise ValueError(f"{n} sequences do not divide into units of {unit}; give a divisor or the unit sizes")
        return [range(i, i + unit) for i in range(0, n, unit)]
    if sum(unit) != n or any(u < 1 for u in unit):
        raise ValueError(f"unit sizes must be positive and add up to the {n} sequences, they add up to {sum(unit)}")
    starts = [0]
    for u in unit:
        starts.append(starts[-1] + u)
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def _first_fit(sizes: list[int], order: list[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 OPT + 6/9 bins (Dosa 2007)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for u in order:
        at = next((b for b, free in enumerate(room) if sizes[u] <= free), None)
        if at is None:
            bins.append([u])
            room.append(budget - sizes[u])
        else:
            bins[at].append(u)
            room[at] -= sizes[u]
    return bins


def _level(sizes: list[int], order: list[int], count: int, budget: int) -> list[list[int]] | None:
    """Longest unit first into the emptiest of `count` bins; None if that breaks the budget where first-fit did not."""
    bins: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for u in order:
        at = min(range(count), key=lambda b: (load[b], b))
        if bins[at] and load[at] + sizes[u] > budget:
            return None
        bins[at].append(u)
        load[at] += sizes[u]
    return bins


def collate(
    samples: Sequence[Sample], fields: Iterable[str] = (), device: Any = None, share: bool = False
) -> dict[str, Any]:
    """Lay samples end to end, and say which rows of the hidden states predict the trained tokens.

    Args:
        samples: S samples.
        fields: names in `Sample.fields` to carry over. A list (one number per trained token) is concatenated to [R], a
            number per sequence gives [S]; "advantage", "label", "reward", "group_id" are renamed to their plural.
        device: where the tensors go.
        share: neighbours of one group hold the prompt that they begin with once (fastrl.data.prefix).

    Returns a dict, T = all tokens (a shared one counts once), R = trained tokens:
        input_ids, position_ids  [T] int64; positions restart at 0 in every sequence
        cu_seqlens               [S+1] int32 boundaries on T;  max_seqlen: int. Of segments where prompts are shared
        layout                   cu_seqlens, or a Layout where prompts are shared: what a PackedModel is to be told
        rows                     [R] int64: hidden[rows[i]] predicts targets[i] (the position before the token)
        here, ends               [R], [S] int64: where the trained tokens themselves and the last of each sample stand
        targets                  [R] int64
        row_cu_seqlens           [S+1] int32 boundaries on R: what `TokenBatch.cu_seqlens` is
        and one tensor per field: floats as float32 ([S] or [R]), bools as bool, ints as int64.

    Raises ValueError if a field is missing in a sample or has the wrong length.
    """
    if not samples:
        raise ValueError("collate needs at least one sample, got none")
    lengths = torch.tensor([len(s) for s in samples])
    ids = torch.tensor(list(chain.from_iterable(s.input_ids for s in samples)), dtype=torch.int64)
    mask = torch.tensor(list(chain.from_iterable(s.completion_mask for s in samples)), dtype=torch.bool)
    ends = lengths.cumsum(0)
    positions = torch.arange(ids.shape[0]) - torch.repeat_interleave(ends - lengths, lengths)
    trained = mask.nonzero().squeeze(1)
    counts = torch.nn.functional.pad(mask.long().cumsum(0), (1, 0))
    layout, place = lay_out(samples) if share else (None, torch.arange(ids.shape[0]))
    bounds = torch.nn.functional.pad(ends, (1, 0)) if layout is None else torch.tensor(layout.bounds)
    blank = ids.new_zeros(int(bounds[-1]))
    out = {
        "input_ids": blank.index_copy(0, place, ids),  # a shared token is put there once for each sample: the same
        "position_ids": blank.index_copy(0, place, positions),
        "cu_seqlens": bounds.to(torch.int32),
        "rows": place[trained - 1],  # the model reads token t-1 to predict token t; Sample keeps token 0 untrained
        "here": place[trained],
        "ends": place[(ends - 1).clamp(min=0)],
        "targets": ids[trained],
        "row_cu_seqlens": counts[torch.nn.functional.pad(ends, (1, 0))].to(torch.int32),
    }
    for name in fields:
        out[PLURAL.get(name, name)] = _field(samples, name)
    if device is not None:
        out = {name: tensor.to(device, non_blocking=True) for name, tensor in out.items()}
    shared = layout is not None and max(layout.parents) >= 0
    out["layout"] = layout if shared else out["cu_seqlens"]
    out["max_seqlen"] = int(lengths.max())
    return out


def _field(samples: Sequence[Sample], name: str) -> Tensor:
    """One field of all samples as a [S] or [R] tensor."""
    missing = [i for i, s in enumerate(samples) if s.fields.get(name) is None]
    if missing:
        raise ValueError(f"sample {missing[0]} has no field {name!r}; it has {sorted(samples[missing[0]].fields)}")
    values = [s.fields[name] for s in samples]
    if not any(_is_list(v) for v in values):
        return _tensor([v.item() if isinstance(v, Tensor) else v for v in values])
    parts = []
    for i, (sample, value) in enumerate(zip(samples, values, strict=True)):
        if not _is_list(value) or len(value) != sample.num_trained:
            got = f"{len(value)} numbers" if _is_list(value) else f"the single value {value!r}"
            raise ValueError(
                f"field {name!r} of sample {i} is {got}, expected {sample.num_trained}, one a trained token"
            )
        parts.append(value.cpu() if isinstance(value, Tensor) else _tensor(list(value)))
    kind = next((p.dtype for p in parts if p.numel()), torch.float32)
    return torch.cat([p.to(kind) for p in parts])


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() == 1)


def _tensor(values: list) -> Tensor:
    """Python numbers as a tensor: float32 if any is a float, whatever torch's default dtype is."""
    return torch.tensor(values, dtype=torch.float32 if any(isinstance(v, float) for v in values) else None)

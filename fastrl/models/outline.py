"""Models without weights, for ranks that are handed theirs later (fastrl.train.parallel.shard).

One rank loads a model as ever and keeps what only weights can tell: the dtype they were saved in, what the checks said.
The others load it inside `without_weights`: on the meta device, with those facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.models.packed import PackedModel

_kept: ContextVar[list | None] = ContextVar("kept", default=None)
_told: ContextVar[list | None] = ContextVar("told", default=None)


# -- facts -------------------------------------------------------------------------------------------------------------
def fact(find: Callable[[], Any]) -> Any:
    """What `find` reads off the weights, as JSON carries it; inside `without_weights` what it gave where they are."""
    told, kept = _told.get(), _kept.get()
    if told is not None:
        return told.pop(0)
    found = find()
    if kept is not None:
        kept.append(found)
    return found


@contextmanager
def keeping_facts() -> Iterator[list]:
    """Every `fact` found inside, in order."""
    with _set(_kept, []) as facts:
        yield facts


@contextmanager
def without_weights(facts: list) -> Iterator[None]:
    """Inside, models are built on the meta device, and the same calls as elsewhere find these facts."""
    with _set(_told, list(facts)) as left:
        yield
        if left:
            raise RuntimeError(f"{len(left)} facts of a model were not asked for: ranks load it in different ways")


@contextmanager
def _set(variable: ContextVar, value: list) -> Iterator[list]:
    before = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(before)


def believed(packed: PackedModel, check: Callable[[], Any]) -> None:
    """Run a check of `packed`, which may change how it attends; without weights, take over what came of it."""

    def find() -> dict[str, Any]:
        check()
        return packed.findings()

    packed.take_over(fact(find))


# -- tensors -----------------------------------------------------------------------------------------------------------
def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; one that is shared comes under each of its names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def table(model: nn.Module) -> dict[str, list]:
    """name -> [shape, dtype, the first name that the same tensor goes by], as JSON."""
    first: dict[int, str] = {}
    return {
        name: [list(x.shape), str(x.dtype).removeprefix("torch."), first.setdefault(id(x), name)]
        for name, x in named_tensors(model).items()
    }


def conform(model: nn.Module, told: dict[str, list]) -> None:
    """Give the tensors of a model without weights the dtypes of another's `table`, and tie what is tied there.

    Raises ValueError where the names or shapes differ.
    """
    own, made, taken = named_tensors(model), {}, set()
    mine = {name: list(x.shape) for name, x in own.items()}
    odd = sorted(n for n in mine.keys() | told.keys() if n not in told or mine.get(n) != told[n][0])
    if odd:
        raise ValueError(f"another rank has loaded another model: {len(odd)} tensors differ: {', '.join(odd[:4])}")
    for name, (_, dtype, first) in told.items():
        if first not in made:
            x, kind = own[first], getattr(torch, dtype)
            made[first] = x if x.dtype == kind and id(x) not in taken else _like(x, kind)
            taken.add(id(x))
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        held = module._parameters if leaf in module._parameters else module._buffers
        held[leaf] = made[first]


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype, device="meta")
    return nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y

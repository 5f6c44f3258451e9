"""What all ranks do at once: fail together, load from what rank 0 reads, hold or gather every weight whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastrl.models import PackedModel
from fastrl.models.actor_critic import ActorCritic
from fastrl.models.attention import UnsupportedModelError
from fastrl.models.outline import conform, keeping_facts, table, without_weights
from fastrl.models.save import is_saved
from fastrl.train.flags import ConfigError
from fastrl.train.parallel import World, full, roots

Made = TypeVar("Made")


class RankError(RuntimeError):
    """Another rank failed; the message is that rank's."""


def together(world: World, work: Callable[[], Made], known: tuple[type[Exception], ...] = ()) -> Made:
    """work() on every rank; where it raises on one of them, every rank raises, so that nobody waits for the others.

    work: may talk to the other ranks only before the first point at which it can fail on one rank alone.
    known: errors that the other ranks raise as what they are; any other is a RankError there.
    """
    if world.size == 1:
        return work()
    made, error = None, None
    try:
        made = work()
    except Exception as caught:  # raised below, when the others have heard of it
        error = caught
    told = world.gather(None if error is None else [type(error).__name__, str(error)])
    if error is not None:
        raise error
    for rank, what in enumerate(told):
        if what is not None:
            name, message = what
            kind = next((k for k in known if k.__name__ == name), None)
            raise RankError(f"rank {rank} failed: {name}: {message}") if kind is None else kind(message)
    return made


def on_main(world: World, work: Callable[[], Made], known: tuple[type[Exception], ...] = ()) -> Made:
    """What work() gives on rank 0, told to every rank as JSON carries it. Raises on every rank what it raises there."""
    return world.from_main(together(world, lambda: work() if world.is_main else None, known))


# -- weights -----------------------------------------------------------------------------------------------------------
def loaded(world: World, load: Callable[[], Made]) -> Made:
    """load() on rank 0; the other ranks build the same model without its weights, which `shard` then hands out.

    load: gives a model; talks to no other rank. What it draws is drawn on rank 0, and random generators of PyTorch's
    CPU are equal afterwards. A model that is kept quantised is read on every rank.

    Raises on every rank what load() raises on rank 0.
    """
    if world.size == 1:
        return load()
    known = (ConfigError, UnsupportedModelError, ValueError)
    with keeping_facts() as facts:
        model = together(world, lambda: load() if world.is_main else None, known)
    mine = (facts, table(model), torch.get_rng_state().tolist()) if world.is_main else None
    facts, tensors, state = world.from_main(mine)

    def follow() -> Made:
        if world.is_main:
            return model
        with without_weights(facts):
            made = load()
        conform(made, tensors)
        torch.set_rng_state(torch.tensor(state, dtype=torch.uint8))
        return made

    return together(world, follow, known)


def gathered(model: PackedModel | ActorCritic, world: World) -> dict[str, Tensor] | None:
    """What `save_pretrained` needs of a model whose weights are split over ranks, in rank 0's CPU memory. Every rank
    has to call it.

    One tensor at a time is whole on a device. Parameters that are tied stay one tensor. None on one process, where the
    model has its own; empty on the other ranks.
    """
    if world.size == 1:
        return None
    out: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # of a parameter, the first of those it goes by
    for name, x in model.state_dict(keep_vars=True).items():
        if not is_saved(model, name):
            continue
        if id(x) in names:
            if world.is_main:
                out[name] = out[names[id(x)]]
            continue
        names[id(x)] = name
        one = full(x.detach())
        if world.is_main:
            out[name] = one.cpu()
    return out


@contextlib.contextmanager
def whole(model: nn.Module, reshard_after_forward: bool = True) -> Iterator[None]:
    """Inside, every rank holds every weight of `model`, and may run it as often as it likes; outside, they are split.

    reshard_after_forward: what the layers were split with. Every rank has to come in and go out.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    tops = [top for top in roots(model) if isinstance(top, FSDPModule)]
    for top in tops:
        top.set_reshard_after_forward(False)
        one_token(top)  # FSDP takes for its root what runs first: that must not be a layer
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(reshard_after_forward and part not in tops, recurse=False)
        part.reshard()
    # FSDP fetches weights in the order of the last forward, and each rank has run as many as its prompts took: from the
    # next one on all must have seen the same, or they wait for each other in different places.
    for top in tops:
        if hasattr(top, "reset_iter_state"):  # torch 2.13
            top.reset_iter_state()
        else:
            one_token(top)


@torch.no_grad()
def one_token(top: nn.Module) -> None:
    """A forward that every rank runs."""
    device = next(top.parameters()).device
    top(torch.zeros(1, dtype=torch.long, device=device), torch.tensor([0, 1], dtype=torch.int32))

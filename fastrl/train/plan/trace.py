"""One update or one scoring pass of the real models, a few layers deep, with every storage counted.

The code that runs is the trainer's: the models of fastrl.models with the switches that the flags ask for, autograd,
transformers' layers. Tensors have no data (FakeTensorMode), so size costs nothing. The head is a stand-in that keeps
what the fused operator keeps; its workspace is added by who reads the trace.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrl.models.packed import PackedModel
from fastrl.models.packing import Packing
from fastrl.train.plan.head import twin_loss
from fastrl.train.plan.liveness import Liveness, births
from fastrl.train.plan.skeleton import layers

HEAD = "W"  # the segment in which the head's workspace is there too


@dataclass(frozen=True)
class How:
    """backward: an update; otherwise a scoring pass without gradients. share: part of the tokens that is trained.

    accumulate: gradients of earlier micro-batches are there. in_backward: each is used and freed as it comes.
    lengths: of the sequences, as parts of all tokens; parents: as those of a Packing, where prompts are shared.
    block: layers that are one step of the repeating pattern.
    """

    backward: bool = True
    autocast: torch.dtype | None = None
    share: float = 1.0
    accumulate: bool = False
    in_backward: bool = False
    lengths: tuple[float, ...] = (1.0,)
    parents: tuple[int, ...] | None = None
    block: int = 1


Trace = dict[str, list[tuple[int, int]]]  # segment -> (bytes of gradients, of all else) after each birth


def trace(models: list[PackedModel], depths: list[int], tokens: int, how: How) -> Trace:
    """Segments: start; then of model m (its place in the list) mF0, mF1, ... its forward by blocks of layers, mH its
    norm and head; W the head's own pass; mB1, mB0 the backward of blocks. Weights do not count."""
    counted = Liveness()
    packing, ids, rows = _inputs(models[0], tokens, how)
    parameters = [p for model in models for p in model.parameters()]
    counted.ignore([*parameters, *(b for model in models for b in model.buffers())])
    handles, gradients = [], set()
    with counted, contextlib.ExitStack() as stack:
        stack.callback(lambda: [h.remove() for h in handles])
        for m, (model, depth) in enumerate(zip(models, depths, strict=True)):
            handles += _markers(counted, str(m), layers(model.model, depth), how)
        if how.backward:
            handles += _prepare_gradients(counted, parameters, how, gradients)
        autocast = torch.autocast("cpu", how.autocast, enabled=how.autocast is not None)
        with torch.set_grad_enabled(how.backward), autocast:
            total = _forward(counted, models, (ids, packing, rows), how)
        if how.backward:
            counted.segment = f"{len(models) - 1}H"
            counted.past_forward = True
            total.backward()
        gradients |= {counted.number(p.grad) for p in parameters if p.grad is not None}
    for p in parameters:
        p.grad = None
    return births(counted.log, gradients)


def _inputs(model: PackedModel, tokens: int, how: How) -> tuple[Packing | None, Tensor, Tensor]:
    """Made outside of the counting; with data, so that boundaries can be read."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        lengths = [round(tokens * part) for part in how.lengths]  # alike where the parts are
        lengths[0] += tokens - sum(lengths)
        bounds = (0, *itertools.accumulate(lengths))
        packing = Packing.from_bounds(bounds, torch.device("cpu"), how.parents if model.shares else None)
        if packing.parents is not None:  # worked out once and kept
            _ = packing.crossing, packing.roots, packing.longest
    ids = torch.zeros(tokens, dtype=torch.long)
    rows = torch.zeros(max(1, round(tokens * how.share)), dtype=torch.long)
    return packing, ids, rows


def _forward(counted: Liveness, models: list[PackedModel], inputs, how: How) -> Tensor:
    ids, packing, rows = inputs
    total = torch.zeros(())
    for m, model in enumerate(models):
        counted.segment = f"{m}F0"
        hidden = _body(model, ids, packing)
        counted.segment = f"{m}H"
        hidden = hidden.index_select(0, rows)

        def enter():
            counted.segment = HEAD

        def leave(m=m):
            counted.segment = f"{m}H"

        total = total + twin_loss(model.head, hidden, enter, leave)
        del hidden
    return total


def _body(model: PackedModel, ids: Tensor, packing: Packing) -> Tensor:
    """PackedModel.forward up to the head, which would read boundaries from tensors."""
    if model.packed:
        return model._packed_body(ids, packing)
    parts = [model.body(input_ids=ids[a:b][None], use_cache=False)[0][0] for a, b in packing.segments()]
    return torch.cat(parts)


def _markers(counted: Liveness, name: str, blocks: list[nn.Module], how: How) -> list:
    """Hooks that say which block of layers the run is in, forwards and backwards."""
    handles = []
    for i, layer in enumerate(blocks):
        at, last = i // how.block, i == len(blocks) - 1
        if i % how.block == 0:
            handles.append(layer.register_forward_pre_hook(_Begins(counted, f"{name}F{at}")))
        if last or (i + 1) % how.block == 0:
            ends = _Ends(counted, f"{name}B{at}", f"{name}H" if last else "")
            handles.append(layer.register_forward_hook(ends))
    return handles


@dataclass(frozen=True)
class _Begins:
    """Recomputation runs the hooks of the forward again: there they say nothing."""

    counted: Liveness
    segment: str

    def __call__(self, *_) -> None:
        if not self.counted.past_forward:
            self.counted.segment = self.segment


@dataclass(frozen=True)
class _Ends:
    """backward: the segment that begins when the gradient of this block's output is there. after: the one that
    follows the block's forward, where that is not another block's."""

    counted: Liveness
    backward: str
    after: str

    def __call__(self, module, inputs, output) -> None:
        if self.counted.past_forward:
            return
        x = output[0] if isinstance(output, tuple) else output
        if x.requires_grad:
            x.register_hook(self.begin)
        if self.after:
            self.counted.segment = self.after

    def begin(self, gradient: Tensor) -> None:
        self.counted.segment = self.backward


def _prepare_gradients(counted: Liveness, parameters: list[nn.Parameter], how: How, gradients: set[int]) -> list:
    trained = [p for p in parameters if p.requires_grad]
    if how.accumulate:
        for p in trained:
            p.grad = torch.zeros_like(p)
    if not how.in_backward:
        return []

    def apply(p: Tensor) -> None:
        gradients.add(counted.number(p.grad))
        p.grad = None

    return [p.register_post_accumulate_grad_hook(apply) for p in trained]

"""Memory that runs out: the micro-batch is cut and done again, and the run goes on with smaller ones.

Exact, because every normaliser counts the whole step: a cut changes the order of sums and nothing else. A backward that
fails half-way has already added to some gradients, so those of the step are dropped and all of its micro-batches are
done again: nothing has to be copied beforehand. With dropout the second try draws anew.

Several ranks work in step: one that fails leaves the others waiting, and the run ends with an error that says so.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from fastrl.data.packing import collate
from fastrl.data.prefix import Layout, tokens_of
from fastrl.models import PackedModel
from fastrl.objective import LossOutput
from fastrl.tokens import TokenStats
from fastrl.train.parallel import World
from fastrl.train.step import Forward, MicroBatch, score

if TYPE_CHECKING:
    from fastrl.train.stages.base import Setting

T = TypeVar("T")
BUDGET = "budget"  # in a checkpoint's sampler state
# What torch, its CPU allocator, CUDA's libraries and C++ say; all as RuntimeError but for torch's own type.
SAYINGS = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc",
    "alloc_failed",
)  # fmt: skip


class OutOfMemoryError(RuntimeError):
    """Memory ran out where nothing can be cut any more: the message says what to change."""


class RankOutOfMemoryError(OutOfMemoryError):
    """One of several ranks ran out of memory in the middle of a step."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there was not enough memory."""
    if isinstance(error, OutOfMemoryError):  # ours: cut as far as it goes already
        return isinstance(error, RankOutOfMemoryError)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(saying in text for saying in SAYINGS)


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """(result, "") or, if memory ran out, (None, what was said). Nothing of the failed call is left alive."""
    try:
        return call(), ""
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    gc.collect()  # tensors that frames and graphs of the failed call held in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, said


# -- the step ----------------------------------------------------------------------------------------------------------
Rounds = Callable[[list[MicroBatch]], Iterable[tuple[MicroBatch, bool]]]


def once(micros: list[MicroBatch]) -> Iterable[tuple[MicroBatch, bool]]:
    """Each micro-batch, and that its loss counts."""
    return ((micro, True) for micro in micros)


def accumulate(
    setting: Setting,
    run: Callable[[MicroBatch], LossOutput],
    micros: list[MicroBatch],
    unit: int = 1,
    rounds: Rounds = once,
    moved: Callable[[], bool] = lambda: False,
) -> list[tuple[MicroBatch, LossOutput]]:
    """Forward and backward of every micro-batch of a step: what was run, with its detached output; gradients add up.

    run: the loss of a micro-batch. unit: this many neighbouring sequences stay together where a micro-batch is cut.
    rounds: in which order they go and whose losses count; moved: have weights changed since (StepGuard has both).
    Raises OutOfMemoryError where a cut does not help, where weights have moved, or on several ranks.
    """
    parts = [piece for micro in micros for piece in fitting(setting, micro, unit)]
    while True:
        done, said = [], ""
        for micro, counted in rounds(parts):
            out, said = attempt(partial(forward_backward, run, micro))
            if said:
                break
            if counted:
                done.append((micro, out))
        if not said:
            return done
        limit = shrink(setting, micro, unit, said)
        drop_gradients(setting, said, moved())
        parts = [piece for m in parts for piece in cut(m, limit, unit)]


def forward_backward(run: Callable[[MicroBatch], LossOutput], micro: MicroBatch) -> LossOutput:
    """The output of `run`, without its graph."""
    out = run(micro)
    out.loss.backward()
    return dataclasses.replace(
        out, loss=out.loss.detach(), metrics={name: value.detach() for name, value in out.metrics.items()}
    )


def drop_gradients(setting: Setting, said: str, moved: bool) -> None:
    """Forget the step so far. Raises OutOfMemoryError where it has updated weights already."""
    if moved:
        raise OutOfMemoryError(
            f"out of memory in a backward that has begun to update the weights ({said}), so that it cannot be done "
            f"again; set --max_tokens_per_device {setting.budget} and go on with --resume_from_checkpoint auto"
        )
    for p in setting.model.parameters():
        p.grad = None


def in_parts(setting: Setting, run: Callable[[MicroBatch], T], micro: MicroBatch, unit: int = 1) -> list[T]:
    """What `run` gives of the micro-batch, or of the pieces that fit, in order: for scoring and evaluation.

    Raises OutOfMemoryError as `accumulate`.
    """
    parts, done = fitting(setting, micro, unit), []
    while len(done) < len(parts):
        out, said = attempt(partial(run, parts[len(done)]))
        if not said:
            done.append(out)
            continue
        limit = shrink(setting, parts[len(done)], unit, said)
        rest = parts[len(done) :]
        parts[len(done) :] = [piece for m in rest for piece in cut(m, limit, unit)]
    return done


def fitting(setting: Setting, micro: MicroBatch, unit: int) -> list[MicroBatch]:
    """The micro-batch, or its pieces if it was planned before the budget was lowered."""
    return cut(micro, setting.budget, unit) if setting.world.size == 1 else [micro]


def scored(setting: Setting, model: PackedModel, micro: MicroBatch, how: Forward, unit: int = 1) -> TokenStats:
    """`score` of the micro-batch, in pieces where it does not fit in one."""
    return TokenStats.joined(in_parts(setting, lambda part: score(model, part, how), micro, unit))


# -- less at once ------------------------------------------------------------------------------------------------------
def shrink(setting: Setting, micro: MicroBatch, unit: int, said: str) -> int:
    """Tokens of a micro-batch from now on, half of the one that failed. Raises OutOfMemoryError if it cannot be cut."""
    tokens, world = micro.input_ids.shape[0], setting.world
    if world.size > 1:
        raise RankOutOfMemoryError(alone_in_this(world, tokens, setting.budget, said))
    if len(micro.samples) <= unit:
        raise OutOfMemoryError(too_long(setting, tokens, len(micro.samples), said))
    limit = max(1, tokens // 2)
    setting.budget = min(setting.budget, limit)
    setting.notes.append(
        f"out of memory with a micro-batch of {tokens} tokens: it was cut and done again, and micro-batches are of at "
        f"most {setting.budget} tokens from now on (same result; --max_tokens_per_device {setting.budget} starts so)"
    )
    return limit


def alone_in_this(world: World, tokens: int, budget: int, said: str) -> str:
    return (
        f"rank {world.rank} of {world.size} ran out of memory with a micro-batch of {tokens} tokens ({said}); the "
        "others wait for it inside of the same step, so that it cannot be done again. Lower --max_tokens_per_device, "
        f"now {budget}, or have --probe_memory true find what fits, and go on with --resume_from_checkpoint auto"
    )


def too_long(setting: Setting, tokens: int, sequences: int, said: str) -> str:
    """The message where a micro-batch that cannot be cut does not fit."""
    stage = setting.config.stage
    limit = next((f for f in ("max_length", "max_completion_length") if hasattr(setting.config, f)), "max_length")
    what = "a single sequence" if sequences == 1 else f"{sequences} sequences that belong together"
    return (
        f"out of memory with {what} of {tokens} tokens ({said}), which --max_tokens_per_device cannot cut; lower "
        f"--{limit}, or take a switch that saves memory: `fastrl plan {stage}` with the same flags tells what each buys"
    )


def note_longer(setting: Setting, micros: list[MicroBatch]) -> None:
    """Tell once that something is longer than the budget and so gets a micro-batch of its own."""
    longest = max((m.input_ids.shape[0] for m in micros), default=0)
    if longest > setting.budget and "longer" not in setting.told:
        setting.told.add("longer")
        setting.notes.append(
            f"the step has something of {longest} tokens that is not cut, more than --max_tokens_per_device "
            f"{setting.budget}: it gets a micro-batch of its own"
        )


# -- cutting -----------------------------------------------------------------------------------------------------------
def cut(micro: MicroBatch, limit: int, unit: int = 1) -> list[MicroBatch]:
    """The micro-batch in order as pieces of at most `limit` tokens, `unit` neighbouring sequences together.

    What is longer goes alone. Columns that the objective took from the whole step stay as they are.
    """
    if micro.input_ids.shape[0] <= limit or len(micro.samples) <= unit:
        return [micro]
    pieces: list[range] = []
    for start in range(0, len(micro.samples), unit):
        stop = start + unit
        first = pieces[-1].start if pieces else stop
        if pieces and tokens_of(micro.samples, range(first, stop), shares(micro)) <= limit:
            pieces[-1] = range(first, stop)
        else:
            pieces.append(range(start, stop))
    return [taken(micro, piece) for piece in pieces]


def shares(micro: MicroBatch) -> bool:
    """Whether its sequences share prompts."""
    return isinstance(micro.cu_seqlens, Layout)


def taken(micro: MicroBatch, piece: range) -> MicroBatch:
    """The sequences of `piece`; what they share with those left behind is copied."""
    samples, bounds = micro.samples[piece.start : piece.stop], micro.batch.cu_seqlens.tolist()
    laid = collate(samples, (), micro.input_ids.device, shares(micro))
    read = "here" if micro.rows is micro.here else "rows"  # heads that are read at the tokens themselves
    return MicroBatch(
        input_ids=laid["input_ids"],
        cu_seqlens=laid["layout"],
        rows=laid[read],
        batch=micro.batch.sequences(piece.start, piece.stop, bounds[piece.start], bounds[piece.stop]),
        samples=samples,
        indices=micro.indices[piece.start : piece.stop],
        here=laid["here"],
        ends=laid["ends"],
    )


def news(setting: Setting) -> list[str]:
    """Lines for the reader that have come up since it was asked last."""
    lines = setting.notes[:]
    setting.notes.clear()
    return lines


def budget_state(setting: Setting) -> dict[str, int]:
    """What a resumed run needs to cut as this one does. JSON."""
    return {"asked": setting.config.max_tokens_per_device, "tokens": setting.budget}


def go_on_with(setting: Setting, state: dict[str, int] | None) -> None:
    """Take up a budget that was lowered, unless --max_tokens_per_device asks for another one now."""
    if state is not None and state["asked"] == setting.config.max_tokens_per_device:
        setting.budget = min(setting.budget, state["tokens"])

"""The worst micro-batch before the first step, so that memory runs out then and not in hour five.

A forward and two backwards of as many tokens as the budget allows, in the longest sequences that there can be; the
second backward meets the gradients of the first, as in a step of several micro-batches. Nothing is updated, gradients
are dropped and random generators put back: the run is the same bit for bit. Sampling is not rehearsed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrl.data.prefix import tokens_of
from fastrl.data.types import Sample
from fastrl.train.budget import OutOfMemoryError, attempt, too_long
from fastrl.train.optim.groups import muon_names
from fastrl.train.optim.norm import local
from fastrl.train.parallel import roots
from fastrl.train.rng import rng_state, set_rng_state
from fastrl.train.step import ALONE, MicroBatch, loss_of, prepare

if TYPE_CHECKING:
    from fastrl.train.stages.base import Setting, Stage


class Quiet:
    """A log that keeps nothing."""

    def timing(self, name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def add(self, values: Any) -> None:
        """Not kept."""

    add_mean = add_max = add_min = count_tokens = add


def probe(stage: Stage, setting: Setting) -> None:
    """Try the worst micro-batch and lower the budget, on all ranks alike, until it fits; say so in setting.notes.

    Raises OutOfMemoryError where weights, gradients and optimizer states leave no room for any, or one sequence is too
    long. On several ranks all of them try the same shape: they run out together, or wait --distributed_timeout.
    """
    if not wanted(setting):
        return
    state = rng_state()
    with as_if_alone(setting), states_reserved(setting):
        while True:
            samples = worst_case(stage, setting.budget)
            _, said = attempt(partial(rehearse, stage, setting, samples))
            drop(setting.model)
            failed = [text for text in setting.world.gather(said) if text]
            if not failed:
                break
            lower(stage, setting, samples, failed[0])
    set_rng_state(*state)
    tokens, longest = tokens_of(samples, range(len(samples)), setting.shares), max(map(len, samples))
    setting.notes.append(
        f"probe: the worst micro-batch here ({tokens} tokens, the longest sequence {longest}) has its peak at "
        f"{peak(setting.device) / 2**30:.2f} GiB, optimizer states included"
    )


def wanted(setting: Setting) -> bool:
    asked = setting.config.probe_memory
    return setting.device.type == "cuda" if asked is None else asked


def lower(stage: Stage, setting: Setting, samples: list[Sample], said: str) -> None:
    """Half of what was tried. Raises OutOfMemoryError if that cannot be cut."""
    tokens = tokens_of(samples, range(len(samples)), setting.shares)
    if len(samples) <= getattr(stage, "unit", 1):
        raise OutOfMemoryError(f"before the first step: {too_long(setting, tokens, len(samples), said)}")
    recover(stage, setting)
    before, setting.budget = setting.budget, min(setting.budget, max(1, tokens // 2))
    setting.notes.append(
        f"probe: {tokens} tokens at once do not fit ({said}); micro-batches are of at most {setting.budget} tokens "
        f"from now on, where --max_tokens_per_device allows {before} (same result)"
    )


def recover(stage: Stage, setting: Setting) -> None:
    """Put sharded models that an error left in the middle of a step back to their start."""
    from torch.distributed.fsdp import FSDPModule

    models = [m for m in (setting.model, setting.reference, getattr(stage, "teacher", None)) if m is not None]
    for root in (root for model in models for root in roots(model) if isinstance(root, FSDPModule)):
        if root._get_fsdp_state()._is_root is None:  # has not run yet
            continue
        if not hasattr(root, "reset_iter_state"):  # torch < 2.13
            raise OutOfMemoryError(
                "the worst micro-batch does not fit, and this torch cannot go on after that on several ranks; lower "
                "--max_tokens_per_device"
            )
        root.reset_iter_state()


# -- what is tried -----------------------------------------------------------------------------------------------------
def rehearse(stage: Stage, setting: Setting, samples: list[Sample]) -> None:
    """What a step does with the samples, but for the update."""
    whole = len(samples) >= setting.config.batch_size * getattr(stage, "unit", 1)  # a step of one micro-batch
    freed = whole and setting.config.optimizer_in_backward
    with hooks_that_free(setting) if freed else contextlib.nullcontext():
        micro = ready(stage, setting, samples)
        for _ in range(2):
            loss_of(setting.model, stage.objective, micro, stage.how).loss.backward()


def worst_case(stage: Stage, tokens: int) -> list[Sample]:
    """The longest that a micro-batch of `tokens` can hold: of the dataset, or as long as completions get."""
    setting = stage.setting
    makers = []
    if hasattr(stage, "items"):
        makers.append(longest_items)
    if hasattr(stage, "prompts") or getattr(setting.config, "samples", False):
        makers.append(longest_completions)
    made = [make(stage, tokens) for make in makers]
    return max(made, key=lambda samples: max(map(len, samples)))


def longest_items(stage: Stage, tokens: int) -> list[Sample]:
    """Rows of the dataset (pairs stay whole), longest first, then what still fits, no more than a step has."""
    share, chosen, left = stage.setting.shares, [], tokens
    most = stage.setting.config.batch_size * stage.unit
    for item in sorted(stage.items, key=lambda item: -sum(map(len, item))):
        size = tokens_of(item, range(len(item)), share)
        if size <= left or not chosen:
            chosen += item
            left -= size
        if len(chosen) == most:
            break
    return chosen


def longest_completions(stage: Stage, tokens: int) -> list[Sample]:
    """Completions of full length to the longest prompts; which tokens they are is of no matter."""
    config, words = stage.setting.config, len(stage.setting.tokenizer)
    length = getattr(config, "max_completion_length", None) or config.max_new_tokens
    each, chosen, left = getattr(config, "num_generations", 1), [], tokens
    for group, prompt in enumerate(sorted(prompts_of(stage), key=len, reverse=True)):
        for k in range(each):
            size = length + (0 if k and stage.setting.shares else len(prompt))
            if chosen and (size > left or len(chosen) == config.batch_size):
                break
            ids = [(31 * k + 7 * t) % words for t in range(length)]
            chosen.append(Sample.from_parts(prompt, ids, group_id=group))
            left -= size
    return chosen


def prompts_of(stage: Stage) -> list[list[int]]:
    if hasattr(stage, "prompts"):
        return [p.ids for p in stage.prompts]
    return [s.input_ids[: s.prompt_length] for [s] in stage.items]


def ready(stage: Stage, setting: Setting, samples: list[Sample]) -> MicroBatch:
    """The largest micro-batch of the samples with all that the objective reads, as `collect` makes it."""
    log = Quiet()
    if hasattr(stage, "items"):
        micros = stage.prepare(samples, log)
    else:
        samples = [dataclasses.replace(s, fields=dict(s.fields)) for s in samples]
        attach_numbers(stage, samples, log)
        micros = setting.plan(samples)
    micros = prepare(setting.model, stage.objective, micros, stage.how, setting.world)
    return max(micros, key=lambda m: m.input_ids.shape[0])


def attach_numbers(stage: Stage, samples: list[Sample], log: Quiet) -> None:
    """Log-probs as the stage takes them, and some advantages."""
    for i, sample in enumerate(samples):
        sample.fields["cut"] = 1.0
        if stage.sampling.logprobs:
            sample.fields["rollout_logprobs"] = [-1.0] * sample.num_trained
        sample.fields["advantage"], sample.fields["reward"] = (-1.0) ** i, float(i % 2)
    if hasattr(stage, "give_statistics"):  # a critic
        for sample in samples:
            del sample.fields["advantage"], sample.fields["reward"], sample.fields["group_id"]
        stage.give_statistics(samples, log)
        stage.give_advantages(samples, torch.arange(len(samples)) % 2.0, log)
        return
    for sample in samples:
        del sample.fields["cut"]
    stage.give_logprobs(samples, log)


# -- surroundings ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def as_if_alone(setting: Setting) -> Iterator[None]:
    """Every rank takes the whole of what is planned: all have the same shape, the worst."""

    def plan(samples: list[Sample], unit: int = 1) -> list[MicroBatch]:
        return type(setting).plan(dataclasses.replace(setting, world=ALONE), samples, unit)

    setting.plan = plan
    try:
        yield
    finally:
        del setting.plan


@contextlib.contextmanager
def states_reserved(setting: Setting) -> Iterator[None]:
    """Hold as much memory as the optimizer will.

    Raises OutOfMemoryError where there is not even that.
    """
    size = state_bytes(setting)
    held, said = attempt(partial(torch.empty, size, dtype=torch.uint8, device=setting.device))
    if said:
        raise OutOfMemoryError(
            f"before the first step: the states of --optim {setting.config.optim} are about {size / 2**30:.1f} GiB and "
            f"do not fit beside the weights ({said}); `fastrl plan {setting.config.stage}` with the same flags tells "
            "what each switch saves"
        )
    yield
    del held


def state_bytes(setting: Setting) -> int:
    """What the optimizer will keep on the device for this rank's part of the weights."""
    from fastrl.train.plan.optimizer import state_bytes as planned

    config = setting.config
    if config.optim_offload or (config.cpu_offload and setting.world.size > 1):
        return 0
    matrices, trained = muon_names(setting.model), {}
    for name, p in setting.model.named_parameters():
        if p.requires_grad:
            trained[name] = local(p)
    return planned(config, [(tuple(p.shape), p.dtype, n in matrices) for n, p in trained.items()])


@contextlib.contextmanager
def hooks_that_free(setting: Setting) -> Iterator[None]:
    """Each gradient goes as soon as it is whole, as with --optimizer_in_backward."""

    def free(p: nn.Parameter) -> None:
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(free) for p in setting.model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def drop(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def peak(device: torch.device) -> int:
    """Bytes that were in use at most so far: allocated on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""The guarded step: clip, check, update, and tell what happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastrl.train.config import TrainConfig
from fastrl.train.optim.host import HostStates
from fastrl.train.optim.in_backward import AT_ONCE, CLIPPED, MEASURE, InBackward, step_one
from fastrl.train.optim.norm import clip_gradients, clip_scale, global_norm, local

M = TypeVar("M")
SEVERAL = (
    "--optimizer_in_backward: a step of several micro-batches keeps the gradients of all weights until the last of "
    "them; a larger --max_tokens_per_device or a smaller batch makes it one"
)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that is NaN or infinite."""


@dataclass
class StepOutcome:
    """grad_norm: before clipping. culprits: parameters with a non-finite gradient when the step was skipped.

    moved: parameters beside the culprits were updated nonetheless (optimizer_in_backward in one pass). note: a line for
    the reader, the first time there is reason for it.
    """

    grad_norm: float
    skipped: bool
    culprits: list[str]
    moved: bool = False
    note: str = ""

    def describe(self) -> str:
        """What a skipped step was, for the reader."""
        names = ", ".join(self.culprits[:3]) or "no single parameter"
        left = "these were left alone, the others have moved" if self.moved else "weights are unchanged"
        return f"step skipped: gradient norm {self.grad_norm} (non-finite: {names}); {left}"


@dataclass
class StepGuard:
    """optimizer.step() behind a check: with a NaN or infinite gradient nothing moves, weights and moments bitwise.

    skipped: steps skipped in all. in_a_row: since the last good one; at `max_skipped_steps` NonFiniteError is raised.
    norm: of gradients of which this rank may hold a part. in_backward, two_pass: see in_backward.py; then the loop goes
    over `rounds`. host: states live in CPU memory.
    """

    optimizer: torch.optim.Optimizer
    named_parameters: list[tuple[str, nn.Parameter]]
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 3
    skipped: int = 0
    in_a_row: int = 0
    norm: Callable[[Iterable[Tensor]], Tensor] = global_norm
    in_backward: bool = False
    two_pass: bool = False
    host: HostStates | None = None
    hooks: InBackward | None = field(default=None, init=False)

    def __post_init__(self):
        self.named_parameters = list(self.named_parameters)
        self._group = {id(p): g for g in self.optimizer.param_groups for p in g["params"]}
        self._measured, self._note, self._noted = None, "", False
        if self.in_backward:
            self.hooks = InBackward(self.optimizer, self.named_parameters, self._visit)

    @classmethod
    def from_config(cls, optimizer: torch.optim.Optimizer, model: nn.Module, config: TrainConfig) -> StepGuard:
        """As the flags say."""
        named = list(model.named_parameters())
        device = named[0][1].device
        host = HostStates(optimizer, device) if config.optim_offload and device.type != "cpu" else None
        return cls(
            optimizer,
            named,
            config.max_grad_norm,
            config.max_skipped_steps,
            in_backward=config.optimizer_in_backward,
            two_pass=config.clip_two_pass,
            host=host,
        )

    @property
    def lr(self) -> float:
        """The learning rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def moved(self) -> bool:
        """Has the step that is under way changed weights already? Then its backwards cannot be done again."""
        return self.hooks is not None and self.hooks.moved

    # -- the backwards of a step ---------------------------------------------------------------------------------------
    def passes(self, lr: float | None = None) -> Iterator[bool]:
        """Forward and backward of all micro-batches belong in each; whether their losses count. Then call `step`.

        One, but two with two_pass: the second draws the same random numbers, and nothing of it is to be logged.
        """
        self._set_lr(lr)
        if self.hooks is None:
            yield True
            return
        self._measured = None
        if not self.two_pass:
            self.hooks.begin(AT_ONCE)
            yield True
            self.hooks.end()
            return
        draws = random_state(self.named_parameters[0][1].device)
        self.hooks.begin(MEASURE)
        yield True
        self.hooks.end()
        self._measured = self.hooks.whole()
        norm = total(self._measured)
        if math.isfinite(norm):
            set_random_state(draws)
            self.hooks.begin(CLIPPED, float(clip_scale(norm, self.max_grad_norm)))
            yield False
            self.hooks.end()

    def arm(self, last: bool) -> None:
        """To be called before each backward of a pass. last: no other follows."""
        if self.hooks is not None:
            self.hooks.armed = last
            if not last and not self._noted:
                self._noted, self._note = True, SEVERAL

    def rounds(self, micro_batches: list[M], lr: float | None = None) -> Iterator[tuple[M, bool]]:
        """(micro-batch, whether its loss counts) of every pass, each to be followed by its backward."""
        for counted in self.passes(lr):
            for i, micro in enumerate(micro_batches):
                self.arm(i == len(micro_batches) - 1)
                yield micro, counted

    # -- the step ------------------------------------------------------------------------------------------------------
    def step(self, lr: float | None = None) -> StepOutcome:
        """Set the rate, clip, update, drop the gradients. One host sync (the norm)."""
        self._set_lr(lr)
        if self.hooks is not None:
            return self._finish()
        gradients = [p.grad for _, p in self.named_parameters if p.grad is not None]
        norm = self.norm(gradients)
        value = norm.item()
        if not math.isfinite(value):
            bad = [n for n, p in self.named_parameters if p.grad is not None and not local(p.grad).isfinite().all()]
            return self._skip(value, bad)
        clip_gradients(gradients, norm, self.max_grad_norm)
        self._update()
        self.optimizer.zero_grad(set_to_none=True)
        self.in_a_row = 0
        return StepOutcome(value, False, [])

    def _finish(self) -> StepOutcome:
        """What the backwards of `rounds` have come to."""
        if any(p.grad is not None for p in self.hooks.parameters.values()):
            raise RuntimeError("gradients are left that no hook took: with in_backward the loop goes over guard.rounds")
        if self.host is not None:
            self.host.finish()
        squares = self.hooks.whole() if self._measured is None else self._measured
        norm = total(squares)
        bad = [n for n, square in squares.items() if not math.isfinite(square)]
        if not math.isfinite(norm):
            self.hooks.uncount([] if self.two_pass else bad)
            return self._skip(norm, bad, moved=self.hooks.moved)
        self.in_a_row = 0
        note, self._note = self._note, ""
        return StepOutcome(norm, False, [], note=note)

    def _skip(self, norm: float, bad: list[str], moved: bool = False) -> StepOutcome:
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_skipped_steps:
            left = "Weights and optimizer are as before the first of them"
            if moved:
                left = "These were left alone, other weights have moved"
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row had a gradient norm of {norm}; non-finite in {len(bad)} parameters: "
                f"{', '.join(bad[:5]) or 'none, the sum of squares overflows'}. {left}; "
                "lower --learning_rate, or look at the data with --debug_checks true"
            )
        return StepOutcome(norm, True, bad, moved)

    def _set_lr(self, lr: float | None) -> None:
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def _update(self) -> None:
        if self.host is None:
            self.optimizer.step()
            return
        held = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        self.host.update(held, self._step_one)
        self.host.finish()

    def _visit(self, p: Tensor, action: Callable[[Tensor], None]) -> None:
        if self.host is None:
            action(p)
        else:
            self.host.update([p], action)

    def _step_one(self, p: Tensor) -> None:
        step_one(self.optimizer, p, self._group[id(p)])


def total(squares: dict[str, float]) -> float:
    """The norm of gradients with these sums of squares."""
    return math.sqrt(sum(squares.values())) if squares else 0.0


def random_state(device: torch.device) -> dict[str, Any]:
    """Of the generators that a forward draws from (dropout)."""
    own = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **own}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])

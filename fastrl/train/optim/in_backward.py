"""The update of a parameter inside the backward: as soon as its gradient is complete, and the gradient is freed.

With one micro-batch a step, gradients then never live at the same time. Two ways:
    one pass    each update is made at once, so the global norm is known only afterwards: no clipping. A parameter whose
                gradient is not finite is left alone; the others have moved.
    two passes  a first backward takes the norm and throws the gradients away, a second one clips by it and applies.
                Exact, at twice the time; a norm that is not finite ends the step before anything has moved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.train.optim.norm import local, split_over, square_of, whole_squares
from fastrl.train.optim.sliced import SlicedAdamW

OFF, MEASURE, CLIPPED, AT_ONCE = "off", "measure", "clipped", "at once"  # what becomes of a gradient


def step_one(optimizer: torch.optim.Optimizer, p: Tensor, group: dict[str, Any]) -> None:
    """optimizer.step() for one parameter of `group`, as if it had no other."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [p]}]
    optimizer.step()
    optimizer.param_groups = groups


class InBackward:
    """Hooks that fire when .grad of a parameter is complete: by autograd, or by FSDP2 after its reduce-scatter.

    visit(p, action): calls action(p) while p's states are at hand. armed: whether this backward is the last of the
    step; before it gradients pile up in .grad as always. moved: a parameter may have changed in this step. squares:
    name -> sum of squares of the gradient, 0-dim on its device (in MEASURE of this rank's part).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: list[tuple[str, nn.Parameter]],
        visit: Callable[[Tensor, Callable[[Tensor], None]], None],
    ):
        self.optimizer, self.visit = optimizer, visit
        self.groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.parameters = {n: p for n, p in named_parameters if id(p) in self.groups}
        self.names = {id(p): n for n, p in self.parameters.items()}
        self.mode, self.armed, self.moved, self.scale = OFF, False, False, 1.0
        self.squares: dict[str, Tensor] = {}
        self.partial = False  # the squares are of this rank's parts
        self.done: set[str] = set()
        self.begun: set[int] = set()  # parameters that have been updated before
        for p in self.parameters.values():
            p.register_post_accumulate_grad_hook(self._hook)

    def begin(self, mode: str, scale: float = 1.0) -> None:
        """A new pass over the micro-batches of a step. scale: of the gradients when CLIPPED."""
        self.mode, self.armed, self.scale, self.done = mode, False, scale, set()
        if mode != CLIPPED:
            self.moved, self.squares, self.partial = False, {}, mode == MEASURE

    def end(self) -> None:
        """Treat what the last backward did not reach: gradients of earlier micro-batches alone."""
        for p in self.parameters.values():
            if p.grad is not None:
                self._take(p)
        self.mode, self.armed = OFF, False

    def whole(self) -> dict[str, float]:
        """name -> sum of squares over all ranks, on the host: the one sync of a step."""
        if not self.squares:
            return {}
        names, squares = list(self.squares), list(self.squares.values())
        parameters = [self.parameters[n] for n in names] if self.partial else []
        return dict(zip(names, whole_squares(squares, parameters).tolist(), strict=True))

    # -- one gradient ------------------------------------------------------------------------------------------------
    def _hook(self, p: Tensor) -> None:
        if self.armed and self.mode != OFF:
            self._take(p)

    def _take(self, p: Tensor) -> None:
        name = self.names[id(p)]
        if name in self.done:
            raise RuntimeError(f"the gradient of {name} came twice in one backward; drop --optimizer_in_backward")
        self.done.add(name)
        if self.mode == MEASURE:
            self.squares[name] = square_of(p.grad)
        elif self.mode == CLIPPED:
            local(p.grad).mul_(self.scale)
            self._move(p)
        else:
            self.squares[name] = whole_squares([square_of(p.grad)], [p.grad])[0]  # all ranks decide alike
            self._move_if(p, self.squares[name].isfinite())
        p.grad = None

    def _move(self, p: Tensor) -> None:
        self.moved = True
        self.begun.add(id(p))
        self.visit(p, self._step)

    def _move_if(self, p: Tensor, ok: Tensor) -> None:
        """Update p where ok (0-dim bool on p's device) is true, else leave weights and moments; no sync on a GPU."""
        fresh = id(p) not in self.begun and not self.optimizer.state.get(p)  # states that cannot be put back
        if fresh or self._costs_nothing(p):
            if bool(ok):
                self._move(p)
            return
        self.moved = True
        self.visit(p, partial(self._step_if, ok))

    def _step(self, p: Tensor) -> None:
        step_one(self.optimizer, p, self.groups[id(p)])

    def _step_if(self, ok: Tensor, p: Tensor) -> None:
        if self._reads_found_inf(p):
            self.optimizer.found_inf = 1.0 - ok.float()
            self._step(p)
            self.optimizer.found_inf = None
            return
        before = {k: v.clone() for k, v in self._beside(p).items()}
        self._step(p)
        for k, now in self._beside(p).items():
            now.copy_(torch.where(ok, now, before[k]))

    def _beside(self, p: Tensor) -> dict[str, Tensor]:
        """This rank's part of p and of its states that are on the same device."""
        parts = {"weight of": p.detach(), **self.optimizer.state[p]}
        held = {k: local(v) for k, v in parts.items() if isinstance(v, Tensor)}
        return {k: v for k, v in held.items() if v.device == p.device}

    def _costs_nothing(self, p: Tensor) -> bool:
        """To look at a number beside p."""
        return p.device.type == "cpu"

    def _reads_found_inf(self, p: Tensor) -> bool:
        """torch's fused optimizers do, on plain tensors; SlicedAdamW always."""
        reads = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return reads and (split_over(p) is None or isinstance(self.optimizer, SlicedAdamW))

    def uncount(self, names: list[str]) -> None:
        """Take back the step counts, kept on the host, of parameters that were left alone on a device."""
        for p in (self.parameters[n] for n in names):
            step = self.optimizer.state.get(p, {}).get("step")
            if step is None or self._costs_nothing(p):
                continue
            if isinstance(step, int) or step.device != p.device:
                self.optimizer.state[p]["step"] = step - 1

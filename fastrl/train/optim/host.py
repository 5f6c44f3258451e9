"""Optimizer states in the CPU's memory: each parameter's come to its device for its own update and go back.

The arithmetic stays on the device, so the result is that of states kept there, bit for bit; with every optimizer, with
clipping, and with the check for non-finite gradients. On CUDA the copies run beside the updates: the next parameter's
states arrive while this one's are worked on and the last one's leave. The host waits so that no more than three
parameters' states are on the device at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


class HostStates:
    """Around the states of one optimizer, whose parameters are all on `device`."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer, self.device = optimizer, device
        optimizer.states_on_host = True  # a checkpoint that is read leaves them there
        self.arriving = self.leaving = None
        if device.type == "cuda":
            self.arriving, self.leaving = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def update(self, parameters: list[Tensor], step_one: Callable[[Tensor], None]) -> None:
        """step_one(p) for each, with p's states on its device while it runs."""
        gone: list[Any] = []
        ahead = self._fetch(parameters[0]) if parameters else None
        for i, p in enumerate(parameters):
            here, ahead = ahead, None
            if i + 1 < len(parameters):
                if len(gone) > 1 and gone[-2] is not None:
                    gone[-2].synchronize()
                ahead = self._fetch(parameters[i + 1])
            homes = self._place(p, *here)
            step_one(p)
            gone.append(self._send_back(p, homes))

    def finish(self) -> None:
        """Wait until everything is home, so that the host may read it."""
        if self.leaving is not None:
            self.leaving.synchronize()

    def _fetch(self, p: Tensor) -> tuple[State, Any]:
        """Copies on the device of p's states, and the event that says when they are there."""
        own = self.optimizer.state.get(p) or {}
        if self.arriving is None:
            return {k: v.to(self.device, copy=True) for k, v in own.items() if _is_large(v)}, None
        self.arriving.wait_stream(self.leaving)  # what p's last update sent home has arrived
        with torch.cuda.stream(self.arriving):
            made = {k: v.to(self.device, non_blocking=True, copy=True) for k, v in own.items() if _is_large(v)}
            return made, self.arriving.record_event()

    def _place(self, p: Tensor, copies: State, ready: Any) -> State:
        """Put the copies into the optimizer's hands; returns the tensors that they were made of."""
        own = self.optimizer.state.get(p) or {}
        homes = {k: own[k] for k in copies}
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            for copy in copies.values():
                copy.record_stream(current)
        own.update(copies)
        return homes

    def _send_back(self, p: Tensor, homes: State) -> Any:
        """Write the states to where they live and forget the copies; returns the event that says when it is done."""
        if self.leaving is not None:
            self.leaving.wait_stream(torch.cuda.current_stream(self.device))
        own = self.optimizer.state[p]
        with contextlib.nullcontext() if self.leaving is None else torch.cuda.stream(self.leaving):
            for key in [k for k, v in own.items() if _is_large(v)]:
                copy, home = own[key], homes.get(key)
                if home is None or home.device.type != "cpu":
                    home = torch.empty_like(copy, device="cpu", pin_memory=self.leaving is not None)
                home.copy_(copy, non_blocking=True)
                if self.leaving is not None:
                    copy.record_stream(self.leaving)
                own[key] = home
            return None if self.leaving is None else self.leaving.record_event()


def _is_large(value: Any) -> bool:
    """Step counts stay where the optimizer keeps them."""
    return isinstance(value, Tensor) and value.dim() > 0

"""What checkpointing keeps of each layer waits in CPU memory: sent there behind the forward, fetched ahead of the use.

`Offloader` decides the order and knows no device; a `Transfer` copies. On CUDA that is `SideStream`: copies run on a
stream of their own, next to the arithmetic, and only events join the two.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Transfer(Protocol):
    """Copies that have begun and may not be over. `done` stands for the end of one of them."""

    device: torch.device

    def send(self, x: Tensor) -> tuple[Tensor, Any]:
        """A copy of x in CPU memory, and its end. It begins after what is queued now, which makes x."""

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        """A copy on the device, and its end. It begins after all copies before it and what is queued now."""

    def wait(self, done: Any) -> None:
        """What is queued from now on begins after that copy; the host does not wait."""

    def finish(self, done: Any) -> None:
        """The host waits for the end of the copy."""


class SideStream:
    """Transfer between a CUDA device and pinned memory. Tensors come from the pool of the stream that uses them."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def send(self, x: Tensor) -> tuple[Tensor, Any]:
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        return host, self._copy(host, x)

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        x = torch.empty_like(host, device=self.device, pin_memory=False)
        return x, self._copy(x, host)

    def _copy(self, into: Tensor, x: Tensor) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            into.copy_(x, non_blocking=True)
            return self.stream.record_event()

    def wait(self, done: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(done)

    def finish(self, done: Any) -> None:
        done.synchronize()


class Ticket:
    """Stands for a tensor in the graph. Everything belongs to the ticket, so a dropped graph leaves nothing behind.

    leaving: (the tensor, its version, end of the copy) until the device copy is let go. coming: (the tensor, end of the
    copy) when it was fetched before it was asked for. before: the ticket made before this one.
    """

    def __init__(self, x: Tensor, transfer: Transfer, before: weakref.ref[Ticket] | None):
        self.transfer, self._before, self.used = transfer, before, False
        self.host, done = transfer.send(x)
        self.leaving: tuple[Tensor, int, Any] | None = (x, x._version, done)
        self.coming: tuple[Tensor, Any] | None = None

    def let_go(self) -> None:
        """Give the device copy back: what reuses its memory is queued after the copy."""
        if self.leaving is not None:
            self.transfer.wait(self.leaving[2])
            self._check()
            self.leaving = None

    def fetch(self) -> None:
        if self.leaving is None and self.coming is None:
            self.coming = self.transfer.fetch(self.host)

    def take(self) -> Tensor:
        """The tensor on the device; one that has not left yet is handed out as it is."""
        self.used = True
        if self.leaving is not None:
            self._check()
            return self.leaving[0]
        self.fetch()
        x, done = self.coming
        self.coming = None
        self.transfer.wait(done)
        return x

    @property
    def before(self) -> Ticket | None:
        return None if self._before is None else self._before()

    def _check(self) -> None:
        x, version, _ = self.leaving
        if x._version != version:
            raise RuntimeError("the input of a checkpointed layer was changed in place while it was offloaded")

    def __del__(self):
        # Fetched and never used: its memory must not be reused under the copy. Only after an error, so waiting is fine.
        if getattr(self, "coming", None) is not None:
            self.transfer.finish(self.coming[1])


class Offloader:
    """pack and unpack of saved tensors. At most `in_flight` tensors stay on the device after the forward is past them.

    smallest: bytes below which a tensor stays where it is.
    """

    def __init__(self, transfer: Transfer, in_flight: int = 2, smallest: int = 1 << 20):
        self.transfer, self.in_flight, self.smallest = transfer, in_flight, smallest
        self.last: weakref.ref[Ticket] | None = None
        self.sending: deque[weakref.ref[Ticket]] = deque()

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, x: Tensor) -> Tensor | Ticket:
        here = x.device.type == self.transfer.device.type and not isinstance(x, torch.nn.Parameter)
        if not here or not x.is_contiguous() or x.nbytes < self.smallest:
            return x
        ticket = Ticket(x.detach(), self.transfer, self.last)
        self.last = weakref.ref(ticket)
        self.sending.append(self.last)
        while len(self.sending) > self.in_flight:
            if (oldest := self.sending.popleft()()) is not None:
                oldest.let_go()
        return ticket

    def unpack(self, kept: Tensor | Ticket) -> Tensor:
        """The tensor; the one packed before it, which the backward asks for next, sets out meanwhile."""
        if not isinstance(kept, Ticket):
            return kept
        x, earlier = kept.take(), kept.before
        while earlier is not None and earlier.used:  # a layer with several inputs asks for them in their own order
            earlier = earlier.before
        if earlier is not None:
            earlier.fetch()
        return x

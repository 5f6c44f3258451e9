"""Logits that were not formed: hidden states, the head, and what the model did with its output since.

Inside `deferring(model)` the model's head returns a DeferredLogits. The model's own forward scales and caps it as if it
were logits, which is recorded; anything that would need the numbers raises and names itself.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.integrations.heads import Head, causal_lm_of, forward_as, head_module
from fastrl.integrations.linear import parts_of
from fastrl.models import LogitTransform, UnsupportedModelError
from fastrl.objective import LossOutput, Objective
from fastrl.tokens import TokenBatch, TokenStats


class DeferredLogits:
    """[..., V] logits as hidden [..., H] and the head that would make them.

    z = outer * tanh(inner * raw), or inner * raw where outer is None. Multiplication and division by numbers, tanh,
    casts and slices of the leading dimensions give another DeferredLogits; `logprobs`, `loss` and `cross_entropy` give
    numbers. dtype: what the logits would have been. Not a dataclass: sharding would look into one for tensors to hook.
    """

    def __init__(
        self, module: nn.Module, hidden: Tensor, dtype: torch.dtype, inner: float = 1.0, outer: float | None = None
    ):
        self.module, self.hidden, self.dtype, self.inner, self.outer = module, hidden, dtype, inner, outer

    def _but(self, **changed: Any) -> DeferredLogits:
        return DeferredLogits(**{**vars(self), **changed})

    # -- numbers ------------------------------------------------------------------------------------------------------
    @property
    def head(self) -> Head:
        """The head with what was recorded: softcap * tanh(scale * raw / softcap)."""
        if self.outer is None:
            return Head(self.module, LogitTransform(self.inner))
        return Head(self.module, LogitTransform(self.inner * self.outer, abs(self.outer)))  # tanh is odd

    def logprobs(self, targets: Tensor, **options: Any) -> TokenStats:
        """Statistics [...] of targets [...]. options: outputs, temperature, ... of `linear_logprobs`."""
        return self.head.logprobs(self.hidden, targets, **options)

    def flatten(self) -> DeferredLogits:
        """[T, V]: every leading dimension in one."""
        return self._but(hidden=self.hidden.reshape(-1, self.hidden.shape[-1]))

    def loss(self, objective: Objective, batch: TokenBatch, **options: Any) -> LossOutput:
        """The objective's loss over all rows, flattened to [T, H]. options: of `fused_loss`."""
        return self.head.loss(objective, self.flatten().hidden, batch, **options)

    def cross_entropy(self, targets: Tensor, **options: Any) -> Tensor:
        """options: of `linear_cross_entropy`."""
        return self.head.cross_entropy(self.hidden, targets, **options)

    # -- what a tensor of this shape would say -------------------------------------------------------------------------
    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], parts_of(self.module).linear.out_features))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.hidden.ndim

    # -- what is recorded ----------------------------------------------------------------------------------------------
    def __mul__(self, factor) -> DeferredLogits:
        factor = self._number("a product", factor)
        if self.outer is None:
            return self._but(inner=self.inner * factor)
        return self._but(outer=self.outer * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor) -> DeferredLogits:
        return self * (1.0 / self._number("a quotient", divisor))

    def tanh(self) -> DeferredLogits:
        if self.outer is not None:
            raise self._refusal("a second tanh")
        return self._but(outer=1.0)

    def to(self, *args, **options) -> DeferredLogits:
        dtypes = [x for x in (*args, *options.values()) if isinstance(x, torch.dtype)]
        return self._but(dtype=dtypes[0]) if dtypes else self

    def float(self) -> DeferredLogits:
        return self.to(torch.float32)

    def contiguous(self) -> DeferredLogits:
        return self

    def __getitem__(self, index) -> DeferredLogits:
        """Of the leading dimensions: the vocabulary is whole or not there."""
        parts = list(index) if isinstance(index, tuple) else [index]
        dots = [i for i, part in enumerate(parts) if part is Ellipsis]
        for at in dots[:1]:
            parts[at : at + 1] = [slice(None)] * (self.ndim - len(parts) + 1)
        vocabulary = self.shape[-1]
        every = isinstance(parts[-1], slice) and parts[-1].indices(vocabulary) == (0, vocabulary, 1)
        whole = len(parts) < self.ndim or every
        several = any(isinstance(part, Tensor) and part.dtype == torch.bool and part.ndim > 1 for part in parts)
        if len(parts) > self.ndim or not whole or any(part is None or part is Ellipsis for part in parts):
            raise self._refusal(f"the slice {index!r}")
        if several and len(parts) > 1:  # a mask over two dimensions beside other indices
            raise self._refusal("a slice by a mask and more")
        return self._but(hidden=self.hidden[tuple(parts[: self.ndim - 1])])

    # -- what is refused -----------------------------------------------------------------------------------------------
    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        own = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, cls))
        if name == "tanh":
            return own.tanh()
        if name in ("mul", "multiply", "__mul__", "__rmul__") and len(args) == 2:
            return own * next(x for x in args if x is not own)
        raise own._refusal(f"torch's {name}")

    def __getattr__(self, name: str):
        raise AttributeError(str(self._refusal(f"attribute {name!r}"))) if name[:2] != "__" else AttributeError(name)

    def _number(self, what: str, x) -> float:
        if isinstance(x, Tensor) and (x.numel() != 1 or x.requires_grad):
            raise self._refusal(f"{what} with a tensor {list(x.shape)}")
        if isinstance(x, DeferredLogits):
            raise self._refusal(f"{what} with other logits")
        return float(x)

    def _refusal(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{what} of logits {list(self.shape)} that were not formed: the loss comes straight from hidden states "
            "(fastrl.integrations). Ask .logprobs(targets, outputs=(...)) for what is needed of them, or unpatch(model)"
        )


@torch.compiler.disable
def _defer(module: nn.Module, hidden: Tensor, *args, **options) -> DeferredLogits:
    if args or options:
        raise UnsupportedModelError(f"the LM head was called with {list(options) or 'more'} beside hidden states")
    device = hidden.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return DeferredLogits(module, hidden, torch.get_autocast_dtype(device) if cast else hidden.dtype)


@contextmanager
def deferring(model: nn.Module) -> Iterator[None]:
    """Inside, the head of `model` (plain, wrapped or with PEFT) gives DeferredLogits, which forward hands on as logits.

    with deferring(model):
        logits = model(input_ids, attention_mask=mask).logits      # DeferredLogits [B, L, V]
    stats = logits[:, :-1].logprobs(input_ids[:, 1:])              # TokenStats [B, L-1], with a graph
    """
    module = head_module(causal_lm_of(model))
    with forward_as(module, types.MethodType(_defer, module)):
        yield

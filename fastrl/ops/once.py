"""Gradients that are computed by hand can be taken once; asking for their derivative must fail, not give zero."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def no_second_derivative(backward: Callable) -> Callable:
    """Decorates the backward of an autograd Function that computes its gradients without a graph.

    torch's own `once_differentiable` hands out gradients without a graph when the upstream gradient has none, so that
    a gradient penalty silently counts as a constant. Here, under create_graph=True, differentiating them raises.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *upstream):
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return grads
        anchor = torch.zeros((), requires_grad=True)
        return tuple(_Refuse.apply(g, anchor) if isinstance(g, Tensor) else g for g in grads)

    return wrapped


def refuse(*_) -> None:
    raise RuntimeError(
        "the gradients of linear_logprobs and fused_loss cannot be differentiated twice: their backward keeps no "
        "graph; use backend='reference' for second derivatives"
    )


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, upstream):
        refuse()

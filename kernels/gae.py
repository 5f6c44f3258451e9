"""Generalised advantage estimation as a segmented reverse scan (Schulman et al. 2016, eq. 16). One program a sequence.

    delta_t = r_t + gamma V_next - V_t,   A_t = delta_t + gamma lam A_next,   return_t = A_t + V_t
A token is the map x -> a x + b with a = gamma lam, b = delta, and a token that is not an action is x -> x. Maps
compose, so a block of tokens is one associative scan; the blocks of a sequence are walked from its end with the state
(A_next, V_next). The state is float64: a sum over thousands of steps keeps every digit of its float32 result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import packed
from .tiles import VECTORS, Tile, pick


@triton.jit
def compose(a1, b1, a2, b2):
    """The map (a1, b1), which lies to the right, then (a2, b2): a2 (a1 x + b1) + b2."""
    return a1 * a2, b2 + a2 * b1


@triton.jit
def nearest(has1, v1, has2, v2):
    """The value of the nearest action to the right: the second is the nearer one."""
    return has1 | has2, tl.where(has2 != 0, v2, v1)


@triton.jit
def gae_kernel(
    rewards, values, bounds, actions, bootstrap, out_advantages, out_returns,
    gamma, gamma_rest, decay, decay_rest, BLOCK: tl.constexpr,
):  # fmt: skip
    """gamma + gamma_rest, decay + decay_rest: gamma and gamma * lam in float64, each as a sum of two float32.

    actions [T] uint8 or None: every token. bootstrap [S] or None: V after the last action, 0 where it ended.
    """
    s = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(bounds + s).to(tl.int64), tl.load(bounds + s + 1).to(tl.int64)
    g = tl.zeros((1,), tl.float64) + gamma + gamma_rest
    gl = tl.zeros((1,), tl.float64) + decay + decay_rest
    lane = tl.arange(0, BLOCK)
    next_advantage = tl.zeros((1,), tl.float64)
    next_value = tl.zeros((1,), tl.float64)
    if bootstrap is not None:
        next_value += tl.load(bootstrap + s).to(tl.float64)
    blocks = (end - begin + BLOCK - 1) // BLOCK
    for i in range(0, blocks):
        first = begin + (blocks - 1 - i) * BLOCK
        t = first + lane
        inside = t < end
        after = t + 1 < end
        if actions is not None:
            acts = inside & (tl.load(actions + t, mask=inside, other=0) != 0)
            acts_after = after & (tl.load(actions + t + 1, mask=after, other=0) != 0)
        else:
            acts, acts_after = inside, after
        # Of the tokens after t, the nearest action's value: an inclusive scan over the tokens one further right.
        v_after = tl.load(values + t + 1, mask=acts_after, other=0.0).to(tl.float64)
        has, v_next = tl.associative_scan((acts_after.to(tl.int32), v_after), 0, nearest, reverse=True)
        v_next = tl.where(has != 0, v_next, next_value)
        v = tl.load(values + t, mask=acts, other=0.0).to(tl.float64)
        r = tl.load(rewards + t, mask=acts, other=0.0).to(tl.float64)
        a = tl.where(acts, gl, 1.0)
        b = tl.where(acts, r + g * v_next - v, 0.0)
        a, b = tl.associative_scan((a, b), 0, compose, reverse=True)
        advantage = b + a * next_advantage
        shown = tl.where(acts, advantage, 0.0)
        tl.store(out_advantages + t, shown.to(out_advantages.dtype.element_ty), mask=inside)
        tl.store(out_returns + t, (shown + v).to(out_returns.dtype.element_ty), mask=inside)
        next_advantage = tl.zeros((1,), tl.float64) + tl.sum(tl.where(lane == 0, advantage, 0.0), 0)
        next_value = tl.zeros((1,), tl.float64) + tl.sum(tl.where(lane == 0, v_next, 0.0), 0)


def gae(
    rewards: Tensor,
    values: Tensor,
    bounds: Tensor,
    gamma: float,
    lam: float,
    *,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), [T] in the dtype of rewards (at least float32), 0 where the mask is False.

    Args: rewards, values: [T] float. bounds: [S+1] int, ascending from 0 to T. mask: [T] bool, True for actions.
        bootstrap: [S] float or None. Raises: ValueError on vectors that do not fit.
    """
    t, s = rewards.shape[0], bounds.shape[0] - 1
    for name, x, size in (("values", values, t), ("mask", mask, t), ("bootstrap", bootstrap, s)):
        if x is not None and x.shape != (size,):
            raise ValueError(f"{name} is {list(x.shape)}; expected [{size}] for T={t} tokens of S={s} sequences")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    out = [torch.zeros(t, dtype=dtype, device=rewards.device) for _ in range(2)]
    actions = None if mask is None else packed(mask).view(torch.uint8)
    tile = tile or pick(VECTORS, rewards)
    if s and t:
        gae_kernel[(s,)](
            packed(rewards), packed(values), packed(bounds), actions, packed(bootstrap), *out,
            *two_floats(gamma), *two_floats(gamma * lam), BLOCK=tile.columns, **tile.options(),
        )  # fmt: skip
    return out[0], out[1]


def two_floats(x: float) -> tuple[float, float]:
    """x as the sum of two float32, which is how a kernel takes its numbers."""
    high = torch.tensor(x, dtype=torch.float32).item()
    return high, x - high

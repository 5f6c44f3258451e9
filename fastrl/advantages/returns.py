"""Advantages and returns of tokens, [T] over packed sequences: GAE and its kin, reward-to-go.

NaN among a sequence's rewards marks it as unscored: its advantages become NaN, and whatever whitens or compares them
(tokenwise) leaves them out and gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over packed sequences, each its own episode.

        delta_t = r_t + gamma V_next - V_t,   A_t = delta_t + gamma lam A_next,   return_t = A_t + V_t

    `next` is the next action of the same sequence; after the last one A = 0 and V = bootstrap.

    Args:
        rewards, values: [T] float; values[t] is V of the state in which token t is chosen.
        cu_seqlens: [S+1] int, ascending from 0 to T.
        gamma, lam: discount and trace decay, in [0, 1]; lam may be [S], one for each sequence.
        mask: [T] bool, True for actions. The other tokens (tool output) take no time: the recurrence jumps over them,
            and nothing of theirs is read, their rewards included.
        bootstrap: [S] V of the state after the last action, for sequences cut off before they ended; None: all ended.

    Returns:
        advantages and returns [T], without graph, in the dtype of rewards (at least float32); 0 where mask is False.
    Raises: ValueError, TypeError on what does not fit.
    """
    check_gae(rewards, values, cu_seqlens, gamma, lam, mask, bootstrap)
    dtype, length = torch.promote_types(rewards.dtype, torch.float32), rewards.shape[0]
    bounds, rows = cu_seqlens.long(), None
    r, v = rewards, values
    if mask is not None:
        rows = mask.nonzero().squeeze(1)
        bounds = torch.nn.functional.pad(mask.long().cumsum(0), (1, 0))[bounds]
        r, v = r[rows], v[rows]
    r, v = r.double(), v.double()
    # V one to the right, and bootstrap (or 0) at the last token of each sequence.
    last = bounds[1:][bounds.diff() > 0] - 1
    after = torch.nn.functional.pad(v[1:], (0, 1)) if len(v) else v
    after[last] = 0.0 if bootstrap is None else bootstrap[bounds.diff() > 0].double()
    if isinstance(lam, Tensor):
        decay = torch.repeat_interleave(gamma * lam.double(), bounds.diff(), output_size=len(v))
    else:
        decay = torch.full_like(v, gamma * lam)
    decay[last] = 0.0
    advantages = reverse_scan(decay, r + gamma * after - v, int(bounds.diff().max()) if len(bounds) > 1 else 0)
    made = [x.to(dtype) for x in (advantages, advantages + v)]
    if rows is not None:
        made = [x.new_zeros(length).index_copy(0, rows, x) for x in made]
    return made[0], made[1]


def reverse_scan(a: Tensor, b: Tensor, longest: int) -> Tensor:
    """[T] x_t = b_t + a_t x_{t+1}, by doubling (Hillis and Steele 1986): log2(longest) passes over the vectors.

    a is 0 at least once in every `longest` tokens: there a sequence ends, and nothing passes from the next one.
    """
    reach = 1
    while reach < longest:
        # x_t = b_t + a_t x_{t + reach}, twice over; behind a = 0 nothing is read, not even NaN.
        beyond = torch.where(a[:-reach] != 0, b[reach:], 0.0)
        b = torch.cat([torch.addcmul(b[:-reach], a[:-reach], beyond), b[-reach:]])
        a = torch.cat([a[:-reach] * a[reach:], a[-reach:]])
        reach *= 2
    return b


def check_gae(rewards, values, cu_seqlens, gamma: float, lam: float | Tensor, mask, bootstrap) -> None:
    """ValueError or TypeError naming what gae cannot take; the numbers of tensors are read on the CPU only."""
    for name, x in (("gamma", gamma), ("lam", lam)):
        if isinstance(x, Tensor):
            outside = x.device.type == "cpu" and not bool(((x >= 0) & (x <= 1)).all())
        else:
            outside = not 0.0 <= x <= 1.0
        if outside:
            raise ValueError(f"{name} must be in [0, 1], got {x}")
    if rewards.dim() != 1 or not rewards.is_floating_point() or not values.is_floating_point():
        got = f"rewards {list(rewards.shape)} {rewards.dtype}, values {values.dtype}"
        raise ValueError(f"rewards and values must be float [T], got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64 [S+1], got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    t, s = rewards.shape[0], cu_seqlens.shape[0] - 1
    sizes = [("values", values, "T", t), ("mask", mask, "T", t), ("bootstrap", bootstrap, "S", s)]
    sizes += [("lam", lam, "S", s)] if isinstance(lam, Tensor) else []
    for name, x, letter, size in sizes:
        if x is not None and x.shape != (size,):
            raise ValueError(f"{name} must be [{letter}={size}], got {list(x.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = an action), got {mask.dtype}; use mask.bool()")
    if cu_seqlens.device.type == "cpu":
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != t or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to T={t}; got {cu_seqlens.tolist()[:20]}")


# -- made of it --------------------------------------------------------------------------------------------------------
def discounted_returns(
    rewards: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """[T] sum_l gamma^l r_{t+l} over the actions still to come of the same sequence; arguments as gae's."""
    return gae(rewards, torch.zeros_like(rewards), cu_seqlens, gamma=gamma, lam=1.0, mask=mask)[1]


def actions_of(cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    """[S] actions of each sequence."""
    if mask is None:
        return cu_seqlens.long().diff()
    return torch.nn.functional.pad(mask.long().cumsum(0), (1, 0))[cu_seqlens.long()].diff()


def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """[S] lam_i = 1 - 1/(alpha n_i), at least 0: sum_t lam^t = alpha n_i, so that the trace grows with the length n_i
    (VAPO, Yue et al. 2025, arXiv:2504.05118, section 4.2)."""
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    return (1 - 1 / (alpha * lengths.double()).clamp(min=1.0)).clamp(min=0.0)


def vapo(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam_policy: float | Tensor | None = None,
    lam_value: float = 1.0,
    alpha: float = 0.05,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GAE with one lambda for the policy's advantages and another for the critic's targets (VAPO, Yue et al. 2025,
    arXiv:2504.05118, section 4.1).

    Args: as gae's. lam_policy: a number, [S], or None: length_adaptive_lambda(alpha). lam_value: 1 gives the critic
        Monte Carlo returns, which carry no bias of its own.

    Returns:
        advantages [T] by lam_policy and returns [T] by lam_value.
    """
    how = dict(gamma=gamma, mask=mask, bootstrap=bootstrap)
    if lam_policy is None:
        lam_policy = length_adaptive_lambda(actions_of(cu_seqlens, mask), alpha)
    advantages, _ = gae(rewards, values, cu_seqlens, lam=lam_policy, **how)
    return advantages, gae(rewards, values, cu_seqlens, lam=lam_value, **how)[1]

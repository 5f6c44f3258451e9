"""Advantages: of completions from the rewards of their group ([S] vectors), of tokens from a value function ([T])."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-4  # TRL's; keeps near-tied groups finite without drowning real differences
SCALES = ("group", "batch", "none")


def group_normalised(rewards: Tensor, group_ids: Tensor, scale: str = "group") -> tuple[Tensor, Tensor]:
    """A = (R - mean of the group) / (std + 1e-4) (GRPO, Shao et al. 2024, section 4.1.2).

    Args:
        rewards: [S] float; NaN marks a completion that could not be scored. group_ids: [S] int.
        scale: "group" divides by the group's unbiased std, "batch" by the std of all rewards, "none" by nothing
            (Dr. GRPO, Liu et al. 2025).

    Returns:
        advantages [S] float32 (0 for unscored completions and groups with fewer than two scored ones) and
        std [S] of each completion's group (0 where undefined).
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; expected one of {', '.join(SCALES)}")
    if rewards.shape != group_ids.shape or rewards.dim() != 1:
        raise ValueError(f"rewards is {list(rewards.shape)} but group_ids {list(group_ids.shape)}; expected [S] both")
    # float64: near ties such as 1 and 1.00001 keep their sign and size.
    r = rewards.double()
    scored = ~torch.isnan(r)
    _, index = torch.unique(group_ids, return_inverse=True)
    groups = int(index.max()) + 1 if index.numel() else 0

    def total(x: Tensor) -> Tensor:
        return r.new_zeros(groups).index_add(0, index, x)[index]

    count = total(scored.double())
    mean = total(r.nan_to_num(0.0)) / count.clamp(min=1)
    centred = torch.where(scored & (count > 1), r - mean, torch.zeros_like(r))
    std = (total(centred.square()) / (count - 1).clamp(min=1)).sqrt()
    if scale == "group":
        centred = centred / (std + EPS)
    elif scale == "batch":
        seen = r[scored]
        spread = seen.std() if seen.numel() > 1 else r.new_zeros(())
        centred = centred / (spread + EPS)
    return centred.float(), std.float()


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over packed sequences, each its own episode.

        delta_t = r_t + gamma V_next - V_t,   A_t = delta_t + gamma lam A_next,   return_t = A_t + V_t

    `next` is the next action of the same sequence; after the last one A = 0 and V = bootstrap.

    Args:
        rewards, values: [T] float; values[t] is V of the state in which token t is chosen.
        cu_seqlens: [S+1] int, ascending from 0 to T.
        gamma, lam: discount and trace decay, in [0, 1].
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


def check_gae(rewards, values, cu_seqlens, gamma: float, lam: float, mask, bootstrap) -> None:
    """ValueError or TypeError naming what gae cannot take; the numbers of cu_seqlens are read on the CPU only."""
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= x <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {x}")
    if rewards.dim() != 1 or not rewards.is_floating_point() or not values.is_floating_point():
        got = f"rewards {list(rewards.shape)} {rewards.dtype}, values {values.dtype}"
        raise ValueError(f"rewards and values must be float [T], got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64 [S+1], got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    t, s = rewards.shape[0], cu_seqlens.shape[0] - 1
    for name, x, letter, size in (("values", values, "T", t), ("mask", mask, "T", t), ("bootstrap", bootstrap, "S", s)):
        if x is not None and x.shape != (size,):
            raise ValueError(f"{name} must be [{letter}={size}], got {list(x.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = an action), got {mask.dtype}; use mask.bool()")
    if cu_seqlens.device.type == "cpu":
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != t or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to T={t}; got {cu_seqlens.tolist()[:20]}")

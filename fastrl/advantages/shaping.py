"""Rewards before they become advantages: KL penalties, token rewards, prices on length. NaN (unscored) stays NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.pools import Pools


def token_rewards(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    kl: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """[T] r_t = R 1[t is the last trained token] - beta kl_t, the reward with the KL penalty inside (Ziegler et al.
    2019, arXiv:1909.08593, eq. 2; Ouyang et al. 2022).

    Args:
        rewards: [S] float; NaN (unscored) makes NaN of all trained tokens of its sequence. cu_seqlens: [S+1] int.
        mask: [T] bool, True where trained: others get 0 and are not read. kl: [T] estimate at each token between the
            policy that sampled and the reference, fastrl.losses.kl_estimate(kind, old_logprobs, ref_logprobs);
            unbiased as k1. beta: its price.

    A sequence without a trained token loses its reward: there is nobody to give it to.
    """
    starts, t = cu_seqlens.long(), int(cu_seqlens[-1])
    if rewards.shape != (starts.shape[0] - 1,):
        raise ValueError(f"rewards must be [S={starts.shape[0] - 1}] to match cu_seqlens, got {list(rewards.shape)}")
    if beta and kl is None:
        raise ValueError(f"beta is {beta} but kl is None; give the estimate [T] at each token")
    mask = torch.ones(t, dtype=torch.bool, device=rewards.device) if mask is None else mask
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    owner = torch.repeat_interleave(starts.diff(), output_size=t)
    counted = torch.nn.functional.pad(mask.long().cumsum(0), (1, 0))
    last = mask & (counted[1:] == counted[starts[1:]][owner])
    own = rewards.to(dtype)[owner]
    made = torch.where(last | torch.isnan(own), own, 0.0)
    if beta:
        made = made - beta * kl.to(dtype)
    return torch.where(mask, made, 0.0)


def kl_penalised(
    rewards: Tensor, kl: Tensor, cu_seqlens: Tensor, *, beta: float, mask: Tensor | None = None
) -> Tensor:
    """[S] R - beta sum_t kl_t over the trained tokens: the penalty for estimators of whole completions (RLOO, TRL)."""
    kl = kl.double() if mask is None else torch.where(mask, kl.double(), 0.0)
    owner = torch.repeat_interleave(cu_seqlens.long().diff(), output_size=kl.shape[0])
    total = kl.new_zeros(rewards.shape[0]).index_add(0, owner, kl)
    return (rewards.double() - beta * total).to(torch.promote_types(rewards.dtype, torch.float32))


def soft_overlong(lengths: Tensor, *, limit: int, buffer: int, factor: float = 1.0) -> Tensor:
    """[S] factor * clip((limit - buffer - n) / buffer, -1, 0): to be added to the reward (DAPO, Yu et al. 2025,
    arXiv:2503.14476, eq. 13). lengths: [S] tokens n. buffer=0: -factor past the limit, else 0."""
    if buffer < 0 or limit < buffer:
        raise ValueError(f"expected 0 <= buffer <= limit, got buffer {buffer} and limit {limit}")
    n = lengths.double()
    if buffer == 0:
        return -factor * (n > limit).float()
    return (factor * ((limit - buffer - n) / buffer).clamp(-1.0, 0.0)).float()


def length_penalised(rewards: Tensor, group_ids: Tensor, **prices: tuple[float, Tensor]) -> Tensor:
    """[S] R - mean_g(R) sum_c price_c n_c / max_g n_c: what a completion uses costs a share of what its group earns.

    prices: any name = (price, [S] how much of it was used): completion tokens, input tokens, turns. The maximum is the
    group's, over scored completions; a group that used nothing pays nothing.
    """
    r = rewards.double()
    groups = Pools.of_groups(~torch.isnan(r), group_ids)
    mean = groups.total(r) / groups.size(r).clamp(min=1)
    share = torch.zeros_like(r)
    for name, (price, used) in prices.items():
        if used.shape != r.shape:
            raise ValueError(f"{name} must be [S={r.shape[0]}], got {list(used.shape)}")
        most = groups.greatest(used.double())
        share = share + price * torch.where(most > 0, used.double() / most, 0.0)
    return (r - mean * share).to(torch.promote_types(rewards.dtype, torch.float32))

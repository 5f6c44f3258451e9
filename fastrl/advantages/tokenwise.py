"""Advantages of tokens, [T], that compare them with the batch or with the other trajectories of their group.

NaN marks what is unscored: it takes no part and gets 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.pools import Everywhere, Pools, alone, z_score
from fastrl.advantages.returns import discounted_returns


# -- over the batch ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def whitened(
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    everywhere: Everywhere = alone,
) -> Tensor:
    """[T] (A - mean) / sqrt(var + eps) over the actions of all ranks; 0 where mask is False or A is NaN (unscored).

    shift_mean=False puts the mean back. unbiased: the variance divides by n - 1. Whiten advantages, never returns.
    """
    seen = ~torch.isnan(advantages)
    if mask is not None:
        if mask.shape != advantages.shape or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool {list(advantages.shape)}, got {list(mask.shape)} {mask.dtype}")
        seen = seen & mask
    pool = Pools.of_all(seen, everywhere)
    made = z_score(advantages, pool, shift_mean=shift_mean, unbiased=unbiased, eps=eps)
    return made.to(torch.promote_types(advantages.dtype, torch.float32))


def reinforce_pp_tokens(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    everywhere: Everywhere = alone,
) -> Tensor:
    """[T] whitened discounted returns of token rewards, as token_rewards makes them of terminal rewards and a KL
    penalty (REINFORCE++, Hu et al. 2025, arXiv:2501.03262, section 3)."""
    returns = discounted_returns(rewards, cu_seqlens, gamma=gamma, mask=mask)
    return whitened(returns, mask, eps=eps, everywhere=everywhere)


# -- over the group, token by token ------------------------------------------------------------------------------------
@torch.no_grad()
def optimal_token_baseline(
    rewards: Tensor,
    logprobs: Tensor,
    log_sum_sq_probs: Tensor,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    zero_tail: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """[T] A_t = G_t - B_t with the baseline of least variance for the t-th action of a group's trajectories:

        B_t = sum_i G_it W_it / (sum_i W_it + eps),   W_it = sum_{s <= t} w_is^2 (1 - 2 p_is + sum_v p_v^2)

    G is the reward-to-go and 1 - 2 p + sum p^2 the squared norm of the score of the logits; the sums run over the
    trajectories that have a t-th action (verl's optimal_token_baseline).

    Args:
        rewards, logprobs, log_sum_sq_probs: [T]; p = exp(logprobs) of the sampling policy. cu_seqlens: [S+1].
        group_ids: [S] int. mask: [T] bool, True for actions. weights: [T] importance weights w to the rollout policy.
        zero_tail: where one trajectory is alone its baseline would be its own return: take 0 there instead.
    """
    t = rewards.shape[0]
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    togo = discounted_returns(rewards, cu_seqlens, mask=mask).double()
    energy = 1 - 2 * logprobs.double().exp() + log_sum_sq_probs.double().exp()
    energy = torch.where(mask, energy.clamp(min=0.0), 0.0)
    if weights is not None:
        energy = energy * torch.where(mask, weights.double().square(), 0.0)
    owner = torch.repeat_interleave(cu_seqlens.long().diff(), output_size=t)
    before = lambda x: torch.nn.functional.pad(x.cumsum(0), (1, 0))[cu_seqlens.long()[:-1]][owner]  # noqa: E731
    path = energy.cumsum(0) - before(energy)
    step = mask.long().cumsum(0) - before(mask.long())
    # One pool for each group and step.
    place = torch.unique(group_ids, return_inverse=True)[1][owner] * (t + 1) + step
    pool = Pools.of_groups(mask & ~torch.isnan(togo), place)
    baseline = pool.total(togo * path) / (pool.total(path) + eps)
    if zero_tail:
        baseline = torch.where(pool.size(togo) > 1, baseline, 0.0)
    made = torch.where(pool.seen, togo - baseline, 0.0)
    return made.to(torch.promote_types(rewards.dtype, torch.float32))


@torch.no_grad()
def process_grpo(
    rewards: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    *,
    mask: Tensor | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """[T] GRPO with process supervision: the rewards of all steps of a group's completions are normalised together,
    and a token gets the sum of those of its own step and of the steps to come (Shao et al. 2024, arXiv:2402.03300,
    section 4.1.3).

    Args:
        rewards: [T], read where step_ends [T] bool is True: the last token of each step; NaN: a step unscored, which
            counts as average. cu_seqlens: [S+1]. group_ids: [S]. mask: [T] bool, True where trained.
    """
    owner = torch.repeat_interleave(cu_seqlens.long().diff(), output_size=rewards.shape[0])
    ends = step_ends if mask is None else step_ends & mask
    r = rewards.double()
    steps = Pools.of_groups(ends & ~torch.isnan(r), group_ids[owner])
    spread = steps.std(r)
    scores = steps.centred(r) / torch.where(spread > 0, spread + eps, 1.0)
    made = discounted_returns(scores, cu_seqlens, mask=mask)
    return made.to(torch.promote_types(rewards.dtype, torch.float32))

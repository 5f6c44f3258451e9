"""Advantages of whole completions from their rewards. Every estimator is called as

    estimator(rewards [S], group_ids [S], **columns and numbers that it names, everywhere=...) -> [S]

rewards: float; NaN marks a completion that nobody could score: it takes no part in any statistic and gets advantage 0.
group_ids: int, which prompt each completion answers; a group lies on one rank whole. Statistics of the batch are those
of all ranks: everywhere(x [n] of this rank) -> [ranks * n]. Sums are float64; the result is float32 (float64 for
float64 rewards), without a graph. A group with one scored completion has nothing to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.advantages.pools import Everywhere, Pools, alone, given, scored, z_score
from fastrl.advantages.subsets import pass_at_k, pass_at_k_best, pkpo

EPS = 1e-4  # TRL's; keeps near-tied groups finite without drowning real differences
SCALES = ("group", "batch", "none")


def group_normalised(
    rewards: Tensor, group_ids: Tensor, scale: str = "group", everywhere: Everywhere = alone
) -> tuple[Tensor, Tensor]:
    """A = (R - mean of the group) / (std + 1e-4) (GRPO, Shao et al. 2024, section 4.1.2).

    Args:
        scale: "group" divides by the group's unbiased std, "batch" by the std of all rewards, "none" by nothing
            (Dr. GRPO, Liu et al. 2025).

    Returns:
        advantages [S] float32 (0 for unscored completions and groups with fewer than two scored ones) and
        std [S] of each completion's group (0 where undefined).
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; expected one of {', '.join(SCALES)}")
    r, groups = scored(rewards, group_ids)
    made = normalised(rewards, group_ids, std=scale, everywhere=everywhere)
    # The std of the group is reported for its unscored completions too.
    std = Pools(torch.ones_like(groups.seen), groups.index, groups.count).greatest(groups.std(r))
    return made.float(), std.float()


@torch.no_grad()
def normalised(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    mean: str = "group",
    std: str = "group",
    leave_one_out: bool = False,
    leave_one_out_std: bool = False,
    unbiased: bool = True,
    eps: float = EPS,
    everywhere: Everywhere = alone,
) -> Tensor:
    """(R - mean) / (std + eps), each taken over the group, the batch (of all ranks), or left out ("none").

    leave_one_out: the mean of the others instead, R - mean_{-i} = n/(n-1) (R - mean). leave_one_out_std: the std of the
    others. unbiased: divide by n-1. A std that is 0 or undefined divides nothing.
    """
    for name, level in (("mean", mean), ("std", std)):
        if level not in SCALES:
            raise ValueError(f"{name} is {level!r}; expected one of {', '.join(SCALES)}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    r, groups = scored(rewards, group_ids)
    pools = {"group": groups, "batch": Pools.of_all(groups.seen, everywhere)}
    made = torch.where(groups.seen, r, 0.0)
    if mean != "none":
        made = pools[mean].centred(r)
        if leave_one_out:
            n = pools[mean].size(r)
            made = made * n / (n - 1).clamp(min=1)
    if std != "none":
        spread = pools[std].std_of_others(r, unbiased) if leave_one_out_std else pools[std].std(r, unbiased)
        made = torch.where(spread > 0, made / torch.where(spread > 0, spread + eps, 1.0), made)
    return given(made, rewards)


# -- one group after the other -----------------------------------------------------------------------------------------
def grpo(rewards: Tensor, group_ids: Tensor, *, unbiased: bool = True, eps: float = EPS) -> Tensor:
    """(R - mean_g) / (std_g + eps) (Shao et al. 2024, arXiv:2402.03300, section 4.1.2)."""
    return normalised(rewards, group_ids, unbiased=unbiased, eps=eps)


def dr_grpo(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """R - mean_g (Liu et al. 2025, arXiv:2503.20783): no division, so that hard and easy prompts weigh alike."""
    return normalised(rewards, group_ids, std="none")


@torch.no_grad()
def rloo(
    rewards: Tensor, group_ids: Tensor, *, normalise: bool = False, eps: float = EPS, everywhere: Everywhere = alone
) -> Tensor:
    """R - mean of the others of the group (Ahmadian et al. 2024, arXiv:2402.14740).

    normalise: then the z-score over all completions that had others, / (std + eps) (TRL's normalize_advantages).
    """
    made = normalised(rewards, group_ids, std="none", leave_one_out=True)
    if not normalise:
        return made
    r, groups = scored(rewards, group_ids)
    compared = Pools.of_all(groups.seen & (groups.size(r) > 1), everywhere)
    spread = compared.std(made.double())
    return given(compared.centred(made.double()) / torch.where(spread > 0, spread + eps, 1.0), rewards)


@torch.no_grad()
def opo(rewards: Tensor, group_ids: Tensor, *, lengths: Tensor) -> Tensor:
    """R - sum_j n_j R_j / sum_j n_j over the group (OPO, Hao et al. 2025, arXiv:2505.23585): the baseline of least
    variance where gradient norms grow with length. lengths: [S] trained tokens n."""
    r, groups = scored(rewards, group_ids)
    return given(groups.centred(r, _positive_lengths(lengths, r)), rewards)


@torch.no_grad()
def max_rl(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(R - mean_g) / mean_g, and 0 where mean_g <= 0: hard prompts count most (MaxRL, Tajwar et al. 2026,
    arXiv:2602.02710)."""
    r, groups = scored(rewards, group_ids)
    mean = groups.total(r) / groups.size(r).clamp(min=1)
    made = groups.centred(r) / torch.where(mean > 0, mean, 1.0)
    return given(torch.where(mean > 0, made, 0.0), rewards)


@torch.no_grad()
def optimal_values(rewards: Tensor, group_ids: Tensor, *, beta: float = 0.5) -> Tensor:
    """[S] V* = beta log mean_g exp(R / beta), the prompt's value under the optimal policy of strength beta
    (A*-PO, Brantley et al. 2025, arXiv:2505.20686); for every completion of the group, 0 if none is scored."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    r, groups = scored(rewards, group_ids)
    best, n = groups.greatest(r), groups.size(r)
    mean = groups.total(torch.exp((r - best) / beta)) / n.clamp(min=1)
    return given(torch.where(n > 0, best + beta * torch.where(n > 0, mean, 1.0).log(), 0.0), rewards)


@torch.no_grad()
def a2po(rewards: Tensor, group_ids: Tensor, *, beta: float = 0.5) -> Tensor:
    """R - V*: the optimal advantage that A*-PO regresses on (arXiv:2505.20686)."""
    return given(rewards.double() - optimal_values(rewards.double(), group_ids, beta=beta), rewards)


# -- the batch as well -------------------------------------------------------------------------------------------------
def lite_ppo(rewards: Tensor, group_ids: Tensor, *, eps: float = EPS, everywhere: Everywhere = alone) -> Tensor:
    """(R - mean_g) / (std of all rewards + eps) (Liu et al. 2025, arXiv:2508.08221; TRL's scale_rewards="batch")."""
    return normalised(rewards, group_ids, std="batch", eps=eps, everywhere=everywhere)


@torch.no_grad()
def reinforce_pp(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    lengths: Tensor | None = None,
    eps: float = 1e-8,
    everywhere: Everywhere = alone,
) -> Tensor:
    """z-score of R over the tokens of the batch: REINFORCE++ (Hu et al. 2025, arXiv:2501.03262) without discount or KL,
    for which see reinforce_pp_tokens. lengths: [S] trained tokens; None: every completion counts once.
    """
    r, groups = scored(rewards, group_ids)
    return given(_over_tokens(r, groups.seen, lengths, eps, everywhere), rewards)


@torch.no_grad()
def reinforce_pp_baseline(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    lengths: Tensor | None = None,
    eps: float = 1e-8,
    everywhere: Everywhere = alone,
) -> Tensor:
    """z-score of R - mean_g over the tokens of the batch (Hu et al. 2025, REINFORCE++-baseline)."""
    r, groups = scored(rewards, group_ids)
    return given(_over_tokens(groups.centred(r), groups.seen, lengths, eps, everywhere), rewards)


def _over_tokens(x: Tensor, seen: Tensor, lengths: Tensor | None, eps: float, everywhere: Everywhere) -> Tensor:
    weights = None if lengths is None else _positive_lengths(lengths, x)
    return z_score(x, Pools.of_all(seen, everywhere), weights=weights, eps=eps)


@torch.no_grad()
def gpg(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    valid: str = "mixed_groups",
    scale: float = 1.0,
    everywhere: Everywhere = alone,
) -> Tensor:
    """(R - mean_g) / scale * B / B_valid: the gradient averaged over the completions of the batch that have one (GPG,
    Chu et al. 2025, arXiv:2504.02546: accurate gradient estimation).

    valid: what B_valid counts: completions of "mixed_groups", where not all are equal (the paper's B - M), or those of
        "nonzero_reward". scale: the paper's F_norm.
    """
    if valid not in ("mixed_groups", "nonzero_reward"):
        raise ValueError(f"valid is {valid!r}; expected mixed_groups or nonzero_reward")
    r, groups = scored(rewards, group_ids)
    everyone = Pools.of_all(groups.seen, everywhere)
    counted = groups.greatest(r) > groups.least(r) if valid == "mixed_groups" else r != 0
    share = everyone.size(r) / everyone.total(counted.double()).clamp(min=1)
    return given(groups.centred(r) * share / scale, rewards)


@torch.no_grad()
def gdpo(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    components: Tensor,
    weights: Tensor | None = None,
    eps: float = EPS,
    everywhere: Everywhere = alone,
) -> Tensor:
    """Each reward normalised in its group, summed with its weight, then the z-score over the batch: no reward's scale
    drowns another's (GDPO, Liu et al. 2026, arXiv:2601.05242; TRL's "normalize_then_sum").

    components: [S, K] float, NaN where a function gave no score; weights: [K], default 1 each. rewards only tells which
    completions are unscored; those whose components are all NaN are too.
    """
    r, groups = scored(rewards, group_ids)
    if components.dim() != 2 or components.shape[0] != r.shape[0]:
        raise ValueError(f"components must be [S={r.shape[0]}, K], got {list(components.shape)}")
    if weights is not None and weights.shape != components.shape[1:]:
        raise ValueError(f"weights must be [K={components.shape[1]}], got {list(weights.shape)}")
    total = torch.zeros_like(r)
    for k, column in enumerate(components.double().unbind(1)):
        part = normalised(torch.where(groups.seen, column, torch.nan), group_ids, eps=eps)
        total = total + part * (1.0 if weights is None else float(weights[k]))
    seen = groups.seen & ~torch.isnan(components).all(1)
    pool = Pools.of_all(seen, everywhere)
    spread = pool.std(total)
    return given(pool.centred(total) / torch.where(spread > 0, spread + eps, 1.0), rewards)


# -- a baseline from elsewhere -----------------------------------------------------------------------------------------
@torch.no_grad()
def remax(rewards: Tensor, group_ids: Tensor, *, greedy_rewards: Tensor) -> Tensor:
    """R - reward of the greedy completion of the same prompt (ReMax, Li et al. 2024, arXiv:2310.10505).

    greedy_rewards: [S]; NaN (unscored) leaves nothing to compare with: advantage 0.
    """
    if greedy_rewards.shape != rewards.shape:
        raise ValueError(f"greedy_rewards must be [S={rewards.shape[0]}], got {list(greedy_rewards.shape)}")
    return given(rewards.double() - greedy_rewards.double(), rewards)


def raw(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A = R, 0 where unscored."""
    return normalised(rewards, group_ids, mean="none", std="none")


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "lite_ppo": lite_ppo,
    "normalised": normalised,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "remax": remax,
    "opo": opo,
    "gpg": gpg,
    "pass_at_k_best": pass_at_k_best,
    "pass_at_k": pass_at_k,
    "pkpo": pkpo,
    "max_rl": max_rl,
    "gdpo": gdpo,
    "a2po": a2po,
    "raw": raw,
}


# -- helpers -----------------------------------------------------------------------------------------------------------
def peer_groups(*ids: Tensor) -> Tensor:
    """[S] one id for each combination of these ids [S]: completions of one prompt in one role, say, who are then
    compared with their peers only (hierarchical GRPO)."""
    return torch.unique(torch.stack(ids), dim=1, return_inverse=True)[1]


def _positive_lengths(lengths: Tensor, r: Tensor) -> Tensor:
    if lengths.shape != r.shape:
        raise ValueError(f"lengths must be [S={r.shape[0]}], got {list(lengths.shape)}")
    return lengths.double()

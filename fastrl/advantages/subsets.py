"""Advantages that pay the best of several completions: pass@k and the expected maximum of k."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.pools import Pools, given, scored

EPS = 1e-4


@torch.no_grad()
def pass_at_k_best(rewards: Tensor, group_ids: Tensor, *, normalise: bool = False, eps: float = EPS) -> Tensor:
    """R_best - R_second for the best completion of the group, 0 for the others (Tang et al. 2025, arXiv:2503.19595).

    normalise: / (std_g + eps). Tied bests have difference 0.
    """
    r, groups = scored(rewards, group_ids)
    best = groups.greatest(r)
    is_best = groups.seen & (r == best)
    alone_at_the_top = is_best & (groups.total(is_best.double()) == 1) & (groups.size(r) > 1)
    rest = Pools(groups.seen & ~is_best, groups.index, groups.count).greatest(r)
    made = torch.where(alone_at_the_top, r - rest, 0.0)
    return given(made / (groups.std(r) + eps) if normalise else made, rewards)


@torch.no_grad()
def pass_at_k(rewards: Tensor, group_ids: Tensor, *, k: int = 4) -> Tensor:
    """The mean advantage of a completion over all k-subsets that it is in, each paid if one of it is right.

    With N scored completions of which W are wrong (reward <= 0), p = 1 - C(W, k)/C(N, k), sd = sqrt(p (1 - p)):
    right ones get (1 - p)/sd, wrong ones (1 - p - C(W-1, k-1)/C(N-1, k-1))/sd; 0 where sd = 0 or N < k
    (Chen et al. 2025, arXiv:2508.10751, analytical derivation).
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    r, groups = scored(rewards, group_ids)
    wrong = groups.seen & (r <= 0)
    n, w = groups.size(r), groups.total(wrong.double())
    none_right = _share_of_subsets(w, n, k)
    none_right_with_me = _share_of_subsets(w - 1, n - 1, k - 1)
    # sd = 0 exactly where every subset is right or none is: decided on counts, not on rounded shares.
    mixed = groups.seen & (n >= k) & (w >= k) & (w < n)
    sd = torch.where(mixed, none_right * (1 - none_right), 1.0).sqrt()
    made = (none_right - torch.where(wrong, none_right_with_me, 0.0)) / sd
    return given(torch.where(mixed, made, 0.0), rewards)


def _share_of_subsets(of: Tensor, n: Tensor, k: int) -> Tensor:
    """C(of, k) / C(n, k) = prod_{j < k} (of - j) / (n - j), and 0 where of < k."""
    share = torch.ones_like(n)
    for j in range(k):
        share = share * (of - j).clamp(min=0) / (n - j).clamp(min=1)
    return share


@torch.no_grad()
def pkpo(rewards: Tensor, group_ids: Tensor, *, k: int = 4) -> Tensor:
    """k times the mean, over the k-subsets that a completion is in, of what it adds to their maximum:

        A_i = k mean_{I with i, |I| = k} (max_I R - max_{I without i} R)

    The mean over completions of A grad log pi is an unbiased gradient of the expected maximum of k rewards, of any kind
    (PKPO, Walder and Karkhanis 2025, arXiv:2505.15201, leave-one-out minus one). 0 in groups of fewer than k; k >= 2.
    """
    if k < 2:
        raise ValueError(f"k must be at least 2, got {k}; the maximum of one is the reward: use rloo")
    r, groups = scored(rewards, group_ids)
    rows = groups.seen.nonzero().squeeze(1)
    rows = rows[torch.argsort(r[rows], stable=True)]
    rows = rows[torch.argsort(groups.index[rows], stable=True)]  # group by group, each in ascending order
    n, group, own = groups.size(r)[rows], groups.index[rows], r[rows]
    first = torch.searchsorted(group, group)
    below = torch.arange(len(rows), device=r.device) - first
    gap = torch.where(below > 0, own - own.roll(1), 0.0)
    # Among p below, C(p, k-1) subsets have i on top and q second in C(q, k-2) of them; summed by parts over the gaps
    # between neighbours, sum_{q < p} (R_i - R_q) C(q, k-2) = sum_{j <= p} gap_j C(j, k-1), nothing cancels.
    share = gap * _share_of_subsets(below, n - 1, k - 1)
    upto = torch.nn.functional.pad(share.cumsum(0), (1, 0))
    added = torch.where(n >= k, k * (upto[1:] - upto[first]), 0.0)
    return given(torch.zeros_like(r).index_copy(0, rows, added), rewards)

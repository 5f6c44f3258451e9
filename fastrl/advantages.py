"""Advantages from rewards of groups: one prompt, several completions. Pure functions of [S] vectors."""

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

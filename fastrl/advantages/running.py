"""Baselines that remember: a running mean of rewards for each agent or role."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.advantages.pools import Everywhere, alone


class RunningBaseline:
    """Role-conditioned advantage estimation (RAE; SPIRAL, Liu et al. 2025, arXiv:2506.24119, section 3.3).

        A = R - b[role],   then   b[role] <- decay b[role] + (1 - decay) mean of the role's rewards in this batch

    Scored before the update, so that no completion is in its own baseline; one update a batch, so that the order of its
    completions does not matter. Unscored completions (NaN) get 0 and change nothing. All ranks keep the same baselines.

    Args: decay: in [0, 1). roles: how many roles there are, 0 ... roles - 1.
    """

    def __init__(self, roles: int, decay: float = 0.95):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if roles < 1:
            raise ValueError(f"roles must be at least 1, got {roles}")
        self.decay, self.means = decay, [0.0] * roles

    def __call__(self, rewards: Tensor, roles: Tensor, everywhere: Everywhere = alone) -> Tensor:
        """rewards [S] float, roles [S] int -> advantages [S]."""
        if rewards.shape != roles.shape or rewards.dim() != 1:
            raise ValueError(f"rewards is {list(rewards.shape)} but roles {list(roles.shape)}; expected [S] both")
        count = len(self.means)
        if roles.numel() and not 0 <= int(roles.min()) <= int(roles.max()) < count:
            raise ValueError(f"roles must be in 0 ... {count - 1}, got {int(roles.min())} ... {int(roles.max())}")
        r = rewards.detach().double()
        seen = ~torch.isnan(r)
        baseline = r.new_tensor(self.means)
        made = torch.where(seen, r - baseline[roles], 0.0)
        own = r.new_zeros(2, count).index_add(1, roles, torch.stack([seen.double(), r.nan_to_num(0.0)]))
        present, total = everywhere(own.flatten()).view(-1, 2, count).sum(0)
        after = self.decay * baseline + (1 - self.decay) * total / present.clamp(min=1)
        self.means = torch.where(present > 0, after, baseline).tolist()
        return made.to(torch.promote_types(rewards.dtype, torch.float32))

    def state_dict(self) -> dict:
        return {"means": list(self.means)}

    def load_state_dict(self, state: dict) -> None:
        if len(state["means"]) != len(self.means):
            raise ValueError(f"the state has {len(state['means'])} roles, this baseline {len(self.means)}")
        self.means = list(state["means"])

"""Muon for the matrices of the body and AdamW for the rest, as one optimizer; on whole weights and on split ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastrl.train.optim.norm import local, split_over

# AdamW's rate and decay fit Muon too when its update is scaled to AdamW's size (Liu et al. 2025, arXiv 2502.16982).
SCALE = "match_rms_adamw"


class RowMuon(torch.optim.Muon):
    """torch.optim.Muon for weights of which a rank may hold some rows: momentum stays split, the matrix that is
    orthogonalised is gathered, one at a time, and each rank keeps its rows of the result."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        everyone = self.param_groups
        for group in everyone:
            params = [p for p in group["params"] if p.grad is not None]
            self.param_groups = [{**group, "params": [p for p in params if split_over(p) is None]}]
            super().step()
            for p in params:
                if split_over(p) is not None:
                    self._split_step(p, group)
        self.param_groups = everyone

    def _split_step(self, p: Tensor, group: dict) -> None:
        state, momentum, g = self.state[p], group["momentum"], local(p.grad)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        buffer = local(state["momentum_buffer"])
        buffer.lerp_(g, 1 - momentum)
        update = g.lerp(buffer, momentum) if group["nesterov"] else buffer
        moved = whole_step(gathered(update, p), p.dtype, group)
        rows = DTensor.from_local(moved, p.device_mesh, run_check=False).redistribute(placements=p.placements)
        weights = local(p)
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.add_(rows.to_local())


def gathered(update: Tensor, p: DTensor) -> Tensor:
    """[R, C] of all ranks, through bfloat16: in it torch orthogonalises anyway, so nothing is lost."""
    half = update.bfloat16()
    split = DTensor.from_local(half, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    return split.full_tensor()


def whole_step(update: Tensor, dtype: torch.dtype, group: dict) -> Tensor:
    """What torch.optim.Muon adds to a weight whose momentum update is `update`: one step from 0 without momentum."""
    weight = nn.Parameter(torch.zeros_like(update, dtype=dtype))
    weight.grad = update.to(dtype)
    own = {k: group[k] for k in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([weight], weight_decay=0.0, momentum=0.0, nesterov=False, **own).step()
    return weight.detach()


class MuonAdamW(torch.optim.Optimizer):
    """Two of torch's optimizers behind one: they share this one's states, and its groups are theirs.

    A group's lr_scale multiplies the learning rate of the schedule.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW | None):
        engines = [e for e in (adamw, muon) if e is not None]
        groups = [{**group, "engine": i} for i, engine in enumerate(engines) for group in engine.param_groups]
        super().__init__(groups, {})
        self.engines = engines

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for i, engine in enumerate(self.engines):
            engine.state = self.state
            engine.param_groups = [g for g in self.param_groups if g["engine"] == i]
            engine.step()

"""The norm of gradients of which this rank may hold a part, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def split_over(x: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold the other parts of x; None where this one has all of it."""
    if not isinstance(x, DTensor):
        return None
    dims = [i for i, placement in enumerate(x.placements) if isinstance(placement, Shard)]
    if len(dims) > 1:
        raise ValueError(f"a tensor is split over {len(dims)} dimensions of the mesh; at most one is known here")
    return x.device_mesh.get_group(dims[0]) if dims else None


def square_of(x: Tensor) -> Tensor:
    """Sum of squares of the local part, 0-dim, accumulated in float32 at least and given in float64 (MPS: float32)."""
    x = local(x)
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return (norm if x.device.type == "mps" else norm.double()).square()


def whole_squares(squares: list[Tensor], tensors: Iterable[Tensor]) -> Tensor:
    """[n] sums of squares over all ranks, from those of the local parts: one all-reduce for each group of ranks."""
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for i, x in enumerate(tensors):
        if (group := split_over(x)) is not None:
            groups.setdefault(group, []).append(i)
    out = torch.stack([s.to(squares[0].device) for s in squares])
    for group, indices in groups.items():
        shared = torch.stack([squares[i] for i in indices])
        dist.all_reduce(shared, group=group)
        out[torch.tensor(indices, device=out.device)] = shared.to(out.device)
    return out


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """sqrt(sum of squares) over all entries, 0-dim, accumulated in float32 (float64 for float64 gradients).

    Of gradients split over ranks it is the norm of the whole; every rank that holds a part has to call it.
    """
    gradients = list(gradients)
    if not gradients:
        return torch.zeros(())
    if any(split_over(g) is not None for g in gradients):
        kind = torch.promote_types(gradients[0].dtype, torch.float32)
        return whole_squares([square_of(g) for g in gradients], gradients).sum().sqrt().to(kind)
    parts = [local(g) for g in gradients]
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in parts]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def clip_scale(norm: Tensor | float, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), as torch clips; 0-dim."""
    return (max_norm / (torch.as_tensor(norm) + 1e-6)).clamp(max=1.0)


def clip_gradients(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale in place by min(1, max_norm / (norm + 1e-6)); max_norm 0 leaves them. No host sync."""
    if max_norm > 0:
        scale = clip_scale(norm, max_norm)
        for g in map(local, gradients):
            g.mul_(scale.to(g.device))

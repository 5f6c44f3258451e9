"""GAE where the vectors are: the scan kernel on a GPU, the plain law of fastrl.advantages elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import advantages
from fastrl.ops import dispatch


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [T]: fastrl.advantages.gae, which is the definition, by the backend that fits.

    A lam for each sequence is scanned by the plain law everywhere.

    Args: as fastrl.advantages.gae; backend: None (the kernel on a GPU), "torch", "reference" or "triton". The kernel
        reads nothing back to the host.
    """
    advantages.check_gae(rewards, values, cu_seqlens, gamma, lam, mask, bootstrap)
    if isinstance(lam, Tensor) or dispatch.pick(backend, rewards) != "triton":
        options = dict(gamma=gamma, lam=lam, mask=mask, bootstrap=bootstrap)
        return advantages.gae(rewards, values, cu_seqlens, **options)
    from fastrl.kernels import gae as kernel

    with torch.cuda.device_of(rewards):
        return kernel.gae(rewards, values, cu_seqlens, gamma, lam, mask=mask, bootstrap=bootstrap)

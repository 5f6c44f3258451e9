"""The truth: every statistic from materialised logits in plain torch, gradients by autograd.

This is the definition, the oracle of the tests and the readable documentation. It forms the [N, V] logits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """[N, V] z = softcap * tanh(logit_scale * (h.W + b) / softcap) / temperature, in float32 (float64 for float64)."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).unsqueeze(-1)
    return z / temperature


def statistics(z: Tensor, targets: Tensor, outputs: tuple[str, ...] = ("logprobs",)) -> dict[str, Tensor]:
    """Per-row statistics of softmax(z): z [N, V], targets [N] in [0, V). Each value [N]; names as in TokenStats."""
    logp = torch.log_softmax(z, dim=-1)
    index = targets.long().unsqueeze(-1)
    # 0 * log 0 = 0: columns of probability zero (z = -inf) must give neither NaN values nor NaN gradients.
    seen = logp > -torch.inf
    safe = torch.where(seen, logp, torch.zeros_like(logp))
    made = {
        "logprobs": lambda: logp.gather(-1, index).squeeze(-1),
        "entropy": lambda: -(torch.where(seen, logp.exp(), torch.zeros_like(logp)) * safe).sum(-1),
        "logsumexp": lambda: torch.logsumexp(z, dim=-1),
        "log_sum_sq_probs": lambda: torch.logsumexp(2 * logp, dim=-1).detach(),
        "is_argmax": lambda: z.argmax(-1) == targets,
    }
    return {name: made[name]() for name in outputs}

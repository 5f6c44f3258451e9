"""The truth: every statistic from materialised logits in plain torch, gradients by autograd.

This is the definition, the oracle of the tests and the readable documentation. It forms the [N, V] logits.
"""

from __future__ import annotations

import math

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


def divergence(student: Tensor, teacher: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """[N] divergence of p = softmax(student) from q = softmax(teacher), both logits [N, V]; kinds as linear_divergence.

    forward_kl sum q log(q/p); reverse_kl sum p log(p/q); tvd sum |p - q| / 2; jsd beta KL(q||m) + (1-beta) KL(p||m)
    with m = beta q + (1-beta) p (Agarwal et al. 2024, eq. 1); mixed beta KL(q||p) + (1-beta) KL(p||q); skew_forward_kl
    KL(q||m), skew_reverse_kl KL(p||m). A word of probability zero adds nothing: 0 log 0 = 0.
    """
    a, b = torch.log_softmax(student, dim=-1), torch.log_softmax(teacher.detach(), dim=-1)
    if kind == "tvd":
        return (a.exp() - b.exp()).abs().sum(-1) / 2
    if kind == "forward_kl":
        return _kl(b, a)
    if kind == "reverse_kl":
        return _kl(a, b)
    if kind == "mixed":
        return beta * _kl(b, a) + (1 - beta) * _kl(a, b)
    floor = torch.finfo(a.dtype).min  # logaddexp(-inf, -inf) has no gradient
    low = torch.logaddexp(b.clamp(min=floor) + math.log(beta), a.clamp(min=floor) + math.log1p(-beta))
    if kind.startswith("skew"):
        return _kl(b, low) if kind == "skew_forward_kl" else _kl(a, low)
    return beta * _kl(b, low) + (1 - beta) * _kl(a, low)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """sum_v exp(a) (a - b), log-probs [N, V]; the terms of probability zero are left out, with their gradients."""
    seen = a > -torch.inf
    safe_a = torch.where(seen, a, torch.zeros_like(a))
    safe_b = torch.where(seen, b, torch.zeros_like(b))
    return torch.where(seen, safe_a.exp() * (safe_a - safe_b), torch.zeros_like(a)).sum(-1)

"""Per-token KL estimators between the policy and a reference, and exponentials that cannot overflow.

D = log pi(y) - log pi_ref(y) at the sampled token. Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

import torch
from torch import Tensor

LINEAR_FROM = 40.0  # e^40 = 2.4e17: past this point exp goes on as its tangent
KINDS = ("k1", "k2", "k3")


def safe_exp(x: Tensor) -> Tensor:
    """exp(x) for x <= 40; beyond, the tangent e^40 (1 + x - 40).

    Equal to exp wherever fp32 training can use it, finite with a finite gradient of the right sign everywhere else.
    A clamp would stop the gradient exactly where a policy has strayed farthest.
    """
    over = (x - LINEAR_FROM).clamp(min=0.0)
    return x.clamp(max=LINEAR_FROM).exp() * (1 + over)


def exp_above_tangent(x: Tensor) -> Tensor:
    """e^x - 1 - x >= 0, to full relative precision at every size, with safe_exp's tangent past 40.

    Near 0 both subtractions cancel: to eps/x^2 as written, to eps/x through expm1. There the series is summed instead,
    e^x - 1 - x = x^2/2 (1 + x/3 (1 + x/4 (1 + ...))), and so is, by autograd, the derivative e^x - 1.
    """
    small = x.abs() < 0.5
    near, far = torch.where(small, x, torch.zeros_like(x)), torch.where(small, torch.zeros_like(x), x)
    series = torch.ones_like(x)
    for n in range(18, 2, -1):
        series = 1 + near / n * series
    return torch.where(small, 0.5 * near.square() * series, safe_exp(far) - 1 - far)


def kl_estimate(kind: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[T] estimate of KL(pi || ref) at each sampled token, differentiable in logprobs.

    k1  D                    unbiased value; its gradient is noise with mean zero: use it in the reward, not the loss
    k2  D^2 / 2              gradient D: on policy, that of the reverse KL
    k3  e^-D - 1 + D         unbiased, >= 0; gradient 1 - e^-D: on policy, that of the forward KL (TRL's, GRPO's choice)
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return exp_above_tangent(-d)
    raise ValueError(f"kl is {kind!r}; expected one of {', '.join(KINDS)}")

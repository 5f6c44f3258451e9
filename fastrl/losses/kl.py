"""Per-token KL estimators between the policy and a reference, and exponentials that cannot overflow.

D = log pi(y) - log pi_ref(y) at the sampled token, d = log pi(y) - log pi_old(y). Schulman 2020, "Approximating KL
divergence". In the mean over tokens of the policy, k1 and k3 estimate KL(pi || ref); what their gradients estimate is
another matter, and the one that counts in a loss:

    kind        value             dvalue/dlogp     which is, on policy
    k1          D                 1                nothing: noise of mean zero (warned about)
    k2          D^2 / 2           D                the reverse KL's gradient
    k3          e^-D - 1 + D      1 - e^-D         the forward KL's gradient (GRPO's and TRL's choice)
    abs         |D|               sign D           that of |D|
    k1+ k3+ abs+  as without +    D                the value of one, the gradient of k2 (straight through)
    is_k1       r D               r (D + 1)        the reverse KL's, off policy too (r = e^d weighs by importance)
    is_k3       r (e^-D - 1 + D)  r D              the same with less variance (DeepSeek-V3.2, arXiv:2512.02556, eq. 7)
"""

from __future__ import annotations

import torch
from torch import Tensor

LINEAR_FROM = 40.0  # e^40 = 2.4e17: past this point exp goes on as its tangent
PLAIN = ("k1", "k2", "k3", "abs")
STRAIGHT_THROUGH = ("k1+", "k3+", "abs+")
CORRECTED = ("is_k1", "is_k3")
KINDS = (*PLAIN, *STRAIGHT_THROUGH, *CORRECTED)


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
    """[T] estimate of KL(pi || ref) at each sampled token, differentiable in logprobs; kinds without importance weight.

    Raises: ValueError for an unknown kind, or one that needs the sampling policy (see kl_corrected).
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return exp_above_tangent(-d)
    if kind == "abs":
        return d.abs()
    if kind in STRAIGHT_THROUGH:
        value, k2 = kl_estimate(kind[:-1], logprobs, ref_logprobs).detach(), 0.5 * d.square()
        return value + (k2 - k2.detach())
    raise ValueError(f"kl is {kind!r}; expected one of {', '.join((*PLAIN, *STRAIGHT_THROUGH))}")


def kl_corrected(kind: str, logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """[T] r times k1 or k3, r = pi / old with its gradient; old None: r is 1, with the gradient that it has there."""
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio, d = safe_exp(logprobs - old), logprobs - ref_logprobs
    if kind == "is_k1":
        return ratio * d
    if kind != "is_k3":
        raise ValueError(f"kl is {kind!r}; expected one of {', '.join(CORRECTED)}")
    # r e^-D = ref / old is a constant: apart from r it cannot overflow where r (e^-D) would, and has no gradient.
    small = d.abs() < 0.5
    near = ratio * exp_above_tangent(torch.where(small, -d, torch.zeros_like(d)))
    return torch.where(small, near, safe_exp(ref_logprobs - old) + ratio * (d - 1))

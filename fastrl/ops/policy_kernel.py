"""The clipped surrogate by its kernel: loss, coefficients and metrics of PPO, GRPO, DAPO and Dr. GRPO in one launch.

fastrl/losses/policy.py is the definition. An objective says that it is exactly that law by its `clipped_surrogate`;
any other objective, dtype or device is left to autograd over the [T] vectors (None is returned).
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.objective import Objective
from fastrl.ops.dispatch import has_triton
from fastrl.ops.head import Coefs
from fastrl.tokens import TokenBatch, TokenStats

if TYPE_CHECKING:
    from fastrl.kernels.policy_loss import PolicyLoss, Surrogate

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # exact in float32; float64 vectors keep the plain law
METRICS = {
    "clip_ratio/low_mean": "below",
    "clip_ratio/high_mean": "above",
    "clip_ratio/region_mean": "clipped",
    "ratio": "ratio",
    "kl": "kl",
}


def coefficients(
    objective: Objective, stats: TokenStats, batch: TokenBatch, weights: Tensor
) -> tuple[Tensor, Coefs] | None:
    """(loss, its derivative in each statistic) of T rows, or None where the kernel does not hold this law.

    Args:
        objective: any objective of scope token. stats: float32 [T]. batch: compact, T rows. weights: [T] float.
    Returns: loss: 0-dim float32. Coefs: logprobs [T] float32, entropy [T] if the law has an entropy term. A row of
        weight zero contributes nothing, whatever its values.
    Raises: ValueError if batch.advantages is None.
    """
    made = _launch(objective, stats, batch, weights)
    return None if made is None else (made.sums[0], Coefs(logprobs=made.c, entropy=made.h))


def metric_sums(
    objective: Objective, stats: TokenStats, batch: TokenBatch, weights: Tensor
) -> dict[str, Tensor] | None:
    """The sums over all T rows, weights aside, of what objective.metrics reports; None as in `coefficients`."""
    made = _launch(objective, stats, batch, weights)
    if made is None:
        return None
    from fastrl.kernels.policy_loss import SUMS

    names = [n for n in METRICS if n != "kl" or batch.ref_logprobs is not None]
    return {name: made.sums[SUMS.index(METRICS[name])] for name in names}


def _launch(objective: Objective, stats: TokenStats, batch: TokenBatch, weights: Tensor) -> PolicyLoss | None:
    law = _surrogate(objective) if _on_kernel_device(stats.logprobs) else None
    if law is None:
        return None
    if (law.kl and batch.ref_logprobs is None) or (law.entropy_coef and stats.entropy is None):
        return None  # the plain law says what is missing
    advantages = batch.token_advantages
    vectors = (stats.logprobs, stats.entropy, advantages, batch.old_logprobs, batch.ref_logprobs)
    if any(x is not None and (x.dtype not in NARROW or x.device != stats.logprobs.device) for x in vectors):
        return None
    if weights.device != stats.logprobs.device:
        return None
    from fastrl.kernels.policy_loss import policy_loss

    with torch.no_grad(), torch.cuda.device_of(stats.logprobs):
        return policy_loss(
            law,
            stats.logprobs.detach(),
            advantages.detach(),
            weights.detach(),
            old=batch.old_logprobs,
            ref=batch.ref_logprobs,
            entropy=stats.entropy,
        )


def _surrogate(objective: Objective) -> Surrogate | None:
    """The kernel's numbers, thresholds taken on d = log r as the definition takes them."""
    numbers = getattr(objective, "clipped_surrogate", None)
    if numbers is None:
        return None
    from fastrl.kernels.policy_loss import Surrogate

    dual = numbers.dual_clip
    return Surrogate(
        log_high=math.log1p(numbers.clip_high),
        log_low=math.log1p(-numbers.clip_low) if numbers.clip_low < 1 else -math.inf,
        log_dual=None if dual is None else math.log(dual),
        ratio_high=1 + numbers.clip_high,
        ratio_low=1 - numbers.clip_low,
        ratio_dual=dual or 1.0,
        kl=numbers.kl if numbers.kl_coef else None,
        kl_coef=numbers.kl_coef,
        entropy_coef=numbers.entropy_coef,
    )


def _on_kernel_device(x: Tensor) -> bool:
    if x.device.type == "cuda":
        return has_triton()
    if "triton" not in sys.modules:  # nobody interprets kernels without having loaded it, and loading it takes a while
        return False
    from fastrl.kernels.launch import interpreting

    return x.device.type == "cpu" and interpreting()

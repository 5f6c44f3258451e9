"""Several rewards as one: gates, worst cases, weights that follow the training, constraints; and one spread on tokens.

rewards [K, N]: K named components of N completions. Everything in float32 at least; an all-zero gate gives exactly 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- on the tokens of one completion -----------------------------------------------------------------------------------
def gated_tokens(holistic: float, aspects: Tensor, weight: float, threshold: float) -> Tensor:
    """ALaRM (Lai et al. 2024, arXiv:2403.06754): r_t = w h 1[t = T] + 1[h >= threshold] a_t, [T] from aspects [T]."""
    out = _wide(aspects) if holistic >= threshold else torch.zeros_like(_wide(aspects))
    out = out.clone()
    if out.numel():
        out[-1] += weight * holistic
    return out


def spread_by_attention(reward: float, attention: Tensor, beta: float = 0.5) -> Tensor:
    """ABC (Chan et al. 2024, arXiv:2402.00782): r_t = beta r a_t + (1 - beta) r 1[t = T]; the sum over t is r.

    attention [T]: of the reward model's last token over the response, renormalised here.
    """
    a = _wide(attention)
    if not a.numel():
        return a.clone()
    a = a / a.sum().clamp(min=torch.finfo(a.dtype).tiny)
    out = beta * reward * a
    out[-1] += reward - out.sum()
    return out


def span_rewards(values: Tensor, ends: Tensor, length: int) -> Tensor:
    """[length] rewards with values[j] at token ends[j], added up where spans end alike (Wu et al. 2023, 2306.01693)."""
    values = _wide(values)
    return values.new_zeros(length).index_add(0, ends.long(), values)


# -- over completions --------------------------------------------------------------------------------------------------
def gated_mix(reward: Tensor, metric: Tensor, valid: Tensor, share: float, lowest: float) -> Tensor:
    """[N] share * reward + (1 - share) * metric where the answer's structure is valid, else `lowest`."""
    mixed = share * _wide(reward) + (1 - share) * _wide(metric)
    return torch.where(valid.bool(), mixed, torch.full_like(mixed, lowest))


def worst_group(rewards: Tensor) -> Tensor:
    """[N] the component whose mean over the batch is lowest (MaxMin-RLHF, Chakraborty et al. 2024, 2402.08925)."""
    rewards = _wide(rewards)
    return rewards[rewards.nanmean(1).argmin()]


def mirror_weights(weights: Tensor, rewards: Tensor, rate: float) -> Tensor:
    """[K] softmax(log w - rate * mean reward): weight moves to what is doing badly (max-min composition)."""
    return torch.softmax(_wide(weights).log() - rate * _wide(rewards).nanmean(1), 0)


def gradient_norm_weights(probabilities: list[Tensor], targets: list[int], features: Tensor) -> Tensor:
    """[K, N] weights g / sum g of K style classifiers, g_k = ||p_k - onehot(target_k)|| ||h|| (2402.14146).

    probabilities: for each classifier [N, classes]. features: [N, H] or [K, N, H], the input of its last layer.
    """
    norms = []
    for k, (p, target) in enumerate(zip(probabilities, targets, strict=True)):
        gap = _wide(p).clone()
        gap[:, target] -= 1
        h = features[k] if features.dim() == 3 else features
        norms.append(gap.norm(dim=1) * _wide(h).norm(dim=1))
    g = torch.stack(norms)
    total = g.sum(0)
    return torch.where(total > 0, g / total.clamp(min=1e-30), torch.full_like(g, 1 / len(norms)))


def exp3_probabilities(arms: Tensor, gamma: float) -> Tensor:
    """[K+1] (1 - gamma) w / sum w + gamma / (K + 1); the last arm leaves the weights as they are (2403.13578)."""
    arms = _wide(arms)
    return (1 - gamma) * arms / arms.sum() + gamma / arms.numel()


def exp3_step(weights: Tensor, arm: int, probability: float, gain: float = 1.0, gamma: float = 0.07) -> Tensor:
    """[K] weights with w_arm *= exp(gamma gain / (K p)); an arm past the last leaves them as they are."""
    out = _wide(weights).clone()
    if arm < out.numel():
        out[arm] *= math.exp(gamma * gain / (out.numel() * probability))
    return out


def log_mix(rewards: Tensor, weights: Tensor, low: float = 1e-4) -> Tensor:
    """[N] sum_k w_k / sum w * log of the scores, clipped to [low, 1 - low]."""
    w = _wide(weights)
    return (w / w.sum())[:, None].mul(_wide(rewards).clamp(low, 1 - low).log()).sum(0)


def lagrangian(reward: Tensor, constrained: Tensor, multipliers: Tensor, limits: Tensor) -> Tensor:
    """[N] r_0 - sum_i mu_i (r_i - limit_i) (constrained RLHF, Moskovitz et al. 2023, arXiv:2310.04373)."""
    return _wide(reward) - (_wide(multipliers)[:, None] * (_wide(constrained) - _wide(limits)[:, None])).sum(0)


def multiplier_step(multipliers: Tensor, constrained: Tensor, limits: Tensor, rate: float) -> Tensor:
    """[C] max(0, mu + rate (mean r_i - limit_i)): the price of a constraint rises while it is broken."""
    return (_wide(multipliers) + rate * (_wide(constrained).nanmean(1) - _wide(limits))).clamp(min=0)

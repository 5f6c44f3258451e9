"""TRL's numbers of a rollout: rewards and completion lengths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrl.data.types import Sample
from fastrl.rollout import Completion


def reward_metrics(scores, group_std: Tensor, groups: Tensor) -> dict[str, float]:
    """reward, reward_std (over all completions), share of groups without spread, and each function's mean and std.

    Completions that no function could score are left out of the means and counted in rewards/unscored; the mean of none
    is NaN.
    """
    total = scores.total.double()
    seen = total[~torch.isnan(total)]
    first = torch.cat([groups.new_ones(1, dtype=torch.bool), groups[1:] != groups[:-1]]) if groups.numel() else groups
    out = {
        "reward": _mean(seen),
        "reward_std": float(seen.std()) if seen.numel() > 1 else 0.0,
        "frac_reward_zero_std": _mean((group_std[first] < 1e-8).double()),
    }
    if seen.numel() < total.numel():
        out["rewards/unscored"] = total.numel() - seen.numel()
    for name, values in scores.by_function.items():
        given = values[~torch.isnan(values)].double()
        out[f"rewards/{name}/mean"] = _mean(given)
        out[f"rewards/{name}/std"] = float(given.std()) if given.numel() > 1 else 0.0
    return out


def known_values(values: dict[str, float]) -> dict[str, float]:
    """Those that are a number: a step without a score has no say in the mean of an interval."""
    return {name: x for name, x in values.items() if x == x}


def completion_metrics(completions: list[Completion], limit: int) -> dict[str, float]:
    """Lengths in tokens, over all completions and over those that ended by themselves."""
    lengths = torch.tensor([len(c.ids) for c in completions], dtype=torch.float64)
    ended = lengths[torch.tensor([not c.truncated for c in completions])]
    out = {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": 1 - ended.numel() / lengths.numel(),
    }
    if ended.numel():
        out["completions/mean_terminated_length"] = _mean(ended)
        out["completions/min_terminated_length"] = float(ended.min())
        out["completions/max_terminated_length"] = float(ended.max())
    return out


def mismatch_metrics(samples: list[Sample]) -> tuple[dict[str, float], dict[str, float]]:
    """(means, maxima) of |old - rollout| over the trained tokens: how far the sampler is from the trained model.

    Empty where either is not known.
    """
    gaps = [
        abs(a - b)
        for s in samples
        if {"old_logprobs", "rollout_logprobs"} <= s.fields.keys()
        for a, b in zip(s.fields["old_logprobs"], s.fields["rollout_logprobs"], strict=True)
    ]
    if not gaps:
        return {}, {}
    name = "sampling/sampling_logp_difference"
    return {f"{name}/mean": sum(gaps) / len(gaps)}, {f"{name}/max": max(gaps)}


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else math.nan

"""Policy losses whose coefficient needs a token's own ratio alone: other weightings, soft and masked trust regions.

r = pi / old, rho = pi / rollout, p = pi(y), p_b = rollout(y), A = advantage, sg = stop-gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.corrections import Correction, TokenMask
from fastrl.losses.kl import safe_exp
from fastrl.losses.policy import PolicyLoss, PPOClip, check_numbers, log_ratio, warn_once
from fastrl.tokens import TokenBatch, TokenStats


@dataclass(frozen=True)
class ISPolicyGradient(PolicyLoss):
    """-r A: policy gradient under importance sampling, no clip (Kakade and Langford 2002; PPO's eq. 6). c_t = -r A."""

    paper: ClassVar[str] = "Schulman et al. 2017, arXiv:1707.06347, eq. 6"
    formula: ClassVar[str] = "-r A"

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -safe_exp(log_ratio(stats, batch)) * batch.token_advantages

    def metrics(self, stats, batch):
        return {**super().metrics(stats, batch), "ratio": safe_exp(log_ratio(stats, batch))}


@dataclass(frozen=True)
class CISPO(PolicyLoss):
    """-sg(clip(r, lowest, highest)) A log pi (MiniMax 2025): REINFORCE with a truncated weight; no token is dropped.

    The bounds are either absolute (ratio_min, ratio_max: TRL's epsilon_high is one) or distances from 1 (clip_low,
    clip_high: lowest = 1 - clip_low, highest = 1 + clip_high), one kind for each side. Default: no lower bound, and
    ratio_max 5 (Khatri et al. 2025, arXiv:2510.13786).
    """

    paper: ClassVar[str] = "MiniMax 2025, arXiv:2506.13585, eq. 4-5"
    formula: ClassVar[str] = "-sg(clip(r, lowest, highest)) A log pi"
    ratio_min: float | None = None
    ratio_max: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None

    def __post_init__(self):
        super().__post_init__()
        for absolute, distance in (("ratio_min", "clip_low"), ("ratio_max", "clip_high")):
            if getattr(self, absolute) is not None and getattr(self, distance) is not None:
                raise ValueError(
                    f"{absolute}={getattr(self, absolute)} (absolute) and {distance}={getattr(self, distance)} "
                    "(distance from 1) both set one bound; give one of them"
                )
        low, high = self.range
        if not 0 <= low < high:
            raise ValueError(f"the bounds of the ratio must be 0 <= lowest < highest, got {low} and {high}")
        if high < 1 or low > 1:
            warn_once(
                "cispo",
                f"cispo bounds the ratio to [{low:g}, {high:g}], without 1: even on policy every token is scaled by a "
                "bound. ratio_min and ratio_max are absolute; clip_low and clip_high are distances from 1",
            )

    @property
    def range(self) -> tuple[float, float]:
        """(lowest, highest) ratio."""
        low = self.ratio_min if self.clip_low is None else 1 - self.clip_low
        high = self.ratio_max if self.clip_high is None else 1 + self.clip_high
        return 0.0 if low is None else low, 5.0 if high is None else high

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        low, high = (math.log(x) if x > 0 else -math.inf for x in self.range)
        weight = safe_exp(log_ratio(stats, batch).detach().clamp(low, high))
        return -weight * batch.token_advantages * stats.logprobs

    def metrics(self, stats, batch):
        d = log_ratio(stats, batch)
        clipped = (d > math.log(self.range[1])) & (batch.token_advantages > 0)
        return {**super().metrics(stats, batch), "cispo_clip_ratio": clipped.float(), "ratio": safe_exp(d)}


@dataclass(frozen=True)
class SAPO(PolicyLoss):
    """-A (4 / tau) sigma(tau (r - 1)), tau by the sign of A (Gao et al. 2025): a soft gate. c_t = -A r 4 g (1 - g)."""

    paper: ClassVar[str] = "Gao et al. 2025, arXiv:2511.20347, eq. 5-6"
    formula: ClassVar[str] = "-A sigma(tau (r - 1)) 4 / tau, tau = temperature_pos if A > 0 else temperature_neg"
    temperature_pos: float = 1.0
    temperature_neg: float = 1.05
    aggregate: ClassVar[str] = "sequence_mean_token_mean"

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "temperature_pos", "temperature_neg", above=0)

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        advantages = batch.token_advantages
        tau = torch.full_like(stats.logprobs, self.temperature_neg).masked_fill(advantages > 0, self.temperature_pos)
        ratio = safe_exp(log_ratio(stats, batch))
        return -advantages * torch.sigmoid(tau * (ratio - 1)) * (4 / tau)

    def metrics(self, stats, batch):
        return {**super().metrics(stats, batch), "ratio": safe_exp(log_ratio(stats, batch))}


# -- against the rollout policy ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RolloutRatio(PolicyLoss):
    """-rho A where `keeps`, else 0: the ratio is to the policy that sampled, and there is no third one."""

    anchor: ClassVar[str] = "rollout"

    def log_rho(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        if batch.rollout_logprobs is None:
            raise ValueError(
                f"{type(self).__name__} takes its ratio to the rollout policy and needs batch.rollout_logprobs [T]; "
                "got None (keep the sampler's log-probs, or give the trainer's own in their place)"
            )
        return stats.logprobs - batch.rollout_logprobs

    def keeps(self, logprobs: Tensor, rollout: Tensor, advantages: Tensor) -> Tensor:  # [T] bool
        raise NotImplementedError(f"{type(self).__name__} has no mask")

    def kept(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[T] bool, from the current policy without gradient."""
        return self.keeps(stats.logprobs.detach(), batch.rollout_logprobs, batch.token_advantages)

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        d = self.log_rho(stats, batch)
        keep = self.kept(stats, batch)
        ratio = safe_exp(torch.where(keep, d, torch.zeros_like(d)))
        return torch.where(keep, -ratio * batch.token_advantages, torch.zeros_like(d))

    def metrics(self, stats, batch):
        dropped = {"clip_ratio/region_mean": (~self.kept(stats, batch)).float()}
        return {**super().metrics(stats, batch), **dropped, "ratio": safe_exp(self.log_rho(stats, batch))}


@dataclass(frozen=True)
class DPPOTV(RolloutRatio):
    """DPPO with the total variation of the sampled token against the rest (Qi et al. 2026): drops A > 0 where
    p - p_b > delta_high and A < 0 where p_b - p > delta_low."""

    paper: ClassVar[str] = "Qi et al. 2026, arXiv:2602.04879, eq. 12 (binary TV)"
    formula: ClassVar[str] = "-rho A, 0 where A > 0 and p - p_b > delta_high or A < 0 and p_b - p > delta_low"
    delta_low: float = 0.2
    delta_high: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "delta_low", "delta_high", at_least=0)

    def keeps(self, logprobs, rollout, advantages):
        risen = _probability(logprobs) - _probability(rollout)
        return ~((advantages > 0) & (risen > self.delta_high) | (advantages < 0) & (-risen > self.delta_low))


@dataclass(frozen=True)
class DPPOKL(DPPOTV):
    """DPPO with the KL of the two-outcome distributions {this token, any other}, in the direction of the advantage."""

    paper: ClassVar[str] = "Qi et al. 2026, arXiv:2602.04879, eq. 13 (binary KL)"
    formula: ClassVar[str] = "-rho A, 0 where KL(p_b || p) > delta and p moves on in the direction of A"
    delta_low: float = 0.05
    delta_high: float = 0.05

    def keeps(self, logprobs, rollout, advantages):
        p_b, kl = _probability(rollout), binary_kl(rollout, logprobs)
        risen = _probability(logprobs) - p_b
        up, down = (advantages > 0) & (risen > 0), (advantages < 0) & (risen < 0)
        return ~(up & (kl > self.delta_high) | down & (kl > self.delta_low))


def _probability(logprobs: Tensor) -> Tensor:
    return logprobs.clamp(max=0.0).exp()


def binary_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[T] KL of Bernoulli(p) from Bernoulli(q); p or q = 1 is read as the nearest number below it."""
    sure = -torch.finfo(log_p.dtype).eps / 2
    log_p, log_q = log_p.clamp(max=sure), log_q.clamp(max=sure)
    log_rest_p, log_rest_q = (torch.log(-torch.expm1(x)) for x in (log_p, log_q))
    return log_p.exp() * (log_p - log_q) - torch.expm1(log_p) * (log_rest_p - log_rest_q)


@dataclass(frozen=True)
class PrimeRL(DPPOTV):
    """prime-rl's default: DPPO-TV scaled by advantage_tau, + kl_tau (log rho)^2 on every token, dropped ones too."""

    paper: ClassVar[str] = "Prime Intellect 2025, INTELLECT-3, arXiv:2512.16144; prime-rl `default`"
    formula: ClassVar[str] = "-advantage_tau rho A M + kl_tau (log rho)^2, M of dppo_tv"
    advantage_tau: float = 1.0
    kl_tau: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "advantage_tau", "kl_tau", at_least=0)

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return self.advantage_tau * super().policy_loss(stats, batch)

    def extra_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return self.kl_tau * self.log_rho(stats, batch).square()


@dataclass(frozen=True)
class PrimeIPO(PrimeRL):
    """prime-rl's `ipo` (no preference loss): drops |p - p_b| > threshold, whatever the advantage."""

    paper: ClassVar[str] = "Prime Intellect 2025, INTELLECT-3, arXiv:2512.16144; prime-rl `ipo`"
    formula: ClassVar[str] = "-advantage_tau rho A 1[|p - p_b| <= threshold] + kl_tau (log rho)^2"
    threshold: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "threshold", at_least=0)
        for name in ("delta_low", "delta_high"):
            if getattr(self, name) != getattr(PrimeIPO, name):
                raise ValueError(f"{name}={getattr(self, name)} has no meaning for prime_ipo: its bound is threshold")

    def keeps(self, logprobs, rollout, advantages):
        return (_probability(logprobs) - _probability(rollout)).abs() <= self.threshold


@dataclass(frozen=True)
class RolloutIS(RolloutRatio):
    """-sg(rho 1[1 - clip_low <= rho <= 1 + clip_high]) A log pi (GLM-5): REINFORCE weighted by the rollout's ratio."""

    paper: ClassVar[str] = "GLM-5 team 2026, arXiv:2602.15763, section 4.1"
    formula: ClassVar[str] = "-sg(rho 1[1 - clip_low <= rho <= 1 + clip_high]) A log pi"
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.clip_low <= 1 and 0 <= self.clip_high < math.inf):
            raise ValueError(f"clip_low must be in [0, 1] and clip_high >= 0, got {self.clip_low} and {self.clip_high}")

    def keeps(self, logprobs, rollout, advantages):
        low = math.log1p(-self.clip_low) if self.clip_low < 1 else -math.inf
        return (logprobs - rollout >= low) & (logprobs - rollout <= math.log1p(self.clip_high))

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        d = self.log_rho(stats, batch).detach()
        weight = torch.where(self.kept(stats, batch), safe_exp(d), torch.zeros_like(d))
        return -weight * batch.token_advantages * stats.logprobs


# -- clipped ratios with something beside them -------------------------------------------------------------------------
@dataclass(frozen=True)
class DecoupledPPO(PPOClip):
    """w ppo_clip(r), w = e^(old - rollout): r to the proximal policy, w to the sampling one (AReaL, Fu et al. 2025).

    behaviour_cap: tokens with a larger w are dropped; inf: none.
    """

    paper: ClassVar[str] = "Fu et al. 2025, arXiv:2505.24298, eq. 5 (Hilton et al. 2022, arXiv:2110.00641)"
    formula: ClassVar[str] = "-sg(w 1[w <= behaviour_cap]) min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)"
    behaviour_cap: float = math.inf

    @property
    def every_correction(self) -> tuple[Correction, ...]:
        return (TokenMask(0.0, self.behaviour_cap), *self.corrections)


@dataclass(frozen=True)
class LUFFY(PPOClip):
    """Tokens of demonstrations earn A p / (p + gamma), no clip; one's own the clipped ratio (Yan et al. 2025).

    Which sequences are demonstrations: batch.per_sequence["off_policy"] [S] bool.
    """

    paper: ClassVar[str] = "Yan et al. 2025, arXiv:2504.14945, eq. 5-7"
    formula: ClassVar[str] = "-A p / (p + gamma) on demonstrations, else ppo_clip"
    gamma: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "gamma", above=0)

    def off_policy(self, batch: TokenBatch) -> Tensor:  # [T] bool
        return batch.spread(batch.sequence("off_policy", "luffy").bool())

    def log_ratio(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        d = super().log_ratio(stats, batch)
        return torch.where(self.off_policy(batch), torch.zeros_like(d), d)  # theirs may stand for nothing

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        shaped = torch.sigmoid(stats.logprobs - math.log(self.gamma))  # p / (p + gamma)
        own = super().policy_loss(stats, batch)
        return torch.where(self.off_policy(batch), -batch.token_advantages * shaped, own)


@dataclass(frozen=True)
class VAPO(PPOClip):
    """ppo_clip with clip-higher, + nll_coef x the mean NLL over the tokens of correct answers (Yue et al. 2025).

    Correct: batch.labels [S], or rewards > 0 where there are none. Under token_mean, as in the paper, the second term
    is divided by the number of those tokens in the step.
    """

    paper: ClassVar[str] = "Yue et al. 2025, arXiv:2504.05118, eq. 13-14"
    formula: ClassVar[str] = "ppo_clip - nll_coef 1[correct] (N / N_correct) log pi"
    clip_high: float = 0.28
    nll_coef: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "nll_coef", at_least=0)

    def step_columns(self, batch, stats, everywhere):
        if batch.labels is None and batch.rewards is None:
            raise ValueError("vapo needs batch.labels [S] (True = correct) or batch.rewards [S]; got neither")
        correct = batch.spread(batch.rewards > 0 if batch.labels is None else batch.labels.bool()).double()
        every = everywhere(correct)
        return {"per_token": {"nll_weight": correct * every.shape[0] / every.sum().clamp(min=1)}}

    def extra_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -self.nll_coef * batch.token("nll_weight", "vapo").to(stats.logprobs.dtype) * stats.logprobs


RATIO = {
    "is_pg": ISPolicyGradient,
    "cispo": CISPO,
    "sapo": SAPO,
    "dppo_tv": DPPOTV,
    "dppo_kl": DPPOKL,
    "prime_rl": PrimeRL,
    "prime_ipo": PrimeIPO,
    "rollout_is": RolloutIS,
    "decoupled_ppo": DecoupledPPO,
    "luffy": LUFFY,
    "vapo": VAPO,
}

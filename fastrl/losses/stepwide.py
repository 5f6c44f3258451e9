"""Preference losses with a statistic of the whole optimizer step: a batch's beta, its worst groups, its hardest pairs.

Each takes what it needs from the step in `columns`, so that micro-batches and ranks may cut the step anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.margin import NOT_NEGATIVE, POSITIVE, RatioPairLoss, interleaved, pairs
from fastrl.losses.pairwise import Ranged
from fastrl.tokens import TokenBatch, TokenStats

Everywhere = Callable[[Tensor], Tensor]


def on_sequences(**per_pair: Tensor) -> dict:
    """Columns: numbers of each pair [P] on both of its sequences [S]."""
    return {"per_sequence": {name: interleaved(x, x) for name, x in per_pair.items()}}


@dataclass(frozen=True)
class Stepwide(Ranged, RatioPairLoss):
    """A pair loss that reads statistics of the whole step. Scope: batch (cut freely once the step is prepared)."""

    scope: ClassVar[str] = "batch"
    unit: ClassVar[str] = "pair"
    needs_scores: ClassVar[bool] = True

    def gaps(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[P] h = score of the chosen - score of the rejected."""
        chosen, rejected = pairs(self.scores(stats, batch))
        return chosen - rejected

    def column(self, name: str, batch: TokenBatch, like: Tensor) -> Tensor:
        """[P]"""
        return pairs(batch.sequence(name, type(self).__name__))[0].to(like.dtype)


@dataclass(frozen=True)
class BetaDPO(Stepwide):
    """beta-DPO (Wu et al. 2024, eq. 7): one beta for the step, larger where its pairs are told apart more widely.

    centre: M_0, the running mean of the gaps h, which the caller keeps (the paper: momentum 0.9). The step's beta is
    at least 1e-3. The paper's filter of outlying pairs is the sampler's affair.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2407.08639, batch-level dynamic beta"
    formula: ClassVar[str] = "-log sigma(beta_step h), beta_step = max(beta (1 + alpha (mean_step h - centre)), 1e-3)"
    alpha: float = 0.6
    centre: float = 0.0

    def columns(self, batch: TokenBatch, stats: TokenStats, everywhere: Everywhere) -> dict:
        gaps = self.gaps(stats, batch)
        every = everywhere(gaps)
        mean = every.sum() / max(every.shape[0], 1)
        beta = (self.beta * (1 + self.alpha * (mean - self.centre))).clamp(min=1e-3)
        return on_sequences(step_beta=beta.expand_as(gaps))

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        return self.link(self.column("step_beta", batch, chosen) * (chosen - rejected) - self.offset(batch))


@dataclass(frozen=True)
class AlphaDPO(Stepwide):
    """alpha-DPO (Wu et al. 2024): SimPO whose margin follows how far each pair has moved from the reference.

    u = S_w/n_w - S_l/n_l, M* = z-score over the step (unbiased deviation, held constant) of the gap of mean log-ratios.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2410.10148, the alpha-DPO loss"
    formula: ClassVar[str] = "-log sigma(beta (u - gamma - alpha M*)), M* the standardised gap of mean log-ratios"
    beta: float = 2.5
    length_normalised: bool = True
    gamma: float = 0.3
    alpha: float = 0.2

    def log_ratios(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[S] log pi alone: the reference is in the margin."""
        return self.summed(stats.logprobs, batch)

    def columns(self, batch: TokenBatch, stats: TokenStats, everywhere: Everywhere) -> dict:
        reference = self.reference(batch)
        drift = TokenStats(stats.logprobs if reference is None else stats.logprobs - reference)
        gaps = self.gaps(drift, batch)
        every = everywhere(gaps)
        count = every.shape[0]
        mean = every.sum() / max(count, 1)
        spread = ((every - mean).square().sum() / max(count - 1, 1)).sqrt()
        z = torch.where(spread > 0, (gaps - mean) / spread.clamp(min=torch.finfo(gaps.dtype).tiny), 0.0)
        return on_sequences(alpha_margin=self.gamma + self.alpha * z)

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        margin = chosen - rejected - self.column("alpha_margin", batch, chosen)
        return self.link(self.beta * margin - self.offset(batch))


@dataclass(frozen=True)
class DrDPO(Stepwide):
    """Dr. DPO (Wu et al. 2024): pairs of the step weighted by a soft maximum of their log-likelihoods.

    L = -b log mean_i e^(l_i / b), l_i = log sigma(beta h_i), b = beta_prime: its gradient weighs pair i by the softmax
    of l / b, which is a constant of the step; each pair carries L and its own share of the gradient.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2407.07880, the Dr. DPO loss"
    formula: ClassVar[str] = "-b' log mean_pairs exp(log sigma(beta h) / b')"
    beta_prime: float = 1.0
    ranges: ClassVar = {"beta_prime": POSITIVE}

    def __post_init__(self):
        super().__post_init__()
        if self.use_weighting:
            raise ValueError("dr_dpo weighs pairs by the step's softmax: use_weighting must be False, got True")

    def columns(self, batch: TokenBatch, stats: TokenStats, everywhere: Everywhere) -> dict:
        own = -self.link(self.beta * self.gaps(stats, batch) - self.offset(batch)) / self.beta_prime
        every = everywhere(own)
        if every.shape[0] == 0:
            return on_sequences(dr_weight=own, dr_loss=own)
        mean = every.logsumexp(0) - torch.log(every.new_tensor(every.shape[0]))
        return on_sequences(dr_weight=(own - mean).exp(), dr_loss=(-self.beta_prime * mean).expand_as(own))

    def law(self, chosen: Tensor, rejected: Tensor, batch: TokenBatch) -> Tensor:
        loss = super().law(chosen, rejected, batch)
        weight = self.column("dr_weight", batch, loss)
        return self.column("dr_loss", batch, loss) + weight * (loss - loss.detach())


@dataclass(frozen=True)
class GroupRobustDPO(Stepwide):
    """Group robust preference optimisation (Ramesh et al. 2024): the worst groups of people weigh most.

    Reads per_sequence["domain"] (int): whose preference the pair is, and per_sequence["domain_weight"]: alpha of that
    domain before the step (default: equal). In the step alpha_g grows by e^(eta L_g), L_g the mean DPO loss of the
    group's pairs, and is normalised over the groups that the step has; L = sum_g alpha_g L_g.
    """

    paper: ClassVar[str] = "Ramesh et al. 2024, arXiv:2405.20304, Alg. 1"
    formula: ClassVar[str] = "sum_g alpha_g mean_(pairs of g) -log sigma(beta h), alpha_g ~ alpha_g e^(eta L_g)"
    eta: float = 0.1
    ranges: ClassVar = {"eta": NOT_NEGATIVE}

    def columns(self, batch: TokenBatch, stats: TokenStats, everywhere: Everywhere) -> dict:
        loss = self.link(self.beta * self.gaps(stats, batch) - self.offset(batch))
        domain = pairs(batch.sequence("domain", "group_robust_dpo").long())[0]
        prior = batch.per_sequence.get("domain_weight")
        prior = torch.ones_like(loss) if prior is None else pairs(prior)[0].to(loss.dtype)
        ids, group = torch.unique(everywhere(domain), return_inverse=True)
        empty = loss.new_zeros(ids.shape[0])
        count = empty.index_add(0, group, torch.ones_like(group, dtype=loss.dtype))
        mean = empty.index_add(0, group, everywhere(loss)) / count
        before = empty.index_add(0, group, everywhere(prior)) / count
        weight = torch.softmax(before.clamp(min=torch.finfo(loss.dtype).tiny).log() + self.eta * mean, 0)
        own = torch.searchsorted(ids, domain.contiguous())
        # Pairs are averaged over all P of the step: a pair of group g stands for P alpha_g / P_g.
        return on_sequences(robust_weight=(group.shape[0] * weight / count)[own])

    def pair_weight(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        own, other = self.column("robust_weight", batch, stats.logprobs), super().pair_weight(stats, batch)
        return own if other is None else own * other


@dataclass(frozen=True)
class FilteredDPO(RatioPairLoss):
    """Filtered DPO (Morimura et al. 2024): pairs whose chosen is worse than the policy's own answer drop out.

    Reads rewards [S] and per_sequence["policy_rewards"]: reward of an answer that the policy sampled for the prompt. A
    pair is kept where reward(chosen) >= policy's; the mean is over the kept pairs of the step. Scope: pair.
    """

    paper: ClassVar[str] = "Morimura et al. 2024, arXiv:2404.13846, Alg. 1"
    formula: ClassVar[str] = "-log sigma(beta h) over the pairs with R(y_w) >= R(y), y ~ pi"

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Everywhere) -> dict:
        if batch.rewards is None:
            raise ValueError("fdpo needs batch.rewards [S]; got None")
        kept = batch.rewards >= batch.sequence("policy_rewards", "fdpo")
        kept = pairs(kept.to(torch.float32))[0]
        every = everywhere(kept)
        return on_sequences(filter_weight=kept * every.shape[0] / every.sum().clamp(min=1))

    def pair_weight(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        own, other = pairs(batch.sequence("filter_weight", "fdpo"))[0], super().pair_weight(stats, batch)
        return own if other is None else own * other


STEPWIDE = {
    "beta_dpo": BetaDPO,
    "alpha_dpo": AlphaDPO,
    "dr_dpo": DrDPO,
    "group_robust_dpo": GroupRobustDPO,
    "fdpo": FilteredDPO,
}

"""Losses of lists beside listwise.py: the best against the rest by likelihood, contrast with noise, regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastrl.losses.listwise import NOWHERE, ListLoss, Lists, RatioListLoss
from fastrl.losses.margin import POSITIVE, mean_logprobs
from fastrl.losses.pairwise import Ranged, one_of
from fastrl.tokens import TokenBatch, TokenStats

MPPO_KINDS = ("mnm", "mns", "mcs", "mcm")


@dataclass(frozen=True)
class MPPO(ListLoss):
    """Multi pair-wise preference optimisation (Xie et al. 2024): geometric mean likelihoods p in the sigmoid.

    The best answer w stands against the N others: mnm takes one sigmoid of them all (eq. 10, the paper's choice), mns
    one for each (eq. 9); mcs and mcm do so with every ranked pair (eq. 11, 12). Tied best answers count as their mean.
    """

    paper: ClassVar[str] = "Xie et al. 2024, arXiv:2412.15244, eq. 10"
    formula: ClassVar[str] = "-log sigma(N p_w - sum_i p_i), p = e^(log pi(y) / n)"
    kind: str = "mnm"

    def __post_init__(self):
        super().__post_init__()
        one_of("kind", self.kind, MPPO_KINDS)

    def scores(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return mean_logprobs(stats, batch).exp()

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        if self.kind in ("mcs", "mcm"):
            gaps, contrasted = (s[:, :, None] - s[:, None, :]).flatten(1), lists.beats.flatten(1)
        else:
            best = lists.best.to(s.dtype)
            gaps, contrasted = (best * s).sum(1, keepdim=True) - s, lists.present & (best == 0)
        if self.kind in ("mns", "mcs"):
            return torch.where(contrasted, -logsigmoid(gaps), 0.0).sum(1)
        merged = torch.where(contrasted, gaps, 0.0).sum(1)
        return torch.where(contrasted.any(1), -logsigmoid(merged), 0.0)


@dataclass(frozen=True)
class ListContrast(Ranged, RatioListLoss):
    """s = beta (log pi - log ref) against rewards; reward_temperature: of the softmax of rewards."""

    reward_temperature: float = 1.0
    ranges: ClassVar = {"reward_temperature": POSITIVE}

    def log_target(self, lists: Lists) -> Tensor:
        """[G, n] float64: log softmax(r / reward_temperature)."""
        return (lists.rewards / self.reward_temperature).masked_fill(~lists.present, NOWHERE).log_softmax(1)


@dataclass(frozen=True)
class EXO(ListContrast):
    """Efficient exact optimisation from rewards (Ji et al. 2024): the reverse KL between the list's two softmaxes.

    beta: the paper's beta_pi, reward_temperature: its beta_r. Two answers with rewards log(1-e), log e: exo_pair.
    """

    paper: ClassVar[str] = "Ji et al. 2024, arXiv:2402.00856, the EXO loss of K answers"
    formula: ClassVar[str] = "sum_i p_i (log p_i - log q_i), p = softmax(beta log(pi/ref)), q = softmax(r / T)"

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        logs = s.masked_fill(~lists.present, NOWHERE).log_softmax(1)
        terms = logs.exp() * (logs - self.log_target(lists).to(s.dtype))
        return torch.where(lists.present, terms, 0.0).sum(1)


@dataclass(frozen=True)
class NCA(ListContrast):
    """Noise contrastive alignment (Chen et al. 2024): answers told from noise, weighted by the softmax of rewards.

    Unlike a softmax over the list it keeps the likelihood of good answers from falling. InfoNCA is `listnet`.
    """

    paper: ClassVar[str] = "Chen et al. 2024, arXiv:2402.05369, the NCA loss"
    formula: ClassVar[str] = "-sum_i [softmax(r / T)_i log sigma(s_i) + log sigma(-s_i) / n], s = beta log(pi/ref)"

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        share = 1 / lists.present.sum(1, keepdim=True).clamp(min=1).to(s.dtype)
        terms = -self.log_target(lists).exp().to(s.dtype) * logsigmoid(s) - share * logsigmoid(-s)
        return torch.where(lists.present, terms, 0.0).sum(1)


@dataclass(frozen=True)
class GVPO(RatioListLoss):
    """Group variance policy optimisation (Zhang et al. 2025): centred log-ratios regressed on centred rewards.

    Its minimum is the optimum of KL-regularised reward whatever policy sampled; a list of one answer adds 0. Gradient:
    -beta w_i / (n - 1) on log pi(y_i), the w of a list summing to 0.
    """

    paper: ClassVar[str] = "Zhang et al. 2025, arXiv:2504.19599, the GVPO loss"
    formula: ClassVar[str] = "sum_i w_i^2 / (2 (n - 1)), w_i = (r_i - mean r) - (s_i - mean s), s = beta log(pi/ref)"

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        count = lists.present.sum(1, keepdim=True)
        gap = torch.where(lists.present, lists.rewards.to(s.dtype) - s, 0.0)
        w = torch.where(lists.present, gap - gap.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
        return 0.5 * w.square().sum(1) / (count[:, 0] - 1).clamp(min=1)


CONTRASTIVE_LISTS = {"mppo": MPPO, "exo": EXO, "nca": NCA, "gvpo": GVPO}

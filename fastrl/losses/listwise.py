"""Losses of whole lists: the sequences with one group_id answer one prompt, ranked by batch.rewards. Scope: group.

Pairs of equal reward are never contrasted, so that the order of the batch decides nothing; unscored answers (reward
NaN) and answers without a trained token are in no list. The mean is over prompts, however many answers each has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from fastrl.losses.margin import NOT_NEGATIVE, POSITIVE, Referenced, check_numbers, mean_logprobs
from fastrl.objective import group_index, num_groups
from fastrl.tokens import TokenBatch, TokenStats, segment_sum

NOWHERE = -1e30  # a logit that softmax cannot see, in float32 too; -inf would make the gradient of an empty row NaN


@dataclass(frozen=True)
class Lists:
    """The batch's G lists, padded to the longest, n. index, present: [G, n]; rewards: [G, n] float64, else 0."""

    index: Tensor
    present: Tensor
    rewards: Tensor

    @classmethod
    def of(cls, batch: TokenBatch, why: str) -> Lists:
        if batch.rewards is None or batch.group_ids is None:
            raise ValueError(f"{why} ranks the answers of a prompt: it needs batch.rewards [S] and batch.group_ids [S]")
        group, count = group_index(batch), num_groups(batch)
        order = torch.argsort(group, stable=True)
        size = torch.bincount(group, minlength=count)
        first = size.cumsum(0) - size
        place = torch.arange(len(order), device=order.device) - first[group[order]]
        longest = int(size.max()) if count else 0
        index = order.new_zeros(count, longest)
        index[group[order], place] = order
        there = torch.arange(longest, device=order.device) < size[:, None]
        rewards = batch.rewards.detach().double()[index]
        there = there & ~torch.isnan(rewards) & (batch.lengths[index] > 0)
        return cls(index, there, torch.where(there, rewards, 0.0))

    def take(self, x: Tensor) -> Tensor:
        """[S] -> [G, n], 0 where absent."""
        return torch.where(self.present, x[self.index], torch.zeros((), dtype=x.dtype, device=x.device))

    @property
    def beats(self) -> Tensor:
        """[G, n, n] bool: answer i is ranked above answer j."""
        r, there = self.rewards, self.present
        return there[:, :, None] & there[:, None, :] & (r[:, :, None] > r[:, None, :])

    @property
    def best(self) -> Tensor:
        """[G, n]: 1 shared among the highest rewards, 0 for the others and for empty lists."""
        top = self.present & (self.rewards == self.rewards.masked_fill(~self.present, -math.inf).amax(1, keepdim=True))
        return top.double() / top.sum(1, keepdim=True).clamp(min=1)

    def softmax(self, logits: Tensor) -> Tensor:
        """[G, n] over those present; 0 elsewhere and in empty lists."""
        return torch.where(self.present, logits.masked_fill(~self.present, NOWHERE).softmax(1), 0.0)


def above_all(logits: Tensor, beats: Tensor) -> Tensor:
    """[G]: sum_i -log [1 / (1 + sum_{j below i} e^x_ij)] for x [G, n, n]: each answer against all that it beats."""
    rest = torch.where(beats, logits, NOWHERE).logsumexp(2)
    return torch.where(beats.any(2), softplus(rest), 0.0).sum(1)


@dataclass(frozen=True)
class ListLoss:
    """law(s, lists) [G] of the scores s [G, n], plus sft_coef * NLL of the best answer (summed over its tokens)."""

    sft_coef: float = 0.0
    scope: ClassVar[str] = "group"
    aggregate: ClassVar[str] = "prompt_mean"
    needs_reference: ClassVar[bool] = False

    def __post_init__(self):
        check_numbers(self, sft_coef=NOT_NEGATIVE)

    def scores(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[S] the mean log-prob of each answer."""
        return mean_logprobs(stats, batch)

    def law(self, s: Tensor, lists: Lists) -> Tensor:  # [G]
        raise NotImplementedError

    def sft_weight(self, lists: Lists) -> Tensor:
        """[G] float64."""
        return torch.full_like(lists.rewards[:, 0], self.sft_coef)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [G]
        lists = Lists.of(batch, type(self).__name__)
        if not lists.index.numel():
            return stats.logprobs.new_zeros(lists.index.shape[0]) + stats.logprobs.sum() * 0
        value = self.law(lists.take(self.scores(stats, batch)), lists)
        if self.sft_coef:
            nll = -lists.take(segment_sum(stats.logprobs, batch)) * lists.best.to(value.dtype)
            value = value + self.sft_weight(lists).to(value.dtype) * nll.sum(1)
        return value

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """[G] the share of ranked pairs that the scores rank alike; 0 for lists without any."""
        lists = Lists.of(batch, type(self).__name__)
        s, beats = lists.take(self.scores(stats, batch)), lists.beats
        right = (beats & (s[:, :, None] > s[:, None, :])).sum((1, 2))
        return {"rewards/accuracies": right.double() / beats.sum((1, 2)).clamp(min=1)}


@dataclass(frozen=True)
class RatioListLoss(Referenced, ListLoss):
    """Scores s = beta sum_t (log pi - log ref); reference_free=True takes log ref = 0."""

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, sft_coef=NOT_NEGATIVE)

    def scores(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return self.rewards(stats, batch)


@dataclass(frozen=True)
class PRO(ListLoss):
    """Preference ranking optimisation (Song et al. 2023): each answer against all below it, at temperatures
    that shrink with the gap in reward, and the NLL of the best.

    s = mean log-prob; below i, 1/T_ij = r_i - r_j; for i itself the largest of those. The NLL weighs sft_coef (n-1)^2
    in a list of n.
    """

    paper: ClassVar[str] = "Song et al. 2023, arXiv:2306.17492, L_PRO + beta L_SFT"
    formula: ClassVar[str] = "-sum_i log [e^(s_i/T_ii) / (e^(s_i/T_ii) + sum_j e^(s_j/T_ij))] - c (n-1)^2 log pi_best"
    sft_coef: float = 0.05

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        beats, r = lists.beats, lists.rewards
        gap = torch.where(beats, r[:, :, None] - r[:, None, :], 0.0).to(s.dtype)
        return above_all(gap * s[:, None, :] - (gap.amax(2) * s)[:, :, None], beats)

    def sft_weight(self, lists: Lists) -> Tensor:
        return self.sft_coef * (lists.present.double().sum(1) - 1).clamp(min=0).square()


@dataclass(frozen=True)
class RRHF(ListLoss):
    """Rank responses to align (Yuan et al. 2023, eq. 2-4): a hinge on every pair in the wrong order, and the best's
    NLL. s = mean log-prob."""

    paper: ClassVar[str] = "Yuan et al. 2023, arXiv:2304.05302, eq. 2-4"
    formula: ClassVar[str] = "sum_{r_i > r_j} max(0, s_j - s_i) - c log pi_best"
    sft_coef: float = 1.0

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        return torch.where(lists.beats, (s[:, None, :] - s[:, :, None]).clamp(min=0.0), 0.0).sum((1, 2))


@dataclass(frozen=True)
class LIRE(ListLoss):
    """Listwise reward enhancement (Zhu et al. 2024): the mean reward under the list's own softmax of log-probs.

    The rewards are taken as they are: bring them to one scale beforehand. length_normalised: mean log-probs.
    """

    paper: ClassVar[str] = "Zhu et al. 2024, arXiv:2405.13516"
    formula: ClassVar[str] = "-sum_i r_i softmax_i(log pi(y_i) / T)"
    temperature: float = 2.0
    length_normalised: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, temperature=POSITIVE)

    def scores(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        return mean_logprobs(stats, batch) if self.length_normalised else segment_sum(stats.logprobs, batch)

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        return -(lists.softmax(s / self.temperature) * lists.rewards.to(s.dtype)).sum(1)


@dataclass(frozen=True)
class PlackettLuce(RatioListLoss):
    """DPO of a full ranking (Rafailov et al. 2023, appendix A.3): the likelihood of drawing the answers in the order
    of their rewards. Two answers: DPO."""

    paper: ClassVar[str] = "Rafailov et al. 2023, arXiv:2305.18290, appendix A.3"
    formula: ClassVar[str] = "-sum_i log [e^s_i / (e^s_i + sum_{r_j < r_i} e^s_j)], s = beta log(pi/ref)"

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        return above_all(s[:, None, :] - s[:, :, None], lists.beats)


@dataclass(frozen=True)
class AllPairs(RatioListLoss):
    """DPO averaged over all ranked pairs of the list (Liu et al. 2024, LiPO: a list as pairs)."""

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2402.01878, pairwise logistic"
    formula: ClassVar[str] = "mean_{r_i > r_j} -log sigma(s_i - s_j), s = beta log(pi/ref)"

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        beats = lists.beats
        loss = torch.where(beats, -logsigmoid(s[:, :, None] - s[:, None, :]), 0.0).sum((1, 2))
        return loss / beats.sum((1, 2)).clamp(min=1)


@dataclass(frozen=True)
class LiPOLambda(RatioListLoss):
    """LambdaRank on log-ratios (Liu et al. 2024, LiPO-lambda): a pair weighs what swapping it would change in DCG.

    Gains G = 2^r - 1 want rewards in [0, 1]. The rank of an answer is its place by s (no gradient); among equal s the
    lower reward comes first, so that at pi = ref every pair counts.
    """

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2402.01878, lambda loss"
    formula: ClassVar[str] = "sum_{r_i > r_j} |G_i - G_j| |1/D(rank_i) - 1/D(rank_j)| log(1 + e^-(s_i - s_j))"

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        beats, there = lists.beats, lists.present
        z, r = s.detach(), lists.rewards
        before = z[:, None, :] > z[:, :, None]
        before = before | ((z[:, None, :] == z[:, :, None]) & (r[:, None, :] < r[:, :, None]))
        rank = 1 + (before & there[:, None, :]).sum(2)
        discount = 1 / torch.log1p(rank.double())
        gain = torch.exp2(r)
        change = (gain[:, :, None] - gain[:, None, :]) * (discount[:, :, None] - discount[:, None, :]).abs()
        loss = -logsigmoid(s[:, :, None] - s[:, None, :]) * change.to(s.dtype)
        return torch.where(beats, loss, 0.0).sum((1, 2))


@dataclass(frozen=True)
class ListNet(RatioListLoss):
    """Cross-entropy between the softmax of rewards and that of log-ratios (Cao et al. 2007; LiPO's list softmax).

    reward_temperature: of the target; small, it is the best answer alone.
    """

    paper: ClassVar[str] = "Cao et al. 2007, ListNet, top-one; Liu et al. 2024, arXiv:2402.01878"
    formula: ClassVar[str] = "-sum_i softmax(r / T)_i log softmax(s)_i, s = beta log(pi/ref)"
    reward_temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, reward_temperature=POSITIVE)

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        target = lists.softmax(lists.rewards / self.reward_temperature).to(s.dtype)
        logs = s.masked_fill(~lists.present, NOWHERE).log_softmax(1)
        return -torch.where(lists.present, target * logs, 0.0).sum(1)


@dataclass(frozen=True)
class RAFT(ListLoss):
    """Reward-ranked fine-tuning (Dong et al. 2023): the mean NLL of the best of the prompt's answers."""

    paper: ClassVar[str] = "Dong et al. 2023, arXiv:2304.06767, algorithm 1"
    formula: ClassVar[str] = "-mean_t log pi of the answer with the highest reward"

    def law(self, s: Tensor, lists: Lists) -> Tensor:
        return -(lists.best.to(s.dtype) * s).sum(1)


LISTWISE = {
    "pro": PRO,
    "rrhf": RRHF,
    "lire": LIRE,
    "plackett_luce": PlackettLuce,
    "dpo_all_pairs": AllPairs,
    "lipo_lambda": LiPOLambda,
    "listnet": ListNet,
    "raft": RAFT,
}

"""Supervised fine-tuning losses. l = log pi(y_t); every one is a weight or a term on the likelihood of the targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.kl import safe_exp
from fastrl.tokens import TokenBatch, TokenStats


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {value}")


def check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood of the target, -log pi(y_t): c_t = -1. Scope: token."""

    paper: ClassVar[str] = "maximum likelihood"
    formula: ClassVar[str] = "-log pi"
    scope: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "token_mean"

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -stats.logprobs


# -- another function of the same log-prob -------------------------------------------------------------------------
@dataclass(frozen=True)
class DFT(NLL):
    """Dynamic fine-tuning: likelihood weighted by the probability itself, taken as a constant: c_t = -pi(y_t)."""

    paper: ClassVar[str] = "Wu et al. 2025, arXiv:2508.05629, dynamic fine-tuning"
    formula: ClassVar[str] = "-sg(pi) log pi"

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -stats.logprobs.detach().exp() * stats.logprobs


@dataclass(frozen=True)
class Focal(NLL):
    """Focal loss: tokens that the model knows already count less. gamma 0 is NLL."""

    paper: ClassVar[str] = "Lin et al. 2017, arXiv:1708.02002, eq. 4"
    formula: ClassVar[str] = "-(1 - pi)^gamma log pi"
    gamma: float = 2.0

    def __post_init__(self):
        check_range("gamma", self.gamma, 0)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        # 1 - pi = -expm1(l), exact for confident tokens. Below `tiny` gamma < 1 would have an infinite slope; the
        # product with log pi is 0 there to working precision.
        rest = (-torch.expm1(stats.logprobs)).clamp(min=torch.finfo(stats.logprobs.dtype).tiny)
        return -rest.pow(self.gamma) * stats.logprobs


@dataclass(frozen=True)
class ProximalSFT(NLL):
    """PSFT: PPO's clip with every advantage 1, so that no update pulls a token far above where it started.

    Needs batch.old_logprobs; without them the ratio is 1 and the gradient is NLL's.
    """

    paper: ClassVar[str] = "Zhu et al. 2025, arXiv:2508.17784, proximal SFT"
    formula: ClassVar[str] = "-min(r, 1 + clip_high), r = pi / pi_old"
    clip_high: float = 0.28

    def __post_init__(self):
        check_positive("clip_high", self.clip_high)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        logp, old = stats.logprobs, batch.old_logprobs
        d = logp - (logp.detach() if old is None else old.to(logp.dtype))
        clipped = d > math.log1p(self.clip_high)
        return -torch.where(clipped, 1 + self.clip_high, safe_exp(torch.where(clipped, torch.zeros_like(d), d)))


@dataclass(frozen=True)
class Unlikelihood(NLL):
    """Likelihood of desirable sequences (batch.labels True), unlikelihood -log(1 - pi) of the tokens of the others."""

    paper: ClassVar[str] = "Welleck et al. 2019, arXiv:1908.04319, unlikelihood objective"
    formula: ClassVar[str] = "label ? -log pi : -alpha log(1 - pi)"
    alpha: float = 1.0

    def __post_init__(self):
        check_range("alpha", self.alpha, 0)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        wanted = batch.spread(_labels(batch, "unlikelihood"))
        logp = stats.logprobs
        against = self.alpha * unlikelihood(torch.where(wanted, torch.full_like(logp, -1.0), logp))
        return torch.where(wanted, -logp, against)


CERTAIN = 1e-6  # 1 - pi below which -log(1 - pi) goes on as its tangent


def unlikelihood(logprobs: Tensor) -> Tensor:
    """-log(1 - e^l); where 1 - pi < 1e-6 its tangent, so that a token the model is sure of keeps a gradient."""
    over = (logprobs + CERTAIN).clamp(min=0.0)
    logp = logprobs.clamp(max=-CERTAIN)
    # Two forms of log(1 - e^l), each exact where the other cancels.
    near = torch.log(-torch.expm1(logp))
    far = torch.log1p(-logp.clamp(max=-0.7).exp())
    slope = 1 / math.expm1(CERTAIN)  # e^l / (1 - e^l) at l = -CERTAIN
    return -torch.where(logp < -0.7, far, near) + slope * over


def _labels(batch: TokenBatch, why: str) -> Tensor:
    if batch.labels is None:
        raise ValueError(f"{why} needs batch.labels [S], True = desirable; got None")
    return batch.labels.bool()


# -- a further statistic of the row --------------------------------------------------------------------------------
@dataclass(frozen=True)
class LabelSmoothing(NLL):
    """A share of the target mass spread evenly over the vocabulary, as torch's cross_entropy and TRL's SFT do.

    mean_v log pi_v = mean_v z_v - logsumexp, and mean_v z_v is the linear map of mean_v W_v: no logits are needed, but
    none is linear under a softcap, which is refused.
    """

    paper: ClassVar[str] = "Szegedy et al. 2016, arXiv:1512.00567, sec. 7"
    formula: ClassVar[str] = "-(1 - e) log pi - e mean_v log pi_v"
    label_smoothing: float = 0.1
    outputs: ClassVar[tuple[str, ...]] = ("logsumexp", "mean_logits")

    def __post_init__(self):
        check_range("label_smoothing", self.label_smoothing, 0, 1)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        smooth = stats.logsumexp - stats.mean_logits
        return -(1 - self.label_smoothing) * stats.logprobs + self.label_smoothing * smooth


@dataclass(frozen=True)
class ZLoss(NLL):
    """Likelihood and a pull of the normaliser towards 1: d/dz_v = 2 z_loss lse pi_v more."""

    paper: ClassVar[str] = "Chowdhery et al. 2022, arXiv:2204.02311, sec. 5"
    formula: ClassVar[str] = "-log pi + z_loss logsumexp^2"
    z_loss: float = 1e-4
    outputs: ClassVar[tuple[str, ...]] = ("logsumexp",)

    def __post_init__(self):
        check_range("z_loss", self.z_loss, 0)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -stats.logprobs + self.z_loss * stats.logsumexp.square()

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"logsumexp": stats.logsumexp}


@dataclass(frozen=True)
class ConfidencePenalty(NLL):
    """Likelihood with an entropy bonus at every token, with its true gradient."""

    paper: ClassVar[str] = "Pereyra et al. 2017, arXiv:1701.06548, confidence penalty"
    formula: ClassVar[str] = "-log pi - entropy_coef H"
    entropy_coef: float = 0.1
    outputs: ClassVar[tuple[str, ...]] = ("entropy",)

    def __post_init__(self):
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef}")

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -stats.logprobs - self.entropy_coef * stats.entropy


# -- a constant weight for each token or sequence ------------------------------------------------------------------
@dataclass(frozen=True)
class _Weighted(NLL):
    """-w_t log pi with constants w: subclasses say which."""

    def weights(self, batch: TokenBatch) -> Tensor:  # [T]
        raise NotImplementedError

    def inert(self, batch: TokenBatch) -> Tensor:
        return self.weights(batch) == 0

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        weights = self.weights(batch).to(stats.logprobs.dtype)
        # A weight of zero keeps its token out, whatever its log-prob.
        return -weights * torch.where(weights != 0, stats.logprobs, torch.zeros_like(stats.logprobs))


@dataclass(frozen=True)
class WeightedSFT(_Weighted):
    """A weight for each token, batch.per_token[column] [T], or each sequence, batch.per_sequence[column] [S].

    normalise: divide by the mean weight of the step's trained tokens, so that the loss is sum w nll / sum w.
    """

    paper: ClassVar[str] = "weighted maximum likelihood"
    formula: ClassVar[str] = "-w log pi"
    column: str = "weights"
    normalise: bool = False

    def given(self, batch: TokenBatch) -> Tensor:  # [T]
        if self.column in batch.per_token:
            return batch.per_token[self.column]
        return batch.spread(batch.sequence(self.column, "weighted_sft (without that name in per_token)"))

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        weights = self.given(batch)
        if self.normalise:
            every = everywhere(weights).double()
            total = every.sum()
            scale = torch.where(total > 0, every.numel() / total, torch.zeros_like(total))
            weights = (weights * scale).to(weights.dtype)
        return {"per_token": {"sft_weight": weights}}

    def weights(self, batch: TokenBatch) -> Tensor:
        return batch.token("sft_weight", "weighted_sft")


@dataclass(frozen=True)
class CRLFT(_Weighted):
    """OpenChat's conditioned fine-tuning: two classes of sources, of which the worse weighs less.

    batch.labels [S] True is the better class. The class also conditions the prompt, which is the dataset's part.
    """

    paper: ClassVar[str] = "Wang et al. 2023, arXiv:2309.11235, C-RLFT"
    formula: ClassVar[str] = "-(label ? 1 : negative_weight) log pi"
    negative_weight: float = 0.1

    def __post_init__(self):
        check_range("negative_weight", self.negative_weight, 0)

    def weights(self, batch: TokenBatch) -> Tensor:
        better = _labels(batch, "c_rlft").double()
        return batch.spread(better + self.negative_weight * (1 - better))


@dataclass(frozen=True)
class RWR(_Weighted):
    """Reward-weighted regression: w = exp(R / tau) over its mean over the sequences of the step. Equal rewards: NLL."""

    paper: ClassVar[str] = "Peters and Schaal 2007, reward-weighted regression"
    formula: ClassVar[str] = "-exp(R / tau) / mean exp(R / tau) log pi"
    tau: float = 1.0

    def __post_init__(self):
        check_positive("tau", self.tau)

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        if batch.rewards is None:
            raise ValueError("rwr needs batch.rewards [S]; got None")
        every = everywhere(batch.rewards).double()
        if not every.numel():
            return {"per_sequence": {"rwr_weight": batch.rewards}}
        best = every.max()  # exp of what is lost against the best: nothing overflows
        mean = torch.exp((every - best) / self.tau).mean()
        made = torch.exp((batch.rewards.double() - best) / self.tau) / mean
        return {"per_sequence": {"rwr_weight": made.to(batch.rewards.dtype)}}

    def weights(self, batch: TokenBatch) -> Tensor:
        return batch.spread(batch.sequence("rwr_weight", "rwr"))


@dataclass(frozen=True)
class AWR(_Weighted):
    """Advantage-weighted regression: w = min(exp(A / tau), max_weight)."""

    paper: ClassVar[str] = "Peng et al. 2019, arXiv:1910.00177, advantage-weighted regression"
    formula: ClassVar[str] = "-min(exp(A / tau), max_weight) log pi"
    tau: float = 1.0
    max_weight: float = 20.0

    def __post_init__(self):
        check_positive("tau", self.tau)
        check_positive("max_weight", self.max_weight)

    def weights(self, batch: TokenBatch) -> Tensor:
        return torch.exp((batch.token_advantages / self.tau).clamp(max=math.log(self.max_weight)))


@dataclass(frozen=True)
class EosWeighted(_Weighted):
    """Another weight on the token that ends a sequence: above 1 it learns sooner to stop, 0 leaves stopping alone."""

    paper: ClassVar[str] = "common practice"
    formula: ClassVar[str] = "-(y = eos_id ? eos_weight : 1) log pi"
    eos_id: int = 0
    eos_weight: float = 1.0

    def __post_init__(self):
        if self.eos_id < 0:
            raise ValueError(f"eos_id must be a token id, got {self.eos_id}")
        check_range("eos_weight", self.eos_weight, 0)

    def weights(self, batch: TokenBatch) -> Tensor:
        return 1.0 + (self.eos_weight - 1.0) * (batch.targets == self.eos_id).double()


SUPERVISED = {
    "nll": NLL,
    "dft": DFT,
    "focal": Focal,
    "psft": ProximalSFT,
    "unlikelihood": Unlikelihood,
    "label_smoothing": LabelSmoothing,
    "z_loss": ZLoss,
    "confidence_penalty": ConfidencePenalty,
    "weighted_sft": WeightedSFT,
    "c_rlft": CRLFT,
    "rwr": RWR,
    "awr": AWR,
    "eos_weighted": EosWeighted,
}

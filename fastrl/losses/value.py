"""Critics and process reward models: losses on one output a row (HeadStats.values).

Critics: V = the value of the state in which a token is chosen, per_token["returns"] its target, per_token["old_values"]
what the critic said when the batch was sampled. Process reward models: one row a step, at the step's separator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.heads import check_numbers, check_range, gaussian_nll, log_variance_of, softplus, values_of
from fastrl.tokens import HeadStats, TokenBatch


# -- critics -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ValueLoss:
    """(V - R)^2 / 2. Scope: token.

    With cliprange e the larger of that and (V_old + clip(V - V_old, -e, e) - R)^2 / 2; on ties the first.
    """

    paper: ClassVar[str] = "Sutton and Barto 2018, chapter 9.3; clip as in Schulman's PPO code"
    formula: ClassVar[str] = "(V - R)^2 / 2"
    cliprange: float | None = None
    scope: ClassVar[str] = "token"
    reads: ClassVar[str] = "values"
    aggregate: ClassVar[str] = "token_mean"

    def __post_init__(self):
        check_numbers(self)
        if self.cliprange is not None and not self.cliprange > 0:
            raise ValueError(f"cliprange must be positive, or none for no clipping, got {self.cliprange}")

    def of_error(self, u: Tensor) -> Tensor:  # V - R -> loss
        return 0.5 * u.square()

    def parts(self, stats: HeadStats, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """(plain, clipped) loss [T]; the same tensor without a cliprange."""
        values, returns = values_of(stats), batch.token("returns", "a value loss").to(stats.values.dtype)
        plain = self.of_error(values - returns)
        if self.cliprange is None:
            return plain, plain
        old = batch.token("old_values", "a clipped value loss").to(values.dtype)
        near = old + (values - old).clamp(-self.cliprange, self.cliprange)
        return plain, self.of_error(near - returns)

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [T]
        plain, clipped = self.parts(stats, batch)
        return torch.where(clipped > plain, clipped, plain)

    def metrics(self, stats: HeadStats, batch: TokenBatch) -> dict[str, Tensor]:
        plain, clipped = self.parts(stats, batch)
        made = {"val/mean": stats.values, "val/error": (stats.values - batch.per_token["returns"]).abs()}
        return made | ({} if self.cliprange is None else {"val/clipfrac_avg": (clipped > plain).float()})


@dataclass(frozen=True)
class ClippedValueLoss(ValueLoss):
    """max((V - R)^2, (V_old + clip(V - V_old, -e, e) - R)^2) / 2: no gradient where the clipped one is larger."""

    paper: ClassVar[str] = "Schulman et al. 2017, PPO code; Huang et al. 2024, arXiv:2403.17031"
    formula: ClassVar[str] = "max((V - R)^2, (V_old + clip(V - V_old, -e, e) - R)^2) / 2"
    cliprange: float | None = 0.2


@dataclass(frozen=True)
class HuberValueLoss(ValueLoss):
    """u^2 / 2 up to |u| = delta, then delta (|u| - delta / 2); u = V - R. With cliprange the larger one, as above."""

    paper: ClassVar[str] = "Huber 1964; Fu et al. 2025, AReaL, arXiv:2505.24298"
    formula: ClassVar[str] = "u^2 / 2 if |u| <= delta else delta (|u| - delta / 2), u = V - R"
    delta: float = 10.0

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "delta", 0.0)

    def of_error(self, u: Tensor) -> Tensor:
        near = u.clamp(-self.delta, self.delta)
        return torch.where(near == u, 0.5 * near.square(), self.delta * (u.abs() - 0.5 * self.delta))


@dataclass(frozen=True)
class ExpectileValueLoss(ValueLoss):
    """|tau - 1[R < V]| (V - R)^2: an upper expectile of the returns for tau > 1/2 (implicit Q-learning)."""

    paper: ClassVar[str] = "Kostrikov et al. 2022, arXiv:2110.06169, eq. 5; Snell et al. 2023, ILQL, arXiv:2206.11871"
    formula: ClassVar[str] = "|tau - 1[R < V]| (V - R)^2"
    tau: float = 0.7

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "tau", 0.0, 1.0)

    def of_error(self, u: Tensor) -> Tensor:
        return (self.tau + (1 - 2 * self.tau) * (u > 0).to(u.dtype)) * u.square()


@dataclass(frozen=True)
class GaussianValueLoss:
    """Gaussian negative log-likelihood of the return under a mean-variance head. Scope: token."""

    mean_variance: ClassVar[bool] = True
    paper: ClassVar[str] = "Nix and Weigend 1994, estimating the mean and variance of a target distribution"
    formula: ClassVar[str] = "(log s^2 + (V - R)^2 / s^2) / 2"
    scope: ClassVar[str] = "token"
    reads: ClassVar[str] = "values"
    aggregate: ClassVar[str] = "token_mean"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [T]
        gap = values_of(stats) - batch.token("returns", "a value loss").to(stats.values.dtype)
        return gaussian_nll(gap, log_variance_of(stats))


@dataclass(frozen=True)
class HistogramValueLoss:
    """Cross-entropy with the return's Gaussian histogram over K equal bins of [low, high] (HL-Gauss). Scope: token.

    values [T, K] are the logits of the bins. The Gaussian has a width of `sigma` bins; returns outside are taken at the
    border. expected_value reads a value off the logits.
    """

    paper: ClassVar[str] = "Farebrother et al. 2024, arXiv:2403.03950, section 3.1"
    formula: ClassVar[str] = "-sum_k q_k log softmax(z)_k, q_k = Phi((b_k+1 - R)/s) - Phi((b_k - R)/s), normalised"
    low: float = -1.0
    high: float = 1.0
    sigma: float = 0.75
    scope: ClassVar[str] = "token"
    reads: ClassVar[str] = "values"
    aggregate: ClassVar[str] = "token_mean"

    def __post_init__(self):
        check_numbers(self)
        check_range(self, "sigma", 0.0)
        if not self.low < self.high:
            raise ValueError(f"low must be below high = {self.high}, got {self.low}")

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [T]
        logits = values_of(stats, 0)
        returns = batch.token("returns", "a value loss").to(logits.dtype).clamp(self.low, self.high)
        edges = torch.linspace(self.low, self.high, logits.shape[1] + 1, dtype=logits.dtype, device=logits.device)
        width = self.sigma * (self.high - self.low) / logits.shape[1]
        below = torch.special.ndtr((edges - returns[:, None]) / width)
        mass = below.diff(dim=1)
        mass = mass / mass.sum(1, keepdim=True)
        return -(mass * logits.log_softmax(1)).sum(1)


def expected_value(logits: Tensor, low: float, high: float) -> Tensor:
    """[T, K] logits of equal bins of [low, high] -> [T] mean of the bins' centres."""
    width = (high - low) / logits.shape[-1]
    centres = low + width * (torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype) + 0.5)
    return (logits.softmax(-1) * centres).sum(-1)


# -- process reward models ---------------------------------------------------------------------------------------------
def step_logit(stats: HeadStats) -> Tensor:
    """[T] log-odds that a step is good: the one output, or the second less the first of two classes."""
    values = stats.values
    if values is not None and values.dim() == 1:
        return values
    wrong, right = values_of(stats, 2).unbind(1)
    return right - wrong


def step_labels(stats: HeadStats, batch: TokenBatch) -> Tensor:
    """[T] per_token["step_label"] in [0, 1], or the class in targets."""
    return batch.per_token.get("step_label", batch.targets).to(stats.values.dtype)


@dataclass(frozen=True)
class StepClass:
    """Cross-entropy of each step's class (batch.targets), as token classification does. values [T, K]. Scope: token."""

    paper: ClassVar[str] = "Uesato et al. 2022, arXiv:2211.14275; Lightman et al. 2023, arXiv:2305.20050, section 2.6"
    formula: ClassVar[str] = "-log softmax(z)_class at the separator of each step"
    scope: ClassVar[str] = "token"
    reads: ClassVar[str] = "values"
    aggregate: ClassVar[str] = "token_mean"

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [T]
        return -values_of(stats, 0).log_softmax(1).gather(1, batch.targets.long()[:, None])[:, 0]

    def metrics(self, stats: HeadStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"accuracy": (stats.values.argmax(1) == batch.targets).float()}


@dataclass(frozen=True)
class StepBCE:
    """y sp(-z) + (1 - y) sp(z), y in [0, 1] hard or soft, z the log-odds of a good step. Scope: token.

    y: per_token["step_label"], or the class in batch.targets. values [T], or [T, 2]: z is then their difference.
    """

    paper: ClassVar[str] = "Wang et al. 2024, Math-Shepherd, arXiv:2312.08935, eq. 2; Luo et al. 2024, arXiv:2406.06592"
    formula: ClassVar[str] = "-y log sigma(z) - (1 - y) log sigma(-z) at the separator of each step"
    scope: ClassVar[str] = "token"
    reads: ClassVar[str] = "values"
    aggregate: ClassVar[str] = "token_mean"

    def of_step(self, z: Tensor, y: Tensor) -> Tensor:
        return y * softplus(-z) + (1 - y) * softplus(z)

    def __call__(self, stats: HeadStats, batch: TokenBatch) -> Tensor:  # [T]
        return self.of_step(step_logit(stats), step_labels(stats, batch))

    def metrics(self, stats: HeadStats, batch: TokenBatch) -> dict[str, Tensor]:
        right = (step_logit(stats) > 0) == (step_labels(stats, batch) >= 0.5)
        return {"accuracy": right.float()}


@dataclass(frozen=True)
class StepMSE(StepBCE):
    """(sigma(z) - y)^2 of each step's soft label: a step value model. Scope: token."""

    paper: ClassVar[str] = "Zhang et al. 2024, ReST-MCTS*, arXiv:2406.03816"
    formula: ClassVar[str] = "(sigma(z) - y)^2 at the separator of each step"

    def of_step(self, z: Tensor, y: Tensor) -> Tensor:
        return (torch.sigmoid(z) - y).square()


VALUE = {
    "value_mse": ValueLoss,
    "value_clip": ClippedValueLoss,
    "value_huber": HuberValueLoss,
    "value_expectile": ExpectileValueLoss,
    "value_gaussian": GaussianValueLoss,
    "value_histogram": HistogramValueLoss,
    "prm_class": StepClass,
    "prm_bce": StepBCE,
    "prm_mse": StepMSE,
}

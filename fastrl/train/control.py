"""Coefficients that follow what they control: the price of KL, the bonus on entropy. Called once an optimizer step,
with the global mean of the step, so that every rank keeps the same number."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class FixedKL:
    """beta stays what it is."""

    beta: float

    def update(self, kl: float, samples: int) -> None:
        """Nothing follows from the step's mean KL."""

    def state_dict(self) -> dict:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict) -> None:
        self.beta = state["beta"]


@dataclass
class AdaptiveKL(FixedKL):
    """beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon) (Ziegler et al. 2019, arXiv:1909.08593, 2.2).

    beta: the first value. target: nats of KL, as the caller measures it (per sequence in the paper). horizon: samples
    over which beta may change by 20 %. A step whose KL is not finite changes nothing.
    """

    target: float = 6.0
    horizon: int = 10_000

    def __post_init__(self):
        for name in ("beta", "target", "horizon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def update(self, kl: float, samples: int) -> None:
        """kl: the step's mean KL to the reference. samples: n, sequences in the step (over all ranks)."""
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # At least 0: a step of more than 5 horizons would turn the penalty into a reward.
        self.beta *= max(1 + error * samples / self.horizon, 0.0)


@dataclass
class AdaptiveEntropy:
    """The coefficient of an entropy bonus that holds entropy at a floor (Skywork-OR1, He et al. 2025, arXiv:2505.22312;
    TRL's use_adaptive_entropy): += delta after a step with entropy <= target, else -= delta, within [low, high].

    The bonus is applied only while the last step's entropy was <= target: `active` is what to multiply it by now.

    coef: the first value. target: nats per token. delta: the step of the coefficient.
    """

    coef: float = 0.0
    target: float = 0.2
    delta: float = 0.005
    low: float = 0.0
    high: float = 1.0
    last_entropy: float = math.inf

    def __post_init__(self):
        if not self.low <= self.high:
            raise ValueError(f"expected low <= high, got {self.low} and {self.high}")
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"delta must be >= 0 and finite, got {self.delta}")

    @property
    def active(self) -> float:
        """The coefficient of this step; 0 while entropy was above target, and before the first step."""
        return self.coef if self.last_entropy <= self.target else 0.0

    def update(self, entropy: float) -> None:
        """entropy: mean over all trained tokens of the step. One that is not finite changes nothing."""
        if not math.isfinite(entropy):
            return
        if entropy <= self.target:
            self.coef = min(self.coef + self.delta, self.high)
        else:
            self.coef = max(self.coef - self.delta, self.low)
        self.last_entropy = entropy

    def state_dict(self) -> dict:
        return {"coef": self.coef, "last_entropy": self.last_entropy}

    def load_state_dict(self, state: dict) -> None:
        self.coef, self.last_entropy = state["coef"], state["last_entropy"]


def kl_controller(beta: float, target: float | None = None, horizon: int = 10_000) -> FixedKL:
    """Fixed without a target, adaptive with one."""
    return FixedKL(beta) if target is None else AdaptiveKL(beta, target, horizon)

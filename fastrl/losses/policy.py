"""Policy-gradient losses on packed tokens. d = log pi - log pi_old, r = e^d, A = advantage, D = log pi - log pi_ref.

Every one of them is   w policy_loss + kl_coef KL(pi || ref) - entropy_coef H   on each token. A new one is a class with
its `policy_loss` and a line in its file's table: REINFORCE and the clipped ratio are here, the rest in clipped.py,
ratio.py, sequence_ratio.py, covariance.py and regression.py. The weight w comes from corrections.py and selection.py.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.corrections import Correction, check_corrections, step_weight
from fastrl.losses.kl import CORRECTED, KINDS, kl_corrected, kl_estimate, safe_exp
from fastrl.losses.selection import Everywhere, high_entropy
from fastrl.objective import widest
from fastrl.tokens import TokenBatch, TokenStats

KERNEL_KINDS = ("k1", "k2", "k3")  # estimators that fastrl/ops/policy_kernel.py holds
SAID: set[str] = set()


def warn_once(key: str, text: str) -> None:
    """A setting that runs and does not do what it seems to: said once in a process."""
    if key not in SAID:
        SAID.add(key)
        warnings.warn(text, stacklevel=4)


def log_ratio(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """[T] d. Without old log-probs the sampling policy is the current one: d is 0 with gradient 1."""
    old = batch.old_logprobs
    return stats.logprobs - (stats.logprobs.detach() if old is None else old)


def kl_to_reference(kind: str, stats: TokenStats, batch: TokenBatch) -> Tensor:
    if batch.ref_logprobs is None:
        raise ValueError("a KL term needs batch.ref_logprobs [T]; got None (set kl_coef=0 or score with a reference)")
    if kind in CORRECTED:
        return kl_corrected(kind, stats.logprobs, batch.ref_logprobs, batch.old_logprobs)
    return kl_estimate(kind, stats.logprobs, batch.ref_logprobs)


def check_numbers(law, *names: str, at_least: float = -math.inf, above: float = -math.inf) -> None:
    """ValueError for options that are no finite number in range."""
    for name in names:
        value = getattr(law, name)
        if not (math.isfinite(value) and value >= at_least and value > above):
            limits = [f" and > {above:g}"] * (above > -math.inf) + [f" and >= {at_least:g}"] * (at_least > -math.inf)
            raise ValueError(f"{name} must be finite{''.join(limits)}, got {value}")


class _Scope:
    """A policy loss's scope: its law's own, as wide as its corrections make it; of the class, its law's own."""

    def __get__(self, law: PolicyLoss | None, kind: type) -> str:
        if law is None:
            return kind.own_scope
        # Columns that read scores are made where nobody prepared the step, and then from all of it.
        step = ["batch"] if law.needs_scores else []
        return widest([kind.own_scope, *(c.scope for c in law.every_correction), *step])


@dataclass(frozen=True)
class PolicyLoss:
    """What every policy loss takes, and how its terms are put together.

    kl_coef, kl: weight and kind of the KL term (fastrl.losses.kl). entropy_coef: weight of the entropy bonus.
    corrections: off-policy weights and masks of the policy term, in order (fastrl.losses.corrections).
    top_entropy: fraction of the step's tokens, those of highest entropy, that keep their policy term.
    """

    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    kl_coef: float = 0.0
    kl: str = "k3"
    entropy_coef: float = 0.0
    corrections: tuple[Correction, ...] = ()
    top_entropy: float = 1.0
    own_scope: ClassVar[str] = "token"
    scope: ClassVar[str] = _Scope()
    unit: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "token_mean"
    reads_scores: ClassVar[bool] = False  # its own columns read the current policy's statistics
    anchor: ClassVar[str] = "old"  # the policy that its ratio is taken to: old or rollout

    def __post_init__(self):
        if self.kl not in KINDS:
            raise ValueError(f"kl is {self.kl!r}; expected one of {', '.join(KINDS)}")
        check_numbers(self, "kl_coef", "entropy_coef")
        if not 0 < self.top_entropy <= 1:
            raise ValueError(f"top_entropy is the fraction of tokens that is kept, in (0, 1]; got {self.top_entropy}")
        object.__setattr__(self, "corrections", tuple(self.corrections))
        check_corrections(self.every_correction)
        if self.kl_coef and self.kl == "k1":
            warn_once(
                "k1",
                "kl='k1' in the loss has gradient grad log pi, whose mean over the policy's own tokens is 0: it adds "
                "noise and no pull to the reference. Use k2, k1+, is_k1 or is_k3, or put k1 into the reward",
            )
        if self.anchor == "rollout" and any(c.weighs for c in self.every_correction):
            name = type(self).__name__
            warn_once(name, f"{name} takes its ratio to the rollout policy already: a correction weighs by it twice")

    # -- what a subclass changes ---------------------------------------------------------------------------------------
    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        raise NotImplementedError(f"{type(self).__name__} has no policy_loss")

    def extra_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor | None:  # [T]
        """A further term that no correction weighs, or None."""
        return None

    def step_columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Everywhere) -> dict:
        """per_token and per_sequence columns of the whole step; where `weighted`, a per_token "kept" drops terms."""
        return {}

    # -- the same for all ----------------------------------------------------------------------------------------------
    @property
    def every_correction(self) -> tuple[Correction, ...]:
        """Those of its own law and those given."""
        return self.corrections

    @property
    def weighted(self) -> bool:
        """Whether the policy term has a column of weights."""
        return bool(self.every_correction) or self.top_entropy < 1

    @property
    def needs_scores(self) -> bool:
        return self.reads_scores or self.top_entropy < 1

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("entropy",) if self.entropy_coef or self.top_entropy < 1 else ()

    @property
    def columns(self):
        """Constants from the whole step (see fastrl.objective), or None where the law has none."""
        own = type(self).step_columns is not PolicyLoss.step_columns
        return self._columns if own or self.weighted else None

    @torch.no_grad()
    def _columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Everywhere) -> dict:
        made = {"per_token": {}, "per_sequence": {}, **self.step_columns(batch, stats, everywhere)}
        if self.weighted:
            weight = step_weight(self.every_correction, batch, everywhere)
            if any(c.needs_rollout for c in self.every_correction):
                made["per_token"]["is_weight"] = weight
            if self.top_entropy < 1:
                weight = weight * high_entropy(stats.entropy, self.top_entropy, everywhere)
            kept = made["per_token"].pop("kept", None)
            made["per_token"]["policy_weight"] = weight if kept is None else weight * kept
        return made

    def inert(self, batch: TokenBatch) -> Tensor | None:
        """[T] bool: rows whose loss and gradient are 0 whatever the model says; None: there may be none."""
        if self.kl_coef or self.entropy_coef or type(self).extra_loss is not PolicyLoss.extra_loss:
            return None
        zero = batch.token_advantages == 0
        return zero | (batch.token("policy_weight", "a correction") == 0) if self.weighted else zero

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        loss = self.policy_loss(stats, batch)
        if self.weighted:
            weight = batch.token("policy_weight", type(self).__name__).to(loss.dtype)
            loss = torch.where(weight != 0, weight * loss, torch.zeros_like(loss))
        for c in self.every_correction:
            if (keep := c.keeps(stats, batch)) is not None:
                loss = torch.where(keep, loss, torch.zeros_like(loss))
        if (extra := self.extra_loss(stats, batch)) is not None:
            loss = loss + extra
        if self.kl_coef:
            loss = loss + self.kl_coef * kl_to_reference(self.kl, stats, batch)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * stats.entropy
        return loss

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """[T] values of each metric; TRL's names."""
        made = {}
        if batch.ref_logprobs is not None:
            made["kl"] = kl_estimate("k3", stats.logprobs, batch.ref_logprobs)
        if any(c.needs_rollout for c in self.every_correction):
            made["sampling/importance_sampling_ratio/mean"] = batch.token("is_weight")
        return made


@dataclass(frozen=True)
class Reinforce(PolicyLoss):
    """-A log pi(y_t): c_t = -A (Williams 1992). Scope: token."""

    paper: ClassVar[str] = "Williams 1992, REINFORCE"
    formula: ClassVar[str] = "-A log pi"

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -batch.token_advantages * stats.logprobs


@dataclass(frozen=True)
class GPG(Reinforce):
    """Group policy gradient (Chu et al. 2025): REINFORCE on advantages of the group, no ratio, clip or reference."""

    paper: ClassVar[str] = "Chu et al. 2025, arXiv:2504.02546, eq. 6"


@dataclass(frozen=True)
class ClippedSurrogate:
    """The numbers that make up PPOClip's law, for a kernel that holds the same law (fastrl/ops/policy_kernel.py)."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl: str
    kl_coef: float
    entropy_coef: float


@dataclass(frozen=True)
class Clipped(PolicyLoss):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and -ceiling A at most where A < 0. c_t = -A r or 0.

    Subclasses say what r is (log_ratio) and whether it has a ceiling. On ties the unclipped branch.
    """

    formula: ClassVar[str] = "-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)"
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.clip_low <= 1 and 0 <= self.clip_high < math.inf):
            raise ValueError(f"clip_low must be in [0, 1] and clip_high >= 0, got {self.clip_low} and {self.clip_high}")

    @property
    def ceiling(self) -> float | None:
        """Largest ratio that counts where A < 0; None: no limit."""
        return None

    def _check_ceiling(self, name: str) -> None:
        if self.ceiling is not None and not self.ceiling > 1 + self.clip_high:
            raise ValueError(f"{name} must exceed 1 + clip_high = {1 + self.clip_high}, got {self.ceiling}")

    def log_ratio(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return log_ratio(stats, batch)

    @property
    def clipped_surrogate(self) -> ClippedSurrogate | None:
        """Its numbers if this object's law is exactly the one written here; None for a subclass that changes it."""
        law = ("__call__", "policy_loss", "bounds", "metrics", "log_ratio", "extra_loss", "step_columns")
        if any(getattr(type(self), name) is not getattr(PPOClip, name) for name in law) or self.weighted:
            return None
        if self.kl_coef and self.kl not in KERNEL_KINDS:
            return None
        own = {"dual_clip": self.ceiling, "kl": self.kl if self.kl in KERNEL_KINDS else "k3"}
        numbers = (f.name for f in fields(ClippedSurrogate))
        return ClippedSurrogate(**{n: own[n] if n in own else getattr(self, n) for n in numbers})

    def bounds(self, d: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T] bools: clipped above (A > 0), clipped below (A < 0), dual-clipped (A < 0). Decided on d, without exp."""
        low = math.log1p(-self.clip_low) if self.clip_low < 1 else -math.inf
        above = (advantages > 0) & (d > math.log1p(self.clip_high))
        below = (advantages < 0) & (d < low)
        top = self.ceiling
        return above, below, torch.zeros_like(above) if top is None else (advantages < 0) & (d > math.log(top))

    def policy_loss(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        d, advantages = self.log_ratio(stats, batch), batch.token_advantages
        above, below, dual = self.bounds(d, advantages)
        # Clipped tokens are replaced before exp, so that no overflow there can reach the gradient as 0 * inf.
        ratio = safe_exp(torch.where(above | below | dual, torch.zeros_like(d), d))
        ratio = torch.where(above, 1 + self.clip_high, torch.where(below, 1 - self.clip_low, ratio))
        if self.ceiling is not None:
            ratio = torch.where(dual, self.ceiling, ratio)
        return -ratio * advantages

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        d = self.log_ratio(stats, batch)
        above, below, dual = self.bounds(d, batch.token_advantages)
        made = {
            "clip_ratio/low_mean": below.float(),
            "clip_ratio/high_mean": above.float(),
            "clip_ratio/region_mean": (above | below | dual).float(),
            "ratio": safe_exp(d),
        }
        return {**super().metrics(stats, batch), **made}


@dataclass(frozen=True)
class PPOClip(Clipped):
    """Clipped surrogate, -min(r A, clip(r, 1-clip_low, 1+clip_high) A) (Schulman et al. 2017, eq. 7). Scope: token.

    clip_high > clip_low is DAPO's clip-higher. dual_clip = c > 1 bounds the loss of negative advantages by -c A
    (Ye et al. 2020, eq. 5; TRL's `delta`). c_t = -A r where unclipped, else 0; on ties the unclipped branch.
    """

    paper: ClassVar[str] = "Schulman et al. 2017, arXiv:1707.06347, eq. 7"
    dual_clip: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self._check_ceiling("dual_clip")

    @property
    def ceiling(self) -> float | None:
        return self.dual_clip


@dataclass(frozen=True)
class PPOTwoSided(Clipped):
    """Two-sided clipping (INTELLECT-2, Prime Intellect 2025, section 3.4): the ratio counts up to delta where A < 0."""

    paper: ClassVar[str] = "Prime Intellect 2025, INTELLECT-2, arXiv:2505.07291, section 3.4"
    formula: ClassVar[str] = "-min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A)"
    delta: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        self._check_ceiling("delta")

    @property
    def ceiling(self) -> float | None:
        return self.delta

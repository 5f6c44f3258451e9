"""Distillation: student p, teacher q over one vocabulary; l = log p(y), D = a divergence of whole distributions.

The full-vocabulary losses read `stats.divergence`, which `fused_loss(..., teacher=fastrl.Teacher(...))` makes from both
heads without the logits of either. Those that know k words of the teacher are in top_k.py, those that weigh the
student's own tokens in sampled.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastrl.losses.sampled import IWOPD, OPD, MiniLLM, OPDImportance
from fastrl.losses.supervised import NLL
from fastrl.losses.top_k import TopK
from fastrl.objective import Divergence
from fastrl.tokens import TokenBatch, TokenStats

# Known elsewhere, refused here -> why.
REFUSED = {
    "uld": "the universal logit distance sorts both softmaxes over the vocabulary, which needs all of their logits at "
    "once; for a teacher with another tokenizer use 'seq_kd' on its texts",
}


def check_coefficient(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {value}")


# -- full vocabulary -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Divergent:
    """divergence_coef D - nll_coef l at every token. Scope: token. Subclasses say which divergence.

    temperature: of both heads in D alone, times the call's own; no factor temperature^2 but in KD. weighted: multiply
    each token by batch.per_token["token_weights"] [T].
    """

    temperature: float = 1.0
    weighted: bool = False
    nll_coef: ClassVar[float] = 0.0
    divergence_coef: ClassVar[float] = 1.0
    scope: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "token_mean"
    outputs: ClassVar[tuple[str, ...]] = ("divergence",)
    linear_in_divergence: ClassVar[bool] = True

    def __post_init__(self):
        check_coefficient("nll_coef", self.nll_coef)
        _ = self.divergence.inner  # says what does not fit

    @property
    def divergence(self) -> Divergence:
        raise NotImplementedError

    @property
    def reads_logprobs(self) -> bool:
        return self.nll_coef != 0

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        loss = self.divergence_coef * stats.divergence
        if self.nll_coef:
            loss = loss - self.nll_coef * stats.logprobs
        return batch.token("token_weights", "weighted=True").to(loss.dtype) * loss if self.weighted else loss

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"divergence": stats.divergence}


@dataclass(frozen=True)
class ForwardKL(Divergent):
    """Word-level distillation, KL(q||p) at every token. nll_coef: weight of -log p of the labels beside it."""

    paper: ClassVar[str] = "Kim and Rush 2016, arXiv:1606.07947, sec. 3.1"
    formula: ClassVar[str] = "KL(q||p) - nll_coef log p"
    nll_coef: float = 0.0

    @property
    def divergence(self) -> Divergence:
        return Divergence("forward_kl", temperature=self.temperature)


@dataclass(frozen=True)
class ReverseKL(ForwardKL):
    """KL(p||q) at every token: mode-seeking; GKD's beta = 1."""

    paper: ClassVar[str] = "Agarwal et al. 2024, arXiv:2306.13649, sec. 2"
    formula: ClassVar[str] = "KL(p||q) - nll_coef log p"

    @property
    def divergence(self) -> Divergence:
        return Divergence("reverse_kl", temperature=self.temperature)


@dataclass(frozen=True)
class GKD(ForwardKL):
    """Generalised Jensen-Shannon divergence; beta 0 is KL(q||p), beta 1 is KL(p||q), as in TRL's GKDTrainer."""

    paper: ClassVar[str] = "Agarwal et al. 2024, arXiv:2306.13649, eq. 1"
    formula: ClassVar[str] = "beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p"
    beta: float = 0.5

    @property
    def divergence(self) -> Divergence:
        return Divergence("jsd", self.beta, self.temperature)


@dataclass(frozen=True)
class MixedKL(ForwardKL):
    """alpha KL(q||p) + (1 - alpha) KL(p||q), both in one walk over the vocabulary (on a GPU through the torch
    backend)."""

    paper: ClassVar[str] = "convex combination of both KLs (NeMo-RL kl_type=mixed)"
    formula: ClassVar[str] = "alpha KL(q||p) + (1 - alpha) KL(p||q)"
    alpha: float = 0.5

    @property
    def divergence(self) -> Divergence:
        return Divergence("mixed", self.alpha, self.temperature)


@dataclass(frozen=True)
class Jeffreys(ForwardKL):
    """The symmetric KL, KL(q||p) + KL(p||q)."""

    paper: ClassVar[str] = "Jeffreys 1946; Wen et al. 2023, arXiv:2307.15190"
    formula: ClassVar[str] = "KL(q||p) + KL(p||q)"
    divergence_coef: ClassVar[float] = 2.0

    @property
    def divergence(self) -> Divergence:
        return Divergence("mixed", 0.5, self.temperature)


@dataclass(frozen=True)
class TVD(ForwardKL):
    """Total variation distance, in [0, 1]."""

    paper: ClassVar[str] = "Wen et al. 2023, arXiv:2307.15190"
    formula: ClassVar[str] = "sum_v |p_v - q_v| / 2"

    @property
    def divergence(self) -> Divergence:
        return Divergence("tvd", temperature=self.temperature)


@dataclass(frozen=True)
class SkewKL(ForwardKL):
    """DistiLLM's skew KL: the student is mixed with a share alpha of the teacher, which bounds it by -log alpha."""

    paper: ClassVar[str] = "Ko et al. 2024, arXiv:2402.03898, skew KL"
    formula: ClassVar[str] = "KL(q||alpha q + (1 - alpha) p)"
    alpha: float = 0.1

    @property
    def divergence(self) -> Divergence:
        return Divergence("skew_forward_kl", self.alpha, self.temperature)


@dataclass(frozen=True)
class SkewRKL(ForwardKL):
    """DistiLLM's skew reverse KL: the teacher is mixed with a share alpha of the student."""

    paper: ClassVar[str] = "Ko et al. 2024, arXiv:2402.03898, skew reverse KL"
    formula: ClassVar[str] = "KL(p||alpha p + (1 - alpha) q)"
    alpha: float = 0.1

    @property
    def divergence(self) -> Divergence:
        return Divergence("skew_reverse_kl", 1 - self.alpha, self.temperature)


@dataclass(frozen=True)
class KD(Divergent):
    """Hinton's: likelihood of the labels at the call's temperature, KL(q||p) of both softened by `temperature`.

    The factor temperature^2 keeps the two gradients in proportion as the temperature changes.
    """

    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531, sec. 2"
    formula: ClassVar[str] = "-alpha log p + (1 - alpha) temperature^2 KL(q||p) softened"
    temperature: float = 2.0
    alpha: float = 0.5

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        super().__post_init__()

    @property
    def divergence(self) -> Divergence:
        return Divergence("forward_kl", temperature=self.temperature)

    @property
    def nll_coef(self) -> float:
        return self.alpha

    @property
    def divergence_coef(self) -> float:
        return (1 - self.alpha) * self.temperature**2


@dataclass(frozen=True)
class SeqKD(NLL):
    """Sequence-level distillation: likelihood of texts that the teacher wrote."""

    paper: ClassVar[str] = "Kim and Rush 2016, arXiv:1606.07947, sec. 3.2"
    formula: ClassVar[str] = "-log p of the teacher's own tokens"


DISTILLATION = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "gkd": GKD,
    "mixed_kl": MixedKL,
    "jeffreys": Jeffreys,
    "tvd": TVD,
    "skew_kl": SkewKL,
    "skew_rkl": SkewRKL,
    "kd": KD,
    "seq_kd": SeqKD,
    "top_k": TopK,
    "opd": OPD,
    "opd_is": OPDImportance,
    "iw_opd": IWOPD,
    "minillm": MiniLLM,
}

"""Distillation: student p, teacher q over one vocabulary; l = log p(y), D = a divergence of whole distributions.

The full-vocabulary losses read `stats.divergence`, which `fused_loss(..., teacher=fastrl.Teacher(...))` makes from both
heads without the logits of either. The sampled-token losses read the teacher's log-probs of the tokens themselves,
`batch.per_token["teacher_logprobs"]` [T], and need no teacher in the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.losses.kl import safe_exp
from fastrl.losses.supervised import NLL
from fastrl.objective import Divergence
from fastrl.tokens import TokenBatch, TokenStats, segment_sum

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

    paper: ClassVar[str] = "Kim and Rush 2016, arXiv:1606.07947, eq. 4"
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

    paper: ClassVar[str] = "Ko et al. 2024, arXiv:2402.03898, eq. 4"
    formula: ClassVar[str] = "KL(q||alpha q + (1 - alpha) p)"
    alpha: float = 0.1

    @property
    def divergence(self) -> Divergence:
        return Divergence("skew_forward_kl", self.alpha, self.temperature)


@dataclass(frozen=True)
class SkewRKL(ForwardKL):
    """DistiLLM's skew reverse KL: the teacher is mixed with a share alpha of the student."""

    paper: ClassVar[str] = "Ko et al. 2024, arXiv:2402.03898, sec. 3.1"
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


# -- the teacher's top k -----------------------------------------------------------------------------------------------
TAIL_FLOOR = 1e-7  # of the mass outside of the k words; TRL's
ABSENT = -1e30  # stands for -inf: finite differences, exp 0
TAILS = ("bucket", "renormalise", "drop")


@dataclass(frozen=True)
class TopK:
    """A divergence on k words a token, of which the teacher's log-probs are at hand (a server's top-k). Scope: token.

    Reads batch.per_token["teacher_topk_indices"] [T, k] int and ["teacher_topk_logprobs"] [T, k], log q over the whole
    vocabulary; entries of -inf are absent. tail: "bucket" adds one word that holds what is left of each distribution
    (at least 1e-7), "renormalise" divides by the kept mass of each, "drop" takes the k terms as they are (which is no
    divergence: it may be negative). kind: forward_kl, reverse_kl, jsd.
    The student's k logits are dot products of their own; "renormalise" forms no other logit at all.
    """

    paper: ClassVar[str] = "top-k distillation with a tail bucket (Agarwal et al. 2024 on a support)"
    formula: ClassVar[str] = "D over the teacher's k words and their tail"
    kind: str = "forward_kl"
    beta: float = 0.5
    tail: str = "bucket"
    nll_coef: float = 0.0
    scope: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "token_mean"
    support: ClassVar[str] = "teacher_topk_indices"

    def __post_init__(self):
        check_coefficient("nll_coef", self.nll_coef)
        if self.tail not in TAILS:
            raise ValueError(f"tail is {self.tail!r}; expected one of {', '.join(TAILS)}")
        if self.kind not in ("forward_kl", "reverse_kl", "jsd"):
            raise ValueError(f"kind is {self.kind!r}; expected forward_kl, reverse_kl or jsd")
        _ = self._law

    @property
    def _law(self) -> Divergence:
        return Divergence(self.kind, self.beta).inner

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("support_logits",) if self.tail == "renormalise" else ("support_logits", "logsumexp")

    @property
    def reads_logprobs(self) -> bool:
        return self.nll_coef != 0

    def distributions(self, stats: TokenStats, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(log p, log q, which entries count), [T, k] or with the tail [T, k + 1]."""
        z = stats.support_logits
        b = batch.token("teacher_topk_logprobs", "top_k").to(z.dtype)
        kept = b > -torch.inf
        if self.tail == "renormalise":
            a = torch.where(kept, z, ABSENT)
            b = torch.where(kept, b, ABSENT)
            return a - a.logsumexp(1, keepdim=True), b - b.logsumexp(1, keepdim=True), kept
        a = torch.where(kept, z - stats.logsumexp.unsqueeze(1), ABSENT)
        b = torch.where(kept, b, ABSENT)
        if self.tail == "drop":
            return a, b, kept
        a, b = (torch.cat([x, log_rest(x)], 1) for x in (a, b))
        return a, b, torch.cat([kept, torch.ones_like(kept[:, :1])], 1)

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        a, b, kept = self.distributions(stats, batch)
        loss = torch.where(kept, _terms(self._law, a, b), torch.zeros_like(a)).sum(1)
        return loss - self.nll_coef * stats.logprobs if self.nll_coef else loss

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        q = batch.token("teacher_topk_logprobs").exp()
        return {"teacher_topk_mass": q.sum(1)}


def log_rest(logp: Tensor) -> Tensor:
    """[T, k] log-probs -> [T, 1] log of the mass that they leave, at least TAIL_FLOOR."""
    mass = logp.logsumexp(1, keepdim=True).clamp(max=-TAIL_FLOOR)
    return torch.log(-torch.expm1(mass))


def _terms(law: Divergence, a: Tensor, b: Tensor) -> Tensor:
    """Terms of the divergence of exp(a) from exp(b)."""
    if law.kind == "forward_kl":
        return b.exp() * (b - a)
    if law.kind == "reverse_kl":
        return a.exp() * (a - b)
    # log m/p and log m/q from d = log p/q, whose smaller side keeps every digit where the two agree.
    d, above = a - b, a >= b
    from_a = torch.log1p(law.beta * torch.expm1(-torch.where(above, d, 0.0)))
    from_b = torch.log1p((1 - law.beta) * torch.expm1(torch.where(above, 0.0, d)))
    to_a, to_b = torch.where(above, from_a, from_b - d), torch.where(above, d + from_a, from_b)
    return -law.beta * b.exp() * to_b - (1 - law.beta) * a.exp() * to_a


# -- sampled tokens: the student's own text, weighed by the teacher ---------------------------------------------------
def teacher_advantage(stats: TokenStats | None, batch: TokenBatch, why: str) -> Tensor:
    """[T] log q(y) - log p_old(y), a constant. Without old log-probs the sampling policy is the current one."""
    teacher = batch.token("teacher_logprobs", why)
    if batch.old_logprobs is not None:
        return teacher - batch.old_logprobs
    if stats is None:
        raise ValueError(f"{why} needs batch.old_logprobs [T], those of the policy that sampled; got None")
    return teacher.to(stats.logprobs.dtype) - stats.logprobs.detach()


def suffix_sums(x: Tensor, batch: TokenBatch, discount: float = 1.0) -> Tensor:
    """[T] float64: sum over u >= t in t's sequence of discount^(u - t) x_u, by doubling the reach log2(T) times."""
    ids, y, step = batch.segment_ids, x.double(), 1
    while step < y.shape[0]:
        ahead = torch.where(ids[step:] == ids[:-step], y[step:], 0.0)
        y = y + discount * torch.nn.functional.pad(ahead, (0, step))
        discount, step = discount * discount, 2 * step
    return y


@dataclass(frozen=True)
class OPD:
    """On-policy distillation: reverse KL by its policy gradient at the sampled tokens. Scope: token.

    c_t = -(log q - log p_old). On policy its expectation is the gradient of KL(p||q) given each prefix.
    """

    paper: ClassVar[str] = "Lu and Thinking Machines 2025, On-Policy Distillation; Gu et al. 2024, arXiv:2306.08543"
    formula: ClassVar[str] = "-(log q - log p_old) log p"
    scope: ClassVar[str] = "token"
    aggregate: ClassVar[str] = "token_mean"

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -teacher_advantage(stats, batch, "opd").to(stats.logprobs.dtype) * stats.logprobs

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        return {"teacher_kl": stats.logprobs - batch.token("teacher_logprobs").to(stats.logprobs.dtype)}


@dataclass(frozen=True)
class OPDImportance(OPD):
    """OPD with the importance ratio rho = p / p_old for batches that the current policy did not sample."""

    formula: ClassVar[str] = "-(log q - log p_old) rho, rho = p / p_old"

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        logp, old = stats.logprobs, batch.old_logprobs
        rho = safe_exp(logp - (logp.detach() if old is None else old.to(logp.dtype)))
        return -teacher_advantage(stats, batch, "opd_is").to(logp.dtype) * rho


@dataclass(frozen=True)
class IWOPD(OPD):
    """OPD whose early tokens weigh more: once the student has left the teacher's path, what follows says less.

    w_t = 1 + gamma (1 - sum_{u<t} |a_u| / sum_u |a_u|), a = log q - log p_old: from 1 + gamma at the first token.
    Needs batch.old_logprobs.
    """

    paper: ClassVar[str] = "On the Position Bias of On-Policy Distillation 2026, arXiv:2606.22600"
    formula: ClassVar[str] = "-w a log p, w = 1 + gamma (1 - prefix|a| / sum|a|), a = log q - log p_old"
    gamma: float = 0.5
    epsilon: float = 1e-8

    def __post_init__(self):
        check_coefficient("gamma", self.gamma)
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be positive and finite, got {self.epsilon}")

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        a = teacher_advantage(None, batch, "iw_opd")
        size = a.abs().double()
        total = batch.spread(segment_sum(size, batch))
        before = (total - suffix_sums(size, batch)).clamp(min=0.0)
        weight = 1 + self.gamma * (1 - before / total.clamp(min=self.epsilon))
        return {"per_token": {"distill_advantage": (weight * a).to(a.dtype)}}

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        return -batch.token("distill_advantage", "iw_opd").to(stats.logprobs.dtype) * stats.logprobs


@dataclass(frozen=True)
class MiniLLM(OPD):
    """Reverse KL of whole sequences: the divergence of this token, and a policy gradient of what comes after it.

    A_t = sum_{u>t} gamma^(u-t-1) (log q - log p_old)(y_u), divided by the sum of those powers with
    length_normalised (the mean of what is left). The ratio is clipped as in PPO. Needs batch.old_logprobs and, with
    single_step, a teacher in the call for KL(p||q) of the token itself.
    """

    paper: ClassVar[str] = "Gu et al. 2024, arXiv:2306.08543, eq. 3-7"
    formula: ClassVar[str] = "KL(p||q) - min(rho A, clip(rho, 1 - eps, 1 + eps) A), A = mean of later log q/p_old"
    gamma: float = 1.0
    length_normalised: bool = True
    single_step: bool = True
    clip: float = 0.2
    linear_in_divergence: ClassVar[bool] = True
    divergence: ClassVar[Divergence] = Divergence("reverse_kl")

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must be between 0 and 1, got {self.clip}")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("divergence",) if self.single_step else ()

    def columns(self, batch: TokenBatch, stats: TokenStats | None, everywhere: Callable[[Tensor], Tensor]) -> dict:
        a = teacher_advantage(None, batch, "minillm")
        later = self._later(a, batch)
        if self.length_normalised:
            later = later / self._later(torch.ones_like(a), batch).clamp(min=1.0)
        return {"per_token": {"distill_advantage": later.to(a.dtype)}}

    def _later(self, x: Tensor, batch: TokenBatch) -> Tensor:
        """[T] float64 sum over u > t of gamma^(u-t-1) x_u: the suffix sum of the next token of the sequence."""
        sums, ids = suffix_sums(x, batch, self.gamma), batch.segment_ids
        return torch.nn.functional.pad(torch.where(ids[1:] == ids[:-1], sums[1:], 0.0), (0, min(1, len(ids))))

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:  # [T]
        advantage = batch.token("distill_advantage", "minillm").to(stats.logprobs.dtype)
        d = stats.logprobs - batch.old_logprobs.to(stats.logprobs.dtype)
        above = (advantage > 0) & (d > math.log1p(self.clip))
        below = (advantage < 0) & (d < math.log1p(-self.clip))
        rho = safe_exp(torch.where(above | below, torch.zeros_like(d), d))
        rho = torch.where(above, 1 + self.clip, torch.where(below, 1 - self.clip, rho))
        return -rho * advantage + (stats.divergence if self.single_step else 0.0)


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

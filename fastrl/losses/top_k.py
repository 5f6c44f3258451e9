"""Distillation from a teacher's k likeliest words a token: what an inference server gives of its softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrl.objective import Divergence
from fastrl.tokens import TokenBatch, TokenStats

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
        if not 0 <= self.nll_coef < math.inf:
            raise ValueError(f"nll_coef must be >= 0 and finite, got {self.nll_coef}")
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

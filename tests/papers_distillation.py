"""Distillation losses as their papers write them: float64 softmaxes of both models, one sequence after the other.

A law is `law(row, o) -> [n]`, the loss of each trained token; `Row` holds a sequence's own logits. Nothing here calls
an objective or an operator of fastrl.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Row:
    """One sequence's trained tokens: logits of student z (with the graph) and teacher t [n, V], labels y [n], log-probs
    of the sampling policy old [n] or None, and the [n] columns."""

    z: Tensor
    t: Tensor
    y: Tensor
    old: Tensor | None
    columns: dict[str, Tensor]

    def log_p(self, temperature: float = 1.0) -> Tensor:
        return torch.log_softmax(self.z / temperature, -1)

    def log_q(self, temperature: float = 1.0) -> Tensor:
        return torch.log_softmax(self.t / temperature, -1)

    @property
    def label_logp(self) -> Tensor:
        return self.log_p().gather(1, self.y[:, None])[:, 0]


def kl(a: Tensor, b: Tensor) -> Tensor:
    """[n] KL(exp a || exp b)."""
    return (a.exp() * (a - b)).sum(-1)


def mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """log((1 - share) e^a + share e^b)."""
    return torch.log((1 - share) * a.exp() + share * b.exp())


def _full(of: Callable[[Tensor, Tensor, dict], Tensor]) -> Callable[[Row, dict], Tensor]:
    """A law from a divergence of log p and log q [n, V], with the options that all of them share."""

    def law(row: Row, o: dict) -> Tensor:
        tau = o.get("temperature", 1.0)
        loss = of(row.log_p(tau), row.log_q(tau), o) - o.get("nll_coef", 0.0) * row.label_logp
        return loss * row.columns["token_weights"].to(loss.dtype) if o.get("weighted") else loss

    return law


def _gkd(p: Tensor, q: Tensor, o: dict) -> Tensor:
    beta = o.get("beta", 0.5)
    if beta in (0, 1):
        return kl(q, p) if beta == 0 else kl(p, q)
    m = mixture(p, q, beta)
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def _mixed(p, q, o):
    alpha = o.get("alpha", 0.5)
    return alpha * kl(q, p) + (1 - alpha) * kl(p, q)


def _skew(p, q, o):
    return kl(q, mixture(p, q, o.get("alpha", 0.1)))


def _skew_reverse(p, q, o):
    return kl(p, mixture(p, q, 1 - o.get("alpha", 0.1)))


def _hinton(row: Row, o: dict) -> Tensor:
    tau, alpha = o.get("temperature", 2.0), o.get("alpha", 0.5)
    soft = kl(row.log_q(tau), row.log_p(tau))
    loss = -alpha * row.label_logp + (1 - alpha) * tau**2 * soft
    return loss * row.columns["token_weights"].to(loss.dtype) if o.get("weighted") else loss


def _top_k(row: Row, o: dict) -> Tensor:
    """Word by word, the tail as one more word."""
    words, given = row.columns["teacher_topk_indices"], row.columns["teacher_topk_logprobs"].double()
    losses = []
    for i, log_p in enumerate(row.log_p()):
        kept = given[i] > -math.inf
        p, q = log_p[words[i][kept]].exp(), given[i][kept].exp().to(log_p.dtype)
        tail = o.get("tail", "bucket")
        if tail == "renormalise":
            p, q = p / p.sum(), q / q.sum()
        elif tail == "bucket":
            p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
        kind, beta = o.get("kind", "forward_kl"), o.get("beta", 0.5)
        if kind == "jsd" and beta == 1:
            kind = "reverse_kl"
        if kind == "forward_kl":
            d = (q * (q / p).log()).sum()
        elif kind == "reverse_kl":
            d = (p * (p / q).log()).sum()
        else:
            m = beta * q + (1 - beta) * p
            d = beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()
        losses.append(d)
    return torch.stack(losses) - o.get("nll_coef", 0.0) * row.label_logp


def _advantage(row: Row) -> Tensor:
    teacher = row.columns["teacher_logprobs"].to(row.z.dtype)
    return teacher - (row.label_logp.detach() if row.old is None else row.old.to(row.z.dtype))


def _opd(row: Row, o: dict) -> Tensor:
    return -_advantage(row) * row.label_logp


def _opd_is(row: Row, o: dict) -> Tensor:
    old = row.label_logp.detach() if row.old is None else row.old.to(row.z.dtype)
    return -_advantage(row) * torch.exp(row.label_logp - old)


def _iw_opd(row: Row, o: dict) -> Tensor:
    a, weights, seen = _advantage(row), [], 0.0
    for x in a:
        weights.append(1 + o.get("gamma", 0.5) * (1 - seen / float(a.abs().sum())))
        seen += abs(float(x))
    return -torch.tensor(weights, dtype=a.dtype) * a * row.label_logp


def _minillm(row: Row, o: dict) -> Tensor:
    a, gamma, eps = _advantage(row), o.get("gamma", 1.0), o.get("clip", 0.2)
    gain = []
    for t in range(len(a)):
        first = t + 1 if o.get("single_step", True) else t
        powers = torch.tensor([gamma ** (u - first) for u in range(first, len(a))], dtype=a.dtype)
        later = (powers * a[first:]).sum()
        gain.append(later / powers.sum() if o.get("length_normalised", True) and len(powers) else later)
    gain, rho = torch.stack(gain), torch.exp(row.label_logp - row.old.to(a.dtype))
    loss = -torch.minimum(rho * gain, rho.clamp(1 - eps, 1 + eps) * gain)
    return loss + kl(row.log_p(), row.log_q()) if o.get("single_step", True) else loss


LAWS: dict[str, Callable[[Row, dict], Tensor]] = {
    "forward_kl": _full(lambda p, q, o: kl(q, p)),
    "reverse_kl": _full(lambda p, q, o: kl(p, q)),
    "gkd": _full(_gkd),
    "mixed_kl": _full(_mixed),
    "jeffreys": _full(lambda p, q, o: kl(q, p) + kl(p, q)),
    "tvd": _full(lambda p, q, o: (p.exp() - q.exp()).abs().sum(-1) / 2),
    "skew_kl": _full(_skew),
    "skew_rkl": _full(_skew_reverse),
    "kd": _hinton,
    "seq_kd": lambda row, o: -row.label_logp,
    "top_k": _top_k,
    "opd": _opd,
    "opd_is": _opd_is,
    "iw_opd": _iw_opd,
    "minillm": _minillm,
}

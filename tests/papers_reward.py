"""Reward, value and process losses written out from their papers: float64, one pair, list or row after the other.

Nothing here calls an objective or an aggregation of fastrl. o: the options as given to losses.get.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

LOG2 = math.log(2)


@dataclass
class Answer:
    """One sequence: what the head says (score a scalar or [K], log_variance a scalar) and what is known of it."""

    score: Tensor
    log_variance: Tensor
    reward: float
    label: bool
    group: int
    margin: float  # of its pair
    column: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Row:
    """One trained row: value a scalar or [K], log_variance a scalar, class, and its columns."""

    value: Tensor
    log_variance: Tensor
    target: int
    column: dict[str, Tensor] = field(default_factory=dict)


Law = Callable[[list, dict], Tensor]


def log_sigma(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x)) if float(x.detach()) > 0 else x - torch.log1p(torch.exp(x))


def pairs(answers: list[Answer]) -> list[tuple[Answer, Answer]]:
    return list(zip(answers[0::2], answers[1::2], strict=True))


def over_pairs(of_pair: Callable[[Tensor, Answer, Answer, dict], Tensor]) -> Law:
    """Mean over pairs of a law of d = r_w - r_l, plus the centring term."""

    def law(answers: list[Answer], o: dict) -> Tensor:
        terms = []
        for w, r in pairs(answers):
            loss = of_pair(w.score - r.score, w, r, o)
            terms.append(loss + o.get("center", 0.0) * (w.score + r.score) ** 2)
        return sum(terms) / len(terms)

    return law


def bradley_terry(d, w, r, o):
    e = o.get("label_smoothing", 0.0)
    return -(1 - e) * log_sigma(d - w.margin) - e * log_sigma(w.margin - d)


def soft_bradley_terry(d, w, r, o):
    y = w.column["preference"]
    return -y * log_sigma(d) - (1 - y) * log_sigma(-d)


def hinge_reward(d, w, r, o):
    gap = o.get("gap", 1.0)
    return gap - d if float((d).detach()) < gap else d * 0


def r3m(d, w, r, o):
    """With the shift that is best for this pair, held fixed; its gradient is the envelope's."""
    lam = o.get("lam", 0.1)
    delta = max(0.0, math.log(1 / lam - 1) - float((d).detach()))
    return -log_sigma(d + delta) + lam * delta


def adaptive_scale(d, w, r, o):
    """tau by Newton's method on H(sigma(c)) = log 2 - rho."""
    rho, c = o.get("rho", 0.1), 1.0
    for _ in range(100):
        p = 1 / (1 + math.exp(-c))
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        c -= (entropy - (LOG2 - rho)) / (-c * p * (1 - p))
    tau = min(max(abs(float((d).detach())) / c, o.get("tau_min", 0.1)), o.get("tau_max", 10.0))
    return -tau * log_sigma(d / tau) + (rho - LOG2) * tau


def pcrm(d, w, r, o):
    if "similarity" in w.column:
        s = w.column["similarity"]
    else:
        a, b = float(w.column["length"]), float(r.column["length"])
        s = min(a, b) / max(a, b)
    bound = o.get("b1", 6.0) / (s + o.get("b2", 0.001)) + o.get("b3", 0.0)
    return -log_sigma(d) - log_sigma(bound - d)


def bradley_terry_ties(d, w, r, o):
    """Probabilities of winning, losing and drawing, which add up to one."""
    theta = o.get("theta", 2.0)
    ew, el = torch.exp(w.score), torch.exp(r.score)
    win, lose = ew / (ew + theta * el), el / (el + theta * ew)
    return -torch.log(1 - win - lose) if w.column["tie"] else -torch.log(win)


def confidence_pairs(answers: list[Answer], o: dict) -> Tensor:
    terms = [
        -log_sigma(w.score[0] - w.score[1])
        - log_sigma(r.score[1] - r.score[0])
        + o.get("center", 0.0) * (w.score.sum() ** 2 + r.score.sum() ** 2)
        for w, r in pairs(answers)
    ]
    return sum(terms) / len(terms)


def mean_variance_pairs(d, w, r, o):
    z = d / torch.sqrt(torch.exp(w.log_variance) + torch.exp(r.log_variance))
    return -torch.log(0.5 * torch.erfc(-z / math.sqrt(2)))


def plackett_luce_reward(answers: list[Answer], o: dict) -> Tensor:
    """Each list counts as many times as it has answers."""
    total = 0.0
    for group in {a.group: None for a in answers}:
        ranked = sorted((a for a in answers if a.group == group), key=lambda a: -a.reward)
        f = torch.stack([a.score for a in ranked])
        total = total + len(ranked) * -sum(f[k] - torch.logsumexp(f[k:], 0) for k in range(len(ranked)))
    return total / len(answers)


def over_answers(of_answer: Callable[[Answer, dict], Tensor]) -> Law:
    return lambda answers, o: sum(of_answer(a, o) for a in answers) / len(answers)


def reward_regression(a, o):
    return (a.score - a.reward) ** 2


def multi_attribute(a, o):
    rated = [k for k in range(len(a.score)) if not math.isnan(a.column["attributes"][k])]
    return sum((a.score[k] - a.column["attributes"][k]) ** 2 for k in rated) / max(1, len(rated)) + 0 * a.score.sum()


def quantile_reward(a, o):
    k = len(a.score)
    terms = []
    for i in range(k):
        level, u = (2 * i + 1) / (2 * k), a.reward - a.score[i]
        terms.append(level * u if float((u).detach()) >= 0 else (level - 1) * u)
    return sum(terms) / k


def gaussian_reward(a, o):
    return 0.5 * (a.log_variance + (a.score - a.reward) ** 2 / torch.exp(a.log_variance))


def verifier(a, o):
    return -log_sigma(a.score if a.label else -a.score)


# -- rows --------------------------------------------------------------------------------------------------------------
def over_rows(of_row: Callable[[Row, dict], Tensor]) -> Law:
    return lambda rows, o: sum(of_row(r, o) for r in rows) / len(rows)


def with_clip(error: Callable[[Tensor, dict], Tensor], default: float | None) -> Callable[[Row, dict], Tensor]:
    def of_row(r: Row, o: dict) -> Tensor:
        returns, old, e = r.column["returns"], r.column["old_values"], o.get("cliprange", default)
        plain = error(r.value - returns, o)
        if e is None:
            return plain
        moved = max(-e, min(e, float((r.value - old).detach())))
        near = r.value if abs(float((r.value - old).detach())) < e else old + moved
        clipped = error(near - returns, o)
        return plain if float((plain).detach()) >= float((clipped).detach()) else clipped + 0 * r.value

    return of_row


def half_square(u, o):
    return u**2 / 2


def huber(u, o):
    delta = o.get("delta", 10.0)
    return u**2 / 2 if abs(float((u).detach())) <= delta else delta * (abs(u) - delta / 2)


def expectile(u, o):
    tau = o.get("tau", 0.7)
    return (1 - tau if float((u).detach()) > 0 else tau) * u**2  # u = V - R: R < V where it is positive


def gaussian_value(r, o):
    return 0.5 * (r.log_variance + (r.value - r.column["returns"]) ** 2 / torch.exp(r.log_variance))


def histogram(r, o):
    low, high, sigma, k = o.get("low", -1.0), o.get("high", 1.0), o.get("sigma", 0.75), len(r.value)
    step = (high - low) / k
    at = min(max(float(r.column["returns"]), low), high)

    def cdf(x: float) -> float:
        return 0.5 * (1 + math.erf((x - at) / (sigma * step * math.sqrt(2))))

    mass = [cdf(low + (i + 1) * step) - cdf(low + i * step) for i in range(k)]
    logp = r.value - torch.logsumexp(r.value, 0)
    return -sum(m / sum(mass) * logp[i] for i, m in enumerate(mass))


def step_class(r, o):
    return torch.logsumexp(r.value, 0) - r.value[r.target]


def step_odds(r: Row) -> Tensor:
    return r.value[1] - r.value[0] if r.value.dim() else r.value


def step_bce(r, o):
    y = r.column.get("step_label", float(r.target))
    return -y * log_sigma(step_odds(r)) - (1 - y) * log_sigma(-step_odds(r))


def step_mse(r, o):
    y = r.column.get("step_label", float(r.target))
    return (1 / (1 + torch.exp(-step_odds(r))) - y) ** 2


SEQUENCES: dict[str, Law] = {
    "bradley_terry": over_pairs(bradley_terry),
    "soft_bradley_terry": over_pairs(soft_bradley_terry),
    "bradley_terry_ties": over_pairs(bradley_terry_ties),
    "hinge_reward": over_pairs(hinge_reward),
    "r3m": over_pairs(r3m),
    "adaptive_scale": over_pairs(adaptive_scale),
    "pcrm": over_pairs(pcrm),
    "confidence_pairs": confidence_pairs,
    "mean_variance_pairs": over_pairs(mean_variance_pairs),
    "plackett_luce_reward": plackett_luce_reward,
    "reward_regression": over_answers(reward_regression),
    "multi_attribute": over_answers(multi_attribute),
    "quantile_reward": over_answers(quantile_reward),
    "gaussian_reward": over_answers(gaussian_reward),
    "verifier": over_answers(verifier),
}
ROWS: dict[str, Law] = {
    "value_mse": over_rows(with_clip(half_square, None)),
    "value_clip": over_rows(with_clip(half_square, 0.2)),
    "value_huber": over_rows(with_clip(huber, None)),
    "value_expectile": over_rows(with_clip(expectile, None)),
    "value_gaussian": over_rows(gaussian_value),
    "value_histogram": over_rows(histogram),
    "prm_class": over_rows(step_class),
    "prm_bce": over_rows(step_bce),
    "prm_mse": over_rows(step_mse),
}

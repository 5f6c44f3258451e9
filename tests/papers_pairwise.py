"""The formulas of the pairwise, Nash, regression and step-wide preference papers, one pair after the other in float64.

Written from the papers' formulas over sums of log-probs; nothing here calls an objective or a helper of fastrl.
law(seqs, o): o = the options as given to losses.get; a missing one is the paper's default, written out here again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from harness import Law, Seq, pairs
from torch import Tensor

LAWS: dict[str, Law] = {}


def law(f: Law) -> Law:
    """Enters a whole law under its own name."""
    LAWS[f.__name__] = f
    return f


def paired(f: Callable[[Seq, Seq, dict], Tensor]) -> Callable:
    """Enters the mean over pairs of f(chosen, rejected, options)."""
    LAWS[f.__name__] = lambda seqs, o: torch.stack([f(w, r, o) for w, r in pairs(seqs)]).mean()
    return f


def softplus(x: Tensor) -> Tensor:
    """-log sigmoid(-x)."""
    return torch.relu(x) + torch.log1p(torch.exp(-x.abs()))


def nls(x: Tensor) -> Tensor:
    """-log sigmoid(x)."""
    return softplus(-x)


def ratio(y: Seq) -> Tensor:
    """log of the ratio of the answer's probabilities."""
    return y.logp.sum() - y.ref.to(y.logp.dtype).sum()


def h(w: Seq, r: Seq) -> Tensor:
    return ratio(w) - ratio(r)


def beta(o: dict, default: float = 0.1) -> float:
    return o.get("beta", default)


# -- offsets, scales, labels, pair weights -----------------------------------------------------------------------------
@paired
def odpo(w, r, o):
    gap = math.log(max(w.margin, 1e-6)) if o.get("f", "log") == "log" else w.margin
    return nls(beta(o) * h(w, r) - o.get("alpha", 1.0) * gap)


@paired
def modpo(w, r, o):
    return nls((beta(o) * h(w, r) - w.margin) / o.get("weight", 0.5))


@paired
def r_dpo(w, r, o):
    return nls(beta(o) * h(w, r) + o.get("alpha", 0.01) * w.n - o.get("alpha", 0.01) * r.n)


@paired
def mallows_dpo(w, r, o):
    settled = (w.token["ref_entropy"].mean() + r.token["ref_entropy"].mean()) / 2
    return nls(2 * o.get("dispersion", 0.5) * torch.log(1 / settled).to(w.logp.dtype) * beta(o) * h(w, r))


@paired
def mmpo(w, r, o):
    p = 1 / (1 + math.exp(-o.get("gamma", 1.0) * w.margin))
    return p * nls(beta(o) * h(w, r)) + (1 - p) * nls(beta(o) * -h(w, r))


@paired
def iw_dpo(w, r, o):
    return w.number["pair_weights"].to(w.logp.dtype) * nls(beta(o) * h(w, r))


@paired
def rdo(w, r, o):
    return w.margin * nls(beta(o) * h(w, r))


@paired
def adpo(w, r, o):
    m = beta(o) * h(w, r)
    label = torch.sign(m.detach()) if abs(m.item()) > o.get("confidence", 1.0) else 1.0
    return nls(label * m)


# -- token weights -----------------------------------------------------------------------------------------------------
def weighted(y: Seq, weights) -> Tensor:
    weights = torch.as_tensor(weights, dtype=y.logp.dtype)
    return (weights * (y.logp - y.ref.to(y.logp.dtype))).sum()


def downsampled(y: Seq, kept: int) -> Tensor:
    places = sorted(range(y.n), key=lambda t: float(y.token["draws"][t]))[:kept]
    return weighted(y, [1.0 if t in places else 0.0 for t in range(y.n)])


@paired
def sampo(w, r, o):
    n = min(w.n, r.n)
    return nls(beta(o) * (downsampled(w, n) - downsampled(r, n)))


@paired
def d2po(w, r, o):
    gamma = o.get("gamma", 0.98)
    return nls(beta(o) * (weighted(w, [gamma**t for t in range(w.n)]) - weighted(r, [gamma**t for t in range(r.n)])))


def turn_weighted(y: Seq, gamma: float) -> Tensor:
    turns = [int(t) for t in y.token["turns"]]
    count = int(y.number["num_turns"]) if "num_turns" in y.number else max(turns) + 1
    if gamma == 1:
        return weighted(y, [(count - t) / count for t in turns])
    return weighted(y, [gamma**t * (1 - gamma ** (count - t)) / (1 - gamma**count) for t in turns])


@paired
def dmpo(w, r, o):
    gamma = o.get("gamma", 0.9)
    return nls(beta(o) * (turn_weighted(w, gamma) - turn_weighted(r, gamma)))


# -- links and both log-ratios -----------------------------------------------------------------------------------------
@paired
def gpo(w, r, o):
    m = beta(o) * h(w, r)
    zero = torch.zeros_like(m)
    return {
        "logistic": lambda: torch.log(1 + torch.exp(-m)),
        "hinge": lambda: torch.maximum(zero, 1 - m),
        "squared": lambda: (m - 1) ** 2,
        "exponential": lambda: torch.exp(-m),
        "truncated_quadratic": lambda: torch.maximum(zero, 1 - m) ** 2,
        "savage": lambda: 1 / (1 + torch.exp(m)) ** 2,
    }[o.get("f", "exponential")]()


@paired
def chi_po(w, r, o):
    m = beta(o) * (torch.exp(ratio(w)) + ratio(w)) - beta(o) * (torch.exp(ratio(r)) + ratio(r))
    bound = o.get("r_max")
    return nls(m if bound is None else torch.clamp(m, -2 * bound, 2 * bound))


@paired
def dpop(w, r, o):
    fallen = torch.maximum(torch.zeros_like(ratio(w)), w.ref.to(w.logp.dtype).sum() - w.logp.sum())
    return nls(beta(o) * (h(w, r) - o.get("penalty", 50.0) * fallen))


@paired
def dpo_shift(w, r, o):
    return nls(beta(o) * ratio(w) - o.get("f", 0.95) * beta(o) * ratio(r))


@paired
def minor_dpo(w, r, o):
    b = beta(o) * ratio(r)
    return nls(beta(o) * ratio(w) - torch.maximum(torch.zeros_like(b), b))


@paired
def cal_dpo(w, r, o):
    target = 1 / (2 * beta(o))
    return nls(h(w, r)) + (ratio(w) - target) ** 2 + (ratio(r) + target) ** 2


@paired
def slic(w, r, o):
    gap = beta(o, 1.0) * (w.logp.sum() - r.logp.sum())
    hinge = torch.maximum(torch.zeros_like(gap), o.get("delta", 1.0) - gap)
    return hinge - o.get("nll_coef", 1.0) * w.logp.sum()


@paired
def simper(w, r, o):
    return torch.exp(r.logp.mean()) - torch.exp(w.logp.mean())


# -- optimism, self-play, Nash -----------------------------------------------------------------------------------------
@paired
def xpo(w, r, o):
    explored = sum(y.number["from_reference"].to(y.logp.dtype) * y.logp.sum() for y in (w, r))
    return nls(beta(o) * h(w, r)) + o.get("alpha", 1e-5) * explored


@paired
def selm(w, r, o):
    explored = sum(y.number["from_reference"].to(y.logp.dtype) * ratio(y) for y in (w, r))
    return nls(beta(o) * h(w, r)) + o.get("alpha", 1e-3) * beta(o) * explored


@paired
def vpo(w, r, o):
    value = ratio(w)
    if "calibration" in w.number:
        value = sum(y.number["calibration"].to(y.logp.dtype) * ratio(y) for y in (w, r))
    sign = 1 if o.get("online", False) else -1
    return nls(beta(o) * h(w, r)) + sign * o.get("alpha", 1e-2) * beta(o) * value


@paired
def spin(w, r, o):
    return torch.log(1 + torch.exp(-beta(o) * (ratio(w) - ratio(r))))


@paired
def inpo(w, r, o):
    eta, share = beta(o, 0.005), o.get("tau_over_eta", 1 / 3)
    dtype = w.logp.dtype

    def gap(which):
        return getattr(w, which).to(dtype).sum() - getattr(r, which).to(dtype).sum()

    return (gap("logp") - share * gap("ref") - (1 - share) * gap("old") - 1 / (2 * eta)) ** 2


@paired
def ipo_md(w, r, o):
    p = w.number["win_rate"].to(w.logp.dtype) if "win_rate" in w.number else 1.0
    return p * (h(w, r) - 1 / (2 * beta(o))) ** 2 + (1 - p) * (h(r, w) - 1 / (2 * beta(o))) ** 2


@law
def sppo(seqs, o):
    each = [(ratio(y) - (y.number["win_rate"].to(y.logp.dtype) - 0.5) / beta(o, 1e-3)) ** 2 for y in seqs]
    return torch.stack(each).mean()


@law
def nash_md(seqs, o):
    """beta sum_t stop(log pi / ref) log pi - (P - 1/2) log pi(y), mean over answers."""
    total = 0.0
    for y in seqs:
        drift = (y.logp - y.ref.to(y.logp.dtype)).detach()
        win = y.number["win_rate"].to(y.logp.dtype)
        total = total + beta(o) * (drift * y.logp).sum() - (win - 0.5) * y.logp.sum()
    return total / len(seqs)


@law
def npo(seqs, o):
    b = beta(o)
    return torch.stack([2 / b * torch.log(1 + torch.exp(b * ratio(y))) for y in seqs]).mean()


@law
def simnpo(seqs, o):
    b, gamma = beta(o, 2.5), o.get("gamma", 0.0)
    return torch.stack([-2 / b * torch.log(torch.sigmoid(-b * y.logp.mean() - gamma)) for y in seqs]).mean()


# -- regressions -------------------------------------------------------------------------------------------------------
def sampled_ratio(y: Seq) -> Tensor:
    return y.logp.sum() - y.old.to(y.logp.dtype).sum()


@paired
def rebel(w, r, o):
    """With beta = 1 / eta."""
    return (beta(o, 1.0) * (sampled_ratio(w) - sampled_ratio(r)) - (w.reward - r.reward)) ** 2


LAWS["refuel"] = LAWS["rebel"]


@paired
def copg(w, r, o):
    regularised = [y.reward - beta(o) * ratio(y) for y in (w, r)]
    return (regularised[0] - regularised[1]) ** 2 / (2 * beta(o))


@paired
def bfpo(w, r, o):
    b1, alpha = o.get("b1", 3.0), o.get("alpha", 0.5)
    label = 1 / (b1 - 1) * (b1 * (1.0 if w.label else 0.0) - (1.0 if r.label else 0.0)) - alpha
    return (h(w, r) - label / beta(o)) ** 2


@paired
def dil(w, r, o):
    good, bad = ((y.logp - y.ref.to(y.logp.dtype)).mean() for y in (w, r))
    if o.get("kind", "lsif") == "lsif":
        return -torch.exp(good) + torch.exp(bad) ** 2 / 2
    return -good + torch.exp(bad) if o["kind"] == "ukl" else nls(good) + nls(-bad)


@law
def dro(seqs, o):
    each = [(y.reward - y.number["values"].to(y.logp.dtype) - beta(o) * ratio(y)) ** 2 / 2 for y in seqs]
    return torch.stack(each).mean()


# -- statistics of the step --------------------------------------------------------------------------------------------
@law
def beta_dpo(seqs, o):
    gaps = torch.stack([h(w, r) for w, r in pairs(seqs)])
    b = beta(o) * (1 + o.get("alpha", 0.6) * (gaps.detach().mean() - o.get("centre", 0.0)))
    return nls(torch.clamp(b, min=1e-3) * gaps).mean()


@law
def alpha_dpo(seqs, o):
    u = torch.stack([w.logp.mean() - r.logp.mean() for w, r in pairs(seqs)])
    reference = torch.stack([w.ref.to(u.dtype).mean() - r.ref.to(u.dtype).mean() for w, r in pairs(seqs)])
    drift = (u - reference).detach()
    standard = (drift - drift.mean()) / drift.std()
    return nls(beta(o, 2.5) * (u - o.get("gamma", 0.3) - o.get("alpha", 0.2) * standard)).mean()


@law
def dr_dpo(seqs, o):
    soft = o.get("beta_prime", 1.0)
    likelihood = torch.stack([torch.log(torch.sigmoid(beta(o) * h(w, r))) for w, r in pairs(seqs)])
    return -soft * torch.log(torch.exp(likelihood / soft).mean())


@law
def group_robust_dpo(seqs, o):
    groups: dict[int, list] = {}
    for w, r in pairs(seqs):
        groups.setdefault(int(w.number["domain"]), []).append((w, r))
    losses = [torch.stack([nls(beta(o) * h(w, r)) for w, r in own]).mean() for own in groups.values()]
    before = [own[0][0].number.get("domain_weight", torch.tensor(1.0)).to(losses[0].dtype) for own in groups.values()]
    after = [a * math.exp(o.get("eta", 0.1) * x.item()) for a, x in zip(before, losses, strict=True)]
    return sum(a / sum(after) * x for a, x in zip(after, losses, strict=True))


@law
def fdpo(seqs, o):
    kept = [(w, r) for w, r in pairs(seqs) if w.reward >= float(w.number["policy_rewards"])]
    return torch.stack([nls(beta(o) * h(w, r)) for w, r in kept]).mean()


# -- lists -------------------------------------------------------------------------------------------------------------
def listed(f: Callable[[list[Seq], dict], Tensor]) -> Callable:
    """Enters the mean over prompts of f(its answers, best first, options)."""

    def whole(seqs, o):
        groups: dict[int, list[Seq]] = {}
        for y in seqs:
            groups.setdefault(y.group, []).append(y)
        ranked = [sorted(own, key=lambda y: -y.reward) for own in groups.values()]
        return sum(f(own, o) for own in ranked) / len(ranked)

    LAWS[f.__name__] = whole
    return f


@listed
def mppo(ys, o):
    p = [torch.exp(y.logp.sum() / y.n) for y in ys]
    best = [p[0] - x for x in p[1:]]
    every = [p[i] - p[j] for i in range(len(p)) for j in range(i + 1, len(p))]
    return {
        "mnm": lambda: nls((len(p) - 1) * p[0] - sum(p[1:])),
        "mns": lambda: sum(nls(x) for x in best),
        "mcs": lambda: sum(nls(x) for x in every),
        "mcm": lambda: nls(sum(every)),
    }[o.get("kind", "mnm")]()


def targets(ys: list[Seq], o: dict) -> list[float]:
    weights = [math.exp(y.reward / o.get("reward_temperature", 1.0)) for y in ys]
    return [x / sum(weights) for x in weights]


@listed
def exo(ys, o):
    weights = torch.exp(torch.stack([beta(o) * ratio(y) for y in ys]))
    p, q = weights / weights.sum(), torch.tensor(targets(ys, o), dtype=weights.dtype)
    return (p * torch.log(p / q)).sum()


@listed
def nca(ys, o):
    good = sum(q * nls(beta(o) * ratio(y)) for q, y in zip(targets(ys, o), ys, strict=True))
    return good + sum(nls(-beta(o) * ratio(y)) for y in ys) / len(ys)


@listed
def gvpo(ys, o):
    rewards = [y.reward for y in ys]
    ratios = [beta(o) * ratio(y) for y in ys]
    r, s = sum(rewards) / len(ys), sum(ratios) / len(ys)
    return sum((a - r - (b - s)) ** 2 for a, b in zip(rewards, ratios, strict=True)) / (2 * (len(ys) - 1))

"""The preference papers' formulas in float64, from whole log-probs, one pair after the other; see harness.Law.

pi, ref: probabilities of a whole answer. Ratios are written as exponentials where the paper does, logarithms where the
numbers would not survive.
"""

from __future__ import annotations

import math

import torch
from harness import Seq, pairs
from torch import Tensor


def nls(x: Tensor) -> Tensor:
    """-log(1 / (1 + e^-x))."""
    return torch.log1p(torch.exp(-x.abs())) + torch.clamp(-x, min=0)


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def weight_of(s: Seq, other: Seq | None, o: dict) -> Tensor:
    """Weight of each token: the column's, and LD-DPO's past the shorter answer's end."""
    w = torch.ones_like(s.logp.detach())
    if "token_weights" in s.token:
        w = w * s.token["token_weights"].to(w.dtype)
    if o.get("ld_alpha") is not None:
        common = min(s.n, other.n)
        w = torch.cat([w[:common], o["ld_alpha"] * w[common:]])
    return w


def of_ref(s: Seq, o: dict) -> Tensor:
    if o.get("reference_free"):
        return torch.zeros_like(s.logp.detach())
    if o.get("references"):
        columns = {"ref_logprobs": s.ref, **s.token}
        return sum(b * columns[n].to(s.logp.dtype) for n, b in o["references"])
    return s.ref.to(s.logp.dtype)


def u_of(s: Seq, o: dict, other: Seq | None = None) -> Tensor:
    """log(pi / ref) of the answer."""
    return (weight_of(s, other, o) * (s.logp - of_ref(s, o))).sum()


def f_prime(u: Tensor, o: dict) -> Tensor:
    """f'(t) at t = pi / ref up to a constant, table 1 of f-DPO."""
    kind, t = o.get("f_divergence", "reverse_kl"), torch.exp(u)
    if kind == "forward_kl":
        return 1 - 1 / t
    if kind == "js_divergence":
        return torch.log(2 * t / (1 + t))
    if kind == "alpha_divergence" and o.get("f_alpha", 0.5) != 1:
        a = o.get("f_alpha", 0.5)
        return (t ** (a - 1) - 1) / (a - 1)
    return u


def pair_weight(w: Seq, lost: Seq, o: dict) -> Tensor | float:
    """WPO: (prod_t pi(y_t) / sum_v pi_v^2)^(1/n) of both answers."""
    if not o.get("use_weighting"):
        return 1.0
    each = [torch.exp((s.logp - s.log_sum_sq.to(s.logp.dtype)).detach()).log().mean().exp() for s in (w, lost)]
    return each[0] * each[1]


def over_pairs(value, normalised: bool = False, divergent: bool = True):
    """Law: the mean over pairs of value(c, r, o, pair)."""

    def law(seqs: list[Seq], o: dict) -> Tensor:
        values = []
        for w, lost in pairs(seqs):
            c, r = u_of(w, o, lost), u_of(lost, o, w)
            if divergent:
                c, r = f_prime(c, o), f_prime(r, o)
            if o.get("length_normalised", normalised):
                c, r = c / w.n, r / lost.n
            values.append(value(c, r, o, (w, lost)) * pair_weight(w, lost, o))
        return torch.stack(values).mean()

    return law


def beta_of(o: dict) -> float:
    return o.get("beta", 0.1)


def shifted(c, r, o, p):
    """beta (c - r) less the offset of ODPO."""
    return beta_of(o) * (c - r) - o.get("margin_coef", 0.0) * p[0].margin


def dpo(c, r, o, p):
    e, x = o.get("label_smoothing", 0.0), shifted(c, r, o, p)
    return (1 - e) * nls(x) + e * nls(-x)


def dpo_nll(c, r, o, p):
    return dpo(c, r, o, p) + o.get("nll_coef", 1.0) * (-p[0].logp.mean())


def robust(c, r, o, p):
    e, x = o.get("label_smoothing", 0.1), shifted(c, r, o, p)
    return ((1 - e) * nls(x) - e * nls(-x)) / (1 - 2 * e)


def hinge(c, r, o, p):
    return torch.clamp(1 - shifted(c, r, o, p), min=0)


def ipo(c, r, o, p):
    return (c - r - 1 / (2 * beta_of(o))) ** 2


def exo_pair(c, r, o, p):
    """KL(softmax of both rewards || (1 - e, e))."""
    e = o.get("label_smoothing", 1e-3)
    q = torch.softmax(torch.stack([beta_of(o) * c, beta_of(o) * r]), 0)
    log_q = torch.log_softmax(torch.stack([beta_of(o) * c, beta_of(o) * r]), 0)
    return q[0] * (log_q[0] - math.log(1 - e)) + q[1] * (log_q[1] - math.log(e))


def nca_pair(c, r, o, p):
    b = beta_of(o)
    return nls(b * c) + sum(nls(-b * x) for x in (c, r)) / 2


def bco_pair(c, r, o, p):
    return nls(beta_of(o) * c) + nls(-beta_of(o) * r)


def sppo_hard(c, r, o, p):
    half = 1 / (2 * beta_of(o))
    return (c - half) ** 2 + (r + half) ** 2


def apo_zero(c, r, o, p):
    return 1 - sig(beta_of(o) * c) + sig(beta_of(o) * r)


def apo_down(c, r, o, p):
    return sig(beta_of(o) * c) + 1 - sig(beta_of(o) * (c - r))


def discopop(c, r, o, p):
    rho = shifted(c, r, o, p)
    g = sig(rho / o.get("tau", 0.05))
    return (1 - g) * nls(rho) + g * torch.exp(-rho)


# -- the whole step at once --------------------------------------------------------------------------------------------
def smoothed(x: Tensor, o: dict) -> Tensor:
    e = o.get("label_smoothing", 0.0)
    return (1 - e) * nls(x) + e * nls(-x)


def aot(seqs: list[Seq], o: dict) -> Tensor:
    whole = torch.mean if o.get("length_normalised") else torch.sum
    policy = torch.stack([whole(w.logp) - whole(lost.logp) for w, lost in pairs(seqs)])
    fixed = torch.stack([whole(of_ref(w, o)) - whole(of_ref(lost, o)) for w, lost in pairs(seqs)])
    return smoothed(beta_of(o) * (policy.sort().values - fixed.sort().values), o).mean()


def aot_unpaired(seqs: list[Seq], o: dict) -> Tensor:
    each = [u_of(s, o) / (s.n if o.get("length_normalised") else 1) for s in seqs]
    c, r = (torch.stack(of).sort().values for of in (each[0::2], each[1::2]))
    return smoothed(beta_of(o) * (c - r), o).mean()


def sft(seqs: list[Seq], o: dict) -> Tensor:
    return -torch.cat([w.logp for w, _ in pairs(seqs)]).mean()


# -- without a reference -----------------------------------------------------------------------------------------------
def step_nll(seqs: list[Seq], coef: float) -> Tensor | float:
    return coef * -torch.cat([s.logp for s in seqs]).mean() if coef else 0.0


def link(kind: str, gap: Tensor, beta: float, e: float) -> Tensor:
    if kind == "hinge":
        return torch.clamp(1 - beta * gap, min=0)
    if kind == "ipo":
        return (gap - 1 / (2 * beta)) ** 2
    return (1 - e) * nls(beta * gap) + e * nls(-beta * gap)


def simpo(seqs: list[Seq], o: dict) -> Tensor:
    b, values = o.get("beta", 2.0), []
    for w, lost in pairs(seqs):
        x = b / w.n * w.logp.sum() - b / lost.n * lost.logp.sum() - o.get("gamma", 0.5)
        values.append(smoothed(x - o.get("margin_coef", 0.0) * w.margin, o) * pair_weight(w, lost, o))
    return torch.stack(values).mean()


def alphapo(seqs: list[Seq], o: dict) -> Tensor:
    a, b, values = o.get("alpha", 0.25), o.get("beta", 2.0), []

    def reward(s: Seq) -> Tensor:
        log_p = s.logp.mean() if o.get("length_normalised", True) else s.logp.sum()
        return (1 - torch.exp(log_p) ** (-a)) / a if a else log_p

    for w, lost in pairs(seqs):
        values.append(smoothed(b * (reward(w) - reward(lost)) - o.get("gamma", 0.5), o))
    return torch.stack(values).mean()


def cpo(seqs: list[Seq], o: dict) -> Tensor:
    mean = o.get("length_normalised", False)
    score = (lambda s: s.logp.mean()) if mean else (lambda s: s.logp.sum())
    gap = torch.stack([score(w) - score(lost) for w, lost in pairs(seqs)])
    nll = step_nll([w for w, _ in pairs(seqs)], o.get("nll_coef", 1.0))
    return link(o.get("kind", "sigmoid"), gap, beta_of(o), o.get("label_smoothing", 0.0)).mean() + nll


def orpo(seqs: list[Seq], o: dict) -> Tensor:
    def odds(s: Seq) -> Tensor:
        p = torch.exp(s.logp.mean())
        return p / (1 - p)

    ratio = torch.stack([torch.log(odds(w) / odds(lost)) for w, lost in pairs(seqs)])
    return step_nll([w for w, _ in pairs(seqs)], o.get("nll_coef", 1.0)) + beta_of(o) * nls(ratio).mean()


def tpo(seqs: list[Seq], o: dict) -> Tensor:
    b, groups = o.get("beta", 0.01), {}
    for s in seqs:
        groups.setdefault(s.group, []).append(s)
    score = (lambda s: s.logp.mean()) if o.get("length_normalised") else (lambda s: s.logp.sum())
    gap = torch.stack([score(c) - score(r) for c, r, _ in groups.values()]) - o.get("gamma", 0.0) / b
    nll = step_nll([gold for _, _, gold in groups.values()], o.get("nll_coef", 1.0))
    return link(o.get("kind", "sigmoid"), gap, b, o.get("label_smoothing", 0.0)).mean() + nll


# -- single answers ----------------------------------------------------------------------------------------------------
def label_weight(s: Seq, o: dict) -> float:
    return o.get("desirable_weight", 1.0) if s.label else o.get("undesirable_weight", 1.0)


def kto(seqs: list[Seq], o: dict) -> Tensor:
    known = [float(s.number["kl"]) for s in seqs if not math.isnan(float(s.number["kl"]))]
    z, b = max(0.0, sum(known) / len(known)), beta_of(o)
    values = [label_weight(s, o) * (1 - sig(b * (u_of(s, o) - z) if s.label else b * (z - u_of(s, o)))) for s in seqs]
    return torch.stack(values).mean()


def apo_zero_unpaired(seqs: list[Seq], o: dict) -> Tensor:
    values = []
    for s in seqs:
        p = sig(beta_of(o) * u_of(s, o))
        values.append(label_weight(s, o) * (1 - p if s.label else p))
    return torch.stack(values).mean()


def bco(seqs: list[Seq], o: dict) -> Tensor:
    rewards = [beta_of(o) * u_of(s, o) for s in seqs]
    delta, values = o.get("delta"), []
    if delta is None:
        good, bad = ([r.detach() for r, s in zip(rewards, seqs, strict=True) if s.label is of] for of in (True, False))
        delta = (sum(good) / len(good) + sum(bad) / len(bad)) / 2
    for r, s in zip(rewards, seqs, strict=True):
        weight = label_weight(s, o)
        if o.get("density_ratios") and not s.label:
            ratio = float(s.number["density_ratio"])
            weight *= min(max(ratio, o.get("min_density_ratio", 0.5)), o.get("max_density_ratio", 10.0))
        values.append(weight * nls(r - delta if s.label else delta - r))
    return torch.stack(values).mean()


PAPERS = {
    "dpo": over_pairs(dpo),
    "sigmoid_norm": over_pairs(dpo, normalised=True),
    "dpo_nll": over_pairs(dpo_nll),
    "robust": over_pairs(robust),
    "hinge": over_pairs(hinge),
    "ipo": over_pairs(ipo, normalised=True),
    "exo_pair": over_pairs(exo_pair),
    "nca_pair": over_pairs(nca_pair, divergent=False),
    "bco_pair": over_pairs(bco_pair, divergent=False),
    "sppo_hard": over_pairs(sppo_hard, divergent=False),
    "apo_zero": over_pairs(apo_zero, divergent=False),
    "apo_down": over_pairs(apo_down, divergent=False),
    "discopop": over_pairs(discopop),
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "sft": sft,
    "simpo": simpo,
    "alphapo": alphapo,
    "cpo": cpo,
    "orpo": orpo,
    "tpo": tpo,
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco,
}

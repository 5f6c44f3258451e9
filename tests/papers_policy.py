"""The policy losses' formulas, from their papers: one sequence after the other, over materialised log-probs.

A law gives the values of each sequence's tokens, [n_i] each; `law_of` adds weights, KL and entropy and aggregates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from harness import Seq, sequence_mean_token_mean, sequence_mean_token_sum, token_mean
from torch import Tensor

Values = Callable[["list[Seq]", dict], "list[Tensor]"]


def ratio(s: Seq, to: str = "old") -> Tensor:
    """pi / another policy, of each token."""
    return torch.exp(s.logp - getattr(s, to).to(s.logp.dtype))


def gain(s: Seq) -> Tensor:
    return s.advantages.to(s.logp.dtype)


def every(name: str):
    """A law of one sequence's tokens -> of all sequences."""

    def make(law):
        LAWS[name] = lambda seqs, o: [law(s, o) for s in seqs]
        return law

    return make


def step(name: str):
    def make(law):
        LAWS[name] = law
        return law

    return make


LAWS: dict[str, Values] = {}


# -- token ratios ------------------------------------------------------------------------------------------------------
@every("gpg")
@every("reinforce")
def reinforce(s, o):
    return -gain(s) * s.logp


@every("is_pg")
def is_pg(s, o):
    return -gain(s) * ratio(s)


def clipped(r, a, low, high, ceiling=None):
    value = torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)
    return -value if ceiling is None else -torch.where(a < 0, torch.maximum(value, ceiling * a), value)


@every("dr_grpo")
@every("bnpo")
@every("grpo")
@every("ppo_clip")
def ppo_clip(s, o):
    return clipped(ratio(s), gain(s), o.get("clip_low", 0.2), o.get("clip_high", 0.2), o.get("dual_clip"))


@every("dapo")
def dapo(s, o):
    return clipped(ratio(s), gain(s), o.get("clip_low", 0.2), o.get("clip_high", 0.28), o.get("dual_clip"))


@every("ppo_two_sided")
def two_sided(s, o):
    """As INTELLECT-2 writes it: min(min(r, delta) A, clip(r) A)."""
    r, a = ratio(s), gain(s)
    inner = torch.minimum(r, torch.full_like(r, o.get("delta", 4.0))) * a
    return -torch.minimum(inner, r.clamp(1 - o.get("clip_low", 0.2), 1 + o.get("clip_high", 0.2)) * a)


@every("cispo")
def cispo(s, o):
    low = o["ratio_min"] if "ratio_min" in o else 1 - o["clip_low"] if "clip_low" in o else 0.0
    high = o["ratio_max"] if "ratio_max" in o else 1 + o["clip_high"] if "clip_high" in o else 5.0
    return -ratio(s).clamp(low, high).detach() * gain(s) * s.logp


@every("sapo")
def sapo(s, o):
    pos, neg = o.get("temperature_pos", 1.0), o.get("temperature_neg", 1.05)
    tau = torch.tensor([pos if a > 0 else neg for a in gain(s)], dtype=torch.float64).to(s.logp.dtype)
    return -gain(s) * 4 / tau / (1 + torch.exp(-tau * (ratio(s) - 1)))


# -- against the rollout policy ----------------------------------------------------------------------------------------
def probabilities(s):
    return torch.exp(s.logp.detach()), torch.exp(s.rollout.to(s.logp.dtype))


def masked(s, dropped, scale=1.0):
    return -scale * ratio(s, "rollout") * gain(s) * (~dropped).to(s.logp.dtype)


def tv_dropped(s, low, high):
    p, q = probabilities(s)
    return ((gain(s) > 0) & (p > q + high)) | ((gain(s) < 0) & (q > p + low))


@every("dppo_tv")
def dppo_tv(s, o):
    return masked(s, tv_dropped(s, o.get("delta_low", 0.2), o.get("delta_high", 0.2)))


@every("dppo_kl")
def dppo_kl(s, o):
    p, q = probabilities(s)
    kl = q * torch.log(q / p) + (1 - q) * torch.log((1 - q) / (1 - p))
    up = (gain(s) > 0) & (p > q) & (kl > o.get("delta_high", 0.05))
    return masked(s, up | (gain(s) < 0) & (p < q) & (kl > o.get("delta_low", 0.05)))


def pulled(s, o):
    return o.get("kl_tau", 1e-3) * (s.logp - s.rollout.to(s.logp.dtype)) ** 2


@every("prime_rl")
def prime_rl(s, o):
    dropped = tv_dropped(s, o.get("delta_low", 0.2), o.get("delta_high", 0.2))
    return masked(s, dropped, o.get("advantage_tau", 1.0)) + pulled(s, o)


@every("prime_ipo")
def prime_ipo(s, o):
    p, q = probabilities(s)
    return masked(s, (p - q).abs() > o.get("threshold", 0.1), o.get("advantage_tau", 1.0)) + pulled(s, o)


@every("rollout_is")
def rollout_is(s, o):
    rho = ratio(s, "rollout").detach()
    inside = (rho > 1 - o.get("clip_low", 0.2)) & (rho < 1 + o.get("clip_high", 0.2))
    return -rho * inside * gain(s) * s.logp


@every("decoupled_ppo")
def decoupled(s, o):
    w = torch.exp((s.old - s.rollout).to(s.logp.dtype))
    return w * (w <= o.get("behaviour_cap", math.inf)) * ppo_clip(s, o)


@every("luffy")
def luffy(s, o):
    p = torch.exp(s.logp)
    return -gain(s) * p / (p + o.get("gamma", 0.1)) if s.number["off_policy"] else ppo_clip(s, o)


@step("vapo")
def vapo(seqs, o):
    correct = sum(s.n for s in seqs if s.label)
    share = o.get("nll_coef", 0.1) * sum(s.n for s in seqs) / correct
    return [ppo_clip(s, {"clip_high": 0.28, **o}) - (share * s.logp if s.label else 0.0) for s in seqs]


# -- whole sequences ---------------------------------------------------------------------------------------------------
def on_all(s: Seq, value: Tensor) -> Tensor:
    """A sequence's value on each of its tokens."""
    return value.expand(s.n) if value.dim() == 0 else value


def geometric(s: Seq) -> Tensor:
    return ratio(s).log().sum().div(max(s.n, 1)).exp()


def sequence_clipped(s, o, r, low, high):
    return clipped(on_all(s, r), gain(s), o.get("clip_low", low), o.get("clip_high", high))


@every("luspo")
@every("gspo")
def gspo(s, o):
    return sequence_clipped(s, o, geometric(s), 3e-4, 4e-4)


@every("gspo_token")
def gspo_token(s, o):
    return sequence_clipped(s, o, geometric(s).detach() * torch.exp(s.logp) / torch.exp(s.logp).detach(), 3e-4, 4e-4)


@every("rloo")
def rloo(s, o):
    return sequence_clipped(s, o, ratio(s).prod(), 0.2, 0.2)


@every("gmpo")
def gmpo(s, o):
    low, high = math.exp(-o.get("clip_low", 0.4)), math.exp(o.get("clip_high", 0.4))
    r = torch.where(gain(s) > 0, ratio(s).clamp(max=high), ratio(s).clamp(min=low))
    return -gain(s) * r.prod() ** (1 / max(s.n, 1))


@every("vespo")
def vespo(s, o):
    w = ratio(s, "rollout" if o.get("from_rollout") else "old").prod().detach()
    good, bad = (o.get("k_pos", 2.0), o.get("lambda_pos", 3.0)), (o.get("k_neg", 3.0), o.get("lambda_neg", 2.0))
    phi = [w**k * torch.exp(scale * (1 - w)) for k, scale in (good if a >= 0 else bad for a in gain(s))]
    return -torch.stack(phi) * gain(s) * s.logp if s.n else s.logp


@every("topr")
def topr(s, o):
    tapered = ratio(s).prod().clamp(o.get("low", 0.0), o.get("high", 1.0)).detach()
    return -torch.where(gain(s) < 0, tapered, torch.ones_like(tapered)) * gain(s) * s.logp


@step("a2po")
def a2po(seqs, o):
    beta1, beta2 = o.get("beta1", 0.5), o.get("beta2", 1e-3)
    values = []
    for s in seqs:
        group = [other.reward for other in seqs if other.group == s.group]
        best = beta1 * math.log(sum(math.exp(r / beta1) for r in group) / len(group))
        best = float(s.number["optimal_value"]) if "optimal_value" in s.number else best
        implicit = beta2 * (s.logp.sum() - s.ref.to(s.logp.dtype).sum())
        values.append(on_all(s, (implicit - (s.reward - best)) ** 2))
    return values


@every("opmd")
def opmd(s, o):
    tau, a = o.get("tau", 1.0), gain(s).mean() if s.n else torch.zeros((), dtype=s.logp.dtype)
    moved = s.logp.sum() - s.old.to(s.logp.dtype).sum()
    if o.get("form", "squared") == "squared":
        return on_all(s, (a - tau * moved) ** 2)
    return on_all(s, (-a * s.logp.sum() + tau / 2 * moved**2) / (1 + tau))


# -- covariance --------------------------------------------------------------------------------------------------------
def covariances(seqs: list[Seq]) -> list[Tensor]:
    a, x = torch.cat([gain(s) for s in seqs]), torch.cat([s.logp.detach() for s in seqs])
    return [(gain(s) - a.mean()) * (s.logp.detach() - x.mean()) for s in seqs]


@step("clip_cov")
def clip_cov(seqs, o):
    """With the fraction 1 nothing is left to chance: every candidate goes."""
    values = []
    for s, cov in zip(seqs, covariances(seqs), strict=True):
        r, a = ratio(s), gain(s)
        out = ((a > 0) & (r > 1 + o.get("clip_high", 0.2))) | ((a < 0) & (r < 1 - o.get("clip_low", 0.2)))
        if "dual_clip" in o:
            out = out | (a < 0) & (r > o["dual_clip"])
        dropped = (cov > o.get("cov_low", 1.0)) & (cov < o.get("cov_high", 5.0)) & ~out
        values.append(ppo_clip(s, o) * ~dropped)
    return values


@step("kl_cov")
def kl_cov(seqs, o):
    covs = covariances(seqs)
    flat = torch.cat(covs)
    count = max(int(o.get("fraction", 2e-4) * len(flat)), 1)
    least = flat.sort(descending=True).values[count - 1]
    return [
        is_pg(s, o) + o.get("cov_coef", 0.1) * (cov >= least).double() * (s.logp - s.old.to(s.logp.dtype)).abs()
        for s, cov in zip(seqs, covs, strict=True)
    ]


# -- weights of the policy term ----------------------------------------------------------------------------------------
def weights(seqs: list[Seq], corrections) -> list[Tensor]:
    """The product of the corrections' factors, each by its own definition."""
    made = [torch.ones(s.n, dtype=torch.float64) for s in seqs]
    for c in corrections:
        made = FACTORS[type(c).__name__](c, seqs, made)
    return made


def w_of(s: Seq) -> Tensor:
    return torch.exp(s.old - s.rollout)


def inside(x, low, high):
    return ((x >= low) & (x <= high)).double()


def each(law):
    return lambda c, seqs, so_far: [m * law(c, s) for s, m in zip(seqs, so_far, strict=True)]


def whole(c, s):
    w = w_of(s).prod()
    return w if c.ratio == "product" else w ** (1 / max(s.n, 1))


def sequence_mask(c, s):
    scale = {"sequence": whole(c, s), "token": w_of(s), "none": 1.0}[c.weight]
    return inside(whole(c, s), c.low, c.high) * scale


def divergence(c, s):
    w = w_of(s)
    x = {"k1": -w.log(), "k2": w.log() ** 2 / 2, "k3": w - 1 - w.log()}[c.metric]
    if c.over != "token":
        x = {"sequence_sum": x.sum(), "sequence_mean": x.mean(), "sequence_max": x.max()}[c.over] if s.n else x.sum()
    return ((x <= c.level) & (x >= (-math.inf if c.low is None else c.low))).double()


def m2po(c, seqs, so_far):
    """Drop the largest, one by one, until the mean of the rest is below the threshold."""
    rest = sorted(float(x) for s in seqs for x in (s.old - s.rollout) ** 2)
    while rest and sum(rest) / len(rest) >= c.threshold:
        rest.pop()
    limit = rest[-1] if rest else -1.0
    return [m * ((s.old - s.rollout) ** 2 <= limit) for s, m in zip(seqs, so_far, strict=True)]


def batch_normalised(c, seqs, so_far):
    parts = [m for m in so_far if len(m)]
    mean = torch.cat(parts).mean() if c.over == "token" else sum(m.mean() for m in parts) / len(parts)
    return [m / mean for m in so_far]


def opsm(c, s):
    gap = (s.rollout - s.logp.detach().double()).mean() if s.n else torch.zeros(())
    return ((s.advantages >= 0) | (gap <= c.delta)).double()


FACTORS = {
    "TokenTruncate": each(lambda c, s: w_of(s).clamp(c.low, c.high)),
    "TokenMask": each(lambda c, s: inside(w_of(s), c.low, c.high) * (w_of(s) if c.weighted else 1.0)),
    "SequenceTruncate": each(lambda c, s: whole(c, s).clamp(c.low, c.high)),
    "SequenceMask": each(sequence_mask),
    "OutlierMask": each(lambda c, s: float(bool(inside(w_of(s), c.low, c.high).all()))),
    "DivergenceReject": each(divergence),
    "M2PO": m2po,
    "BatchNormalised": batch_normalised,
    "OPSM": each(opsm),
}


def entropy_kept(seqs: list[Seq], fraction: float) -> list[Tensor]:
    least = torch.quantile(torch.cat([s.entropy.detach().double() for s in seqs]), 1 - fraction)
    return [(s.entropy.detach().double() >= least).double() for s in seqs]


# -- KL, entropy, aggregation ------------------------------------------------------------------------------------------
def kl_value(kind: str, s: Seq) -> Tensor:
    big_d = s.logp - s.ref.to(s.logp.dtype)
    k2, forward = big_d**2 / 2, torch.exp(-big_d) - 1 + big_d
    plain = {"k1": big_d, "k2": k2, "k3": forward, "abs": big_d.abs()}
    if kind.startswith("is_"):
        return ratio(s) * plain[kind[3:]]
    if kind.endswith("+"):  # the value of one, the gradient of k2
        return plain[kind[:-1]].detach() + k2 - k2.detach()
    return plain[kind]


def constant(values: list[Tensor], length: int) -> Tensor:
    return sum(v.sum() for v in values) / (len(values) * length)


AGGREGATION = {
    **dict.fromkeys(("grpo", "sapo", "gspo", "gspo_token", "rloo", "gmpo", "a2po", "opmd"), sequence_mean_token_mean),
    **dict.fromkeys(("luspo", "topr"), sequence_mean_token_sum),
}
EXTRA = {"prime_rl": pulled, "prime_ipo": pulled}  # terms that no correction weighs


def law_of(name: str) -> Callable[[list[Seq], dict], Tensor]:
    """The whole loss of `name` by its paper."""

    def law(seqs: list[Seq], o: dict) -> Tensor:
        values = LAWS[name](seqs, o)
        factors = weights(seqs, o.get("corrections", ()))
        if o.get("top_entropy", 1.0) < 1:
            factors = [f * k for f, k in zip(factors, entropy_kept(seqs, o["top_entropy"]), strict=True)]
        values = [v * f.to(v.dtype) for v, f in zip(values, factors, strict=True)]
        if o.get("kl_coef"):
            values = [v + o["kl_coef"] * kl_value(o.get("kl", "k3"), s) for v, s in zip(values, seqs, strict=True)]
        if o.get("entropy_coef"):
            values = [v - o["entropy_coef"] * s.entropy for v, s in zip(values, seqs, strict=True)]
        if name == "dr_grpo":
            return constant(values, o["max_length"])
        return AGGREGATION.get(name, token_mean)(values)

    return law

"""Advantages as the papers write them: loops over plain Python numbers, one completion and one token after the other.

rewards: list of float, NaN where unscored; groups: list of ids; results: list of float. Nothing here calls fastrl.
"""

from __future__ import annotations

import math
from itertools import combinations

NAN = math.nan


def members(rewards, groups, i):
    """Scored completions of i's group."""
    return [j for j in range(len(rewards)) if groups[j] == groups[i] and not math.isnan(rewards[j])]


def scored(rewards):
    return [j for j in range(len(rewards)) if not math.isnan(rewards[j])]


def mean(xs):
    return math.fsum(xs) / len(xs)


def std(xs, unbiased=True):
    """0 where it is undefined, or where all are equal."""
    n = len(xs) - (1 if unbiased else 0)
    if n < 1 or max(xs) == min(xs):
        return 0.0
    return math.sqrt(math.fsum((x - mean(xs)) ** 2 for x in xs) / n)


def each(rewards, law):
    """law(i) for the scored, 0 for the others."""
    return [0.0 if math.isnan(r) else law(i) for i, r in enumerate(rewards)]


def normalised(
    rewards, groups, mean_level="group", std_level="group", leave_one_out=False, leave_one_out_std=False, unbiased=True,
    eps=1e-4,
):  # fmt: skip
    def peers(i, level):
        return members(rewards, groups, i) if level == "group" else scored(rewards)

    def law(i):
        a = rewards[i]
        if mean_level != "none":
            of = [rewards[j] for j in peers(i, mean_level) if not (leave_one_out and j == i)]
            a = a - mean(of) if of else 0.0
        if std_level != "none":
            of = [rewards[j] for j in peers(i, std_level) if not (leave_one_out_std and j == i)]
            spread = std(of, unbiased)
            a = a / (spread + eps) if spread > 0 else a
        return a

    return each(rewards, law)


def opo(rewards, groups, lengths):
    def law(i):
        g = members(rewards, groups, i)
        return rewards[i] - sum(lengths[j] * rewards[j] for j in g) / sum(lengths[j] for j in g)

    return each(rewards, law)


def max_rl(rewards, groups):
    def law(i):
        mu = mean([rewards[j] for j in members(rewards, groups, i)])
        return (rewards[i] - mu) / mu if mu > 0 else 0.0

    return each(rewards, law)


def pass_at_k_best(rewards, groups, normalise=False, eps=1e-4):
    def law(i):
        own = [rewards[j] for j in members(rewards, groups, i)]
        ranked = sorted(own, reverse=True)
        if len(ranked) < 2 or rewards[i] != ranked[0]:
            return 0.0
        return (ranked[0] - ranked[1]) / (std(own) + eps if normalise else 1.0)

    return each(rewards, law)


def pass_at_k(rewards, groups, k):
    """Every k-subset of the group drawn, paid 1 if one of it is right; a completion gets the mean advantage of the
    subsets that it is in."""

    def law(i):
        g = members(rewards, groups, i)
        if len(g) < k:
            return 0.0
        paid = {s: float(any(rewards[j] > 0 for j in s)) for s in combinations(g, k)}
        p = mean(list(paid.values()))
        if p in (0.0, 1.0):
            return 0.0
        return mean([(x - p) / math.sqrt(p * (1 - p)) for s, x in paid.items() if i in s])

    return each(rewards, law)


def pkpo(rewards, groups, k):
    """What a completion adds to the maximum of every k-subset that it is in."""

    def law(i):
        g = members(rewards, groups, i)
        mine = [s for s in combinations(g, k) if i in s]
        if not mine:
            return 0.0
        added = [max(rewards[j] for j in s) - max(rewards[j] for j in s if j != i) for s in mine]
        return k * mean(added)

    return each(rewards, law)


def a2po(rewards, groups, beta):
    def law(i):
        own = [rewards[j] for j in members(rewards, groups, i)]
        return rewards[i] - beta * math.log(mean([math.exp(r / beta) for r in own]))

    return each(rewards, law)


def over_tokens(values, lengths, eps=1e-8):
    """z-score of values as if each stood on as many tokens as its completion has."""
    kept = [(v, n) for v, n in zip(values, lengths, strict=True) if not math.isnan(v)]
    copies = [v for v, n in kept for _ in range(n)]
    mu, sd = mean(copies), std(copies)
    return [0.0 if math.isnan(v) else (v - mu) / math.sqrt(sd**2 + eps) for v in values]


def reinforce_pp(rewards, groups, lengths):
    return over_tokens(rewards, lengths)


def reinforce_pp_baseline(rewards, groups, lengths):
    centred = [
        NAN if math.isnan(r) else r - mean([rewards[j] for j in members(rewards, groups, i)])
        for i, r in enumerate(rewards)
    ]
    return over_tokens(centred, lengths)


def gpg(rewards, groups, valid, scale=1.0):
    every = scored(rewards)
    if valid == "mixed_groups":
        good = [i for i in every if len({rewards[j] for j in members(rewards, groups, i)}) > 1]
    else:
        good = [i for i in every if rewards[i] != 0]
    alpha = len(every) / max(len(good), 1)
    centre = {i: mean([rewards[j] for j in members(rewards, groups, i)]) for i in every}
    return each(rewards, lambda i: alpha * (rewards[i] - centre[i]) / scale)


def gdpo(components, groups, weights, eps=1e-4):
    """components: [S][K], NaN where a function gave no score."""
    totals = []
    for i, row in enumerate(components):
        total = 0.0
        for k, x in enumerate(row):
            own = [components[j][k] for j in range(len(components)) if groups[j] == groups[i]]
            own = [v for v in own if not math.isnan(v)]
            if not math.isnan(x) and std(own) > 0:
                total += weights[k] * (x - mean(own)) / (std(own) + eps)
        totals.append(NAN if all(math.isnan(x) for x in row) else total)
    known = [t for t in totals if not math.isnan(t)]
    return [0.0 if math.isnan(t) else (t - mean(known)) / (std(known) + eps) for t in totals]


# -- tokens ------------------------------------------------------------------------------------------------------------
def token_rewards(rewards, sequences, kl, beta):
    """sequences: list of lists of bool (trained); kl: [T] over all tokens."""
    made, t = [], 0
    for r, trained in zip(rewards, sequences, strict=True):
        last = max([s for s, on in enumerate(trained) if on], default=None)
        for s, on in enumerate(trained):
            made.append(((r if s == last else 0.0) - beta * kl[t]) if on else 0.0)
            t += 1
    return made


def returns(rewards, gamma):
    """Discounted sums of what is still to come, of one sequence's actions."""
    return [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def gae(rewards, values, gamma, lam, bootstrap=0.0):
    """(advantages, returns) of one sequence's actions, eq. 16 summed as written."""
    after = [*values[1:], bootstrap][: len(values)]
    delta = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    made = [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]
    return made, [a + v for a, v in zip(made, values, strict=True)]


def optimal_token_baseline(trajectories, zero_tail, eps=1e-8):
    """trajectories: (group, rewards, p, sum p^2, importance weights) of each one's actions -> advantages of each."""
    togo, path = [], []
    for _, r, p, q, w in trajectories:
        togo.append(returns(r, 1.0))
        path.append([sum(w[s] ** 2 * (1 - 2 * p[s] + q[s]) for s in range(t + 1)) for t in range(len(r))])
    made = []
    for i, (group, r, *_) in enumerate(trajectories):
        own = []
        for t in range(len(r)):
            alive = [j for j, x in enumerate(trajectories) if x[0] == group and len(x[1]) > t]
            b = sum(togo[j][t] * path[j][t] for j in alive) / (sum(path[j][t] for j in alive) + eps)
            own.append(togo[i][t] - (0.0 if zero_tail and len(alive) == 1 else b))
        made.append(own)
    return made


def process_grpo(sequences, eps=1e-4):
    """sequences: (group, [(tokens, reward or NaN)] of each step) -> [[advantage of each token]]."""
    made = []
    for group, steps in sequences:
        pool = [r for g, own in sequences if g == group for _, r in own if not math.isnan(r)]
        known = [not math.isnan(r) and std(pool) > 0 for _, r in steps]
        scores = [(r - mean(pool)) / (std(pool) + eps) if k else 0.0 for k, (_, r) in zip(known, steps, strict=True)]
        made.append([sum(scores[k:]) for k, (tokens, _) in enumerate(steps) for _ in range(tokens)])
    return made

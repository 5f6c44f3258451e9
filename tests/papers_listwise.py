"""Listwise losses as the papers write them: float64, one list after the other, one pair after the other."""

from __future__ import annotations

import math

import torch
from harness import Seq
from torch import Tensor


def ranked_lists(seqs: list[Seq]) -> list[list[Seq]]:
    """Every prompt's scored, non-empty answers, the best first; a prompt without any gives an empty list."""
    made = []
    for group in dict.fromkeys(s.group for s in seqs):
        own = [s for s in seqs if s.group == group and not math.isnan(s.reward) and s.n]
        made.append(sorted(own, key=lambda s: -s.reward))
    return made


def over_prompts(seqs: list[Seq], law) -> Tensor:
    """Mean of law(list) over prompts; an empty list is 0."""
    lists = ranked_lists(seqs)
    zero = sum(s.logp.sum() for s in seqs) * 0
    return sum((law(answers) if answers else zero) for answers in lists) / len(lists) + zero


def ratio(s: Seq, o: dict) -> Tensor:
    reference = 0.0 if o.get("reference_free") else s.ref
    return o.get("beta", 0.1) * (s.logp - reference).sum()


def tops(answers: list[Seq]) -> list[Seq]:
    return [s for s in answers if s.reward == answers[0].reward]


def best_nll(answers: list[Seq]) -> Tensor:
    return -sum(s.logp.sum() for s in tops(answers)) / len(tops(answers))


def pro(seqs: list[Seq], o: dict) -> Tensor:
    def law(answers):
        total = o.get("sft_coef", 0.05) * (len(answers) - 1) ** 2 * best_nll(answers)
        for k in answers:
            below = [i for i in answers if i.reward < k.reward]
            if below:
                own = torch.exp(k.logp.mean() * max(k.reward - i.reward for i in below))
                rest = sum(torch.exp(i.logp.mean() * (k.reward - i.reward)) for i in below)
                total = total - torch.log(own / (own + rest))
        return total

    return over_prompts(seqs, law)


def rrhf(seqs: list[Seq], o: dict) -> Tensor:
    def law(answers):
        total = o.get("sft_coef", 1.0) * best_nll(answers)
        for i in answers:
            for j in answers:
                if i.reward < j.reward and i.logp.mean() > j.logp.mean():
                    total = total + i.logp.mean() - j.logp.mean()
        return total

    return over_prompts(seqs, law)


def lire(seqs: list[Seq], o: dict) -> Tensor:
    def law(answers):
        t = o.get("temperature", 2.0)
        powers = [torch.exp((s.logp.mean() if o.get("length_normalised") else s.logp.sum()) / t) for s in answers]
        expected = sum(p / sum(powers) * s.reward for p, s in zip(powers, answers, strict=True))
        return o.get("sft_coef", 0.0) * best_nll(answers) - expected

    return over_prompts(seqs, law)


def plackett_luce(seqs: list[Seq], o: dict) -> Tensor:
    def law(answers):
        total = o.get("sft_coef", 0.0) * best_nll(answers)
        for k in answers:
            below = [torch.exp(ratio(i, o)) for i in answers if i.reward < k.reward]
            own = torch.exp(ratio(k, o))
            total = total - torch.log(own / (own + sum(below)))
        return total

    return over_prompts(seqs, law)


def dpo_all_pairs(seqs: list[Seq], o: dict) -> Tensor:
    def law(answers):
        pairs = [(w, r) for w in answers for r in answers if w.reward > r.reward]
        terms = [-torch.log(torch.sigmoid(ratio(w, o) - ratio(r, o))) for w, r in pairs]
        return sum(terms) / len(terms) if terms else answers[0].logp.sum() * 0

    return over_prompts(seqs, law)


def lipo_lambda(seqs: list[Seq], o: dict) -> Tensor:
    def law(answers):
        by_score = sorted(answers, key=lambda s: (-float(ratio(s, o).detach()), s.reward))
        place = {id(s): k + 1 for k, s in enumerate(by_score)}
        total = answers[0].logp.sum() * 0
        for w in answers:
            for r in answers:
                if w.reward > r.reward:
                    gain = abs((2**w.reward - 1) - (2**r.reward - 1))
                    discount = abs(1 / math.log(1 + place[id(w)]) - 1 / math.log(1 + place[id(r)]))
                    total = total + gain * discount * torch.log(1 + torch.exp(-(ratio(w, o) - ratio(r, o))))
        return total

    return over_prompts(seqs, law)


def listnet(seqs: list[Seq], o: dict) -> Tensor:
    def law(answers):
        t = o.get("reward_temperature", 1.0)
        target = [math.exp(s.reward / t) for s in answers]
        powers = [torch.exp(ratio(s, o)) for s in answers]
        return -sum(g / sum(target) * torch.log(p / sum(powers)) for g, p in zip(target, powers, strict=True))

    return over_prompts(seqs, law)


def raft(seqs: list[Seq], o: dict) -> Tensor:
    return over_prompts(seqs, lambda answers: -sum(s.logp.mean() for s in tops(answers)) / len(tops(answers)))

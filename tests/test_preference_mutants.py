"""Planted mistakes in the preference losses: each makes the check of its loss against its paper fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from harness import check_paper, check_step
from papers_preference import PAPERS
from test_losses_preference import CASES, world_of

from fastrl.losses import kto, margin, preference, reference_free, transport

MUTANTS: dict[str, tuple[Callable, Callable]] = {}


def paper(name: str, i: int = 0):
    return lambda: check_paper(name, CASES[name][i], PAPERS[name], world_of(name))


def mutant(check: Callable):
    """Registers a function that plants one mistake through monkeypatch, with the check that must fail."""

    def register(plant):
        MUTANTS[plant.__name__] = (plant, check)
        return plant

    return register


def wrap(patch, owner, name: str, change: Callable) -> None:
    patch.setattr(owner, name, change(getattr(owner, name)))


def with_options(patch, cls, **options) -> None:
    """The law of `cls` reads other options than it was given."""
    wrap(patch, cls, "__call__", lambda f: lambda self, *args: f(dataclasses.replace(self, **options), *args))


@mutant(paper("ipo"))
def chosen_and_rejected_swapped(patch):
    wrap(patch, margin, "pairs", lambda f: lambda x: f(x)[::-1])


@mutant(paper("ipo"))
def scores_not_divided_by_length(patch):
    patch.setattr(margin, "own_length", lambda batch, like: torch.ones_like(like))


@mutant(paper("robust"))
def flipped_term_added(patch):
    with_options(patch, preference.RobustDPO, label_smoothing=0.0)


@mutant(paper("dpo", 3))
def forward_kl_of_the_other_sign(patch):
    wrap(patch, preference, "safe_expm1", lambda f: lambda x: f(-x))


@mutant(paper("dpo", 5))
def alpha_taken_for_a_half_and_back(patch):
    with_options(patch, preference.DPO, f_alpha=1.5)


@mutant(paper("dpo", 8))
def wpo_weights_with_a_gradient(patch):
    def kept(stats, batch):
        sums = margin.segment_sum(stats.logprobs - stats.log_sum_sq_probs, batch)
        return sum(margin.pairs(sums / margin.own_length(batch, sums))).exp()

    patch.setattr(margin, "on_policy_weight", kept)


@mutant(paper("dpo", 8))
def tail_and_shared_tokens_exchanged(patch):
    wrap(patch, margin, "beyond_shared_length", lambda f: lambda batch, alpha: 1 + alpha - f(batch, alpha))


@mutant(paper("dpo", 8))
def offset_added(patch):
    wrap(patch, margin.PairLoss, "offset", lambda f: lambda self, batch: -f(self, batch))


@mutant(paper("dpo", 9))
def only_the_first_reference(patch):
    wrap(patch, margin.Referenced, "_column", lambda f: lambda self, name, batch: f(self, "ref_logprobs", batch))


@mutant(paper("exo_pair"))
def labels_of_exo_exchanged(patch):
    with_options(patch, preference.EXOPair, label_smoothing=1 - 1e-3 - 0.6)


@mutant(paper("discopop"))
def gate_of_discopop_turned(patch):
    wrap(patch, preference.DiscoPOP, "link", lambda f: lambda self, m: f(self, -m))


@mutant(paper("aot"))
def margins_not_sorted(patch):
    wrap(patch, transport, "ranks", lambda f: lambda own, everywhere: (torch.arange(len(own)), f(own, everywhere)[1]))


@mutant(paper("aot_unpaired"))
def partners_move_with_the_policy(patch):
    def law(self, chosen, rejected, batch):
        below, above = margin.pairs(batch.sequence("aot_partner"))
        return self.link(self.beta * (chosen - below))

    patch.setattr(transport.AOTUnpaired, "law", law)


@mutant(paper("sft"))
def rejected_trained_too(patch):
    patch.setattr(preference, "interleaved", lambda chosen, rejected: margin.interleaved(chosen, chosen))


@mutant(lambda: check_step("sft", {}, world_of("sft")))
def chosen_counted_in_each_micro_batch(patch):
    def own(self, stats, batch):
        chosen = torch.arange(batch.num_segments) % 2 == 0
        kept = batch.spread(chosen)
        return -stats.logprobs * kept / kept.sum() * len(kept)

    patch.setattr(preference.ChosenNLL, "__call__", own)


@mutant(paper("kto"))
def kl_forgotten(patch):
    patch.setattr(kto.KTO, "shift", kto.Unpaired.shift)


@mutant(paper("kto", 1))
def weights_of_both_labels_exchanged(patch):
    wrap(patch, kto.Unpaired, "labels", lambda f: lambda self, batch: ~f(self, batch))


@mutant(paper("bco"))
def delta_is_the_mean_of_all_rewards(patch):
    patch.setattr(kto.BCO, "_middle", lambda self, rewards, batch, everywhere: everywhere(rewards).mean())


@mutant(paper("bco", 1))
def density_ratios_not_clamped(patch):
    with_options(patch, kto.BCO, min_density_ratio=0.0, max_density_ratio=1e9)


@mutant(paper("orpo"))
def odds_taken_for_probabilities(patch):
    patch.setattr(reference_free, "log_odds", lambda x: x)


@mutant(paper("alphapo"))
def alpha_of_the_other_sign(patch):
    with_options(patch, reference_free.AlphaPO, alpha=-0.25)


@mutant(paper("simpo"))
def target_margin_times_beta(patch):
    with_options(patch, reference_free.SimPO, gamma=1.0)


@mutant(paper("cpo", 3))
def nll_of_pairs_weighed_alike(patch):
    wrap(patch, reference_free.WithNLL, "extra", lambda f: lambda self, s, b: 0.5 * margin.chosen_nll(s, b))


@mutant(paper("tpo"))
def gold_and_rejected_exchanged(patch):
    triples = reference_free.TPO.triples
    patch.setattr(reference_free.TPO, "triples", staticmethod(lambda batch: triples(batch)[:, [0, 2, 1]]))


@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_notices(name, monkeypatch):
    plant, check = MUTANTS[name]
    check()
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            check()

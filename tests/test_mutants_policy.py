"""The policy losses' tests must notice: each planted mistake makes the named check fail, and without it it passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import harness
import pytest
import torch
from harness import check_far, check_paper, check_step
from papers_policy import law_of
from test_corrections import CASES as WEIGHTS
from test_losses_policy import CASES, check_binary_kl, make

from fastrl.losses import corrections, covariance, kl, policy, ratio, regression, sequence_ratio
from fastrl.tokens import segment_sum

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MUTANTS: dict[str, tuple[Callable, Callable]] = {}


def paper(name: str, **options):
    return lambda: check_paper(name, options or CASES[name][-1], law_of(name), make(name, 1))


def step(name: str, **options):
    return lambda: check_step(name, options or CASES[name][-1], make(name, 4))


def mutant(check: Callable):
    def register(plant):
        MUTANTS[plant.__name__] = (plant, check)
        return plant

    return register


def wrap(patch, owner, name: str, change: Callable) -> None:
    patch.setattr(owner, name, change(getattr(owner, name)))


def with_numbers(**swapped):
    """The law of an object whose numbers are taken from others of its own."""
    return lambda f: lambda self, *args: f(
        dataclasses.replace(self, **{n: getattr(self, other) for n, other in swapped.items()}), *args
    )


@mutant(paper("gspo"))
def product_in_place_of_the_geometric_mean(patch):
    patch.setattr(sequence_ratio, "segment_mean", segment_sum)


@mutant(paper("luspo"))
def length_bias_left_in(patch):
    patch.setattr(sequence_ratio.LUSPO, "aggregate", "sequence_mean_token_mean")


@mutant(paper("gspo_token"))
def gradient_through_the_whole_sequence(patch):
    patch.setattr(sequence_ratio.GSPOToken, "log_ratio", sequence_ratio.GSPO.log_ratio)


@mutant(paper("rloo"))
def ratio_of_tokens_in_place_of_completions(patch):
    patch.setattr(sequence_ratio.RLOO, "log_ratio", policy.Clipped.log_ratio)


@mutant(paper("gmpo"))
def clip_of_the_mean_on_the_wrong_side(patch):
    wrap(patch, sequence_ratio.GMPO, "policy_loss", with_numbers(clip_low="clip_high", clip_high="clip_low"))


@mutant(paper("vespo"))
def weights_of_gains_and_losses_swapped(patch):
    wrap(patch, sequence_ratio.VESPO, "phi", with_numbers(k_pos="k_neg", k_neg="k_pos"))


@mutant(paper("topr"))
def positives_tapered_too(patch):
    def change(f):
        return lambda self, s, b: f(self, s, dataclasses.replace(b, advantages=-b.token_advantages.abs()))

    wrap(patch, sequence_ratio.TOPR, "weight", change)


@mutant(paper("sapo"))
def temperatures_swapped(patch):
    swap = with_numbers(temperature_pos="temperature_neg", temperature_neg="temperature_pos")
    wrap(patch, ratio.SAPO, "policy_loss", swap)


@mutant(paper("cispo", ratio_max=1.1))
def absolute_bound_read_as_a_distance(patch):
    patch.setattr(ratio.CISPO, "range", property(lambda self: (0.0, 1 + self.ratio_max)))


@mutant(paper("dppo_tv"))
def mask_blind_to_the_sign_of_the_advantage(patch):
    wrap(patch, ratio.DPPOTV, "keeps", lambda f: lambda self, logp, old, a: f(self, logp, old, a.abs()))


@mutant(check_binary_kl)
def kl_with_its_arguments_swapped(patch):
    wrap(patch, ratio, "binary_kl", lambda f: lambda p, q: f(q, p))


@mutant(paper("prime_rl"))
def pull_on_kept_tokens_only(patch):
    def change(f):
        return lambda self, s, b: f(self, s, b) * self.kept(s, b)

    wrap(patch, ratio.PrimeRL, "extra_loss", change)


@mutant(paper("luffy"))
def demonstrations_taken_for_ones_own(patch):
    wrap(patch, ratio.LUFFY, "off_policy", lambda f: lambda self, b: f(self, b) & False)


@mutant(paper("vapo"))
def likelihood_over_all_tokens(patch):
    def change(f):
        def columns(self, batch, *rest):
            made = f(self, batch, *rest)
            made["per_token"]["nll_weight"] = (made["per_token"]["nll_weight"] > 0).double()
            return made

        return columns

    wrap(patch, ratio.VAPO, "step_columns", change)


@mutant(paper("decoupled_ppo"))
def cap_forgotten(patch):
    patch.setattr(ratio.DecoupledPPO, "every_correction", property(lambda self: (corrections.TokenMask(0.0, 1e9),)))


@mutant(paper("a2po"))
def mean_in_place_of_the_soft_maximum(patch):
    wrap(patch, regression, "optimal_value", lambda f: lambda r, g, beta, *rest: f(r, g, 1e6, *rest))


@mutant(paper("opmd", tau=0.3))
def pulled_the_wrong_way(patch):
    wrap(patch, regression, "log_ratio", lambda f: lambda s, b: -f(s, b))


@mutant(paper("kl_cov"))
def lowest_covariance(patch):
    wrap(patch, covariance, "largest", lambda f: lambda values, *rest: f(-values, *rest))


@mutant(step("kl_cov"))
def statistics_of_the_micro_batch(patch):
    def change(f):
        def each(objective, batches, stats=None):
            stats = [None] * len(batches) if stats is None else stats
            return [f(objective, [b], None if s is None else [s])[0] for b, s in zip(batches, stats, strict=True)]

        return each

    wrap(patch, harness, "prepared", change)


@mutant(step("clip_cov", fraction=0.1, cov_low=0.05, cov_high=9.0))
def lots_drawn_by_row(patch):
    def by_row(candidates, count, batch, everywhere):
        return candidates & (candidates.cumsum(0) <= count)

    patch.setattr(covariance, "by_lot", by_row)


@mutant(paper("clip_cov"))
def covariance_of_what_is_not_centred(patch):
    patch.setattr(covariance, "covariance", lambda a, logp, everywhere: (a * logp).double())


@mutant(paper("dapo", top_entropy=0.4))
def low_entropy_tokens_kept(patch):
    wrap(patch, policy, "high_entropy", lambda f: lambda h, *rest: f(-h, *rest))


@mutant(paper("dapo", corrections=WEIGHTS["tis"]))
def weight_upside_down(patch):
    def change(f):
        def swapped(cs, b, everywhere):
            turned = dataclasses.replace(b, old_logprobs=b.rollout_logprobs, rollout_logprobs=b.old_logprobs)
            return f(cs, turned, everywhere)

        return swapped

    wrap(patch, policy, "step_weight", change)


@mutant(paper("dapo", corrections=WEIGHTS["everything"], kl_coef=0.3))
def weight_on_the_kl_too(patch):
    wrap(patch, policy, "kl_to_reference", lambda f: lambda kind, s, b: f(kind, s, b) * b.token("policy_weight"))


@mutant(paper("dapo", corrections=WEIGHTS["m2po"]))
def moment_of_the_first_power(patch):
    def change(f):
        return lambda self, weight, log_w, *rest: f(self, weight, log_w.abs().sqrt(), *rest)

    wrap(patch, corrections.M2PO, "apply", change)


@mutant(paper("reinforce", corrections=WEIGHTS["opsm"]))
def positive_sequences_dropped_too(patch):
    def change(f):
        return lambda self, s, b: f(self, s, dataclasses.replace(b, advantages=-b.token_advantages.abs()))

    wrap(patch, corrections.OPSM, "keeps", change)


@mutant(paper("reinforce", kl_coef=0.5, kl="is_k3"))
def kl_without_its_importance_weight(patch):
    wrap(patch, policy, "kl_corrected", lambda f: lambda kind, logp, ref, old: f(kind, logp, ref, None))


@mutant(paper("bnpo", kl_coef=0.5, kl="k3+"))
def straight_through_keeps_its_own_gradient(patch):
    wrap(patch, policy, "kl_estimate", lambda f: lambda kind, logp, ref: f("k3", logp, ref))


@mutant(lambda: check_far("is_pg", {}, lambda: make("is_pg", 5)))
def plain_exponential(patch):
    for module in (ratio, policy, kl):
        patch.setattr(module, "safe_exp", torch.exp)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_notices(name, monkeypatch):
    plant, check = MUTANTS[name]
    check()
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            check()

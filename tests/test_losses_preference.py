"""Preference losses: each against its paper, against TRL's own code, and under every cut of the step."""

from __future__ import annotations

import math

import pytest
import torch
from harness import check_accuracy, check_chunks, check_far, check_paper, check_step, world
from papers_preference import PAPERS

from fastrl import losses
from fastrl.losses import kto, preference, reference_free
from fastrl.objective import scope_of

NAMES = [*preference.PREFERENCE, *kto.UNPAIRED, *reference_free.REFERENCE_FREE]
DIVERGENCES = [{"f_divergence": k} for k in preference.F_DIVERGENCES[1:]]
CASES: dict[str, list[dict]] = {
    "dpo": [
        {}, {"beta": 0.7, "label_smoothing": 0.2}, {"beta": 2.0, "reference_free": True}, *DIVERGENCES,
        {"f_divergence": "alpha_divergence", "f_alpha": 1.7}, {"f_divergence": "alpha_divergence", "f_alpha": 1.0},
        {"ld_alpha": 0.3, "use_weighting": True, "margin_coef": 0.4},
        {"references": (("ref_logprobs", 0.6), ("second", 0.4))},
    ],
    "sigmoid_norm": [{}, {"beta": 2.0, "f_divergence": "js_divergence"}],
    "dpo_nll": [{}, {"nll_coef": 0.3, "label_smoothing": 0.1}],
    "robust": [{}, {"label_smoothing": 0.3, "beta": 1.0}],
    "hinge": [{}, {"beta": 1.5, "margin_coef": 1.0}],
    "ipo": [{}, {"beta": 0.5, "length_normalised": False}, {"f_divergence": "forward_kl", "use_weighting": True}],
    "exo_pair": [{}, {"beta": 0.8, "label_smoothing": 0.2}],
    "nca_pair": [{}, {"beta": 0.9, "use_weighting": True}],
    "bco_pair": [{}, {"beta": 0.9, "ld_alpha": 0.5}],
    "sppo_hard": [{}, {"beta": 1.0}],
    "apo_zero": [{}, {"beta": 0.9}],
    "apo_down": [{}, {"beta": 0.9}],
    "discopop": [{}, {"beta": 0.5, "tau": 0.8, "margin_coef": 0.2}],
    "aot": [{}, {"beta": 0.8, "label_smoothing": 0.2}, {"reference_free": True}],
    "aot_unpaired": [{}, {"beta": 0.8, "label_smoothing": 0.2}],
    "sft": [{}],
    "simpo": [{}, {"beta": 2.5, "gamma": 1.4, "label_smoothing": 0.1, "margin_coef": 0.3}],
    "alphapo": [{}, {"alpha": -0.4, "beta": 1.0, "gamma": 0.0}, {"alpha": 0.1, "length_normalised": False},
                {"alpha": 0.0}],
    "cpo": [{}, {"kind": "hinge", "nll_coef": 0.0, "beta": 0.6}, {"kind": "ipo", "length_normalised": True},
            {"label_smoothing": 0.2, "nll_coef": 0.5}],
    "orpo": [{}, {"beta": 1.0, "nll_coef": 0.2}],
    "tpo": [{}, {"beta": 1.0, "gamma": 0.5, "length_normalised": True}, {"kind": "hinge", "nll_coef": 0.2},
            {"kind": "ipo", "beta": 0.5, "nll_coef": 0.0, "length_normalised": True}],
    "kto": [{}, {"beta": 0.8, "desirable_weight": 1.3, "undesirable_weight": 0.6}, {"reference_free": True}],
    "apo_zero_unpaired": [{}, {"beta": 0.8, "desirable_weight": 1.3}],
    "bco": [{}, {"beta": 0.8, "density_ratios": True}, {"delta": 0.4, "density_ratios": True,
            "min_density_ratio": 0.1, "max_density_ratio": 1.0}],
}  # fmt: skip
EVERY_CASE = [(name, i) for name in CASES for i in range(len(CASES[name]))]


def with_numbers(w, g) -> None:
    """A KL above 0 with one answer that has none, positive density ratios, labels of both sorts."""
    w.per_sequence["kl"] = w.per_sequence["kl"] + 1
    w.per_sequence["kl"][3] = math.nan
    w.per_sequence["density_ratio"] = w.per_sequence["density_ratio"].exp()
    w.labels[:2] = torch.tensor([True, False])


def world_of(name: str, seed: int = 0, dtype=torch.float64, **options):
    columns = {"per_sequence": ("kl", "density_ratio")} if name in kto.UNPAIRED else {}
    make = with_numbers if columns else None
    if any("references" in o for o in CASES[name]):
        columns["per_token"] = ("second",)
    return world(seed, dtype, make=make, **columns, **options)


def test_every_loss_has_a_case_and_a_paper():
    assert set(CASES) == set(NAMES) == set(PAPERS) and set(NAMES) <= set(losses.names())
    for name in NAMES:
        law = losses.law(name)
        assert law.paper and law.formula and scope_of(losses.get(name)) and law.__doc__


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_paper_formula(name, i):
    for seed in (0, 1):
        check_paper(name, CASES[name][i], PAPERS[name], world_of(name, seed))


@pytest.mark.parametrize("name", CASES)
def test_chunks_and_strategies(name):
    check_chunks(name, CASES[name][-1], PAPERS[name], world_of(name, 2))


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_cuts_order_and_padding(name, i):
    check_step(name, CASES[name][i], world_of(name, 3))


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_policies_far_apart_stay_finite(name, i):
    check_far(name, CASES[name][i], lambda: world_of(name, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_rule7(name, dtype):
    check_accuracy(name, CASES[name][0], PAPERS[name], lambda seed, d: world_of(name, seed, d), dtype)

"""Pairwise, Nash, regression and step-wide preference losses: against their papers, and what no step may break."""

from __future__ import annotations

import pytest
import torch
from harness import check_accuracy, check_chunks, check_far, check_paper, check_step, ours, world
from papers_pairwise import LAWS

from fastrl import losses
from fastrl.losses import contrastive_lists, links, nash, pairwise, regression_pairs, stepwide
from fastrl.objective import scope_of

TABLES = (
    pairwise.PAIRWISE,
    links.LINKS,
    nash.NASH,
    regression_pairs.REGRESSION_PAIRS,
    stepwide.STEPWIDE,
    contrastive_lists.CONTRASTIVE_LISTS,
)
NAMES = [name for table in TABLES for name in table]
CASES: dict[str, list[dict]] = {name: [{}, {"beta": 0.7}] for name in NAMES}
CASES |= {
    "odpo": [{}, {"beta": 0.7, "alpha": 0.3, "f": "linear"}],
    "modpo": [{}, {"beta": 0.7, "weight": 0.8}],
    "r_dpo": [{}, {"beta": 0.7, "alpha": 0.3}],
    "mallows_dpo": [{}, {"beta": 0.7, "dispersion": 2.0}],
    "d2po": [{}, {"gamma": 0.6, "beta": 1.0}, {"gamma": 1.0}],
    "dmpo": [{}, {"gamma": 0.5, "beta": 1.0}, {"gamma": 1.0}],
    "mmpo": [{}, {"gamma": 2.0}],
    "adpo": [{}, {"confidence": 0.1, "beta": 0.9}],
    "gpo": [{"f": f, "beta": 0.8} for f in links.GPO_LINKS] + [{}],
    "chi_po": [{}, {"beta": 0.5, "r_max": 0.4}],
    "dpop": [{}, {"penalty": 2.0, "beta": 0.7}],
    "dpo_shift": [{}, {"f": 0.5, "beta": 0.7}],
    "slic": [{}, {"beta": 0.5, "delta": 3.0, "nll_coef": 0.2}],
    "simper": [{}],
    "xpo": [{}, {"alpha": 0.3}],
    "selm": [{}, {"alpha": 0.3, "beta": 0.7}],
    "vpo": [{}, {"alpha": 0.3, "online": True}],
    "inpo": [{}, {"beta": 0.3, "tau_over_eta": 0.7}],
    "sppo": [{}, {"beta": 0.2}],
    "simnpo": [{}, {"beta": 0.7, "gamma": 0.4}],
    "bfpo": [{}, {"b1": 2.0, "alpha": 0.1, "beta": 0.5}],
    "dil": [{}, {"kind": "ukl"}, {"kind": "bce"}],
    "beta_dpo": [{}, {"beta": 0.3, "alpha": 2.0, "centre": 0.4}, {"alpha": -50.0}],
    "alpha_dpo": [{}, {"beta": 1.0, "gamma": 0.1, "alpha": 1.5}],
    "dr_dpo": [{}, {"beta": 0.8, "beta_prime": 0.3}],
    "group_robust_dpo": [{}, {"beta": 0.8, "eta": 3.0}],
    "mppo": [{}, *({"kind": kind} for kind in contrastive_lists.MPPO_KINDS)],
    "exo": [{}, {"beta": 0.7, "reward_temperature": 0.3}],
    "nca": [{}, {"beta": 0.7, "reward_temperature": 0.3}],
}
EVERY_CASE = [(name, i) for name in NAMES for i in range(len(CASES[name]))]
SEQUENCE_COLUMNS = ("pair_weights", "from_reference", "win_rate", "values", "policy_rewards", "domain", "domain_weight")


def make(seed: int = 0, dtype=torch.float64, optional: bool = False, **how):
    """A step with every column that a loss of these tables reads; optional: also those that have a default."""

    def columns(w, g):
        s, t = len(w.lengths), sum(w.lengths)
        uniform = lambda n: torch.rand(n, generator=g, dtype=torch.float64)  # noqa: E731
        w.margins = w.margins.abs() + 0.1
        w.per_token = {"draws": uniform(t), "ref_entropy": 0.1 + 0.8 * uniform(t)}
        w.per_token["turns"] = torch.cat([torch.arange(0), *(torch.arange(n) // 3 for n in w.lengths)])
        w.per_sequence = {name: uniform(s) + 0.05 for name in SEQUENCE_COLUMNS}
        w.per_sequence["from_reference"] = (torch.arange(s) % 2 == (torch.arange(s) // 2) % 2).double()
        w.per_sequence["values"] = uniform(s) - 0.5
        w.per_sequence["policy_rewards"] = w.rewards + torch.tensor([-0.5, 0.0, 0.4, 0.0]).repeat(3)[:s]
        w.per_sequence["domain"] = (torch.arange(s) // 2) % 3 * 5
        w.per_sequence["domain_weight"] = (1.0 + torch.arange(s) // 2 % 3).double()
        if optional:
            w.per_sequence["num_turns"] = torch.tensor([(n + 2) // 3 + 1 for n in w.lengths])
            w.per_sequence["calibration"] = (uniform(s) < 0.5).double()
        else:
            del w.per_sequence["domain_weight"]

    return world(seed, dtype, make=columns, **how)


def test_every_name_has_a_paper_and_a_law():
    assert set(NAMES) == set(LAWS)
    for table in TABLES:
        for name, kind in table.items():
            assert kind.paper and kind.formula and scope_of(kind()), name
            assert losses.law(name) is kind


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_paper(name, i):
    for seed in (0, 1):
        check_paper(name, CASES[name][i], LAWS[name], make(seed, optional=seed == 1))


@pytest.mark.parametrize("name", NAMES)
def test_paper_by_every_strategy(name):
    check_chunks(name, CASES[name][-1], LAWS[name], make(2))


@pytest.mark.parametrize("name", NAMES)
def test_cuts_order_and_padding(name):
    check_step(name, CASES[name][-1], make(3, optional=True))


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_far_policies(name, i):
    check_far(name, CASES[name][i], make)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_accuracy(name, dtype):
    # Their losses are differences of few numbers near 1: draws where plain torch happens to round well decide nothing.
    first = {"simper": 6, "dil": 6}.get(name, 0)
    check_accuracy(name, CASES[name][0], LAWS[name], lambda seed, d: make(first + seed, d), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_step_and_an_empty_answer(name):
    """Answers without a trained token add nothing that is not finite; a step without any sequence is 0."""

    def emptied(w, g):
        w.mask[w.rows(1)] = False
        w.mask[w.rows(6)] = False

    w = make(4)
    emptied(w, None)
    loss, grads, metrics = ours(name, CASES[name][-1], w)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert all(torch.as_tensor(m).isfinite() for m in metrics.values())
    loss, grads, _ = ours(name, {}, make(0, lengths=()))
    assert loss == 0 and not any(g.any() for g in grads)


# -- planted mistakes --------------------------------------------------------------------------------------------------
MUTANTS = {
    "odpo": (pairwise.ODPO, "offset", lambda f: lambda self, batch: -f(self, batch)),
    "r_dpo": (pairwise.LengthDPO, "offset", lambda f: lambda self, batch: -f(self, batch)),
    "modpo": (pairwise.MODPO, "scale", lambda f: lambda self, batch: self.beta),
    "mallows_dpo": (pairwise.MallowsDPO, "scale", lambda f: lambda self, batch: -f(self, batch)),
    "sampo": (pairwise, "rank_within", lambda f: lambda values, batch: f(-values, batch)),
    "d2po": (pairwise, "positions", lambda f: lambda batch: f(batch) + 1),
    "minor_dpo": (links.MinorDPO, "law", lambda f: lambda self, c, r, b: super(links.MinorDPO, self).law(c, -r, b)),
    "dpop": (links.DPOPositive, "law", lambda f: lambda self, c, r, b: f(self, -c, r, b)),
    "chi_po": (links.ChiPO, "transform", lambda f: lambda self, x: f(self, x) - x),
    "cal_dpo": (links.CalDPO, "law", lambda f: lambda self, c, r, b: f(self, r, c, b)),
    "bfpo": (regression_pairs, "pairs", lambda f: lambda x: f(x)[::-1]),
    "rebel": (regression_pairs, "reward_difference", lambda f: lambda *args: -f(*args)),
    "inpo": (nash.INPO, "link", lambda f: lambda self, m: (m - 1 / self.beta).square()),
    "vpo": (nash, "pairs", lambda f: lambda x: f(x)[::-1]),
    "xpo": (nash.Optimistic, "extra", lambda f: lambda *args: -f(*args)),
    "selm": (nash.SELM, "optimism", lambda f: lambda self, *args: f(self, *args) / self.beta),
    "dr_dpo": (stepwide.DrDPO, "column", lambda f: lambda *args: f(*args) if args[1] != "dr_weight" else 1.0),
    "alpha_dpo": (stepwide.AlphaDPO, "log_ratios", lambda f: stepwide.Stepwide.log_ratios),
    "group_robust_dpo": (stepwide.GroupRobustDPO, "pair_weight", lambda f: lambda *args: None),
    "mppo": (contrastive_lists.MPPO, "scores", lambda f: contrastive_lists.ListLoss.scores),
    "gvpo": (contrastive_lists.GVPO, "scores", lambda f: lambda *args: f(*args) * 2),
    "exo": (contrastive_lists.EXO, "log_target", lambda f: lambda *args: -f(*args)),
    "fdpo": (stepwide.FilteredDPO, "pair_weight", lambda f: lambda *args: f(*args).clamp(max=1.0)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_mistakes_are_noticed(name, monkeypatch):
    owner, attribute, change = MUTANTS[name]
    w = make(8)
    options = CASES[name][1]
    check_paper(name, options, LAWS[name], w)
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        check_paper(name, options, LAWS[name], w)

"""Every policy loss against its paper (tests/papers_policy.py), and what no batch, cut or distance may break."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from harness import (
    World,
    batch_of,
    check_accuracy,
    check_chunks,
    check_far,
    check_paper,
    check_step,
    ours,
    world,
)
from oracle import assert_same, plain_statistics
from papers_policy import LAWS, law_of

from fastrl import TokenBatch, TokenStats, fused_loss, linear_logprobs, loss_from_logprobs, losses
from fastrl.losses import corrections, policy, ratio, selection
from fastrl.objective import prepared
from fastrl.tokens import compact

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EXTRAS = {"kl_coef": 0.3, "entropy_coef": 0.2}
CASES: dict[str, list[dict]] = {
    "reinforce": [{}, {"kl_coef": 0.5, "kl": "is_k3", "entropy_coef": -0.1}],
    "gpg": [{}],
    "ppo_clip": [{}, {"clip_low": 0.1, "clip_high": 0.6, "dual_clip": 1.7, **EXTRAS}],
    "ppo_two_sided": [{}, {"delta": 1.5, **EXTRAS}],
    "grpo": [{"clip_low": 0.3, "clip_high": 0.4, "kl_coef": 0.1, "kl": "k2"}],
    "dapo": [{}, {"top_entropy": 0.4, **EXTRAS}],
    "dr_grpo": [{"max_length": 11}],
    "bnpo": [{"kl_coef": 0.2, "kl": "k3+"}],
    "is_pg": [{}, {"kl_coef": 0.3, "kl": "is_k1"}],
    "cispo": [{}, {"ratio_max": 1.1}, {"clip_low": 0.1, "clip_high": 0.15, **EXTRAS}, {"ratio_min": 0.9}],
    "sapo": [{}, {"temperature_pos": 2.0, "temperature_neg": 3.0, "kl_coef": 0.1}],
    "dppo_tv": [{}, {"delta_low": 0.003, "delta_high": 0.002, **EXTRAS}],
    "dppo_kl": [{}, {"delta_low": 0.0003, "delta_high": 0.0002}],
    "prime_rl": [{}, {"delta_low": 0.003, "delta_high": 0.002, "advantage_tau": 0.7, "kl_tau": 0.3}],
    "prime_ipo": [{}, {"threshold": 0.004, "advantage_tau": 0.7, "kl_tau": 0.3}],
    "rollout_is": [{}, {"clip_low": 0.1, "clip_high": 0.5, **EXTRAS}],
    "decoupled_ppo": [{}, {"behaviour_cap": 1.1, "clip_high": 0.3, **EXTRAS}],
    "luffy": [{}, {"gamma": 0.02, "clip_high": 0.1, **EXTRAS}],
    "vapo": [{}, {"nll_coef": 0.7, "dual_clip": 1.6, **EXTRAS}],
    "gspo": [{}, {"clip_low": 0.1, "clip_high": 0.2, **EXTRAS}],
    "gspo_token": [{}, {"clip_low": 0.1, "clip_high": 0.2, **EXTRAS}],
    "luspo": [{}, {"clip_low": 0.1, "clip_high": 0.2, **EXTRAS}],
    "gmpo": [{}, {"clip_low": 0.1, "clip_high": 0.2, **EXTRAS}],
    "vespo": [{}, {"k_pos": 1.0, "lambda_neg": 0.5, "from_rollout": True, **EXTRAS}],
    "rloo": [{}, {"clip_low": 0.5, "clip_high": 0.9, **EXTRAS}],
    "topr": [{}, {"low": 0.7, "high": 1.3, **EXTRAS}],
    "clip_cov": [{"fraction": 1.0, "cov_low": 0.1, "cov_high": 2.0, "dual_clip": 1.5, **EXTRAS}],
    "kl_cov": [{}, {"fraction": 0.3, "cov_coef": 1.5, **EXTRAS}],
    "a2po": [{}, {"beta1": 1.3, "beta2": 0.4, **EXTRAS}],
    "opmd": [{}, {"tau": 0.3, "form": "linear", **EXTRAS}],
}
EVERY_CASE = [(name, i) for name in CASES for i in range(len(CASES[name]))]
# Losses of whole sequences have one advantage a sequence; these have one a token all the same.
PER_TOKEN = {"gspo_token"}


def demonstrations(w: World, g: torch.Generator) -> None:
    w.per_sequence["off_policy"] = torch.rand(len(w.lengths), generator=g) < 0.4


def make(name: str, seed: int = 0, dtype=torch.float64) -> World:
    whole = losses.POLICY[name].own_scope == "sequence" and name not in PER_TOKEN
    return world(seed, dtype, per_sequence_advantages=whole, make=demonstrations if name == "luffy" else None)


def test_every_policy_loss_has_a_paper_and_cases():
    assert set(LAWS) == set(CASES) == set(losses.POLICY)
    for kind in losses.POLICY.values():
        assert kind.paper and kind.formula and kind.unit == "token" and kind.__doc__


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_paper_formula(name, i):
    for seed in range(3):
        check_paper(name, CASES[name][i], law_of(name), make(name, seed))


@pytest.mark.parametrize("name", CASES)
def test_no_strategy_or_chunk_matters(name):
    check_chunks(name, CASES[name][-1], law_of(name), make(name, 3))


@pytest.mark.parametrize("name", CASES)
def test_no_cut_order_or_padding_matters(name):
    check_step(name, CASES[name][-1], make(name, 4))


@pytest.mark.parametrize("name,i", EVERY_CASE)
def test_policies_far_apart_stay_finite(name, i):
    check_far(name, CASES[name][i], lambda: make(name, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_rule7(name, dtype):
    check_accuracy(name, CASES[name][-1], law_of(name), lambda seed, kind: make(name, seed + 10, kind), dtype)


# -- step 0: what theory says of ratio 1 -------------------------------------------------------------------------------
SAME_AS_REINFORCE = [  # c_t = -A at ratio 1, under any aggregation (clip_cov drops a token at least)
    "is_pg", "ppo_clip", "ppo_two_sided", "grpo", "dapo", "bnpo", "cispo", "sapo", "dppo_tv", "dppo_kl", "rollout_is",
    "decoupled_ppo", "kl_cov", "gspo_token", "vespo", "topr",
]  # fmt: skip


def at_ratio_one(w: World, old: str) -> dict:
    """Fields of a batch whose other policies are the current one (old None: not even said)."""
    logp = linear_logprobs(w.hidden, w.weight, w.targets).logprobs
    same = torch.where(w.mask, logp, torch.nan)
    return {"old_logprobs": None if old == "none" else same, "rollout_logprobs": same, "ref_logprobs": same}


def gradient(objective, w: World, fields: dict, aggregate=None):
    weight = w.weight.clone().requires_grad_()
    hidden = torch.where(w.mask[:, None], w.hidden, torch.nan)
    out = fused_loss(objective, hidden, weight, batch_of(w, **fields)[1], aggregate=aggregate)
    return out, torch.autograd.grad(out.loss, weight)[0]


@pytest.mark.parametrize(
    ("name", "old"),
    [(n, old) for n in SAME_AS_REINFORCE for old in ("given", "none") if (n, old) != ("decoupled_ppo", "none")],
)
def test_at_ratio_one_the_gradient_is_reinforces(name, old):
    w = make(name, 6)
    fields = at_ratio_one(w, old)
    for aggregate in ("token_mean", "sequence_mean_token_mean"):
        _, want = gradient(losses.get("reinforce"), w, fields, aggregate)
        _, got = gradient(losses.get(name), w, fields, aggregate)
        assert_same(name, got, want, 1e-9)


@pytest.mark.parametrize("old", ["given", "none"])
@pytest.mark.parametrize("name", ["gspo", "gmpo", "luspo", "rloo", "opmd"])
def test_at_ratio_one_a_whole_sequence_is_reinforces(name, old):
    """Values of whole sequences: GSPO and GMPO share 1/n with a mean over tokens; RLOO and OPMD sum their tokens."""
    w = make(name, 7)
    fields = at_ratio_one(w, old)
    same = {"gspo": "sequence_mean_token_mean", "gmpo": "sequence_mean_token_mean"}.get(name, "sequence_mean_token_sum")
    objective = losses.get(name)
    _, got = gradient(objective, w, fields)
    _, want = gradient(losses.get("reinforce"), w, fields, same)
    assert_same(name, got, want * (2 if name == "opmd" else 1), 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_at_ratio_one_nothing_is_clipped_and_the_kl_is_zero(name):
    w = make(name, 8)
    out, _ = gradient(losses.get(name, **({"max_length": 9} if name == "dr_grpo" else {})), w, at_ratio_one(w, "given"))
    assert abs(float(out.metrics["kl"])) < 1e-12
    assert all(float(out.metrics.get(n, 0)) == 0 for n in out.metrics if n.startswith("clip_ratio"))
    assert float(out.metrics.get("ratio", 1.0)) == pytest.approx(1.0, abs=1e-9)
    kls = [losses.get("reinforce", kl_coef=1.0, kl=k) for k in ("k2", "k3", "abs", "k3+", "is_k1", "is_k3")]
    nothing = torch.zeros_like(w.columns["advantages"])
    for objective in kls:
        assert abs(float(gradient(objective, w, {**at_ratio_one(w, "none"), "advantages": nothing})[0].loss)) < 1e-12


def test_binary_kl():
    check_binary_kl()


def check_binary_kl() -> None:
    """Bernoulli distributions far apart, where the two directions differ; certainty stays finite."""
    p = torch.tensor([0.1, 0.6, 0.999, 1e-6, 0.5], dtype=torch.float64)
    q = torch.tensor([0.7, 0.2, 0.01, 0.9, 0.5], dtype=torch.float64)
    want = [
        a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
        for a, b in zip(p.tolist(), q.tolist(), strict=True)
    ]
    assert_same("kl", ratio.binary_kl(p.log(), q.log()), torch.tensor(want, dtype=torch.float64), 1e-9)
    extremes = torch.tensor([0.0, 200.0, -200.0, -1e4, -0.1])
    assert all(ratio.binary_kl(extremes, x.expand(5)).isfinite().all() for x in extremes)


# -- selection ---------------------------------------------------------------------------------------------------------
def test_the_quantile_is_torchs():
    for n in (1, 2, 7, 100):
        x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for q in (0.0, 0.2, 0.55, 0.8, 1.0):
            assert_same("quantile", selection.quantile(x, q), torch.quantile(x, q), 1e-12)
    assert selection.quantile(torch.zeros(0), 0.3).isnan()


@pytest.mark.parametrize("fraction", [0.05, 0.2])
def test_clip_cov_draws_its_share_of_the_candidates(fraction):
    w = make("clip_cov", 2)
    options = {"cov_low": 0.05, "cov_high": 9.0}
    rows, batch = batch_of(w)
    stats = TokenStats(**plain_statistics([w.hidden, w.weight, None], w.targets))
    seen = {}
    for f in (fraction, 1.0):
        objective = losses.get("clip_cov", fraction=f, **options)
        kept = linear_batch(objective, stats, batch)
        seen[f] = ~kept.bool()
    assert int(seen[fraction].sum()) == int(fraction * int(w.mask.sum())) < int(seen[1.0].sum())
    assert (seen[fraction] <= seen[1.0]).all(), "a token was dropped that was no candidate"
    check_step("clip_cov", {"fraction": fraction, **options}, w)


def linear_batch(objective, stats, batch) -> torch.Tensor:
    """The column of weights that an objective makes of a step."""
    kept, rows = compact(batch, -100)
    (made,) = prepared(objective, [kept], [stats.map(lambda x: x[rows])])
    return made.per_token["policy_weight"]


def test_lots_are_spread_and_belong_to_the_token():
    g = torch.Generator().manual_seed(0)
    targets, cu = torch.randint(0, 50, (4000,), generator=g), torch.arange(0, 4001, 40)
    lots = selection.token_lots(TokenBatch(targets, cu_seqlens=cu))
    assert len(lots.unique()) == 4000
    share = (lots.double() / 2**63).sort().values
    assert (share - torch.linspace(-1, 1, 4000, dtype=torch.float64)).abs().max() < 0.05
    swapped = torch.cat([targets[40:80], targets[:40], targets[80:]])
    again = selection.token_lots(TokenBatch(swapped, cu_seqlens=cu))
    assert torch.equal(again[:40], lots[40:80]) and torch.equal(again[40:80], lots[:40])
    changed = targets.clone()
    changed[5] += 1
    assert not (selection.token_lots(TokenBatch(changed, cu_seqlens=cu))[:40] == lots[:40]).any()


# -- options -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cispo", {"ratio_max": 3.0, "clip_high": 2.0}, ("ratio_max", "clip_high")),
        ("cispo", {"ratio_min": 2.0, "ratio_max": 1.5}, ("lowest", "2.0")),
        ("ppo_two_sided", {"delta": 1.1}, ("delta", "1.2")),
        ("sapo", {"temperature_pos": 0.0}, ("temperature_pos", "0")),
        ("reinforce", {"kl": "k4"}, ("k4", "is_k3")),
        ("reinforce", {"top_entropy": 0.0}, ("top_entropy", "0.0")),
        ("clip_cov", {"cov_low": 3.0, "cov_high": 2.0}, ("cov_low", "3.0")),
        ("kl_cov", {"fraction": 1.5}, ("fraction", "1.5")),
        ("topr", {"low": 2.0}, ("low", "2.0")),
        ("opmd", {"form": "cubic"}, ("form", "cubic")),
        ("a2po", {"beta2": 0.0}, ("beta2", "0")),
        ("vespo", {"lambda_neg": -1.0}, ("lambda_neg", "-1")),
        ("gmpo", {"clip_low": math.nan}, ("clip_low", "nan")),
    ],
)
def test_bad_options_are_named(name, options, words):
    with pytest.raises(ValueError) as error:
        losses.get(name, **options)
    assert all(w in str(error.value) for w in words)


@pytest.mark.parametrize(
    ("name", "missing", "word"),
    [
        ("dppo_tv", "rollout_logprobs", "rollout_logprobs"),
        ("prime_rl", "rollout_logprobs", "rollout_logprobs"),
        ("rollout_is", "rollout_logprobs", "rollout_logprobs"),
        ("decoupled_ppo", "rollout_logprobs", "rollout_logprobs"),
        ("decoupled_ppo", "old_logprobs", "old_logprobs"),
        ("a2po", "ref_logprobs", "ref_logprobs"),
        ("a2po", "rewards", "rewards"),
        ("luffy", "per_sequence", "off_policy"),
        ("grpo", "advantages", "advantages"),
    ],
)
def test_what_is_missing_is_named(name, missing, word):
    w = make(name)
    _, batch = batch_of(w, **{missing: {} if missing.startswith("per_") else None})
    with pytest.raises(ValueError, match=word):
        fused_loss(losses.get(name), w.hidden, w.weight, batch)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("reinforce", {"kl_coef": 0.1, "kl": "k1"}, "noise"),
        ("gspo", {"clip_low": 0.2, "clip_high": 0.2}, "without effect"),
        ("cispo", {"ratio_max": 0.2}, "absolute"),
    ],
)
def test_known_mistakes_warn_once_and_say_why(name, options, word, monkeypatch):
    monkeypatch.setattr(policy, "SAID", set())
    with pytest.warns(UserWarning, match=word):
        losses.get(name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses.get(name, **options)


def test_the_kernel_is_asked_for_its_own_law_only():
    assert losses.get("dapo", kl_coef=0.1, kl="k2").clipped_surrogate.clip_high == 0.28
    assert losses.get("ppo_two_sided").clipped_surrogate.dual_clip == 4.0
    assert losses.get("grpo", kl="is_k3").clipped_surrogate is not None  # no KL term: the kind is not read
    for name, options in {
        "grpo": {"kl_coef": 0.1, "kl": "is_k3"}, "dapo": {"top_entropy": 0.5}, "gspo": {}, "rloo": {}, "luffy": {},
        "vapo": {}, "decoupled_ppo": {}, "clip_cov": {},
    }.items():  # fmt: skip
        assert losses.get(name, **options).clipped_surrogate is None, name


def test_an_empty_step_has_loss_zero():
    for t, cu in ((0, [0]), (0, [0, 0, 0]), (4, [0, 1, 4])):
        column = torch.full((t,), torch.nan)
        for name in CASES:
            s = len(cu) - 1
            batch = TokenBatch(
                torch.ones(t, dtype=torch.long), mask=torch.zeros(t, dtype=torch.bool), cu_seqlens=torch.tensor(cu),
                advantages=column, old_logprobs=column, ref_logprobs=column, rollout_logprobs=column,
                rewards=torch.ones(s), group_ids=torch.zeros(s, dtype=torch.long),
                labels=torch.ones(s, dtype=torch.bool), per_sequence={"off_policy": torch.ones(s)},
            )  # fmt: skip
            hidden, weight = torch.randn(t, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
            options = {"max_length": 3} if name == "dr_grpo" else {}
            out = fused_loss(losses.get(name, top_entropy=0.5, **options), hidden, weight, batch)
            out.loss.backward()
            assert out.loss == 0 and not weight.grad.any(), name
            assert all(m.isfinite() for m in out.metrics.values()), name


def test_loss_from_logprobs_is_the_same_law():
    for name in CASES:
        w, options = make(name, 9), CASES[name][-1]
        _, batch = batch_of(w)
        stats = linear_logprobs(w.hidden, w.weight, w.targets, outputs=("logprobs", "entropy"))
        same = loss_from_logprobs(losses.get(name, **options), stats, batch)
        loss, _, metrics = ours(name, options, w)
        assert_same(name, same.loss, loss, 1e-12)
        assert set(same.metrics) >= set(metrics)


def compacted(w: World, order: list[int]) -> tuple[TokenBatch, TokenStats]:
    rows, batch = batch_of(w, order)
    kept, chosen = compact(batch, -100)
    stats = TokenStats(**plain_statistics([w.hidden, w.weight, None], w.targets))
    return kept, stats.map(lambda x: x[rows[chosen]])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip_cov", {"fraction": 0.1, "cov_low": 0.05}),
        ("kl_cov", {"fraction": 0.2}),
        ("vapo", {}),
        ("a2po", {}),
        ("dapo", {"top_entropy": 0.3}),
        ("dapo", {"corrections": (corrections.TokenTruncate(), corrections.M2PO(), corrections.BatchNormalised())}),
    ],
)
def test_ranks_together_have_the_columns_of_the_whole_step(name, options):
    """Two ranks, each given what `everywhere` gathers, against one that holds everything."""
    w, objective = make(name, 10), losses.get(name, **options)
    parts = [compacted(w, list(range(3))), compacted(w, list(range(3, 12)))]  # whole groups
    batch, stats = compacted(w, list(range(12)))
    whole = prepared(objective, [batch], [stats])[0]
    own = [gathering(objective, *part, parts) for part in parts]
    for where in ("per_token", "per_sequence"):
        for column, x in getattr(whole, where).items():
            got = torch.cat([getattr(b, where)[column] for b in own])
            assert_same(column, got.double(), x.double(), 1e-9)


def test_a_groups_number_says_nothing_on_another_rank():
    """a2po's V* is of the rank's own group 0, whatever group 0 of the other rank earned."""
    parts = []
    for rewards in ([0.0, 1.0], [5.0, 7.0]):
        batch = TokenBatch(torch.zeros(4, dtype=torch.long), cu_seqlens=torch.tensor([0, 2, 4]),
                           group_ids=torch.tensor([0, 0]), rewards=torch.tensor(rewards))  # fmt: skip
        parts.append((batch, None))
    law = losses.get("a2po", beta1=1.0)

    def everywhere(x):
        return torch.cat([x, x + 3])

    for (batch, _), rewards in zip(parts, ([0.0, 1.0], [5.0, 7.0]), strict=True):
        want = torch.tensor(rewards, dtype=torch.float64).exp().mean().log()
        got = prepared(law, [batch], None, everywhere)[0].per_sequence["optimal_value"]
        assert_same("optimal_value", got.double(), want.expand(2), 1e-12)


def test_advantages_of_sequences_stay_theirs_in_a_piece_of_as_many_rows():
    batch = TokenBatch(torch.zeros(7, dtype=torch.long), cu_seqlens=torch.tensor([0, 4, 6, 6, 7]),
                       advantages=torch.tensor([10.0, 20.0, 30.0, 40.0]), num_tokens=7, num_sequences=4)  # fmt: skip
    cu = batch.cu_seqlens.tolist()
    for start in range(4):
        for stop in range(start + 1, 5):
            piece = batch.sequences(start, stop, cu[start], cu[stop])
            assert piece.token_advantages.tolist() == batch.token_advantages[cu[start] : cu[stop]].tolist()


def test_the_reported_weight_is_the_corrections_alone():
    w = make("dapo", 11)
    case = (corrections.TokenTruncate(),)
    name = "sampling/importance_sampling_ratio/mean"
    alone, masked = (ours("dapo", {"corrections": case, "top_entropy": q}, w)[2] for q in (1.0, 0.3))
    assert float(alone[name]) == pytest.approx(float(masked[name]), rel=1e-12)
    assert name not in ours("dapo", {"corrections": (corrections.OPSM(),)}, w)[2]


def gathering(objective, batch, stats, parts):
    """prepared() on one rank, each gather answered by running the other ranks to the same gather."""
    answers: list[torch.Tensor] = []

    class Heard(Exception):
        pass

    def sent(other: int) -> torch.Tensor:
        """What rank `other` sends to the next gather, knowing the answers so far."""
        given = iter(answers)

        def everywhere(x):
            answer = next(given, None)
            if answer is None:
                raise Heard(x)
            return answer

        try:
            prepared(objective, [parts[other][0]], [parts[other][1]], everywhere)
        except Heard as heard:
            return heard.args[0]
        raise AssertionError("the other rank sends less often")

    def everywhere(x):
        answers.append(torch.cat([sent(i) for i in range(len(parts))]))
        return answers[-1]

    return prepared(objective, [batch], [stats], everywhere)[0]

"""Advantages, returns, reward shaping and controllers: against the papers' loops, TRL, and what no batch may break."""

from __future__ import annotations

import inspect
import math
import textwrap

import papers_advantages as papers
import pytest
import torch
from oracle import assert_same

from fastrl import advantages
from fastrl.advantages import ESTIMATORS, estimate, group_normalised, normalised
from fastrl.train.control import AdaptiveEntropy, AdaptiveKL, FixedKL, kl_controller

NAN = math.nan
# Ragged groups, not contiguous: a singleton, an all-equal one, one with a single scored, one with none, near ties.
GROUPS = [7, 7, 3, 7, 3, 3, 9, 1, 1, 1, 5, 5, 4, 4, 7, 2, 2, 3]
REWARDS = [1.0, 0.0, 0.3, NAN, -2.0, 0.7, 5.0, 0.1, 0.1, 0.1, NAN, 0.4, NAN, NAN, 1.0, 1.0, 1.00001, 0.3]
LENGTHS = [3, 1, 8, 2, 5, 1, 4, 2, 9, 1, 3, 3, 6, 1, 7, 2, 5, 4]
BINARY, HARD = ([NAN if math.isnan(r) else float(r > bar) for r in REWARDS] for bar in (0.2, 0.6))
N = len(GROUPS)


def tensors(rewards=REWARDS, groups=GROUPS, dtype=torch.float64):
    return torch.tensor(rewards, dtype=dtype), torch.tensor(groups)


def columns():
    g = torch.Generator().manual_seed(1)
    components = torch.randn(N, 3, generator=g, dtype=torch.float64)
    components[torch.rand(N, 3, generator=g) < 0.25] = NAN
    components[[i for i, r in enumerate(REWARDS) if math.isnan(r)]] = NAN
    components[GROUPS.index(9)] = torch.tensor([1.0, NAN, 2.0])
    return {
        "lengths": torch.tensor(LENGTHS),
        "greedy_rewards": torch.randn(N, generator=g, dtype=torch.float64),
        "components": components,
        "weights": torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64),
    }


COLUMNS = columns()
GIVEN = {n: x.tolist() for n, x in COLUMNS.items()}
LAWS = {  # name -> [(options, the paper's loop)]
    "grpo": [
        ({}, lambda r, g: papers.normalised(r, g)),
        ({"eps": 1e-9, "unbiased": False}, lambda r, g: papers.normalised(r, g, unbiased=False, eps=1e-9)),
    ],
    "dr_grpo": [({}, lambda r, g: papers.normalised(r, g, std_level="none"))],
    "lite_ppo": [({}, lambda r, g: papers.normalised(r, g, std_level="batch"))],
    "normalised": [
        (
            {"mean": m, "std": s, "leave_one_out": loo, "leave_one_out_std": los, "unbiased": u, "eps": 1e-5},
            lambda r, g, how=(m, s, loo, los, u): papers.normalised(r, g, *how, eps=1e-5),
        )
        for m in ("group", "batch", "none")
        for s in ("group", "batch", "none")
        for loo, los, u in ((False, False, True), (True, False, False), (True, True, True), (False, True, False))
    ],
    "rloo": [({}, lambda r, g: papers.normalised(r, g, std_level="none", leave_one_out=True))],
    "reinforce_pp": [({}, lambda r, g: papers.reinforce_pp(r, g, LENGTHS))],
    "reinforce_pp_baseline": [({}, lambda r, g: papers.reinforce_pp_baseline(r, g, LENGTHS))],
    "remax": [
        ({}, lambda r, g: papers.each(r, lambda i: r[i] - GIVEN["greedy_rewards"][i])),
    ],
    "opo": [({}, lambda r, g: papers.opo(r, g, LENGTHS))],
    "gpg": [
        ({}, lambda r, g: papers.gpg(r, g, "mixed_groups")),
        ({"valid": "nonzero_reward", "scale": 2.0}, lambda r, g: papers.gpg(r, g, "nonzero_reward", 2.0)),
    ],
    "pass_at_k_best": [
        ({}, lambda r, g: papers.pass_at_k_best(r, g)),
        ({"normalise": True}, lambda r, g: papers.pass_at_k_best(r, g, normalise=True)),
    ],
    "pass_at_k": [({"k": k}, lambda r, g, k=k: papers.pass_at_k(r, g, k)) for k in (1, 2, 3, 4)],
    "pkpo": [({"k": k}, lambda r, g, k=k: papers.pkpo(r, g, k)) for k in (2, 3, 4)],
    "max_rl": [({}, lambda r, g: papers.max_rl(r, g))],
    "gdpo": [({}, lambda r, g: papers.gdpo(GIVEN["components"], g, GIVEN["weights"]))],
    "a2po": [({"beta": b}, lambda r, g, b=b: papers.a2po(r, g, b)) for b in (0.5, 2.0)],
    "raw": [({}, lambda r, g: papers.each(r, lambda i: r[i]))],
}
CASES = [(name, i) for name, laws in LAWS.items() for i in range(len(laws))]


def check_law(name: str, i: int = 0) -> None:
    options, law = LAWS[name][i]
    for rewards in (REWARDS, BINARY, HARD):
        truth = torch.tensor(law(rewards, GROUPS), dtype=torch.float64)
        made = estimate(name, *tensors(rewards), columns=COLUMNS, **options)
        assert made.dtype == torch.float64 and not made.requires_grad
        if not truth.any():
            assert not made.any()
            continue
        assert_same(name, made, truth, 1e-9)
        unscored = torch.isnan(torch.tensor(rewards))
        assert not made[unscored].any() and made.isfinite().all()


def test_every_estimator_is_covered():
    assert set(LAWS) == set(ESTIMATORS)


@pytest.mark.parametrize("name,i", CASES)
def test_against_the_papers_loop(name, i):
    check_law(name, i)


@pytest.mark.parametrize("name", LAWS)
def test_float32_rewards_lose_nothing_on_the_way(name):
    rewards, groups = tensors(dtype=torch.float32)
    how = dict(columns=COLUMNS, **LAWS[name][0][0])
    made = estimate(name, rewards, groups, **how)
    assert made.dtype == torch.float32
    assert torch.equal(made, estimate(name, rewards.double(), groups, **how).float())


@pytest.mark.parametrize("name", LAWS)
def test_the_order_of_completions_does_not_matter(name):
    rewards, groups = tensors()
    options = LAWS[name][-1][0]
    want = estimate(name, rewards, groups, columns=COLUMNS, **options)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    moved = {n: x if n == "weights" else x[order] for n, x in COLUMNS.items()}
    renamed = 100 - groups[order]  # ids are names, not numbers
    assert_same(name, estimate(name, rewards[order], renamed, columns=moved, **options), want[order], 1e-12)


class Ranks:
    """Several ranks in turn: the first pass of each records what it gives, the second reads what all gave."""

    def __init__(self, parts):
        self.parts = parts

    def run(self, call):
        """call(part, everywhere) -> [n]: rounds of recording until every collective has everybody's input."""
        gathered: list[torch.Tensor] = []
        while True:
            given, made = [], []
            for part in self.parts:
                seen = iter(gathered)
                pending = []

                def everywhere(x, seen=seen, pending=pending):
                    ready = next(seen, None)
                    if ready is None:
                        pending.append(x)
                        raise StopIteration
                    return ready

                try:
                    made.append(call(part, everywhere))
                except StopIteration:
                    given.append(pending[0])
            if not given:
                return made
            gathered.append(torch.cat(given))


@pytest.mark.parametrize("name", LAWS)
def test_several_ranks_agree_with_one(name):
    """Whole groups on each rank, one rank without any: statistics of the batch are everybody's."""
    rewards, groups = tensors()
    options = LAWS[name][0][0] if name != "normalised" else {"mean": "batch", "std": "batch"}
    parts = [torch.tensor([i for i, g in enumerate(GROUPS) if g in ids]) for ids in ((7, 9, 4), (), (3, 1, 5, 2))]
    parts = [p.long() for p in parts]

    def call(rows, everywhere):
        own = {n: x if n == "weights" else x[rows] for n, x in COLUMNS.items()}
        return estimate(name, rewards[rows], groups[rows], columns=own, everywhere=everywhere, **options)

    want = estimate(name, rewards, groups, columns=COLUMNS, **options)
    made = Ranks(parts).run(call)
    for rows, own in zip(parts, made, strict=True):
        assert own.shape == rows.shape
        assert_same(name, own, want[rows], 1e-12)


SHIFTS = ("grpo", "dr_grpo", "lite_ppo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "opo", "pass_at_k_best")
SHIFTS = (*SHIFTS, "pkpo", "gpg")
SCALES = ("dr_grpo", "rloo", "opo", "gpg", "pass_at_k_best", "pkpo", "raw", "remax")


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_of_all_rewards_changes_nothing(name):
    rewards, groups = tensors()
    want = estimate(name, rewards, groups, columns=COLUMNS)
    assert_same(name, estimate(name, rewards + 64.0, groups, columns=COLUMNS), want, 1e-6)


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_of_all_rewards_scales(name):
    rewards, groups = tensors()
    want = estimate(name, rewards, groups, columns=COLUMNS)
    given = {**COLUMNS, "greedy_rewards": 8 * COLUMNS["greedy_rewards"]}
    assert_same(name, estimate(name, 8 * rewards, groups, columns=given), 8 * want, 1e-12)


@pytest.mark.parametrize("name", ("grpo", "lite_ppo", "rloo", "reinforce_pp", "reinforce_pp_baseline"))
def test_a_scale_does_not_matter_where_it_is_divided_out(name):
    options = {"eps": 0.0} | ({"normalise": True} if name == "rloo" else {})
    rewards, groups = tensors()
    want = estimate(name, rewards, groups, columns=COLUMNS, **options)
    assert_same(name, estimate(name, 1000 * rewards, groups, columns=COLUMNS, **options), want, 1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e6, NAN])
@pytest.mark.parametrize("name", [n for n in LAWS if n not in ("raw", "remax", "gdpo")])
def test_all_equal_rewards_teach_nothing(name, value):
    """Exactly 0, and with no epsilon to hide behind; one completion likewise, and none."""
    options = {"eps": 0.0} if "eps" in inspect.signature(ESTIMATORS[name]).parameters else {}
    for n in (0, 1, 7):
        rewards, groups = tensors([value] * n, [4] * n, torch.float32)
        groups = groups.long()
        made = estimate(name, rewards, groups, columns={"lengths": torch.arange(n) + 1}, **options)
        assert made.dtype == torch.float32 and made.shape == (n,)
        # beta log mean exp(R / beta) of equal rewards is R up to a rounding
        assert torch.equal(made, torch.zeros(n)) or (name == "a2po" and made.abs().max() <= 1e-6 * abs(value))


def test_near_ties_keep_their_size():
    made, std = group_normalised(*tensors([1.0, 1.00001], [0, 0]))
    spread = 1e-5 / math.sqrt(2)
    assert_same("A", made, torch.tensor([-0.5e-5, 0.5e-5]) / (spread + 1e-4), 1e-5)
    assert_same("std", std, torch.tensor([spread, spread]), 1e-5)


def test_known_by_heart():
    r, g = tensors([1.0, 0.0, 0.0, 0.0], [0] * 4)
    assert estimate("rloo", r, g).tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert estimate("max_rl", r, g).tolist() == pytest.approx([3.0, -1.0, -1.0, -1.0])
    # 4 completions, 1 right, k = 2: half of the pairs are paid; a wrong one is in one paid pair of three.
    assert estimate("pass_at_k", r, g, k=2).tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert estimate("pass_at_k", r, g, k=1).tolist() == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3)
    # the std of the others of the only right one is 0: it is not divided
    leave = dict(leave_one_out=True, leave_one_out_std=True, eps=0.0)
    assert normalised(r, g, **leave)[0] == pytest.approx(1.0)
    assert estimate("a2po", r, g, beta=0.01)[1] == pytest.approx(-(1 - 0.01 * math.log(4)))


def test_peer_groups():
    ids = advantages.peer_groups(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 5, 2, 2, 5]))
    assert ids[0] == ids[2] and len(set(ids.tolist())) == 4


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda r, g: estimate("grop", r, g), "did you mean 'grpo'"),
        (lambda r, g: estimate("grpo", r, g, epz=1), "did you mean 'eps'"),
        (lambda r, g: estimate("opo", r, g), "needs lengths"),
        (lambda r, g: estimate("pass_at_k", r, g, k=0), "k must be at least 1"),
        (lambda r, g: estimate("pkpo", r, g, k=1), "use rloo"),
        (lambda r, g: estimate("gpg", r, g, valid="some"), "mixed_groups"),
        (lambda r, g: estimate("a2po", r, g, beta=0.0), "beta must be positive"),
        (lambda r, g: estimate("normalised", r, g, mean="world"), "mean is 'world'"),
        (lambda r, g: estimate("grpo", r, g, eps=-1.0), "eps must be"),
        (lambda r, g: estimate("grpo", r[:-1], g), r"\[S\]"),
        (lambda r, g: estimate("remax", r, g, columns={"greedy_rewards": r[:2]}), "greedy_rewards must be"),
        (lambda r, g: estimate("gdpo", r, g, columns={"components": r}), r"\[S=18, K\]"),
        (lambda r, g: group_normalised(r, g, "grup"), "scale is 'grup'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*tensors())


# -- TRL ---------------------------------------------------------------------------------------------------------------
def trl_advantages(trainer: str, first: str, settings: dict, names: dict) -> torch.Tensor:
    """The lines of TRL's trainer between the rewards and the advantages, run as they are installed."""
    module = pytest.importorskip(f"trl.trainer.{trainer}_trainer")
    kind = {"grpo": "GRPOTrainer", "rloo": "RLOOTrainer"}[trainer]
    source = inspect.getsource(getattr(module, kind)._generate_and_score_completions)
    start, end = source.index(first), source.index("# Slice to keep only the local part")
    start = source.rindex("\n", 0, start) + 1
    scope = {**vars(module), **names, "self": type("Settings", (), settings)()}
    exec(textwrap.dedent(source[start : source.rindex("\n", 0, end)]), scope)  # noqa: S102
    return scope["advantages"]


def rewards_of_three_functions(seed=0, prompts=6, generations=4):
    g = torch.Generator().manual_seed(seed)
    per_function = torch.randn(prompts * generations, 3, generator=g)
    per_function[:, 1] = (per_function[:, 1] > 0).float()
    per_function[torch.rand(per_function.shape, generator=g) < 0.2] = NAN
    per_function[5] = NAN
    per_function[8:11] = NAN  # a group with one scored completion
    per_function[12:16, :] = torch.tensor([0.25, 1.0, -1.0])  # and one without spread
    groups = torch.arange(prompts).repeat_interleave(generations)
    return per_function, groups


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_parity_with_trl_grpo(scale, aggregation):
    per_function, groups = rewards_of_three_functions()
    weights = torch.tensor([1.0, 0.5, 2.0])
    settings = dict(
        multi_objective_aggregation=aggregation, reward_weights=weights, scale_rewards=scale, reward_funcs=[0, 1, 2]
    )
    names = dict(rewards_per_func=per_function.clone(), device="cpu", num_generations=4)
    theirs = trl_advantages("grpo", "unscorable_mask =", settings, names)
    total = (per_function * weights).nansum(1)
    total[per_function.isnan().all(1)] = NAN
    if aggregation == "normalize_then_sum":
        ours = estimate("gdpo", total, groups, columns={"components": per_function, "weights": weights})
    else:
        ours = group_normalised(total, groups, scale)[0]
        same = {"group": "grpo", "batch": "lite_ppo", "none": "dr_grpo"}[scale]
        assert torch.equal(ours, estimate(same, total, groups))
    assert theirs.any()
    assert_same("advantages", ours, theirs, 1e-4)


@pytest.mark.parametrize("normalise", [False, True])
def test_parity_with_trl_rloo(normalise):
    per_function, groups = rewards_of_three_functions(1)
    weights, beta = torch.tensor([1.0, 0.5, 2.0]), 0.3
    g = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 9, (24,), generator=g)
    mask = torch.arange(8)[None] < lengths[:, None]
    old, ref = torch.randn(2, 24, 8, generator=g).unbind(0)
    same = lambda x: x  # noqa: E731
    settings = dict(
        reward_weights=weights, reward_clip_range=(-2.0, 2.0), beta=beta, normalize_advantages=normalise,
        accelerator=type("One", (), {"gather": staticmethod(same)}),
    )  # fmt: skip
    names = dict(
        rewards_per_func=per_function.clone(), device="cpu", num_generations=4, gather=same,
        old_per_token_logps=old, ref_per_token_logps=ref, completion_mask=mask,
    )  # fmt: skip
    theirs = trl_advantages("rloo", "unscorable_mask =", settings, names)
    total = (per_function * weights).nansum(1)
    total[per_function.isnan().all(1)] = NAN
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rewards = advantages.kl_penalised(total.clamp(-2.0, 2.0), (old - ref)[mask], cu, beta=beta)
    assert_same("advantages", estimate("rloo", rewards, groups, normalise=normalise), theirs, 1e-4)


def test_parity_with_trl_soft_overlong():
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_soft_overlong_punishment(100, 20)([[1] * n for n in range(0, 130, 7)])
    ours = advantages.soft_overlong(torch.arange(0, 130, 7), limit=100, buffer=20)
    assert_same("penalty", ours, torch.tensor(theirs), 1e-6)
    step = advantages.soft_overlong(torch.tensor([9, 10, 11]), limit=10, buffer=0, factor=0.5)
    assert step.tolist() == [0, 0, -0.5]


# -- tokens ------------------------------------------------------------------------------------------------------------
SIZES = (4, 1, 0, 6, 3, 2, 5, 1)
OWNERS = [0, 0, 1, 1, 1, 0, 3, 1]


def packed(seed=0):
    """(values of tokens by name, mask, cu_seqlens); rows outside the mask hold NaN."""
    g = torch.Generator().manual_seed(seed)
    t = sum(SIZES)
    cu = torch.tensor([0, *torch.tensor(SIZES).cumsum(0).tolist()], dtype=torch.int32)
    mask = torch.rand(t, generator=g) < 0.7
    mask[4] = False  # the second sequence has no action
    mask[5] = True
    made = {n: torch.randn(t, generator=g, dtype=torch.float64) for n in ("rewards", "values", "kl", "weights")}
    made["logprobs"] = -torch.rand(t, generator=g, dtype=torch.float64) * 3
    made["log_sum_sq_probs"] = (2 * made["logprobs"]).exp().mul(1 + torch.rand(t, generator=g)).log()
    return {n: torch.where(mask, x, NAN) for n, x in made.items()}, mask, cu


def actions(x, mask, cu):
    """[[float of each action] of each sequence]."""
    return [x[a:b][mask[a:b]].tolist() for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False)]


def flat(lists):
    return torch.tensor([x for own in lists for x in own], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_token_rewards(beta):
    x, mask, cu = packed()
    rewards = torch.tensor([1.0, 2.0, 3.0, -1.0, NAN, 0.5, 4.0, 0.0], dtype=torch.float64)
    made = advantages.token_rewards(rewards, cu, mask=mask, kl=x["kl"], beta=beta)
    spans = [mask[a:b].tolist() for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False)]
    truth = papers.token_rewards(rewards.nan_to_num(0.0).tolist(), spans, x["kl"].nan_to_num(0.0).tolist(), beta)
    truth = torch.tensor(truth, dtype=torch.float64)
    unscored = torch.zeros_like(mask)
    unscored[int(cu[4]) : int(cu[5])] = True
    assert torch.equal(made.isnan(), unscored & mask)
    assert_same("rewards", made[~unscored], truth[~unscored], 1e-14)
    whole = advantages.token_rewards(rewards, cu)
    assert whole[int(cu[1]) - 1] == 1.0 and whole[0] == 0.0


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_discounted_returns(gamma):
    x, mask, cu = packed()
    made = advantages.discounted_returns(x["rewards"], cu, gamma=gamma, mask=mask)
    truth = flat(papers.returns(own, gamma) for own in actions(x["rewards"], mask, cu))
    assert_same("returns", made[mask], truth, 1e-13)
    assert not made[~mask].any()


def check_whitened(**how) -> None:
    x, mask, _ = packed()
    x["rewards"][6] = NAN  # unscored, inside the mask
    made = advantages.whitened(x["rewards"], mask, **how)
    own = [v for v in x["rewards"][mask].tolist() if not math.isnan(v)]
    mu, sd = papers.mean(own), papers.std(own, how.get("unbiased", True))
    back = 0.0 if how.get("shift_mean", True) else mu
    truth = [0.0 if math.isnan(v) else (v - mu) / math.sqrt(sd**2 + 1e-8) + back for v in x["rewards"][mask].tolist()]
    assert_same("whitened", made[mask], torch.tensor(truth, dtype=torch.float64), 1e-12)
    assert not made[~mask].any()


@pytest.mark.parametrize("how", [{}, {"shift_mean": False}, {"unbiased": False}])
def test_whitened(how):
    check_whitened(**how)


def test_whitening_over_ranks_and_of_little():
    x, mask, _ = packed()
    want = advantages.whitened(x["rewards"], mask)
    parts = [torch.arange(0, 7), torch.arange(0), torch.arange(7, len(mask))]
    made = Ranks(parts).run(lambda p, e: advantages.whitened(x["rewards"][p], mask[p], everywhere=e))
    assert_same("whitened", torch.cat(made), want, 1e-12)
    for few in (torch.zeros(0), torch.ones(1), torch.full((5,), 0.1), torch.full((3,), NAN)):
        assert torch.equal(advantages.whitened(few, eps=0.0), torch.zeros(len(few)))


def test_reinforce_pp_of_tokens():
    """Terminal reward and KL, discounted, whitened; without KL and discount: the estimator of whole completions."""
    x, mask, cu = packed()
    rewards = torch.tensor([1.0, 2.0, 3.0, -1.0, NAN, 0.5, 4.0, 0.0], dtype=torch.float64)
    token = advantages.token_rewards(rewards, cu, mask=mask, kl=x["kl"], beta=0.1)
    made = advantages.reinforce_pp_tokens(token, cu, gamma=0.9, mask=mask)
    togo = [papers.returns(own, 0.9) for own in actions(token, mask, cu)]
    togo = flat(papers.over_tokens([v for own in togo for v in own], [1] * int(mask.sum())) for _ in range(1))
    assert_same("advantages", made[mask], togo, 1e-12)
    plain = advantages.token_rewards(rewards, cu, mask=mask)
    per_token = advantages.reinforce_pp_tokens(plain, cu, mask=mask)
    lengths = advantages.returns.actions_of(cu, mask)
    rewards[lengths == 0] = NAN  # they have no token to stand on
    whole = estimate("reinforce_pp", rewards, torch.arange(len(SIZES)), columns={"lengths": lengths})
    assert_same("whole", per_token[mask], torch.repeat_interleave(whole, torch.tensor(SIZES))[mask], 1e-12)


@pytest.mark.parametrize("lam", [None, 0.8, "each"])
def test_vapo(lam):
    x, mask, cu = packed()
    bootstrap = torch.randn(len(SIZES), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    each = torch.linspace(0.1, 1.0, len(SIZES), dtype=torch.float64) if lam == "each" else lam
    a, ret = advantages.vapo(
        x["rewards"], x["values"], cu, gamma=0.95, lam_policy=each, alpha=0.6, mask=mask, bootstrap=bootstrap
    )
    own, truth, targets = zip(actions(x["rewards"], mask, cu), actions(x["values"], mask, cu), strict=True), [], []
    for i, (r, v) in enumerate(own):
        adaptive = max(0.0, 1 - 1 / (0.6 * len(r))) if r else 0.0
        how = adaptive if lam is None else (float(each[i]) if lam == "each" else lam)
        truth.append(papers.gae(r, v, 0.95, how, float(bootstrap[i]))[0])
        targets.append(papers.gae(r, v, 0.95, 1.0, float(bootstrap[i]))[1])
    assert_same("advantages", a[mask], flat(truth), 1e-12)
    assert_same("returns", ret[mask], flat(targets), 1e-12)
    assert not a[~mask].any() and not ret[~mask].any()


def test_length_adaptive_lambda():
    made = advantages.length_adaptive_lambda(torch.tensor([0, 1, 20, 40, 10_000]))
    assert_same("lam", made, torch.tensor([0, 0, 0, 0.5, 1 - 1 / 500], dtype=torch.float64), 1e-12)
    with pytest.raises(ValueError, match="alpha must be positive"):
        advantages.length_adaptive_lambda(torch.tensor([1]), 0.0)
    x, mask, cu = packed()
    for lam, message in ((torch.full((8,), 1.5), "lam must be in"), (torch.zeros(3), r"lam must be \[S=8\]")):
        with pytest.raises(ValueError, match=message):
            advantages.gae(x["rewards"], x["values"], cu, gamma=1.0, lam=lam, mask=mask)


def check_optimal_token_baseline(zero_tail=True, weighted=False) -> None:
    x, mask, cu = packed()
    names = ("rewards", "logprobs", "log_sum_sq_probs", "weights")
    x = {n: torch.where(mask, x[n], NAN) for n in names}
    made = advantages.optimal_token_baseline(
        x["rewards"], x["logprobs"], x["log_sum_sq_probs"], cu, torch.tensor(OWNERS),
        mask=mask, weights=x["weights"] if weighted else None, zero_tail=zero_tail,
    )  # fmt: skip
    r, logp, q, w = (actions(x[n], mask, cu) for n in names)
    own = []
    for i in range(len(SIZES)):
        p, ones = [math.exp(v) for v in logp[i]], [1.0] * len(r[i])
        own.append((OWNERS[i], r[i], p, [math.exp(v) for v in q[i]], w[i] if weighted else ones))
    assert_same("advantages", made[mask], flat(papers.optimal_token_baseline(own, zero_tail)), 1e-10)
    assert not made[~mask].any()


@pytest.mark.parametrize("zero_tail", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_optimal_token_baseline(zero_tail, weighted):
    check_optimal_token_baseline(zero_tail, weighted)


def test_an_unscored_trajectory_is_in_no_baseline():
    x, mask, cu = packed()
    how = (x["logprobs"], x["log_sum_sq_probs"])
    rewards = torch.where(mask, x["rewards"], NAN)
    rewards[int(cu[3]) : int(cu[4])] = NAN
    made = advantages.optimal_token_baseline(rewards, *how, cu, torch.tensor(OWNERS), mask=mask)
    away = torch.tensor([*OWNERS[:3], 99, *OWNERS[4:]])
    alone = advantages.optimal_token_baseline(x["rewards"], *how, cu, away, mask=mask)
    span = slice(int(cu[3]), int(cu[4]))
    assert not made[span].any()
    made[span] = alone[span]
    assert torch.equal(made, alone)


def test_process_grpo():
    """Two prompts; steps of some tokens each, one unscored, a sequence without a step."""
    unscored_first = [(3, NAN), (1, -1.0), (2, 0.0)]
    sequences = [(0, [(2, 1.0), (1, 0.5)]), (1, [(1, 2.0)]), (0, unscored_first), (0, []), (1, [(2, 2.0)])]
    ends, rewards, cu = [], [], [0]
    for _, steps in sequences:
        for tokens, r in steps:
            ends += [False] * (tokens - 1) + [True]
            rewards += [9.0] * (tokens - 1) + [r]
        cu.append(len(ends))
    made = advantages.process_grpo(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(ends), torch.tensor(cu), torch.tensor([0, 1, 0, 0, 1])
    )
    assert_same("advantages", made, flat(papers.process_grpo(sequences)), 1e-12)


def test_the_expected_maximum_has_this_gradient():
    """Two answers with rewards 1 and 0, p = softmax(z): grad of 1 - (1-p)^2 by all 2^3 draws of three completions."""
    z = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    p = z.softmax(0)
    (truth,) = torch.autograd.grad(1 - p[1].square(), z, retain_graph=True)
    estimate_ = torch.zeros(2, dtype=torch.float64)
    for draw in range(8):
        answers = [draw >> j & 1 for j in range(3)]
        rewards = torch.tensor([1.0 - a for a in answers], dtype=torch.float64)
        a = estimate("pkpo", rewards, torch.zeros(3, dtype=torch.long), k=2)
        value = sum(w * p[k].log() for w, k in zip(a, answers, strict=True)) / 3
        (grad,) = torch.autograd.grad(value, z, retain_graph=True)
        estimate_ += math.prod(float(p[k].detach()) for k in answers) * grad
    assert_same("gradient", estimate_, truth, 1e-12)


# -- rewards, running baselines ----------------------------------------------------------------------------------------
def test_kl_penalised():
    x, mask, cu = packed()
    rewards = torch.tensor([1.0, 2.0, 3.0, -1.0, NAN, 0.5, 4.0, 0.0], dtype=torch.float64)
    made = advantages.kl_penalised(rewards, x["kl"], cu, beta=0.4, mask=mask)
    truth = [r - 0.4 * sum(own) for r, own in zip(rewards.tolist(), actions(x["kl"], mask, cu), strict=True)]
    assert_same("rewards", made.nan_to_num(7.0), torch.tensor(truth, dtype=torch.float64).nan_to_num(7.0), 1e-13)


def test_length_penalised():
    rewards, groups = tensors()
    turns = torch.zeros(N)
    made = advantages.length_penalised(rewards, groups, output=(0.25, torch.tensor(LENGTHS)), turns=(0.1, turns))
    for i, r in enumerate(REWARDS):
        if math.isnan(r):
            assert made[i].isnan()
            continue
        g = papers.members(REWARDS, GROUPS, i)
        share = 0.25 * LENGTHS[i] / max(LENGTHS[j] for j in g)
        assert float(made[i]) == pytest.approx(r - share * papers.mean([REWARDS[j] for j in g]), rel=1e-12)


def test_running_baseline():
    roles = torch.tensor([0, 1, 0, 1, 1])
    batches = [[1.0, 2.0, 3.0, NAN, 4.0], [0.0, NAN, 1.0, NAN, NAN], [5.0, 1.0, NAN, 1.0, 1.0]]
    ours, means = advantages.RunningBaseline(3, 0.9), [0.0, 0.0, 0.0]
    for rewards in batches:
        made = ours(torch.tensor(rewards, dtype=torch.float64), roles)
        truth = [0.0 if math.isnan(r) else r - means[k] for r, k in zip(rewards, roles.tolist(), strict=True)]
        assert made.tolist() == pytest.approx(truth)
        for k in (0, 1):
            own = [r for r, role in zip(rewards, roles.tolist(), strict=True) if role == k and not math.isnan(r)]
            means[k] = 0.9 * means[k] + 0.1 * papers.mean(own) if own else means[k]
        assert ours.means == pytest.approx(means)
    again = advantages.RunningBaseline(3, 0.9)
    again.load_state_dict(ours.state_dict())
    assert again.means == ours.means
    with pytest.raises(ValueError, match="roles must be in 0 ... 2"):
        ours(torch.zeros(1), torch.tensor([3]))
    with pytest.raises(ValueError, match="the state has 3 roles"):
        advantages.RunningBaseline(2).load_state_dict(ours.state_dict())


def test_running_baseline_over_ranks():
    rewards, roles = torch.tensor([1.0, 2.0, NAN, 4.0]), torch.tensor([0, 1, 0, 0])
    one = advantages.RunningBaseline(2)
    one(rewards, roles)
    parts = [torch.tensor([0, 2]), torch.tensor([1, 3])]

    def call(rows, everywhere):
        own = advantages.RunningBaseline(2)
        own(rewards[rows], roles[rows], everywhere)
        return own.means

    assert all(means == pytest.approx(one.means) for means in Ranks(parts).run(call))


# -- controllers -------------------------------------------------------------------------------------------------------
def test_adaptive_kl():
    control = kl_controller(0.2, target=6.0, horizon=100)
    assert isinstance(control, AdaptiveKL) and type(kl_controller(0.2)) is FixedKL
    beta = 0.2
    for kl, n in ((12.0, 10), (6.0, 10), (5.4, 20), (0.0, 50), (-3.0, 7), (NAN, 5), (math.inf, 5)):
        control.update(kl, n)
        if math.isfinite(kl):
            beta *= 1 + max(-0.2, min(0.2, kl / 6.0 - 1)) * n / 100
        assert control.beta == pytest.approx(beta, rel=1e-12)
    again = kl_controller(0.5, 6.0, 100)
    again.load_state_dict(control.state_dict())
    assert again.beta == control.beta
    fixed = FixedKL(0.3)
    fixed.update(1e9, 10)
    assert fixed.beta == 0.3
    control.update(-1e9, 10**6)
    assert control.beta == 0.0  # never a reward for straying
    for bad in ({"beta": 0.0}, {"target": -1.0}, {"horizon": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdaptiveKL(**{"beta": 0.1, **bad})


def test_adaptive_entropy_follows_trl():
    control = AdaptiveEntropy(coef=0.0, target=0.2, delta=0.4, high=1.0)
    assert control.active == 0.0  # nothing is known before the first step
    seen = []
    for entropy in (0.1, 0.2, 0.15, 0.1, 0.5, 0.1, 0.9, 0.9, 0.9, NAN):
        control.update(entropy)
        seen.append((round(control.coef, 9), round(control.active, 9)))
    assert seen == [
        (0.4, 0.4), (0.8, 0.8), (1.0, 1.0), (1.0, 1.0), (0.6, 0.0), (1.0, 1.0), (0.6, 0.0), (0.2, 0.0), (0.0, 0.0),
        (0.0, 0.0),
    ]  # fmt: skip
    again = AdaptiveEntropy()
    again.load_state_dict(control.state_dict())
    assert again.state_dict() == control.state_dict()
    with pytest.raises(ValueError, match="low <= high"):
        AdaptiveEntropy(low=1.0, high=0.0)


# -- planted mistakes --------------------------------------------------------------------------------------------------
Pools = advantages.pools.Pools


def halved(f):
    return lambda self, *args, **how: f(self, *args, **how) / 2


MUTANTS = {
    "the mean is not taken off": (Pools, "centred", lambda f: lambda self, x, w=None: x, lambda: check_law("dr_grpo")),
    "the mean is halved": (Pools, "centred", halved, lambda: check_law("rloo")),
    "biased std": (
        Pools, "std", lambda f: lambda self, x, u=True, w=None: f(self, x, False, w), lambda: check_law("grpo")
    ),
    "own reward in the others' std": (Pools, "std_of_others", lambda f: Pools.std, lambda: check_law("normalised", 2)),
    "unscored ones count": (
        Pools, "size", lambda f: lambda self, like: f(Pools.of_groups(self.seen | True, self.index), like),
        lambda: check_law("rloo"),
    ),
    "lengths forgotten": (
        advantages.sequences, "_positive_lengths", lambda f: lambda n, r: torch.ones_like(r), lambda: check_law("opo")
    ),
    "one subset too large": (
        advantages.subsets, "_share_of_subsets", lambda f: lambda of, n, k: f(of, n, k + 1),
        lambda: check_law("pass_at_k", 1),
    ),
    "whitened by the variance": (
        advantages.tokenwise, "z_score", lambda f: lambda x, pool, **how: f(x, pool, **how) / 2, check_whitened
    ),
    "mean back in": (
        advantages.tokenwise, "z_score", lambda f: lambda x, pool, **how: f(x, pool, **{**how, "shift_mean": False}),
        check_whitened,
    ),
    "steps of other groups in the baseline": (
        Pools, "of_groups", lambda f: lambda seen, ids: f(seen, ids % (sum(SIZES) + 1)), check_optimal_token_baseline
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_noticed(name, monkeypatch):
    owner, attribute, change, check = MUTANTS[name]
    check()
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        check()

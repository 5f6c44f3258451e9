"""Shares of a step: every sequence once, within budget, as few rounds as packing allows, and even in cost."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.data import Sample, pack
from fastrl.data.balance import Cost, cost_of, share, share_samples
from fastrl.data.prefix import measured


def flat(made: list[list[list[int]]]) -> list[int]:
    return sorted(i for rank in made for part in rank for i in part)


def imbalance(made: list[list[list[int]]], costs: list[float]) -> float:
    """Time of all rounds, each as long as its costliest micro-batch, over the time of an even split."""
    work = [[sum(costs[i] for i in part) for part in rank] for rank in made]
    return sum(max(of) for of in zip(*work, strict=True)) * len(made) / sum(map(sum, work))


def round_robin(lengths: list[int], budget: int, ranks: int) -> list[list[list[int]]]:
    """What a plain loader does: samples dealt in turn, then cut in order."""
    made: list[list[list[int]]] = [[[]] for _ in range(ranks)]
    for i, length in enumerate(lengths):
        parts = made[i % ranks]
        if parts[-1] and sum(lengths[j] for j in parts[-1]) + length > budget:
            parts.append([])
        parts[-1].append(i)
    rounds = max(map(len, made))
    return [parts + [[]] * (rounds - len(parts)) for parts in made]


def long_tailed(count: int, seed: int, longest: int) -> list[int]:
    draw = random.Random(seed)
    return [min(longest, max(8, int(draw.lognormvariate(5.5, 1.0)))) for _ in range(count)]


# -- what always holds ---------------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    budget=st.integers(1, 150),
    unit=st.integers(1, 3),
    ranks=st.integers(1, 5),
    square=st.floats(0, 0.2),
)
def test_every_sequence_once_whole_and_within_budget(lengths, budget, unit, ranks, square):
    lengths = lengths * unit
    costs = [n + square * n * n for n in lengths]
    made = share(lengths, budget, unit, ranks, costs)
    assert len(made) == ranks and flat(made) == list(range(len(lengths)))
    assert len({len(parts) for parts in made}) == 1, "ranks would wait for each other in vain"
    for part in (p for parts in made for p in parts):
        assert part == sorted(part)
        units = {i // unit for i in part}
        assert len(part) == unit * len(units), "a unit was torn apart"
        assert sum(lengths[i] for i in part) <= budget or len(units) == 1
    assert len(made[0]) == -(-len(pack(lengths, budget, unit)) // ranks), "more rounds than packing needs"
    empty = sum(not p for parts in made for p in parts)
    assert empty == max(0, ranks * len(made[0]) - len(lengths) // unit), "an empty micro-batch beside two that share"
    assert made == share(list(lengths), budget, unit, ranks, list(costs))


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=30), budget=st.integers(1, 150))
def test_one_rank_has_what_pack_gives(lengths, budget):
    assert share(lengths, budget, 1, 1, [n * n for n in lengths]) == [pack(lengths, budget)]


def test_units_of_given_sizes_stay_together():
    made = share([5, 5, 5, 1, 1, 7], 16, [3, 2, 1], 2)
    assert flat(made) == [0, 1, 2, 3, 4, 5]
    assert sorted(p for parts in made for p in parts) == [[0, 1, 2], [3, 4, 5]]


def test_fewer_sequences_than_ranks_leave_the_last_round_short():
    made = share([4, 9, 2], 100, 1, 4)
    assert sorted(map(len, (p for parts in made for p in parts))) == [0, 1, 1, 1]
    assert all(len(parts) == 1 for parts in made)


# -- how even ------------------------------------------------------------------------------------------------------
COST = Cost(token=1.0, pair=1 / 500)  # attention and linear layers are even at 1000 tokens


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_long_tailed_lengths_are_even_where_round_robin_is_not(ranks, seed):
    lengths = long_tailed(32 * ranks, seed, 4096)
    costs = [COST.of(n) for n in lengths]
    ours, plain = (imbalance(made, costs) for made in (
        share(lengths, 8192, 1, ranks, costs), round_robin(lengths, 8192, ranks)
    ))  # fmt: skip
    assert ours <= 1.1, (ours, plain)
    assert plain > ours + 0.05, (ours, plain)


def test_evening_out_tokens_alone_would_leave_attention_uneven():
    """The case that cost is there for: one long sequence against many short ones of as many tokens."""
    lengths = [4000] + [100] * 300
    costs = [COST.of(n) for n in lengths]
    by_cost, by_tokens = share(lengths, 50_000, 1, 2, costs), share(lengths, 50_000, 1, 2)
    assert imbalance(by_cost, costs) < 1.02 < 1.2 < imbalance(by_tokens, costs)


def test_pairs_are_even_too():
    lengths = long_tailed(128, 5, 2048)
    costs = [COST.of(n) for n in lengths]
    assert imbalance(share(lengths, 16_384, 2, 4, costs), costs) <= 1.1


def test_a_tight_budget_keeps_the_fewest_rounds():
    """Where every bin is full to the brim there is no room for evening out, and the cut of `pack` is kept."""
    lengths = [50, 50, 60, 40, 70, 30, 100]
    made = share(lengths, 100, 1, 2, [n * n for n in lengths])
    assert len(made[0]) == 2 and all(sum(lengths[i] for i in p) == 100 for parts in made for p in parts)


def test_a_large_step_is_shared_fast_enough_to_plan_it_every_time():
    lengths = long_tailed(4096, 3, 4096)
    made = share(lengths, 16_384, 1, 8, [COST.of(n) for n in lengths])
    assert flat(made) == list(range(4096))


# -- groups that share a prompt ------------------------------------------------------------------------------------
def groups(prompts: int, completions: int, prompt: int, seed: int) -> list[Sample]:
    lengths = iter(long_tailed(prompts * completions, seed, 2000))
    return [
        Sample.from_parts([g + 2] * prompt, [1] * next(lengths), group_id=g)
        for g in range(prompts)
        for _ in range(completions)
    ]


def work_of(samples: list[Sample], part: list[int]) -> float:
    """Of a micro-batch, each prompt in it once."""
    made = sum(COST.of(len(samples[i])) for i in part)
    seen = [samples[i].fields["group_id"] for i in part]
    return made - sum((seen.count(g) - 1) * COST.of(samples[part[seen.index(g)]].prompt_length) for g in set(seen))


def time_of(samples: list[Sample], made: list[list[list[int]]]) -> float:
    work = [[work_of(samples, part) for part in rank] for rank in made]
    return sum(max(of) for of in zip(*work, strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_groups_are_divided_where_that_evens_out_more_than_it_costs(ranks):
    samples = groups(8, 8, 200, 1)
    ours = share_samples(samples, 32_768, 1, ranks, share_prompts=True, cost=COST)
    assert flat(ours) == list(range(64))
    sizes, units = measured(samples, 32_768, 1, True, ranks)
    whole = share(sizes, 32_768, units, ranks, [COST.of(n) for n in sizes])
    assert time_of(samples, ours) <= time_of(samples, whole)
    if ranks == 8:
        assert time_of(samples, ours) < 0.95 * time_of(samples, whole)
    apart = share([len(s) for s in samples], 32_768, 1, ranks, [COST.of(len(s)) for s in samples])
    assert time_of(samples, ours) <= 1.02 * time_of(samples, apart), "worse than completions dealt one by one"


def test_groups_that_are_even_already_stay_whole():
    samples = [Sample.from_parts([g + 2] * 500, [1] * 300, group_id=g) for g in range(8) for _ in range(4)]
    for ranks in (1, 2, 4, 8):
        made = share_samples(samples, 100_000, 1, ranks, share_prompts=True, cost=COST)
        for part in (p for parts in made for p in parts):
            assert all(part.count(4 * (i // 4) + k) == 1 for i in part for k in range(4))


def test_samples_without_shared_prompts_are_shared_by_cost():
    samples = groups(8, 2, 10, 3)
    costs = [COST.of(len(s), s.num_trained) for s in samples]
    made = share_samples(samples, 5000, 2, 3, cost=COST)
    assert made == share([len(s) for s in samples], 5000, 2, 3, costs)
    assert share_samples(samples, 5000) == [pack([len(s) for s in samples], 5000)]


# -- cost ----------------------------------------------------------------------------------------------------------
def config(**fields) -> SimpleNamespace:
    shape = {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 128, "vocab_size": 1000, "hidden_act": "silu", **fields,
    }  # fmt: skip
    made = SimpleNamespace(**shape)
    made.get_text_config = lambda: made
    return made


def test_cost_is_counted_from_the_shape():
    cost = cost_of(config())
    body = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k and v, o; gate, up, down
    assert cost.token == 2 * 4 * body and cost.row == 2 * 64 * 1000
    assert cost.pair == 4 * 4 * 64 and cost.near == 0
    assert cost.of(10, 3) == pytest.approx(10 * cost.token + 3 * cost.row + 55 * cost.pair)


def test_windows_and_experts_are_counted():
    kinds = ["sliding_attention", "full_attention"] * 2
    windowed = cost_of(config(layer_types=kinds, sliding_window=8))
    assert windowed.pair == windowed.near == 2 * 4 * 64
    seen = sum(min(t, 8) for t in range(1, 21))
    assert windowed.of(20) == pytest.approx(20 * windowed.token + 210 * windowed.pair + seen * windowed.near)
    experts = cost_of(config(num_experts_per_tok=2, moe_intermediate_size=32))
    assert experts.token == 2 * 4 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 64)


def test_linear_layers_of_a_real_model_are_its_parameters(tmp_path):
    """Weights that multiply every token: all but embeddings, norms and biases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    for kind, more in (
        ("llama", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
        ("gpt2", {"n_inner": 96}),
    ):
        made = AutoConfig.for_model(kind, vocab_size=50, **shape, **more)
        model = AutoModelForCausalLM.from_config(made).get_decoder()
        inside = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "wte" not in n]
        weights = sum(p.numel() for p in inside if p.shape[0] != made.max_position_embeddings)
        assert cost_of(made).token == 2 * weights, kind

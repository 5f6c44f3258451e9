"""Packing, collation and data order: every token once, in its place, aligned with the row that predicts it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl import TokenBatch
from fastrl.data import IndexSampler, Sample, collate, pack

lengths_lists = st.lists(st.integers(0, 60), min_size=1, max_size=40)


# -- pack ----------------------------------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(lengths=lengths_lists, budget=st.integers(1, 120), unit=st.integers(1, 4))
def test_pack_keeps_everything_whole_and_within_budget(lengths, budget, unit):
    lengths = lengths * unit
    cut = pack(lengths, budget, unit)
    assert sorted(i for micro in cut for i in micro) == list(range(len(lengths)))
    for micro in cut:
        assert micro == sorted(micro)
        units = {i // unit for i in micro}
        assert len(micro) == unit * len(units), "a unit was torn apart"
        assert sum(lengths[i] for i in micro) <= budget or len(units) == 1
    assert cut == pack(list(lengths), budget, unit)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), budget=st.integers(60, 200))
def test_pack_needs_few_micro_batches(lengths, budget):
    assert len(pack(lengths, budget)) <= 2 * sum(lengths) / budget + 1  # first fit leaves no two halves empty


def test_pack_evens_out_and_puts_the_fullest_first():
    assert pack([10] * 8, 40) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    loads = [sum([50, 30, 20, 20, 10, 10][i] for i in micro) for micro in pack([50, 30, 20, 20, 10, 10], 90)]
    assert loads == sorted(loads, reverse=True) and max(loads) - min(loads) <= 10


def test_pack_of_ragged_groups():
    assert sorted(map(tuple, pack([5, 5, 5, 1, 1], 8, [3, 2]))) == [(0, 1, 2), (3, 4)]
    with pytest.raises(ValueError, match="add up to the 5 sequences"):
        pack([1] * 5, 8, [3, 3])
    with pytest.raises(ValueError, match="do not divide into units of 2"):
        pack([1] * 5, 8, 2)
    with pytest.raises(ValueError, match="max_tokens"):
        pack([1], 0)


# -- collate -------------------------------------------------------------------------------------------------------
def samples_of(seed: int, count: int, vocabulary: int = 50) -> list[Sample]:
    """Ragged samples, some without completion, some with holes in the mask."""
    draw = torch.Generator().manual_seed(seed)

    def rand(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draw))

    out = []
    for _ in range(count):
        prompt, completion = [[rand(0, vocabulary) for _ in range(rand(lo, 9))] for lo in (1, 0)]
        mask = [False] * len(prompt) + [rand(0, 4) > 0 for _ in completion]
        out.append(Sample(prompt + completion, len(prompt), mask))
    return out


@pytest.mark.parametrize("seed", range(5))
def test_rows_point_at_the_token_before_the_target(seed):
    """A model whose hidden state is a one-hot of its own token: only the right alignment predicts every target."""
    vocabulary = 50
    samples = samples_of(seed, 12)
    follows = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    for sample in samples:  # each token is a fixed permutation of the one before it
        for t in range(1, len(sample)):
            sample.input_ids[t] = int(follows[sample.input_ids[t - 1]])
    out = collate(samples)
    hidden = torch.nn.functional.one_hot(out["input_ids"], vocabulary).double()
    head = torch.nn.functional.one_hot(follows, vocabulary).double().T * 1e3  # logits pick the successor
    logits = hidden[out["rows"]] @ head.T
    assert (logits.argmax(-1) == out["targets"]).all()
    wrong = (hidden[(out["rows"] + 1).clamp(max=len(hidden) - 1)] @ head.T).argmax(-1)
    assert (wrong != out["targets"]).any(), "the check must be able to fail"


@pytest.mark.parametrize("seed", range(5))
def test_collate_loses_nothing(seed):
    samples = samples_of(seed, 9)
    for sample in samples:
        sample.fields = {"old_logprobs": [-float(i) for i in range(sample.num_trained)], "advantage": 0.5 + len(sample)}
    out = collate(samples, ["old_logprobs", "advantage"])
    assert out["cu_seqlens"].dtype == out["row_cu_seqlens"].dtype == torch.int32
    assert out["advantages"].dtype == torch.float32
    for i, sample in enumerate(samples):
        a, b = out["cu_seqlens"][i : i + 2].tolist()
        assert out["input_ids"][a:b].tolist() == sample.input_ids
        assert out["position_ids"][a:b].tolist() == list(range(len(sample)))
        ra, rb = out["row_cu_seqlens"][i : i + 2].tolist()
        trained = [t for t, m in enumerate(sample.completion_mask) if m]
        assert (out["rows"][ra:rb] - a + 1).tolist() == trained
        assert out["targets"][ra:rb].tolist() == [sample.input_ids[t] for t in trained]
        assert out["old_logprobs"][ra:rb].tolist() == sample.fields["old_logprobs"]
    assert out["max_seqlen"] == max(map(len, samples))
    batch = TokenBatch(
        out["targets"],
        cu_seqlens=out["row_cu_seqlens"],
        advantages=out["advantages"],
        old_logprobs=out["old_logprobs"],
    )
    assert batch.lengths.tolist() == [s.num_trained for s in samples]


def test_collate_fields_of_every_sort():
    samples = [Sample.from_parts([1], [2, 3], label=True, group_id=0, old_logprobs=torch.tensor([-1.0, -2.0]))]
    samples += [Sample.from_parts([1], [], label=False, group_id=1, old_logprobs=[])]
    out = collate(samples, ["label", "group_id", "old_logprobs"])
    assert out["labels"].tolist() == [True, False] and out["labels"].dtype == torch.bool
    assert out["group_ids"].dtype == torch.int64
    assert out["old_logprobs"].tolist() == [-1.0, -2.0]
    torch.set_default_dtype(torch.float64)
    try:
        assert collate([Sample.from_parts([1], [2], advantage=0.1)], ["advantage"])["advantages"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_collate_of_nothing_trained():
    out = collate([Sample([5, 6], 2, [False, False]), Sample([], 0, [])])
    assert out["rows"].numel() == 0 and out["row_cu_seqlens"].tolist() == [0, 0, 0]
    assert out["cu_seqlens"].tolist() == [0, 2, 2]


def test_collate_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])
    with pytest.raises(ValueError, match=r"sample 1 has no field 'advantage'"):
        collate([Sample.from_parts([1], [2], advantage=1.0), Sample.from_parts([1], [2])], ["advantage"])
    with pytest.raises(ValueError, match=r"'old_logprobs' of sample 0 is 1 numbers, expected 2"):
        collate([Sample.from_parts([1], [2, 3], old_logprobs=[0.0])], ["old_logprobs"])
    mixed = [Sample.from_parts([1], [2], advantage=[1.0]), Sample.from_parts([1], [2], advantage=1.0)]
    with pytest.raises(ValueError, match="single value 1.0"):
        collate(mixed, ["advantage"])


def test_sample_refuses_a_trained_prompt():
    with pytest.raises(ValueError, match="inside the context"):
        Sample([1, 2, 3], 2, [False, True, True])
    with pytest.raises(ValueError, match="token 0 is always context"):
        Sample([1, 2], 0, [True, True])
    with pytest.raises(ValueError, match="one bool per token"):
        Sample([1, 2], 1, [False])
    with pytest.raises(ValueError, match="prompt_length is 3"):
        Sample([1, 2], 3, [False, False])
    assert Sample.from_parts([], [4, 5]).completion_mask == [False, True]


# -- order ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_every_pass_has_every_row_once(batch):
    sampler = IndexSampler(10, seed=3)
    passes = []
    for _ in range(3):
        rows = []
        for _ in range(sampler.batches_per_epoch(batch)):
            rows += sampler.take(batch)
        assert sorted(rows) == list(range(10))
        assert sampler.offset == 0
        passes.append(rows)
    assert passes[0] != passes[1] != passes[2]
    assert sampler.progress == 3


def test_resume_is_exact_at_every_offset():
    whole = IndexSampler(7, seed=1)
    stream, states = [], []
    for _ in range(15):
        states.append(json.loads(json.dumps(whole.state_dict())))
        stream.append(whole.take(3))
    for k, state in enumerate(states):
        again = IndexSampler(7, seed=1)
        again.load_state_dict(state)
        assert [again.take(3) for _ in range(15 - k)] == stream[k:]


def test_order_depends_on_the_seed_only():
    torch.manual_seed(0)
    first = IndexSampler(100, seed=5).take(100)
    torch.manual_seed(1)
    assert IndexSampler(100, seed=5).take(100) == first
    assert IndexSampler(100, seed=6).take(100) != first
    assert IndexSampler(5, shuffle=False).take(9) == [0, 1, 2, 3, 4]
    assert IndexSampler(12, seed=0).take(12) == [4, 0, 5, 2, 8, 3, 11, 9, 6, 1, 10, 7], "fixed for ever"


def test_order_refuses_another_dataset():
    state = IndexSampler(7, seed=1).state_dict()
    for other in (IndexSampler(8, seed=1), IndexSampler(7, seed=2), IndexSampler(7, seed=1, shuffle=False)):
        with pytest.raises(ValueError, match="the saved data order has"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="outside 7 rows"):
        IndexSampler(7, seed=1).load_state_dict(state | {"offset": 7})
    with pytest.raises(ValueError, match="size must be at least 1"):
        IndexSampler(0)

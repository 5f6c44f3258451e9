"""Sampling: exact ids, right probabilities, reproducible, nothing dropped, the model left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig

from fastrl.models import PackedModel
from fastrl.quickstart.model import build_config, build_tokenizer
from fastrl.rollout import Sampling, TransformersSampler, record
from fastrl.rollout.transformers import _batches, eos_ids

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = build_config(tokenizer)
    config.tie_word_embeddings = False  # a tied model without training repeats its last token
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.2)
    return model


PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 3, 4], [5, 5]]


def step_by_step(model, prompt: list[int], new: int, eos: int) -> list[int]:
    """Greedy decoding without cache, padding or batch: what generate must equal."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def test_greedy_equals_decoding_one_by_one(model, tokenizer):
    model.eval()
    with torch.no_grad():
        expected = [step_by_step(model, p, 8, tokenizer.eos_token_id) for p in PROMPTS]
    assert len({t for e in expected for t in e}) > 4, "a model that repeats itself proves nothing"
    for budget in (1, 40, 10_000):
        made = TransformersSampler(model, tokenizer, max_tokens=budget).generate(PROMPTS, Sampling(8, temperature=0))
        assert [c.ids for [c] in made] == expected
        assert [c.truncated for [c] in made] == [e[-1] != tokenizer.eos_token_id for e in expected]


def test_seeded_and_leaves_the_random_state_alone(model, tokenizer):
    sampler = TransformersSampler(model, tokenizer)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sampler.generate(PROMPTS, Sampling(6), n=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert sampler.generate(PROMPTS, Sampling(6), n=3, seed=1) == first
    assert sampler.generate(PROMPTS, Sampling(6), n=3, seed=2) != first
    torch.manual_seed(5)
    unseeded = sampler.generate(PROMPTS, Sampling(6), n=3)
    torch.manual_seed(5)
    assert sampler.generate(PROMPTS, Sampling(6), n=3) == unseeded


def test_counts_and_order(model, tokenizer):
    made = TransformersSampler(model, tokenizer, max_tokens=30).generate(PROMPTS, Sampling(4), n=[2, 0, 3, 1], seed=0)
    assert [len(group) for group in made] == [2, 0, 3, 1]
    greedy = TransformersSampler(model, tokenizer, max_tokens=30).generate(PROMPTS, Sampling(4, temperature=0), n=2)
    assert all(a == b for a, b in greedy)
    assert TransformersSampler(model, tokenizer).generate([], Sampling(4)) == []


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_models_own_distribution(model, tokenizer, temperature):
    """Frequencies of the first token against softmax(logits / T): a chi-square test that a cut tail would fail."""
    draws, prompt = 4000, [3, 4, 5]
    made = TransformersSampler(model, tokenizer).generate([prompt], Sampling(1, temperature), n=draws, seed=0)[0]
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / temperature, -1)
    seen = torch.bincount(torch.tensor([c.ids[0] for c in made]), minlength=len(p)).double()
    often = p * draws >= 5
    chi2 = ((seen - p * draws) ** 2 / (p * draws))[often].sum() + (seen[~often].sum() - (p[~often] * draws).sum()) ** 2
    assert chi2 < 2.5 * len(p), f"chi-square {chi2:.1f} for {len(p)} tokens"


def test_settings_shipped_with_a_model_do_not_bias_the_draws(model, tokenizer):
    plain = TransformersSampler(model, tokenizer).generate(PROMPTS, Sampling(6), n=4, seed=0)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        do_sample=True,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        typical_p=0.2,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[3, 4, 5],
        min_new_tokens=6,
    )
    shipped = model.generation_config
    assert TransformersSampler(model, tokenizer).generate(PROMPTS, Sampling(6), n=4, seed=0) == plain
    assert model.generation_config is shipped


def test_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    TransformersSampler(model, tokenizer, attn_implementation="eager").generate(PROMPTS, Sampling(2), seed=0)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        TransformersSampler(model, tokenizer).generate([[1], []], Sampling(2))
    assert model.training


def test_gradient_checkpointing_does_not_turn_the_cache_off(model, tokenizer):
    plain = TransformersSampler(model, tokenizer).generate(PROMPTS, Sampling(5, temperature=0))
    model.train()
    model.gradient_checkpointing_enable()
    assert TransformersSampler(model, tokenizer).generate(PROMPTS, Sampling(5, temperature=0)) == plain


def test_eos_ends_and_pad_does_not(model, tokenizer):
    """A drawn pad id is a token like any other, and with pad == eos the end of a completion is still found."""
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform draws
    made = TransformersSampler(model, tokenizer).generate([[3]] * 40, Sampling(8), n=4, seed=0)
    flat = [c for group in made for c in group]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert any(pad in c.ids for c in flat) and any(c.truncated for c in flat) and any(not c.truncated for c in flat)
    for c in flat:
        assert (eos in c.ids) != c.truncated
        assert eos not in c.ids[:-1]
        assert len(c.ids) == 8 or not c.truncated
    same = build_tokenizer()
    same.pad_token = same.eos_token
    again = TransformersSampler(model, same).generate([[3]] * 40, Sampling(8), n=4, seed=0)
    assert [c.ids for g in again for c in g] == [c.ids for c in flat]


def test_every_eos_of_the_model_ends(model, tokenizer):
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id, 8]
    assert eos_ids(model, tokenizer) == [tokenizer.eos_token_id, 7, 8]
    with torch.no_grad():
        model.lm_head.weight.zero_()
    made = TransformersSampler(model, tokenizer).generate([[3]], Sampling(20), n=60, seed=0)[0]
    assert {c.ids[-1] for c in made if not c.truncated} == {tokenizer.eos_token_id, 7, 8}


def test_prompt_beyond_the_context_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"prompt 0 has 60 tokens; with max_new_tokens=5 .* context of 64"):
        TransformersSampler(model, tokenizer).generate([[3] * 60], Sampling(5))
    assert len(TransformersSampler(model, tokenizer).generate([[3] * 59], Sampling(5, temperature=0))[0][0].ids) <= 5
    with pytest.raises(ValueError, match="n has 1 counts for 2 prompts"):
        TransformersSampler(model, tokenizer).generate([[3], [4]], Sampling(5), n=[1])


def test_no_eos_anywhere_is_refused(model):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos token"):
        TransformersSampler(model, tokenizer)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"top_p": 0.9}, "bias every ratio"),
        ({"top_k": 50}, "bias every ratio"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
    ],
)
def test_sampling_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**({"max_new_tokens": 4} | bad))


def test_cut_distributions_only_on_request(model, tokenizer):
    only_top = Sampling(6, top_k=1, allow_cut=True)
    greedy = TransformersSampler(model, tokenizer).generate(PROMPTS, Sampling(6, temperature=0))
    assert TransformersSampler(model, tokenizer).generate(PROMPTS, only_top, seed=0) == greedy


def check_logprobs(model, tokenizer, temperature: float) -> None:
    """Against fastrl's own of the same tokens, unpadded and without cache; and asking changes no draw."""
    ask = {"n": 3, "seed": 1}
    sampler = TransformersSampler(model, tokenizer, max_tokens=60)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3  # so that some completions end early
    plain = sampler.generate(PROMPTS, Sampling(7, temperature), **ask)
    made = sampler.generate(PROMPTS, Sampling(7, temperature, logprobs=True), **ask)
    flat = [(p, c) for p, group in zip(PROMPTS, made, strict=True) for c in group]
    assert [c.ids for g in plain for c in g] == [c.ids for _, c in flat]
    assert all(c.logprobs is None for g in plain for c in g)
    assert {c.truncated for _, c in flat} == {True, False}
    packed = PackedModel(model)
    packed.eval()
    for prompt, c in flat:
        ids, first = torch.tensor([*prompt, *c.ids]), len(prompt) - 1
        rows = torch.arange(first, len(ids) - 1)
        with torch.no_grad():
            stats = packed(ids, torch.tensor([0, len(ids)]), rows=rows, targets=ids[rows + 1], temperature=temperature)
        assert len(c.logprobs) == len(c.ids)
        torch.testing.assert_close(torch.tensor(c.logprobs), stats.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_draws(model, tokenizer, temperature):
    check_logprobs(model, tokenizer, temperature)


def test_wrong_logprobs_are_noticed(model, tokenizer, monkeypatch):
    """Of the token before, of the untempered logits, off by a little."""
    drawn, scale = record._Drawn.__call__, record._Scale.__call__

    def untempered(self, ids, scores):
        made = scale(self, ids, scores)
        self.record.scores = scores
        return made

    def off(self, ids, scores, **kwargs):
        made = drawn(self, ids, scores, **kwargs)
        self.record.steps[-1] = self.record.steps[-1] + 1e-3
        return made

    planted = [
        (record._Drawn, lambda self, ids, scores, **kwargs: drawn(self, ids[:, :-1], scores, **kwargs)),
        (record._Scale, untempered),
        (record._Drawn, off),
    ]
    for where, wrong in planted:
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(where, "__call__", wrong)
            check_logprobs(model, tokenizer, 0.6)


def test_only_draws_from_the_whole_distribution_have_logprobs():
    for options in ({"temperature": 0.0}, {"top_k": 3, "allow_cut": True}, {"top_p": 0.5, "allow_cut": True}):
        with pytest.raises(ValueError, match="whole distribution have log-probs"):
            Sampling(4, logprobs=True, **options)


def test_batches_stay_within_the_budget():
    lengths = [5, 1, 9, 9, 2, 30, 4]
    assert max(map(len, _batches(lengths, new_tokens=4, budget=1000, max_rows=3))) == 3
    batches = _batches(lengths, new_tokens=4, budget=30, max_rows=100)
    assert sorted(i for b in batches for i in b) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + 4) <= 30

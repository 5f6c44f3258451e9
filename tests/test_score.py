"""Score models: what transformers says of the same sequences, packed, saved and loaded; critics and judges."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
import zoo

from fastrl import HeadStats, TokenBatch, loss_from_scores, losses
from fastrl.models import ActorCritic, load_causal_lm, load_reward_model, load_token_classifier, save_pretrained
from fastrl.models.judge import load_reward_function
from fastrl.models.packed import next_tokens
from fastrl.models.score import ScoreModel, is_reward_model, last_rows, pack_score_model
from fastrl.rewards import RewardError, resolve

LENGTHS = (7, 1, 12, 5)
SEQUENCE_CLASSES = {
    "llama": transformers.LlamaForSequenceClassification,
    "qwen3": transformers.Qwen3ForSequenceClassification,
    "gpt2": transformers.GPT2ForSequenceClassification,
    "mistral": transformers.MistralForSequenceClassification,
    "gemma2": transformers.Gemma2ForSequenceClassification,
    "phi3": transformers.Phi3ForSequenceClassification,
}
TOKEN_CLASSES = {
    "qwen3": transformers.Qwen3ForTokenClassification,
    "gpt2": transformers.GPT2ForTokenClassification,
}


def classifier(cls, name: str, labels: int = 1, pad: int | None = 0, seed: int = 0):
    """A tiny classifier with the body of the zoo's causal LM."""
    lm = zoo.make(name)
    config = lm.config.__class__(**{**lm.config.to_dict(), "num_labels": labels, "pad_token_id": pad})
    torch.manual_seed(seed)
    model = cls(config)
    model.base_model.load_state_dict(lm.base_model.state_dict())
    head = getattr(model, "score", None) or model.classifier
    torch.nn.init.normal_(head.weight, std=0.2)
    return model.eval()


def padded(documents: list[torch.Tensor], pad: int = 0):
    ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", SEQUENCE_CLASSES)
@pytest.mark.parametrize("labels", [1, 3])
def test_packed_scores_are_those_of_transformers(name, labels):
    plain = classifier(SEQUENCE_CLASSES[name], name, labels)
    documents = zoo.documents(LENGTHS)
    with torch.no_grad():
        want = plain(**padded(documents)).logits
        ours = pack_score_model(ScoreModel(plain))
        got = ours.scores(torch.cat(documents), zoo.boundaries(documents))
        again = plain(**padded(documents)).logits
    assert ours.packed and not ours.notes
    assert got.shape == ((4,) if labels == 1 else (4, 3))
    assert torch.allclose(got.view(4, -1), want, atol=1e-5)
    assert torch.allclose(again, want, atol=1e-6)


@pytest.mark.parametrize("name", TOKEN_CLASSES)
def test_packed_classes_are_those_of_transformers(name):
    plain = classifier(TOKEN_CLASSES[name], name, 2)
    documents = zoo.documents(LENGTHS)
    with torch.no_grad():
        want = torch.cat([plain(d[None]).logits[0] for d in documents])
        ours = pack_score_model(ScoreModel(plain))
        got = ours.values(torch.cat(documents), zoo.boundaries(documents))
    assert torch.allclose(got, want, atol=1e-5)


def test_the_score_is_read_where_transformers_reads_it():
    """Also with a padding token that doubles as the end of a text."""
    ids = torch.tensor([5, 6, 0, 7, 0, 0, 0, 0, 8])
    cu = torch.tensor([0, 3, 6, 8, 9])
    assert last_rows(ids, cu, 0).tolist() == [1, 3, 6, 8]
    assert last_rows(ids, cu, None).tolist() == [2, 5, 7, 8]
    assert last_rows(ids, cu, 9).tolist() == [2, 5, 7, 8]
    plain = classifier(transformers.Qwen3ForSequenceClassification, "qwen3", pad=5)
    documents = [torch.tensor([7, 9, 11, 5]), torch.tensor([8, 5, 9])]
    with torch.no_grad():
        want = plain(**padded(documents, 5)).logits[:, 0]
        got = pack_score_model(ScoreModel(plain)).scores(torch.cat(documents), zoo.boundaries(documents))
    assert torch.allclose(got, want, atol=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("score")
    return tiny.make_model(root / "model")


def test_a_causal_lm_gets_a_fresh_head_and_is_saved_whole(place, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    torch.manual_seed(1)
    model = load_reward_model(place, tokenizer=tokenizer)
    torch.manual_seed(1)
    same = load_reward_model(place, tokenizer=tokenizer)
    assert torch.equal(model.head.weight, same.head.weight)
    body = load_causal_lm(place)
    assert torch.equal(model.body.embed_tokens.weight, body.body.embed_tokens.weight)
    save_pretrained(model, tokenizer, tmp_path)
    plain, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and plain.config.num_labels == 1 and plain.config.pad_token_id == 0
    again = load_reward_model(tmp_path)
    ids, cu = torch.tensor([4, 5, 6, 7, 8]), torch.tensor([0, 2, 5], dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(model.head.weight, again.head.weight)
        assert torch.allclose(model.eval().scores(ids, cu), again.eval().scores(ids, cu), atol=1e-6)
        assert torch.allclose(plain.eval()(ids[None, :2]).logits[0, 0], again.scores(ids, cu)[0], atol=1e-6)
    assert is_reward_model(tmp_path) and not is_reward_model(place)
    assert load_token_classifier(place).head.out_features == 2


def test_a_damaged_head_is_refused(place, tmp_path):
    """A reward model without its head would otherwise be given a random one."""
    model = load_reward_model(place)
    state = {k: v for k, v in model.model.state_dict().items() if not k.startswith("score")}
    model.model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 1 weights of the model"):
        load_reward_model(tmp_path)


def test_the_loss_of_a_score_model_and_its_gradient(place):
    """The fused call is the head's outputs under the objective, and gradients reach body and head."""
    model = load_reward_model(place)
    ids, cu = torch.arange(2, 18), torch.tensor([0, 4, 9, 12, 16], dtype=torch.int32)
    rows = last_rows(ids, cu, 0)
    batch = TokenBatch(ids[rows], cu_seqlens=torch.arange(5), margins=torch.tensor([0.3, -0.2]))
    out = model(ids, cu, rows=rows, objective=losses.get("bradley_terry"), batch=batch)
    want = loss_from_scores(losses.get("bradley_terry"), HeadStats(scores=model.scores(ids, cu)), batch)
    assert torch.equal(out.loss, want.loss) and out.stats.scores.shape == (4,)
    out.loss.backward()
    assert model.head.weight.grad.any() and model.body.embed_tokens.weight.grad.any()


def test_a_low_precision_body_still_gives_float32_scores(place):
    model = load_reward_model(place, dtype=torch.bfloat16)
    ids, cu = torch.arange(2, 10), torch.tensor([0, 8], dtype=torch.int32)
    assert model.scores(ids, cu).dtype == torch.float32
    wide = load_reward_model(place)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wide.scores(ids, cu).dtype == torch.float32


def test_a_mean_variance_head(place):
    model = load_reward_model(place, num_labels=2)
    ids, cu = torch.arange(2, 10), torch.tensor([0, 3, 8], dtype=torch.int32)
    batch = TokenBatch(torch.zeros(2).long(), cu_seqlens=torch.arange(3))
    out = model(ids, cu, rows=torch.tensor([2, 7]), objective=losses.get("mean_variance_pairs"), batch=batch)
    assert out.loss.isfinite() and out.stats.log_variance.shape == (2,)
    with pytest.raises(ValueError, match="2 outputs, this one 1"):
        load_reward_model(place)(
            ids, cu, rows=torch.tensor([2, 7]), objective=losses.get("mean_variance_pairs"), batch=batch
        )
    with pytest.raises(ValueError, match="reads 'log-probs'"):
        model(ids, cu, rows=torch.tensor([2, 7]), objective=losses.get("dpo"), batch=batch)


# -- policy and critic -------------------------------------------------------------------------------------------------
def test_actor_and_critic_are_one_loss(place, tmp_path):
    value_loss, policy_loss = losses.get("value_clip"), losses.get("ppo_clip")
    pair = ActorCritic(load_causal_lm(place), load_reward_model(place), value_loss, 0.3)
    ids, cu = torch.arange(2, 14), torch.tensor([0, 5, 12], dtype=torch.int32)
    rows = torch.tensor([2, 3, 7, 8, 9, 10])
    columns = {"returns": torch.randn(6), "old_values": torch.randn(6)}
    batch = TokenBatch(
        next_tokens(ids, cu)[rows],
        cu_seqlens=torch.tensor([0, 2, 6]),
        advantages=torch.randn(6),
        old_logprobs=-3 + torch.randn(6) / 4,
        per_token=columns,
    )
    out = pair(ids, cu, rows=rows, objective=policy_loss, batch=batch)
    policy = pair.actor(ids, cu, rows=rows, objective=policy_loss, batch=batch)
    values = pair.critic.values(ids, cu, rows)
    value = loss_from_scores(value_loss, HeadStats(values=values), batch)
    assert float(out.loss.detach()) == pytest.approx(float((policy.loss + 0.3 * value.loss).detach()), rel=1e-6)
    moved = (policy.stats.logprobs - batch.old_logprobs).square().mean() / 2
    assert float(out.metrics["policy/approxkl_avg"]) == pytest.approx(float(moved), rel=1e-5)
    assert float(out.metrics["loss/value_avg"]) == pytest.approx(float(value.loss.detach()), rel=1e-6)
    out.loss.backward()
    assert all(p.grad is not None for p in pair.parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    save_pretrained(pair, tokenizer, tmp_path)
    critic = load_reward_model(tmp_path / "value_model")
    assert torch.equal(critic.head.weight, pair.critic.head.weight)
    assert torch.equal(load_causal_lm(tmp_path).head.weight, pair.actor.head.weight)
    scores = pair(ids, cu, rows=rows, targets=batch.targets).logprobs  # without an objective: the actor alone
    assert torch.allclose(scores, policy.stats.logprobs, atol=1e-6)


def test_a_critic_with_two_outputs_is_refused(place):
    with pytest.raises(ValueError, match="2 outputs; a value is one number"):
        ActorCritic(load_causal_lm(place), load_reward_model(place, num_labels=2), losses.get("value_mse"), 0.1)


# -- judges ------------------------------------------------------------------------------------------------------------
def test_a_reward_model_is_a_reward_function(place, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    model = load_reward_model(place, tokenizer=tokenizer)
    torch.nn.init.normal_(model.head.weight)
    save_pretrained(model, tokenizer, tmp_path / "judge")
    judge = load_reward_function(tmp_path / "judge", max_tokens=20)
    prompts, completions = ["1+2=", "3+4=", "9+9=", "1="], ["3", "7<eos>", "18", "5" * 70]
    got = judge(prompts, completions)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").eval()
    for i in range(3):
        text = prompts[i] + completions[i].removesuffix("<eos>") + "<eos>"
        with torch.no_grad():
            want = plain(**tokenizer(text, return_tensors="pt")).logits[0, 0]
        assert got[i] == pytest.approx(float(want), abs=1e-5)
    assert got[3] is None  # longer than the model has positions for: not scored
    function = resolve(str(tmp_path / "judge"), lambda path: load_reward_function(path))
    assert function.name == "judge"
    assert function.call(**function.arguments({"prompts": ["1+2="], "completions": ["3"], "answer": ["3"]})) == [
        pytest.approx(got[0], abs=1e-6)
    ]
    with pytest.raises(RewardError, match="trainer opens reward models"):
        resolve(str(tmp_path / "judge"))


def test_a_conversation_is_scored_by_its_template(place):
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    from fastrl.models.judge import RewardModelFunction

    judge = RewardModelFunction(load_reward_model(place, tokenizer=tokenizer), tokenizer, "judge")
    prompt, answer = [{"role": "user", "content": "1+2="}], [{"role": "assistant", "content": "3"}]
    assert judge.encode(prompt, answer) == tokenizer("1+2=<eos>3<eos>")["input_ids"]
    assert judge([prompt], [answer]) == [pytest.approx(judge(["1+2=<eos>"], ["3"])[0], abs=1e-6)]

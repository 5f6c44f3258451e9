"""fastrl ppo, end to end on a tiny model: advantages by hand, exact resume, a reward model as the reward."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fastrl.models import load_causal_lm, load_reward_model, load_tokenizer, save_pretrained
from fastrl.rollout import Completion
from fastrl.train import ConfigError, GRPOConfig, run
from fastrl.train.config import PPOConfig
from fastrl.train.metrics import MetricsLogger
from fastrl.train.output_dir import Run
from fastrl.train.stages.ppo import sample_of
from fastrl.train.workbench import build

REWARDS = """
def closeness(prompts, completions, answer, **columns):
    return [sum(x == y for x, y in zip(c, a)) - 0.1 * len(c) for c, a in zip(completions, answer)]

def brevity(completions, completion_ids, **columns):
    return [None if "9" in c else -0.25 * len(ids) for c, ids in zip(completions, completion_ids)]
"""


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("fastrl.train.loop.plot_run", lambda path: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("ppo")
    (root / "rewards.py").write_text(REWARDS)
    made = {"model": tiny.make_model(root / "model"), "rewards": root / "rewards.py", **tiny.make_data(root / "data")}
    judge = load_reward_model(made["model"], tokenizer=load_tokenizer(made["model"]))
    torch.nn.init.normal_(judge.head.weight)
    save_pretrained(judge, load_tokenizer(made["model"]), root / "judge")
    return {**made, "judge": root / "judge"}


def config_of(place: dict, out: Path, **options) -> PPOConfig:
    shared = {
        "model_name_or_path": str(place["model"]),
        "dataset_name": str(place["grpo"]),
        "output_dir": str(out),
        "reward_funcs": [f"{place['rewards']}:closeness"],
        "max_completion_length": 5,
        "temperature": 1.0,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "num_ppo_epochs": 2,
    }
    return PPOConfig(**{**shared, **options})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def records(path: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in lines if key in r]


def by_hand(samples, totals, references, o) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """(advantages before whitening, returns, KL sums): token by token, from the formulas."""
    advantages, returns, kls = [], [], []
    for sample, total, reference in zip(samples, totals, references, strict=True):
        old, values = sample.fields["old_logprobs"], sample.fields["old_values"]
        if o["kl"] == "k1":
            kl = [a - b for a, b in zip(old, reference, strict=True)]
        else:
            kl = [math.exp(b - a) - 1 - (b - a) for a, b in zip(old, reference, strict=True)]
        rewards = [-o["coef"] * k for k in kl]
        rewards[-1] += total
        last, own = 0.0, []
        for t in reversed(range(len(old))):
            after = values[t + 1] if t + 1 < len(old) else 0.0
            last = rewards[t] + o["gamma"] * after - values[t] + o["gamma"] * o["lam"] * last
            own.append(last)
        advantages.append(own[::-1])
        returns.append([a + v for a, v in zip(own[::-1], values, strict=True)])
        kls.append(sum(kl))
    return advantages, returns, kls


@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_advantages_and_returns_are_those_of_the_formulas(kl, place, tmp_path):
    config = config_of(
        place, tmp_path, kl_estimator=kl, kl_coef=0.3, gamma=0.9, lam=0.8, missing_eos_penalty=0.7, num_ppo_epochs=1
    )
    stage = build(config, Run(tmp_path, None, [])).stage
    with torch.no_grad():  # a policy that has left its reference
        for p in stage.setting.model.actor.parameters():
            p.add_(0.05 * torch.randn_like(p))
    kept = {}
    give = stage.give_advantages

    def watched(samples, total, log):
        kept["samples"], kept["total"] = samples, total.tolist()
        kept["ref"] = [list(s.fields["ref_logprobs"]) for s in samples]
        give(samples, total, log)

    stage.give_advantages = watched
    with MetricsLogger(config, 1) as log:
        stage.collect(log)
        seen = log.interval.results()
    samples = kept["samples"]
    o = {"kl": kl, "coef": 0.3, "gamma": 0.9, "lam": 0.8}
    advantages, returns, kls = by_hand(samples, kept["total"], kept["ref"], o)
    flat = torch.tensor([a for own in advantages for a in own], dtype=torch.float64)
    whitened = ((flat - flat.mean()) / (flat.var() + 1e-8).sqrt()).tolist()
    assert [a for s in samples for a in s.fields["advantages"]] == pytest.approx(whitened, abs=1e-4)
    assert [x for s in samples for x in s.fields["returns"]] == pytest.approx(
        [x for own in returns for x in own], abs=1e-5
    )
    assert seen["objective/kl"] == pytest.approx(sum(kls) / 8, rel=1e-5) and seen["objective/kl"] != 0
    assert seen["objective/non_score_reward"] == pytest.approx(-0.3 * sum(kls) / 8, rel=1e-5)
    assert seen["objective/scores"] == pytest.approx(sum(kept["total"]) / 8, rel=1e-5)
    assert seen["objective/scores"] < seen["reward"]  # some were cut, and paid for it


def test_a_cut_completion_can_go_on_at_the_critics_value(place, tmp_path):
    config = config_of(place, tmp_path, bootstrap_truncated=True, kl_coef=0.0, whiten_advantages=False)
    stage = build(config, Run(tmp_path, None, [])).stage
    prompt = stage.prompts[0]
    samples = [sample_of(prompt, Completion([5, 6], cut), 1.0) for cut in (True, False)]
    with MetricsLogger(config, 1) as log:
        stage.give_statistics(samples, log)
        after = [s.fields["value_after"] for s in samples]
        ids = torch.tensor([*prompt.ids, 5, 6])
        with torch.no_grad():
            critic = stage.setting.model.critic
            want = critic.values(ids, torch.tensor([0, len(ids)]))
        assert after == pytest.approx([float(want[-1])] * 2, abs=1e-5)
        assert samples[0].fields["old_values"] == pytest.approx(want[-3:-1].tolist(), abs=1e-5)
        stage.give_advantages(samples, torch.ones(2), log)
    gained = samples[0].fields["advantages"][-1] - samples[1].fields["advantages"][-1]
    assert gained == pytest.approx(after[0], abs=1e-5)


def test_what_no_function_scores_is_not_trained(place, tmp_path):
    config = config_of(place, tmp_path, reward_funcs=[f"{place['rewards']}:brevity"], kl_coef=0.0)
    stage = build(config, Run(tmp_path, None, [])).stage
    prompt = stage.prompts[0]
    nine = load_tokenizer(place["model"])("9")["input_ids"]
    made = [Completion(nine, True), Completion([5, 1], False)]
    with MetricsLogger(config, 1) as log:
        _, total = stage.score([prompt] * 2, made, log)
        samples = [sample_of(prompt, c, r) for c, r in zip(made, total.tolist(), strict=True)]
        stage.give_statistics(samples, log)
        stage.give_advantages(samples, total, log)
    assert [s.num_trained for s in samples] == [0, 2]
    assert samples[0].fields["returns"] == [] and all(map(math.isfinite, samples[1].fields["advantages"]))


def test_it_raises_the_reward(place, tmp_path):
    options = {"max_steps": 40, "learning_rate": 4e-3, "per_device_train_batch_size": 32, "cliprange_value": None}
    out = run(config_of(place, tmp_path, **options)).output_dir
    rewards = records(out, "reward")
    assert len(rewards) == 20 and sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.15
    assert records(out, "val/error")[-1] < records(out, "val/error")[0]  # the critic has learnt what to expect
    assert records(out, "ratio")[0] == 1.0 and records(out, "policy/clipfrac_avg")[0] == 0.0
    assert records(out, "objective/kl")[0] == 0.0


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(stop, place, tmp_path):
    """Stop 1 falls between two updates on one rollout: samples, values and advantages must come back too."""
    options = {"save_steps": stop, "logging_steps": 2, "num_mini_batches": 2, "per_device_train_batch_size": 4}
    whole = run(config_of(place, tmp_path / "whole", **options)).output_dir
    start = str(whole / f"checkpoint-{stop}")
    again = run(config_of(place, tmp_path / "again", resume_from_checkpoint=start, **options)).output_dir
    for part in (".", "value_model"):
        assert same(weights(whole / part), weights(again / part))
        assert not same(weights(whole / part), weights(whole / f"checkpoint-{stop}" / part))
    assert records(whole, "loss")[-1] == records(again, "loss")[-1]


def test_the_token_budget_changes_nothing(place, tmp_path):
    large, small = (
        run(config_of(place, tmp_path / str(n), max_tokens_per_device=n, max_steps=2)).output_dir for n in (4096, 20)
    )
    for key in ("loss", "loss/value_avg", "grad_norm", "objective/kl", "policy/approxkl_avg"):
        assert records(large, key) == pytest.approx(records(small, key), rel=1e-4, abs=1e-6), key


def test_a_reward_model_judges_ppo_and_is_where_its_critic_starts(place, tmp_path):
    config = config_of(place, tmp_path / "out", reward_funcs=[], reward_model_path=str(place["judge"]), max_steps=1)
    critic = build(config, Run(tmp_path, None, [])).model.critic
    assert torch.equal(critic.head.weight, load_reward_model(place["judge"]).head.weight)
    out = run(config).output_dir
    assert records(out, "rewards/judge/mean") == records(out, "reward")
    assert load_reward_model(out / "value_model").head.out_features == 1
    asked = config_of(place, tmp_path / "next", model_name_or_path=str(out), value_model_path=str(place["judge"]))
    assert torch.equal(build(asked, Run(tmp_path, None, [])).model.critic.head.weight, critic.head.weight)
    config = config_of(place, tmp_path / "own", model_name_or_path=str(out))
    saved = load_reward_model(out / "value_model").head.weight
    assert torch.equal(build(config, Run(tmp_path, None, [])).model.critic.head.weight, saved)
    assert not torch.equal(saved, load_reward_model(place["judge"]).head.weight)
    assert load_causal_lm(out).head.weight.shape == load_causal_lm(place["model"]).head.weight.shape


def test_a_reward_model_judges_grpo(place, tmp_path):
    config = GRPOConfig(
        model_name_or_path=str(place["model"]),
        dataset_name=str(place["grpo"]),
        output_dir=str(tmp_path),
        reward_funcs=[str(place["judge"]), f"{place['rewards']}:closeness"],
        num_generations=4,
        max_completion_length=5,
        max_steps=1,
    )
    out = run(config).output_dir
    both = records(out, "rewards/judge/mean")[0] + records(out, "rewards/closeness/mean")[0]
    assert records(out, "reward")[0] == pytest.approx(both, rel=1e-6)


def test_settings_that_cannot_be(place, tmp_path):
    with pytest.raises(ConfigError, match="ppo needs a reward"):
        config_of(place, tmp_path, reward_funcs=[])
    with pytest.raises(ConfigError, match="2 numbers for 1 rewards"):
        config_of(place, tmp_path, reward_weights=[1.0, 2.0])


def test_evaluation_draws_the_same_every_time(place, tmp_path):
    config = config_of(place, tmp_path, learning_rate=0.0, eval_strategy="steps", eval_steps=1, max_steps=2)
    out = run(config).output_dir
    a, b = records(out, "eval_reward")
    assert a == b and same(weights(out), weights(place["model"]))

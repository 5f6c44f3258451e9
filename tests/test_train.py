"""The trainer end to end on a tiny model: stages, exact resume, invariance to the token budget, step-0 identities."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fastrl.rollout import Completion
from fastrl.train import DPOConfig, GRPOConfig, SFTConfig, loop, run
from fastrl.train.checkpoint import CheckpointError
from fastrl.train.metrics import MetricsLogger
from fastrl.train.output_dir import Run
from fastrl.train.step import loss_of, plan
from fastrl.train.workbench import build

REWARDS = '''
def closeness(prompts, completions, answer, **columns):
    """Spread enough that groups differ from the first step on."""
    return [sum(x == y for x, y in zip(c, a)) - 0.1 * len(c) for c, a in zip(completions, answer)]
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    (root / "rewards.py").write_text(REWARDS)
    return {"model": tiny.make_model(root / "model"), "rewards": root / "rewards.py", **tiny.make_data(root / "data")}


def config_of(stage: str, place: dict, out: Path, **options):
    shared = {
        "model_name_or_path": str(place["model"]),
        "dataset_name": str(place[stage]),
        "output_dir": str(out),
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
    }
    if stage == "grpo":
        shared |= {"reward_funcs": [f"{place['rewards']}:closeness"], "num_generations": 4, "max_completion_length": 5}
    cls = {"sft": SFTConfig, "dpo": DPOConfig, "grpo": GRPOConfig}[stage]
    return cls(**{**shared, **options})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def records(path: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in lines if key in r]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


STAGES = {
    "sft": {},
    "dpo": {},
    "grpo": {"beta": 0.05, "entropy_coef": 0.01, "steps_per_generation": 2, "num_iterations": 2},
}


@pytest.mark.parametrize("stage", STAGES)
def test_same_seed_gives_the_same_weights(stage, place, tmp_path):
    a, b = (run(config_of(stage, place, tmp_path / n, **STAGES[stage])).output_dir for n in "ab")
    assert same(weights(a), weights(b))
    c = run(config_of(stage, place, tmp_path / "c", seed=7, **STAGES[stage])).output_dir
    assert not same(weights(a), weights(c))
    assert not same(weights(a), weights(place["model"]))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(stage, stop, place, tmp_path):
    """Stop 1 falls between two updates on one GRPO batch: samples, old log-probs and advantages must come back too."""
    options = {"max_steps": 6, "save_steps": stop, "logging_steps": 2, **STAGES[stage]}
    whole = run(config_of(stage, place, tmp_path / "whole", **options)).output_dir
    resumed = config_of(
        stage, place, tmp_path / "again", resume_from_checkpoint=str(whole / f"checkpoint-{stop}"), **options
    )
    again = run(resumed).output_dir
    assert same(weights(whole), weights(again))
    assert records(whole, "loss")[-1] == records(again, "loss")[-1]


@pytest.mark.parametrize("stage", STAGES)
def test_the_token_budget_changes_memory_and_never_the_result(stage, place, tmp_path):
    options = {"max_steps": 2, **STAGES[stage]}
    if stage == "grpo":  # the same completions in both runs: one rollout, all updates on it
        options |= {"steps_per_generation": 1, "num_iterations": 2}
    large, small = (
        run(config_of(stage, place, tmp_path / str(n), max_tokens_per_device=n, **options)).output_dir
        for n in (4096, 20)
    )
    assert records(large, "loss") == pytest.approx(records(small, "loss"), rel=1e-5, abs=1e-6)
    assert records(large, "grad_norm") == pytest.approx(records(small, "grad_norm"), rel=1e-4)


def test_gradient_accumulation_is_one_batch_normalised_together(place, tmp_path):
    one = run(config_of("sft", place, tmp_path / "one", per_device_train_batch_size=8)).output_dir
    four = run(
        config_of("sft", place, tmp_path / "four", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    ).output_dir
    assert same(weights(one), weights(four))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_the_first_update_after_a_rollout_has_ratio_one_and_no_kl(temperature, place, tmp_path):
    out = run(
        config_of(
            "grpo",
            place,
            tmp_path,
            max_steps=1,
            beta=0.1,
            temperature=temperature,
            steps_per_generation=2,
            max_tokens_per_device=30,
        )
    ).output_dir
    assert records(out, "ratio") == [1.0]
    assert records(out, "kl") == [0.0]
    assert records(out, "clip_ratio/region_mean") == [0.0]


def test_learning_rate_zero_changes_nothing(place, tmp_path):
    out = run(config_of("grpo", place, tmp_path, learning_rate=0.0, beta=0.1, num_iterations=2)).output_dir
    assert same(weights(out), weights(place["model"]))
    assert records(out, "ratio") == [1.0] * 4 and records(out, "kl") == [0.0] * 4


def test_evaluation_and_files(place, tmp_path):
    result = run(config_of("sft", place, tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, max_steps=4))
    assert len(records(result.output_dir, "eval_loss")) == 2
    names = {p.name for p in result.output_dir.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "plots", "checkpoint-2"} <= names
    assert list((result.output_dir / "plots").glob("*.png"))
    assert same(weights(result.output_dir / "checkpoint-4"), weights(result.output_dir))


def test_the_saved_model_loads_with_transformers_and_agrees(place, tmp_path):
    from transformers import AutoModelForCausalLM

    import fastrl
    from fastrl.models import load_causal_lm

    out = run(config_of("sft", place, tmp_path)).output_dir
    ids = torch.randint(2, 19, (17,))
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        want = torch.log_softmax(plain(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None]).squeeze(1)
        ours = load_causal_lm(str(out), dtype=torch.float32).eval()
        hidden = ours.hidden(ids, torch.tensor([0, 17], dtype=torch.int32))
        got = ours.head(hidden[:-1], targets=ids[1:]).logprobs
        bare = fastrl.linear_logprobs(hidden[:-1], plain.lm_head.weight, ids[1:]).logprobs
    assert torch.allclose(got, want, atol=1e-5) and torch.allclose(bare, want, atol=1e-5)


def test_sft_learns(place, tmp_path):
    out = run(config_of("sft", place, tmp_path, max_steps=30, learning_rate=5e-3)).output_dir
    losses = records(out, "loss")
    assert losses[-1] < 0.7 * losses[0]


def test_dpo_starts_at_log_two_and_learns(place, tmp_path):
    out = run(config_of("dpo", place, tmp_path, max_steps=10)).output_dir
    assert records(out, "loss")[0] == pytest.approx(0.6931472, abs=1e-6)
    assert records(out, "rewards/margins")[-1] > 0 and records(out, "rewards/accuracies")[-1] > 0.9


def test_grpo_raises_the_reward(place, tmp_path):
    options = {"max_steps": 30, "learning_rate": 5e-3, "per_device_train_batch_size": 32}
    out = run(config_of("grpo", place, tmp_path, **options)).output_dir
    rewards = records(out, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_truncated_completions_can_be_masked(place, tmp_path):
    """Only completions that ended by themselves keep trained tokens; a step without any has loss 0, not 0/0."""
    config = config_of("grpo", place, tmp_path, mask_truncated_completions=True, max_steps=1)
    stage = build(config, Run(tmp_path, None, [])).stage
    with MetricsLogger(config, 1) as log:
        samples, _ = stage.score(stage.prompts[:1], [[Completion([5, 6], True), Completion([5, 1], False)]], log)
    assert [s.num_trained for s in samples] == [0, 2]
    for sample in samples:
        sample.fields["advantage"] = 1.0
    [micro] = plan(samples[:1], 100, torch.device("cpu"))
    out = loss_of(stage.setting.model, stage.objective, micro, stage.how)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in stage.setting.model.parameters())


@pytest.mark.parametrize("stopped", [False, True])
def test_a_disk_that_refuses_stops_a_run_only_when_nothing_comes_after(stopped, place, tmp_path, monkeypatch):
    """Mid-run the failed save is reported and training goes on; after a signal it must not be called resumable."""

    def refuse(*args, **kwargs):
        raise CheckpointError("could not save: no space left on device")

    monkeypatch.setattr(loop, "save_checkpoint", refuse)
    config = config_of("sft", place, tmp_path, max_steps=2, save_steps=1)
    run_ = Run(tmp_path, None, [])
    if stopped:
        with pytest.raises(CheckpointError, match="no space"):
            loop.fit(build(config, run_), config, run_, SimpleNamespace(requested=True))
    else:
        assert loop.fit(build(config, run_), config, run_, SimpleNamespace(requested=False)).steps == 2
        assert (tmp_path / "model.safetensors").exists()

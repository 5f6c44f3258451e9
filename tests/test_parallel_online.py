"""Stages that sample, on 1, 2 and 4 processes: the same completions, rewards, losses and gradient norms.

What is drawn depends on the seed, the prompt and the completion's number alone, so the runs can be compared at all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks

from fastrl.models import load_causal_lm, load_tokenizer
from fastrl.rollout import Sampling, TransformersSampler, draws, seed_of
from fastrl.train import config as configs
from fastrl.train import loop, run

# A large epsilon: where a gradient is rounding alone, Adam's update would be noise of full size.
SHARED = {"max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "adam_epsilon": 1e-3}
GROUPS = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 8}
CASES = {  # name -> (stage, options)
    "grpo": ("grpo", {**GROUPS, "beta": 0.05, "steps_per_generation": 2, "gradient_accumulation_steps": 1}),
    "grpo_sampler": (
        "grpo",
        {
            **GROUPS,
            "importance_sampling_mode": "token_truncate",
            "temperature": 1.3,
            "num_iterations": 2,
            "use_adaptive_entropy": True,
            "entropy_coef": 0.01,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "num_generations_eval": 2,
            "model": "untied",
        },
    ),
    "remax": ("grpo", {**GROUPS, "advantage_estimator": "remax", "max_tokens_per_device": 30}),
    "rloo": ("rloo", {**GROUPS, "per_device_train_batch_size": 12, "beta": 0.1}),
    "ppo": (
        "ppo",
        {"per_device_train_batch_size": 5, "max_completion_length": 6, "num_ppo_epochs": 2, "missing_eos_penalty": 0.5},
    ),
    "distill_student": ("distill", {"per_device_train_batch_size": 5, "lmbda": 1.0, "loss_type": "opd"}),
    "distill_teacher": ("distill", {"per_device_train_batch_size": 3, "lmbda": 0.5, "seq_kd": True}),
}
MESHES = {  # ranks -> how their weights are split, for each case in turn
    2: ({}, {"sharding": "none"}),
    4: ({}, {"sharding": "hybrid", "shard_size": 2}, {"reshard_after_forward": False}),
}
REWARDS = '''
import os

def closeness(prompts, completions, answer, **columns):
    """Says what it was asked, so that a test can count."""
    with open(os.environ["REWARD_LOG"], "a") as log:
        log.write("".join(f"{p}{c}\\n" for p, c in zip(prompts, completions)))
    return [sum(x == y for x, y in zip(c, a)) - 0.1 * len(c) for c, a in zip(completions, answer)]

def brevity(completions, **columns):
    return [None if "9" in c else -0.25 * len(c) for c in completions]

def choosy(prompts, completions, **columns):
    if os.environ["RANK"] == "1":
        raise KeyError("not this one")
    return [0.0] * len(completions)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("online")
    tiny.make_model(root / "model")
    tiny.make_model(root / "untied", tie_word_embeddings=False)
    tiny.make_model(root / "teacher", seed=3)
    (root / "rewards.py").write_text(REWARDS)
    for split, count, seed in (("train", 40, 1), ("test", 6, 2)):
        tiny.write(root / "data" / f"{split}.jsonl", tiny.sums(count, seed), ("prompt", "completion", "answer"))
    return root


def config_of(name: str, root: Path, out: Path, **more):
    stage, options = CASES[name]
    options = dict(options)
    paths = {"model_name_or_path": str(root / options.pop("model", "model")), "output_dir": str(out)}
    if stage == "distill":
        paths["teacher_model_name_or_path"], paths["max_new_tokens"] = str(root / "teacher"), 6
    else:
        paths["reward_funcs"] = [f"{root / 'rewards.py'}:{f}" for f in ("closeness", "brevity")]
    return configs.CONFIGS[stage](dataset_name=str(root / "data"), **{**SHARED, **options, **paths, **more})


def run_all(root: Path, out: Path, ranks: int) -> None:
    loop.plot_run = lambda path: None
    meshes = MESHES[ranks] if ranks > 1 else ({},)
    for i, name in enumerate(CASES):
        os.environ["REWARD_LOG"] = str(out / f"{name}.asked")
        out.mkdir(exist_ok=True)
        run(config_of(name, root, out / name, **meshes[i % len(meshes)]))
    if ranks == 2:
        fails_on_one(root, out)
        draws_by_rank(root, out)


def fails_on_one(root: Path, out: Path) -> None:
    """A reward function that raises on rank 1 alone: each rank writes down what it raised."""
    config = config_of("grpo", root, out / "choosy", reward_funcs=[f"{root / 'rewards.py'}:choosy"])
    try:
        run(config)
    except Exception as error:
        (out / f"raised-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")


def draws_by_rank(root: Path, out: Path) -> None:
    """A planted mistake: every rank numbers its prompts from 0."""
    own = TransformersSampler.generate
    TransformersSampler.generate = lambda self, prompts, sampling, n=1, seed=None, first=0: own(
        self, prompts, sampling, n, seed
    )
    os.environ["REWARD_LOG"] = str(out / "planted.asked")
    run(config_of("grpo", root, out / "planted"))
    TransformersSampler.generate = own


@pytest.fixture(scope="module")
def runs(place) -> dict[int, Path]:
    """The folder of the runs of every case on 1, 2 and 4 processes."""
    made = {n: place / f"on-{n}" for n in (1, 2, 4)}
    plot = loop.plot_run
    run_all(place, made[1], 1)
    loop.plot_run = plot
    for n in (2, 4):
        run_ranks(n, run_all, place, made[n], n)
    return made


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# And how many tokens have a clipped value loss above the plain one: rounding decides where none is clipped.
TIMES = ("timing_s/", "perf/", "step_time", "val/clipfrac_avg")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_same_on_any_number_of_processes(name, ranks, runs):
    alone, together = (records(runs[n] / name) for n in (1, ranks))
    assert len(alone) == len(together) >= 3
    for one, many in zip(alone, together, strict=True):
        assert one.keys() == many.keys()
        for key in one:
            if not key.startswith(TIMES):
                assert many[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", [n for n, (stage, _) in CASES.items() if stage != "distill"])
def test_every_completion_is_scored_once(name, ranks, runs):
    alone, together = ((runs[n] / f"{name}.asked").read_text().splitlines() for n in (1, ranks))
    assert sorted(alone) == sorted(together) and len(set(alone)) > 8


def test_the_runs_compared_have_moved(runs):
    """Else equality would say nothing: neither of training, nor of the draws."""
    for name in CASES:
        numbers = [r["loss"] for r in records(runs[4] / name) if "loss" in r]
        assert len(set(numbers)) == len(numbers) == 3, name
        assert all(r["grad_norm"] > 0 for r in records(runs[4] / name) if "grad_norm" in r), name


def test_draws_that_depend_on_the_rank_would_show(runs):
    alone, planted = records(runs[1] / "grpo"), records(runs[2] / "planted")
    assert planted[0]["reward"] != pytest.approx(alone[0]["reward"], rel=1e-3)


def test_a_reward_that_fails_on_one_rank_fails_on_all(runs):
    told = [(runs[2] / f"raised-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and told[0].startswith("RewardError: ") and "not this one" in told[0]


# -- what a draw depends on --------------------------------------------------------------------------------------------
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 3, 4], [5, 5], [12, 9]]


@pytest.fixture(scope="module")
def sampler(place) -> TransformersSampler:
    return TransformersSampler(load_causal_lm(place / "untied").model, load_tokenizer(place / "untied"))


def ids(made) -> list[list[list[int]]]:
    return [[c.ids for c in group] for group in made]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_depend_on_no_batch(sampler, temperature):
    ask = (Sampling(12, temperature), 3, 7)
    whole = ids(sampler.generate(PROMPTS, *ask))
    assert len({tuple(c) for group in whole for c in group}) > 12, "completions that are all alike prove nothing"
    one_by_one = [ids(sampler.generate([p], *ask, first=i))[0] for i, p in enumerate(PROMPTS)]
    assert one_by_one == whole
    assert ids(sampler.generate(PROMPTS[2:], *ask, first=2)) == whole[2:]
    fewer = sampler.generate(PROMPTS, Sampling(12, temperature), [3, 1, 0, 2, 3], 7)
    assert ids(fewer) == [group[:n] for group, n in zip(whole, [3, 1, 0, 2, 3], strict=True)]
    assert ids(sampler.generate(PROMPTS[2:], *ask)) != whole[2:]


def test_long_completions_take_their_noise_in_blocks(sampler, monkeypatch):
    """Blocks of another length are another stream, but each is whole: nothing repeats from block to block."""
    monkeypatch.setattr(draws, "BLOCK", 3 * sampler.model.config.vocab_size)
    noise = draws.Noise([seed_of(1), seed_of(2)], max_new_tokens=8)
    zeros = torch.zeros(2, sampler.model.config.vocab_size)
    seen = torch.stack([noise(None, zeros) for _ in range(8)])
    assert len(seen.unique()) == seen.numel()
    alone = draws.Noise([seed_of(2)], max_new_tokens=8)
    assert torch.equal(torch.stack([alone(None, zeros[:1]) for _ in range(8)])[:, 0], seen[:, 1])


def test_noise_is_gumbel(monkeypatch):
    """Mean and variance of -log(-log u): Euler's constant and pi^2 / 6, within five standard errors."""
    noise = draws.Noise([seed_of("gumbel")], max_new_tokens=1)
    x = noise(None, torch.zeros(1, 200_000))[0].double()
    assert abs(float(x.mean()) - 0.5772157) < 5 * 1.2825 / 200_000**0.5
    assert abs(float(x.var()) - 1.644934) < 0.05


def test_logits_that_are_not_numbers_are_noticed(place):
    model = load_causal_lm(place / "untied").model
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 0] = torch.nan
    broken = TransformersSampler(model, load_tokenizer(place / "untied"))
    with pytest.raises(RuntimeError, match="not numbers"):
        broken.generate(PROMPTS, Sampling(3), seed=0)

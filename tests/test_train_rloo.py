"""fastrl rloo, and fastrl grpo with every loss it serves, end to end on a tiny model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fastrl import losses
from fastrl.ops.fused import loss_from_logprobs
from fastrl.rewards.score import Scores
from fastrl.rollout import Completion
from fastrl.tokens import TokenBatch, TokenStats
from fastrl.train import ConfigError, GRPOConfig, run
from fastrl.train.config import RLOOConfig
from fastrl.train.configs.grpo import CLIPPED, KINDS, OTHERS, RANGED
from fastrl.train.configs.online import MODES
from fastrl.train.output_dir import Run
from fastrl.train.stages.grpo import READ_REWARDS, GRPOStage, objective_of
from fastrl.train.stages.grpo_metrics import known_values, reward_metrics
from fastrl.train.stages.grpo_objective import with_entropy
from fastrl.train.step import loss_of, prepare
from fastrl.train.workbench import build

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
REWARDS = '''
def closeness(prompts, completions, answer, **columns):
    """Spread enough that groups differ from the first step on."""
    return [sum(x == y for x, y in zip(c, a)) - 0.1 * len(c) for c, a in zip(completions, answer)]


def shortness(prompts, completions, **columns):
    return [-float(len(c)) for c in completions]
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("rloo")
    (root / "rewards.py").write_text(REWARDS)
    return {"model": tiny.make_model(root / "model"), "rewards": root / "rewards.py", **tiny.make_data(root / "data")}


def config_of(cls, place: dict, out: Path, reward: str = "closeness", **options):
    shared = {
        "model_name_or_path": str(place["model"]), "dataset_name": str(place["grpo"]), "output_dir": str(out),
        "max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "per_device_train_batch_size": 8,
        "num_generations": 4, "max_completion_length": 5, "reward_funcs": [f"{place['rewards']}:{reward}"],
    }  # fmt: skip
    return cls(**{**shared, **options})


def records(path: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in lines if key in r]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Quiet:
    """A log that nobody reads."""

    def timing(self, name):
        return contextlib.nullcontext()

    def add_mean(self, values):
        pass

    add_max = add_mean


def stage_of(config) -> tuple:
    bench = build(config, Run(Path(config.output_dir), None, []))
    return bench, bench.stage


# -- rloo --------------------------------------------------------------------------------------------------------------
def test_defaults_agree_with_trl():
    config = RLOOConfig(model_name_or_path="m", dataset_name="d", output_dir="o", reward_funcs=["exact"])
    assert (config.num_generations, config.beta, config.epsilon, config.epsilon_high) == (2, 0.05, 0.2, None)
    assert (config.learning_rate, config.normalize_advantages, config.reward_clip_range) == (1e-6, False, None)
    assert (config.num_iterations, config.max_completion_length, config.temperature) == (1, 512, 1.0)
    with pytest.raises(ConfigError, match="reward_clip_range"):
        dataclasses.replace(config, reward_clip_range=[1.0])


def test_a_resumed_run_ends_where_the_whole_one_does_and_no_budget_shows(place, tmp_path):
    options = {"max_steps": 3, "steps_per_generation": 2, "num_iterations": 2, "save_steps": 1.0, "entropy_coef": 0.01}
    whole = run(config_of(RLOOConfig, place, tmp_path / "whole", **options)).output_dir
    again = run(
        config_of(RLOOConfig, place, tmp_path / "again", resume_from_checkpoint=str(whole / "checkpoint-1"), **options)
    ).output_dir
    assert same(weights(whole), weights(again)) and not same(weights(whole), weights(place["model"]))
    small = run(config_of(RLOOConfig, place, tmp_path / "small", max_tokens_per_device=20, **options)).output_dir
    assert records(whole, "loss") == pytest.approx(records(small, "loss"), rel=1e-4, abs=1e-6)
    assert records(whole, "kl")[0] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("cls", "options"), [(RLOOConfig, {"beta": 0.01}), (GRPOConfig, {"loss_type": "gspo"})])
def test_the_reward_rises(cls, options, place, tmp_path):
    options |= {"max_steps": 12, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "num_generations": 8}
    out = run(config_of(cls, place, tmp_path, "shortness", max_completion_length=8, **options)).output_dir
    rewards = records(out, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.5, rewards


def test_rloo_advantages_are_those_of_the_definition(place, tmp_path):
    """Clipped rewards less beta KL, each against the mean of its siblings; TRL's order of operations."""
    options = {"beta": 0.3, "reward_clip_range": [-0.3, 0.4], "num_iterations": 2}
    bench, stage = stage_of(config_of(RLOOConfig, place, tmp_path, **options))
    with torch.no_grad():
        for p in stage.setting.reference.parameters():  # as if training had moved away from it
            p.mul_(0.9)
    seen = {}
    own = stage.scorer.score
    stage.scorer.score = lambda *a: seen.setdefault("scores", own(*a))
    kept = {}
    give = stage.give_logprobs

    def noted(samples, log):
        give(samples, log)
        kept["kl"] = [sum(s.fields["old_logprobs"]) - sum(s.fields["ref_logprobs"]) for s in samples]

    stage.give_logprobs = noted
    stage.collect(Quiet())
    rewards = [min(max(r, -0.3), 0.4) - 0.3 * k for r, k in zip(seen["scores"].total.tolist(), kept["kl"], strict=True)]
    samples = stage.pending[0]
    for i, sample in enumerate(samples):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        want = rewards[i] - (sum(group) - rewards[i]) / 3
        assert sample.fields["advantage"] == pytest.approx(want, rel=1e-5, abs=1e-6)
        assert "ref_logprobs" not in sample.fields
    assert max(abs(k) for k in kept["kl"]) > 0.01


# -- grpo with every loss ----------------------------------------------------------------------------------------------
def test_the_flags_name_every_loss_and_kind():
    assert set(CLIPPED) | set(RANGED) | set(OTHERS) == set(losses.POLICY) - {"luffy"}
    assert KINDS == losses.kl.KINDS
    assert set(MODES[1:]) < set(losses.corrections.CORRECTIONS)
    for name in losses.POLICY:
        own = {f.name for f in dataclasses.fields(losses.POLICY[name])}
        assert ({"clip_low", "clip_high", "dual_clip"} <= own) == (name in (*CLIPPED, "luffy")), name
        assert not (name in RANGED and not {"clip_low", "clip_high"} <= own), name


@pytest.mark.parametrize("name", [*CLIPPED, *RANGED, *OTHERS])
def test_every_loss_trains_and_no_budget_shows(name, place, tmp_path):
    options = {"loss_type": name, "num_iterations": 2, "beta": 0.05, "top_entropy_quantile": 0.8, "max_steps": 2}
    if name == "clip_cov":
        options["loss_options"] = ["fraction=0.2", "cov_low=0"]
    _, stage = stage_of(config_of(GRPOConfig, place, tmp_path, **options))
    log = Quiet()
    stage.collect(log)
    samples = stage.pending[0]
    totals = []
    for budget in (4096, 20):
        stage.config.max_tokens_per_device = budget
        stage.pending = [samples]
        model = stage.setting.model
        model.zero_grad()
        total = 0.0
        for micro in prepare(model, stage.objective, stage.collect(log), stage.how):
            out = loss_of(model, stage.objective, micro, stage.how)
            out.loss.backward()
            total += float(out.loss.detach())
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert grads.isfinite().all() and grads.any()
        totals.append((total, grads.clone()))
    (a, da), (b, db) = totals
    assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert (da - db).norm() < 1e-3 * da.norm()


def numbers_of(place, tmp_path, **options):
    return objective_of(config_of(GRPOConfig, place, tmp_path, **options))


def test_flags_become_the_objectives_numbers(place, tmp_path):
    def made(**options):
        return numbers_of(place, tmp_path, **options)

    assert made() == losses.get("dapo", clip_high=0.2)
    assert made(loss_type="grpo", importance_sampling_level="sequence") == losses.get("gspo")
    assert made(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.01, epsilon_high=0.02) == losses.get(
        "gspo", clip_low=0.01, clip_high=0.02
    )
    assert made(loss_type="grpo", importance_sampling_level="sequence_token") == losses.get("gspo_token")
    assert made(loss_type="cispo", epsilon_high=3.0) == losses.get("cispo", ratio_max=3.0)
    assert made(loss_type="sapo", sapo_temperature_neg=2.0) == losses.get("sapo", temperature_neg=2.0)
    assert made(loss_type="vespo", vespo_k_neg=1.0) == losses.get("vespo", k_neg=1.0)
    assert made(loss_type="dr_grpo") == losses.get("dr_grpo", max_length=5)
    assert made(loss_type="ppo_two_sided", delta=3.0) == losses.get("ppo_two_sided", delta=3.0)
    assert made(loss_type="vapo") == losses.get("vapo")
    assert made(loss_type="vapo", epsilon=0.1) == losses.get("vapo", clip_low=0.1, clip_high=0.1)
    assert made(beta=0.1).kl == made(beta=0.1, use_bias_correction_kl=True).kl == "is_k3"
    assert made(beta=0.1, use_bias_correction_kl=False).kl == "k3"
    assert made(top_entropy_quantile=0.2).top_entropy == 0.2
    opmd = made(loss_type="opmd", loss_options=["tau=0.5", "form=linear"])
    assert opmd == losses.get("opmd", tau=0.5, form="linear")
    opsm = losses.corrections.OPSM(0.5)
    assert made(off_policy_mask_threshold=0.5).corrections == (opsm,)
    tis = made(importance_sampling_mode="sequence_mask", importance_sampling_clip_min=0.5).corrections
    assert tis == (losses.corrections.SequenceMask(0.5, 3.0),)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "sapo", "epsilon": 0.1}, ("--epsilon", "sapo")),
        ({"loss_type": "gspo", "delta": 3.0}, ("--delta", "gspo")),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, ("sequence", "dapo", "grpo")),
        ({"use_bias_correction_kl": True, "kl_estimator": "k2"}, ("use_bias_correction_kl", "k2")),
        ({"loss_options": ["tau"]}, ("tau", "name=value")),
        ({"loss_type": "prime_ipo", "loss_options": ["delta_low=0.3"]}, ("delta_low", "threshold")),
        ({"loss_type": "a2po", "advantage_estimator": "rloo"}, ("advantage_estimator", "a2po")),
        ({"loss_type": "a2po", "scale_rewards": "none"}, ("scale_rewards", "a2po")),
        ({"entropy_target": 0.5}, ("entropy_target", "use_adaptive_entropy")),
        ({"entropy_coef_max": 0.5}, ("entropy_coef_max", "use_adaptive_entropy")),
        ({"sapo_temperature_pos": 2.0}, ("sapo_temperature_pos", "dapo")),
        ({"loss_type": "sapo", "vespo_k_pos": 1.0}, ("vespo_k_pos", "sapo")),
        ({"loss_type": "opmd", "loss_options": ["tua=1"]}, ("opmd", "tua", "tau")),
    ],
)
def test_what_does_not_fit_is_refused(options, words, place, tmp_path):
    with pytest.raises(ConfigError) as error:
        numbers_of(place, tmp_path, **options)
    assert all(w in str(error.value) for w in words)


def test_the_entropy_bonus_is_a_mean_over_tokens_of_every_loss(place, tmp_path):
    plain, with_bonus = (numbers_of(place, tmp_path, loss_type="grpo", entropy_coef=c) for c in (0.0, 0.5))
    cu, entropy = torch.tensor([0, 1, 4]), torch.tensor([1.0, 2.0, 3.0, 6.0])
    batch = TokenBatch(torch.zeros(4, dtype=torch.long), cu_seqlens=cu, advantages=torch.ones(4))
    stats = TokenStats(logprobs=-torch.ones(4), entropy=entropy)
    a, b = (float(loss_from_logprobs(o, stats, batch).loss) for o in (plain, with_bonus))
    assert b - a == pytest.approx(-0.5 * 3.0)
    c = float(loss_from_logprobs(with_entropy(with_bonus, 0.25), stats, batch).loss)
    assert c - a == pytest.approx(-0.25 * 3.0)


def test_a_step_without_a_trained_token_moves_no_coefficient(place, tmp_path):
    config = config_of(GRPOConfig, place, tmp_path, use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=0.5)
    stage = stage_of(config)[1]
    stage.entropy_seen, stage.unsettled = [torch.zeros(())], False
    stage.settle_entropy()
    assert stage.entropy.coef == 0.01 and stage.entropy_seen == []
    stage.entropy_seen, stage.unsettled = [torch.zeros(())], True
    stage.settle_entropy()
    assert stage.entropy.coef == pytest.approx(0.015)


def test_an_epoch_is_the_steps_that_it_takes(place, tmp_path):
    config = config_of(GRPOConfig, place, tmp_path, steps_per_generation=3, num_iterations=2)
    first = stage_of(config)[1]
    at_once, size = first.prompts_at_once, config.prompts_per_step
    for count in (1, at_once, at_once + 1, 2 * at_once + size + 1):
        stage = GRPOStage(first.setting, (first.prompts * 99)[:count], [], first.sampler, first.scorer)
        taken, steps = 0, 0
        while taken < count:
            rows = len(stage.order.take(at_once))
            taken, steps = taken + rows, steps + len(range(0, rows * config.num_generations, config.batch_size)) * 2
        assert stage.steps_per_epoch == steps


def test_samples_are_drawn_by_the_policy_as_it_is_trained(place, tmp_path):
    """Under the same autocast, or their log-probs would be another model's."""
    stage, seen = stage_of(config_of(GRPOConfig, place, tmp_path))[1], []
    stage.how = dataclasses.replace(stage.how, autocast=torch.bfloat16)
    stage.held_out = stage.prompts[:2]
    generate = stage.sampler.generate

    def watched(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return generate(*args, **kwargs)

    stage.sampler = type("Engine", (), {"generate": staticmethod(watched)})()
    stage.collect(Quiet())
    assert "eval_frac_reward_zero_std" not in stage.evaluate(Quiet())
    assert seen == [True, True]


def test_the_rewards_numbers():
    scores = Scores(torch.tensor([0.0, 0.0, 1.0, 1.0]), {"f": torch.tensor([0.0, 0.0, 1.0, 1.0])})
    out = reward_metrics(scores, torch.zeros(4), torch.tensor([0, 0, 1, 1]))
    assert out["reward_std"] == pytest.approx(3**-0.5) and out["frac_reward_zero_std"] == 1.0
    nothing = Scores(torch.full((2,), torch.nan), {"f": torch.full((2,), torch.nan)})
    out = reward_metrics(nothing, torch.zeros(2), torch.tensor([0, 0]))
    assert out["reward"] != out["reward"] and "reward" not in known_values(out) and out["rewards/unscored"] == 2


def test_the_entropy_bonus_follows_its_target(place, tmp_path):
    """Above the target nothing is applied and the coefficient falls to its floor; below, it climbs; a resume knows."""
    options = {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_coef_delta": 0.004, "save_steps": 2.0}
    above = run(config_of(GRPOConfig, place, tmp_path / "above", max_steps=4, **options)).output_dir
    assert records(above, "entropy_coef") == pytest.approx([0.01, 0.006, 0.002, 0.0])
    options |= {"entropy_target": 50.0, "max_steps": 4}
    below = run(config_of(GRPOConfig, place, tmp_path / "below", **options)).output_dir
    assert records(below, "entropy_coef") == pytest.approx([0.01, 0.014, 0.018, 0.022])
    at = str(below / "checkpoint-2")
    again = run(config_of(GRPOConfig, place, tmp_path / "again", resume_from_checkpoint=at, **options)).output_dir
    assert records(again, "entropy_coef")[-2:] == pytest.approx([0.018, 0.022])
    assert same(weights(below), weights(again))


def test_a_samplers_logprobs_reach_the_loss(place, tmp_path):
    """With an engine that disagrees by 0.2 nats a token the truncated weight is e^0.2 or its limit."""
    bench, plain = stage_of(config_of(GRPOConfig, place, tmp_path / "o"))
    plain.setting.config = config_of(GRPOConfig, place, tmp_path / "p", importance_sampling_mode="token_truncate",
                                     importance_sampling_clip_max=1.1, mask_truncated_completions=True)  # fmt: skip
    stage = GRPOStage(plain.setting, plain.prompts, [], plain.sampler, plain.scorer)
    generate = plain.sampler.generate

    def told(*args, **kwargs):
        made = generate(*args, **kwargs)
        return [[Completion(c.ids, c.truncated, [-9.0] * len(c.ids)) for c in group] for group in made]

    stage.sampler = type("Engine", (), {"generate": staticmethod(told)})()
    micros = prepare(stage.setting.model, stage.objective, stage.collect(Quiet()), stage.how)
    weight = torch.cat([m.batch.per_token["policy_weight"] for m in micros])
    assert len(weight) and torch.allclose(weight, torch.full_like(weight, 1.1))
    assert READ_REWARDS == ("a2po", "vapo")

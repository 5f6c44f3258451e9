"""fastrl grpo and rloo: the sampler's own log-probs, the whole-vocabulary KL, advantage estimators by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch

from fastrl import losses
from fastrl.advantages import ESTIMATORS, estimate
from fastrl.objective import Divergence
from fastrl.rollout import Completion
from fastrl.train import ConfigError, GRPOConfig, run
from fastrl.train.config import RLOOConfig
from fastrl.train.configs import grpo as grpo_flags
from fastrl.train.output_dir import Run
from fastrl.train.stages import grpo, grpo_objective
from fastrl.train.stages.grpo_objective import FullKL, objective_of, policy_of
from fastrl.train.step import loss_of, prepare
from fastrl.train.workbench import build

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
REWARDS = '''
def closeness(prompts, completions, answer, **columns):
    return [sum(x == y for x, y in zip(c, a)) - 0.1 * len(c) for c, a in zip(completions, answer)]


def shortness(prompts, completions, **columns):
    return [-float(len(c)) for c in completions]
'''
GAP = "sampling/sampling_logp_difference"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("mismatch")
    (root / "rewards.py").write_text(REWARDS)
    return {"model": tiny.make_model(root / "model"), "rewards": root / "rewards.py", **tiny.make_data(root / "data")}


def config_of(cls, place: dict, out: Path, **options):
    shared = {
        "model_name_or_path": str(place["model"]), "dataset_name": str(place["grpo"]), "output_dir": str(out),
        "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "per_device_train_batch_size": 8,
        "num_generations": 4, "max_completion_length": 5,
        "reward_funcs": [f"{place['rewards']}:closeness", f"{place['rewards']}:shortness"],
    }  # fmt: skip
    return cls(**{**shared, **options})


def records(path: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in lines if key in r]


class Quiet:
    """A log that nobody reads."""

    def timing(self, name):
        return contextlib.nullcontext()

    def add_mean(self, values):
        pass

    add_max = add_mean


def stage_of(config):
    return build(config, Run(Path(config.output_dir), None, [])).stage


# -- log-probs of the sampler ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (GRPOConfig, {"importance_sampling_mode": "token_truncate", "temperature": 0.7}),
        (GRPOConfig, {"loss_type": "decoupled_ppo", "num_iterations": 2, "mask_truncated_completions": True}),
        (RLOOConfig, {"importance_sampling_mode": "sequence_mask"}),
        (RLOOConfig, {"importance_sampling_mode": "token_truncate", "beta": 0.0}),
    ],
)
def test_a_run_with_the_samplers_own_logprobs(cls, options, place, tmp_path):
    out = run(config_of(cls, place, tmp_path, **options)).output_dir
    assert all(0 <= m < 1e-5 for m in records(out, f"{GAP}/mean"))
    assert all(0 <= m < 1e-4 for m in records(out, f"{GAP}/max"))
    assert len(records(out, f"{GAP}/max")) == len(records(out, f"{GAP}/mean")) == 2 // options.get("num_iterations", 1)
    if not options.get("mask_truncated_completions"):  # then there may be no token to average over
        weights = records(out, "sampling/importance_sampling_ratio/mean")
        assert weights == pytest.approx([1.0] * 2, abs=1e-4)


def test_only_those_that_read_them_ask(place, tmp_path):
    def asked(cls=GRPOConfig, **options) -> bool:
        stage = stage_of(config_of(cls, place, tmp_path, **options))
        stage.collect(Quiet())
        found = {"rollout_logprobs" in s.fields for step in [stage.roll_out(Quiet())[0]] for s in step}
        assert found == {stage.sampling.logprobs}
        return stage.sampling.logprobs

    assert asked(loss_type="dppo_tv") and asked(loss_type="decoupled_ppo")
    assert asked(RLOOConfig, importance_sampling_mode="token_mask")
    assert not asked() and not asked(RLOOConfig) and not asked(off_policy_mask_threshold=0.5)


def test_a_sampler_that_is_another_policy_shows(place, tmp_path):
    """The trained weights change after sampling was asked of the old ones: the gap and the weights say by how much."""
    stage = stage_of(config_of(GRPOConfig, place, tmp_path, importance_sampling_mode="token_truncate"))
    generate, head = stage.sampler.generate, stage.setting.model.head

    def then_move(*args):
        made = generate(*args)
        with torch.no_grad():
            head.weight.mul_(1.5)
        return made

    stage.sampler = type("Engine", (), {"generate": staticmethod(then_move)})()
    seen = {}
    log = Quiet()
    log.add_max = seen.update
    micros = prepare(stage.setting.model, stage.objective, stage.collect(log), stage.how)
    batch = micros[0].batch
    gap = batch.old_logprobs - batch.rollout_logprobs
    assert float(gap.abs().max()) == pytest.approx(seen[f"{GAP}/max"]) and seen[f"{GAP}/max"] > 0.01
    torch.testing.assert_close(batch.per_token["policy_weight"].float(), gap.exp().clamp(max=3.0), atol=1e-5, rtol=1e-5)


# -- the whole-vocabulary KL -------------------------------------------------------------------------------------------
def test_full_kl_is_aggregated_as_the_policy_loss_beside_it(place, tmp_path):
    def made(**options):
        config = config_of(GRPOConfig, place, tmp_path, beta=0.2, kl_estimator="full", **options)
        return config, objective_of(config)

    _, objective = made(loss_type="dr_grpo")
    (one, policy), (beta, kl) = objective.terms
    assert (one, beta) == (1.0, 0.2) and policy == losses.get("dr_grpo", max_length=5)
    assert kl == FullKL(aggregate="constant", max_length=5)
    assert made(loss_type="grpo")[1].terms[1][1].aggregate == "sequence_mean_token_mean"
    config, _ = made(loss_type="a2po")
    assert config.reads_ref_logprobs and not made()[0].reads_ref_logprobs
    without = objective_of(config_of(GRPOConfig, place, tmp_path, kl_estimator="full"))
    assert without == policy_of(without) == losses.get("dapo", clip_high=0.2)
    with pytest.raises(ConfigError, match="use_bias_correction_kl"):
        made(use_bias_correction_kl=True)


def moved(stage) -> None:
    """As if training had led the policy away from the reference."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in stage.setting.reference.parameters():
            p.add_(0.1 * torch.randn_like(p))


def check_full_kl(name: str, temperature: float, place: dict, tmp_path: Path) -> None:
    """Value and gradient of the step's loss in float64 against both log-softmaxes formed."""
    options = {"loss_type": name, "beta": 0.3, "kl_estimator": "full", "temperature": temperature, "dtype": "float64"}
    # The model's norms round to float32 on their way back: a prompt's summed gradient once, where copies do it each.
    options |= {"max_tokens_per_device": 20, "bf16": False, "share_prompts": False}
    stage = stage_of(config_of(GRPOConfig, place, tmp_path, **options))
    moved(stage)
    generate = stage.sampler.generate
    stage.sampler.generate = lambda *a: [
        [Completion(c.ids[: 1 + i], truncated=True) for i, c in enumerate(group)] for group in generate(*a)
    ]  # of all lengths, so that no two means agree
    model, reference = stage.setting.model, stage.setting.reference
    micros = prepare(model, stage.objective, stage.collect(Quiet()), stage.how)
    assert len(micros) > 1 and all(m.batch.ref_logprobs is None for m in micros)
    model.zero_grad()
    total, kl = 0.0, 0.0
    for micro in micros:
        out = loss_of(model, stage.objective, micro, stage.how)
        out.loss.backward()
        total, kl = total + float(out.loss.detach()), kl + float(out.metrics["kl"])
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    samples = [s for m in micros for s in m.samples]
    tokens, want, want_kl = sum(s.num_trained for s in samples), 0.0, 0.0
    for s in samples:
        ids, first = torch.tensor([s.input_ids]), s.prompt_length
        logp = (model.model(ids).logits[0, first - 1 : -1] / temperature).log_softmax(-1)
        with torch.no_grad():
            logq = (reference.model(ids).logits[0, first - 1 : -1] / temperature).log_softmax(-1)
        own = logp.gather(1, ids[0, first:, None])[:, 0]
        if name == "gspo":
            ratio = (own - own.detach()).mean().exp().expand_as(own)
        else:
            ratio = (own - own.detach()).exp()
        divergence = (logp.exp() * (logp - logq)).sum(-1)
        value = -s.fields["advantage"] * ratio + 0.3 * divergence
        n = s.num_trained
        weight = {"dapo": 1 / tokens, "dr_grpo": 1 / (len(samples) * 5)}.get(name, 1 / (len(samples) * n))
        want, want_kl = want + weight * value.sum(), want_kl + float(divergence.sum().detach()) / tokens
    want.backward()
    assert total == pytest.approx(float(want.detach()), rel=1e-9, abs=1e-12)
    assert kl == pytest.approx(want_kl, rel=1e-9) and kl > 0.01
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[n], p.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("name", "temperature"), [("grpo", 0.7), ("dr_grpo", 1.0), ("gspo", 1.0), ("dapo", 1.0)])
def test_full_kl_equals_materialised_logits(name, temperature, place, tmp_path):
    check_full_kl(name, temperature, place, tmp_path)


def test_a_wrong_kl_is_noticed(place, tmp_path, monkeypatch):
    """The other direction; another mean than the policy loss's; a reference without the temperature."""
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(FullKL, "divergence", property(lambda self: Divergence("forward_kl")))
        check_full_kl("grpo", 1.0, place, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        made = FullKL(aggregate="token_mean")
        patch.setattr(grpo_objective, "FullKL", lambda **kwargs: made)
        check_full_kl("grpo", 1.0, place, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        own = grpo.teacher_of
        patch.setattr(grpo, "teacher_of", lambda *a: dataclasses.replace(own(*a), logit_scale=0.7))
        check_full_kl("grpo", 0.7, place, tmp_path)


def test_a_run_with_the_full_kl(place, tmp_path):
    options = {"beta": 0.1, "kl_estimator": "full", "top_entropy_quantile": 0.8, "num_iterations": 2, "max_steps": 4}
    options |= {"use_adaptive_entropy": True, "entropy_target": 50.0, "entropy_coef": 0.01}
    out = run(config_of(GRPOConfig, place, tmp_path, **options)).output_dir
    kl = records(out, "kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and 0 < kl[-1] < 1
    assert records(out, "entropy_coef")[1] > records(out, "entropy_coef")[0]


# -- advantages --------------------------------------------------------------------------------------------------------
def test_the_flag_names_every_estimator():
    assert grpo_flags.ESTIMATORS == tuple(ESTIMATORS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_is_served(name, place, tmp_path):
    stage = stage_of(config_of(GRPOConfig, place, tmp_path, advantage_estimator=name, reward_weights=[1.0, 0.5]))
    seen = {}
    own, known = stage.scorer.score, stage.known
    stage.scorer.score = lambda *a: seen.setdefault(f"scores {len(seen)}", own(*a))
    stage.known = lambda *a: seen.setdefault("known", known(*a))
    [samples] = stage.roll_out(Quiet())
    scores, columns = seen["scores 0"], seen["known"]
    groups = torch.tensor([0] * 4 + [1] * 4)
    want = estimate(name, scores.total, groups, columns=columns)
    assert [s.fields["advantage"] for s in samples] == want.tolist() and want.isfinite().all()
    assert columns["lengths"].tolist() == [s.num_trained for s in samples]
    assert columns["components"].shape == (8, 2) and columns["weights"].tolist() == [1.0, 0.5]
    if name == "remax":
        greedy = seen["scores 1"].total
        torch.testing.assert_close(want, scores.total - greedy.repeat_interleave(4))


def test_a_run_by_the_name_of_its_estimator(place, tmp_path):
    options = {"advantage_estimator": "remax", "loss_type": "reinforce"}
    out = run(config_of(GRPOConfig, place, tmp_path, **options)).output_dir
    assert len(records(out, "reward_greedy")) == 2
    given = config_of(GRPOConfig, place, tmp_path / "b", advantage_estimator="pkpo", advantage_options=["k=3"])
    assert records(run(given).output_dir, "loss")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"advantage_estimator": "rlooo"}, ("advantage_estimator", "rloo")),
        ({"advantage_estimator": "pkpo", "advantage_options": ["kk=3"]}, ("pkpo", "kk", "k")),
        ({"advantage_estimator": "pkpo", "advantage_options": ["k=1"]}, ("pkpo", "at least 2")),
        ({"advantage_estimator": "pkpo", "advantage_options": ["k=5"]}, ("pkpo", "k=5", "num_generations 4")),
        ({"advantage_options": ["k=1"]}, ("advantage_estimator",)),
        ({"advantage_estimator": "rloo", "scale_rewards": "none"}, ("scale_rewards", "advantage_estimator")),
    ],
)
def test_what_does_not_fit_is_refused(options, words, place, tmp_path):
    with pytest.raises(ConfigError) as error:
        stage_of(config_of(GRPOConfig, place, tmp_path, **options))
    assert all(w in str(error.value) for w in words)


def test_the_flags_survive_a_copy(place, tmp_path):
    config = config_of(GRPOConfig, place, tmp_path, kl_estimator="full", beta=0.1, advantage_estimator="rloo")
    assert dataclasses.replace(config) == config

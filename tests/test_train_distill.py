"""`fastrl distill` and the losses of `fastrl sft` end to end on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fastrl import losses
from fastrl.data.types import DataError
from fastrl.models import load_causal_lm
from fastrl.train import ConfigError, SFTConfig, run
from fastrl.train.config import DistillConfig
from fastrl.train.configs.sft import LOSSES, SIGNALS
from fastrl.train.metrics import MetricsLogger
from fastrl.train.output_dir import Run
from fastrl.train.stages.sft import objective_of, signal_fits
from fastrl.train.step import loss_of, prepare
from fastrl.train.workbench import build


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A student, a wider teacher with an untied head, and data with every column that a loss reads."""
    root = tmp_path_factory.mktemp("distill")
    rows = tiny.sums(40, 1)
    for i, row in enumerate(rows):
        row |= {"weight": 0.5 + i % 3, "label": i % 4 > 0, "reward": float(i % 5), "advantage": (i % 7) - 3.0}
    columns = ("prompt", "completion", "weight", "label", "reward", "advantage")
    for split in ("train", "test"):
        tiny.write(root / "data" / f"{split}.jsonl", rows if split == "train" else rows[:10], columns)
    wide = {"hidden_size": 48, "num_attention_heads": 6, "tie_word_embeddings": False}
    return {
        "data": root / "data",
        "student": tiny.make_model(root / "student"),
        "teacher": tiny.make_model(root / "teacher", seed=1, **wide),
    }


def config_of(place, out: Path, cls=DistillConfig, **options):
    shared = {
        "model_name_or_path": str(place["student"]),
        "dataset_name": str(place["data"]),
        "output_dir": str(out),
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
    }
    if cls is DistillConfig:
        shared |= {"teacher_model_name_or_path": str(place["teacher"]), "max_new_tokens": 5}
    return cls(**{**shared, **options})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def records(path: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in lines if key in r]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


LOSS_OPTIONS = {
    "gkd": {"lmbda": 0.5, "beta": 0.3},
    "mixed_kl": {"lmbda": 0.0, "alpha": 0.2, "nll_coef": 0.1},
    "skew_kl": {"lmbda": 1.0},
    "kd": {"lmbda": 0.0, "distill_temperature": 3.0, "alpha": 0.3},
    "seq_kd": {"lmbda": 0.0, "seq_kd": True},
    "opd": {"lmbda": 1.0, "temperature": 1.0},
    "opd_is": {"lmbda": 1.0},
    "iw_opd": {"lmbda": 1.0, "gamma": 0.7},
    "minillm": {"lmbda": 1.0},
}


@pytest.mark.parametrize("loss_type", ["gkd", "minillm"])
def test_a_resumed_run_ends_the_same(loss_type, place, tmp_path):
    options = {"loss_type": loss_type, "save_steps": 2, **LOSS_OPTIONS[loss_type]}
    whole = run(config_of(place, tmp_path / "a", **options)).output_dir
    again = config_of(place, tmp_path / "b", resume_from_checkpoint=str(whole / "checkpoint-2"), **options)
    assert same(weights(whole), weights(run(again).output_dir))
    assert not same(weights(whole), weights(place["student"]))


def gradient_of(stage, samples, budget: int) -> tuple[float, torch.Tensor]:
    """(loss, gradient of the embedding) of one optimizer step on these samples, cut at this many tokens."""
    model, total = stage.setting.model, 0.0
    stage.setting.config.max_tokens_per_device = budget
    model.zero_grad()
    with MetricsLogger(stage.setting.config, 1) as log:
        for micro in prepare(model, stage.objective, stage.prepare(samples, log), stage.how):
            loss = loss_of(model, stage.objective, micro, stage.how).loss
            loss.backward()
            total += float(loss.detach())
    return total, model.model.get_input_embeddings().weight.grad.clone()


def check_step(stage, samples) -> None:
    """One optimizer step: a gradient, and the same one whatever the token budget."""
    (loss, grad), (again, other) = (gradient_of(stage, samples, budget) for budget in (4096, 20))
    assert grad.any() and loss == pytest.approx(again, rel=1e-5, abs=1e-6)
    assert torch.allclose(grad, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_OPTIONS)
def test_every_loss_makes_a_step_that_no_token_budget_changes(loss_type, place, tmp_path):
    config = config_of(place, tmp_path, loss_type=loss_type, **LOSS_OPTIONS[loss_type])
    stage = build(config, Run(tmp_path, None, [])).stage
    samples, writer = [s for [s] in stage.items[:8]], stage.writer()
    if writer:
        with MetricsLogger(config, 1) as log:
            samples = stage.write(samples, writer, log)
    check_step(stage, samples)


def test_the_loss_is_that_of_both_models_logits(place, tmp_path):
    """The stage's fused loss against transformers' logits of student and teacher and the definition of the JSD."""
    stage = build(config_of(place, tmp_path, lmbda=0.0, beta=0.3), Run(tmp_path, None, [])).stage
    student, teacher = (load_causal_lm(str(place[n]), torch.float32).eval() for n in ("student", "teacher"))
    stage.setting.model.eval()
    [micro] = stage.prepare([s for [s] in stage.items[:6]], None)
    got = loss_of(stage.setting.model, stage.objective, micro, stage.how).loss
    values = []
    for sample in micro.samples:
        ids = torch.tensor(sample.input_ids)
        z, t = (m.model(ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (student, teacher))
        m = torch.log(0.3 * t.exp() + 0.7 * z.exp())
        jsd = 0.3 * (t.exp() * (t - m)).sum(-1) + 0.7 * (z.exp() * (z - m)).sum(-1)
        values.append(jsd[torch.tensor(sample.completion_mask)[1:]])
    assert float(got.detach()) == pytest.approx(float(torch.cat(values).mean().detach()), rel=1e-5)


def test_the_student_comes_nearer_to_its_teacher(place, tmp_path):
    options = {"max_steps": 25, "learning_rate": 1e-2, "beta": 0.0, "lmbda": 0.0, "per_device_train_batch_size": 16}
    out = run(config_of(place, tmp_path / "a", **options, eval_strategy="steps", eval_steps=25)).output_dir
    seen = records(out, "divergence")
    assert seen[-1] < 0.5 * seen[0]
    assert records(out, "eval_loss")[-1] < 0.5 * seen[0]


def test_on_policy_distillation_comes_nearer_too(place, tmp_path):
    options = {"max_steps": 16, "learning_rate": 1e-2, "loss_type": "opd", "lmbda": 1.0, "temperature": 1.0}
    options |= {"eval_strategy": "steps", "eval_steps": 16, "eval_on_start": True}
    out = run(config_of(place, tmp_path, **options)).output_dir
    kl = records(out, "eval_loss")  # the reverse KL on held-out texts
    assert kl[-1] < kl[0] and records(out, "on_policy") == [1.0] * 16


def test_lmbda_is_the_share_of_steps_on_own_samples(place, tmp_path):
    stage = build(config_of(place, tmp_path, lmbda=0.25, seq_kd=True), Run(tmp_path, None, [])).stage
    drawn = []
    for stage.taken in range(400):
        drawn.append(stage.writer())
    assert 0.18 < drawn.count("student") / 400 < 0.32 and set(drawn) == {"student", "teacher"}
    stage.config.seq_kd = False
    assert stage.writer() in ("student", None)


def test_a_larger_vocabulary_of_the_teacher_is_cut(place, tmp_path):
    padded = tiny.make_model(tmp_path / "padded", seed=1, vocab_size=32)
    config = config_of(place, tmp_path / "o", teacher_model_name_or_path=str(padded))
    stage = build(config, Run(tmp_path, None, [])).stage
    [micro] = stage.prepare([s for [s] in stage.items[:2]], None)
    assert stage.teacher_head(micro).weight.shape[0] == stage.setting.model.head.out_features
    assert loss_of(stage.setting.model, stage.objective, micro, stage.how).loss.isfinite()
    backwards = {"model_name_or_path": str(padded), "teacher_model_name_or_path": str(place["student"])}
    with pytest.raises(ConfigError, match="head has 32 words but"):
        build(config_of(place, tmp_path / "p", **backwards), Run(tmp_path, None, []))


REFUSED = [
    ({"teacher_model_name_or_path": None}, "--teacher_model_name_or_path is required"),
    ({"loss_type": "opd"}, "use --lmbda 1"),
    ({"loss_type": "seq_kd"}, "use --lmbda 0"),
    ({"alpha": 0.3}, "has no option 'alpha'"),
    ({"max_new_tokens": 64}, "more than the model's context of 64"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_done_is_named(options, message, place, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(config_of(place, tmp_path, **options), Run(tmp_path, None, []))


def test_another_tokenizer_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "ALPHABET", tiny.ALPHABET[::-1])
    other = tiny.make_model(tmp_path / "other")
    with pytest.raises(ConfigError, match="tokenizers of .* differ in .* entries"):
        build(config_of(place, tmp_path / "o", teacher_model_name_or_path=str(other)), Run(tmp_path, None, []))


def test_texts_without_prompts_cannot_be_sampled_from(place, tmp_path):
    tiny.write(tmp_path / "data" / "train.jsonl", [{"text": "1+1=2"}] * 8, ("text",))
    config = config_of(place, tmp_path / "o", dataset_name=str(tmp_path / "data"))
    with pytest.raises(DataError, match="sampling needs prompts"):
        build(config, Run(tmp_path, None, []))
    alone = config_of(place, tmp_path / "o", dataset_name=str(tmp_path / "data"), lmbda=0.0, max_steps=1)
    assert run(alone).steps == 1


# -- sft -------------------------------------------------------------------------------------------------------------
SFT = {
    "label_smoothing": {"label_smoothing_factor": 0.2},
    "eos_weighted": {"eos_weight": 3.0},
    "weighted_sft": {"normalise_weights": True},
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_supervised_loss_makes_a_step(loss_type, place, tmp_path):
    config = config_of(place, tmp_path, SFTConfig, loss_type=loss_type, **SFT.get(loss_type, {}))
    stage = build(config, Run(tmp_path, None, [])).stage
    check_step(stage, [s for [s] in stage.items[:8]])


def test_label_smoothing_goes_with_the_likelihood_as_in_transformers(place, tmp_path):
    named, plain = (
        objective_of(config_of(place, tmp_path, SFTConfig, loss_type=name, label_smoothing_factor=0.2), 1)
        for name in ("label_smoothing", "nll")
    )
    assert named == plain == losses.get("label_smoothing", label_smoothing=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dft", "label_smoothing_factor": 0.1}, "would change nothing"),
        ({"loss_type": "label_smoothing"}, "needs --label_smoothing_factor above 0"),
        ({"signal_column": "weight"}, "--signal_column is read by"),
        ({"z_loss": 0.1}, "--z_loss 0.1 is read by z_loss, not by --loss_type nll"),
        ({"loss_type": "rwr", "max_weight": 5.0}, "--max_weight 5.0 is read by awr, not by --loss_type rwr"),
        ({"loss_type": "awr", "normalise_weights": True}, "--normalise_weights True is read by weighted_sft"),
        ({"loss_type": "eos_weighted"}, "is plain nll"),
    ],
)
def test_flags_that_do_nothing_are_named(options, message, place, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_of(place, tmp_path, SFTConfig, **options)


def test_numbers_of_other_losses_are_named(place, tmp_path):
    with pytest.raises(ConfigError, match="--beta 0.3 is read by gkd, not by --loss_type reverse_kl"):
        config_of(place, tmp_path, loss_type="reverse_kl", beta=0.3)
    config = config_of(place, tmp_path, SFTConfig, loss_type="eos_weighted", eos_weight=2.0)
    with pytest.raises(ConfigError, match="this tokenizer has none"):
        objective_of(config, None)


def test_signals_are_finite_and_labels_true_or_false():
    for name, good, bad in (
        ("reward", (1, -0.5, True), (math.nan, math.inf, "1", None)),
        ("label", (True, False, 0, 1, 1.0), (0.5, 2, -1, math.nan, "true", None)),
    ):
        assert all(signal_fits(name, x) for x in good) and not any(signal_fits(name, x) for x in bad)


@pytest.mark.parametrize("loss_type", SIGNALS)
def test_a_missing_column_is_named(loss_type, place, tmp_path):
    config = config_of(place, tmp_path, SFTConfig, loss_type=loss_type, signal_column="prompt")
    with pytest.raises(DataError, match="reads the column 'prompt'"):
        build(config, Run(tmp_path, None, []))

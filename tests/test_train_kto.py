"""`fastrl kto` and the choices of `fastrl dpo` on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_train import records, same, weights

from fastrl import losses
from fastrl.data import DataError, encode_dpo, encode_kto
from fastrl.data.types import Sample
from fastrl.models import load_tokenizer
from fastrl.train import DPOConfig, run
from fastrl.train.config import KTOConfig
from fastrl.train.configs import dpo as dpo_flags
from fastrl.train.flags import ConfigError
from fastrl.train.metrics import MetricsLogger
from fastrl.train.output_dir import Run
from fastrl.train.stages.dpo import objective_of
from fastrl.train.stages.kto import balance, mismatched
from fastrl.train.stages.reference import mix
from fastrl.train.step import loss_of, prepare
from fastrl.train.workbench import build


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("kto")
    made = {"model": tiny.make_model(root / "model"), **tiny.make_data(root / "data")}
    for split, seed, count in (("train", 1, 40), ("test", 2, 10)):
        rows = []
        for i, row in enumerate(tiny.sums(count, seed)):
            rows.append({**row, "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)})
        tiny.write(root / "data" / "kto" / f"{split}.jsonl", rows, ("prompt", "completion", "label"))
    return {**made, "kto": root / "data" / "kto"}


def config_of(cls, place: dict, out: Path, data: str | None = None, **options):
    shared = {
        "model_name_or_path": str(place["model"]), "dataset_name": str(place[data or cls.stage]),
        "output_dir": str(out), "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1,
        "per_device_train_batch_size": 8,
    }  # fmt: skip
    return cls(**{**shared, **options})


def kto_config(place, out, **options):
    return config_of(KTOConfig, place, out, **options)


# -- kto ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["kto", "bco"])
def test_it_starts_where_it_must_and_learns(name, place, tmp_path):
    out = run(kto_config(place, tmp_path, loss_type=name, max_steps=6, eval_strategy="steps", eval_steps=3)).output_dir
    at_zero = math.log(2) if name == "bco" else 0.5
    assert records(out, "loss")[0] == pytest.approx(at_zero, abs=1e-5)
    assert records(out, "rewards/margins")[-1] > 0 and records(out, "loss")[-1] < at_zero
    assert len(records(out, "eval_loss")) == 2 and records(out, "logps/rejected")
    if name == "kto":
        assert records(out, "kl")[0] == pytest.approx(0, abs=1e-5) and len(records(out, "eval_kl")) == 2


def test_kto_is_the_same_under_every_token_budget(place, tmp_path):
    large, small = (
        run(kto_config(place, tmp_path / str(n), max_tokens_per_device=n, max_steps=2)).output_dir for n in (4096, 20)
    )
    for key, rel in (("loss", 1e-5), ("grad_norm", 1e-4), ("kl", 1e-3), ("rewards/chosen", 1e-3)):
        assert records(large, key) == pytest.approx(records(small, key), rel=rel, abs=1e-5)


def test_kto_resumes_bit_for_bit(place, tmp_path):
    whole = run(kto_config(place, tmp_path / "whole", save_steps=2)).output_dir
    again = run(kto_config(place, tmp_path / "again", resume_from_checkpoint=str(whole / "checkpoint-2"))).output_dir
    assert same(weights(whole), weights(again))


def test_the_kl_is_that_of_each_prompt_with_the_answer_before(place, tmp_path):
    config = kto_config(place, tmp_path)
    stage = build(config, Run(tmp_path, None, [])).stage
    with torch.no_grad():
        for p in stage.setting.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    samples = [item[0] for item in stage.items[:5]]
    with MetricsLogger(config, 1) as log:
        got = stage.mismatched_kl(samples, log)
    want = []
    for i, sample in enumerate(samples):
        other = samples[i - 1]
        answer = other.input_ids[other.prompt_length :]
        ids = torch.tensor([sample.input_ids[: sample.prompt_length] + answer])
        sums = []
        for model in (stage.setting.model, stage.setting.reference):
            logp = model.model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            sums.append(float(logp[-len(answer) :].sum().detach()))
        want.append(sums[0] - sums[1])
    assert got == pytest.approx(want, abs=1e-4) and max(map(abs, want)) > 0.01


def test_a_mismatched_answer_is_cut_at_the_limit():
    asked, answered = Sample.from_parts([1, 2, 3], [4]), Sample.from_parts([5], [6, 7, 8])
    assert mismatched(asked, answered, None).input_ids == [1, 2, 3, 6, 7, 8]
    assert mismatched(asked, answered, 4).input_ids == [1, 2, 3, 6]
    assert mismatched(asked, answered, 3).num_trained == 0


def test_pairs_are_split_into_single_answers(place):
    tokenizer = load_tokenizer(place["model"])
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}, {"prompt": "2+2=", "chosen": "4", "rejected": "5 ?"}]
    samples, report = encode_kto(rows, tokenizer)
    assert [s.fields["label"] for s in samples] == [True, False, True, False] and report.total == 4
    assert [s.num_trained for s in samples] == [2, 2, 2, 4]
    single, _ = encode_kto([{"prompt": "1+1=", "completion": "2", "label": 1}], tokenizer)
    assert single[0].input_ids == samples[0].input_ids and single[0].fields["label"] is True
    with pytest.raises(DataError, match="label"):
        encode_kto([{"prompt": "1+1=", "completion": "2", "label": "good"}], tokenizer)
    with pytest.raises(DataError, match="kto needs"):
        encode_kto([{"prompt": "1+1=", "completion": "2"}], tokenizer)


def test_scores_of_pairs_become_rewards(place):
    tokenizer = load_tokenizer(place["model"])
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3", "score_chosen": 7, "score_rejected": 1.5}] * 2
    samples, _ = encode_dpo(rows, tokenizer)
    assert [s.fields["reward"] for s in samples] == [7.0, 1.5] * 2
    with pytest.raises(DataError, match="score_chosen and score_rejected must be numbers"):
        encode_dpo([rows[0], {**rows[1], "score_chosen": None}], tokenizer)
    assert "reward" not in encode_dpo([{**rows[0], "score_chosen": "good"}], tokenizer)[0][0].fields


def test_uneven_labels_are_noted(place, tmp_path):
    samples = [Sample.from_parts([1], [2], label=i < 3) for i in range(4)]
    config = kto_config(place, tmp_path)
    assert "--desirable_weight 0.333" in balance(config, samples)[0]
    assert balance(kto_config(place, tmp_path, desirable_weight=1 / 3), samples) == []
    assert "contrast" in balance(config, samples[:3])[0]


def test_kto_needs_two_answers_a_step(place, tmp_path):
    with pytest.raises(ConfigError, match="at least two"):
        kto_config(place, tmp_path, per_device_train_batch_size=1)
    kto_config(place, tmp_path, per_device_train_batch_size=1, loss_type="bco")


def test_one_answer_has_no_other_answer_to_be_held_against(place, tmp_path):
    config = kto_config(place, tmp_path)
    stage = build(config, Run(tmp_path, None, [])).stage
    with torch.no_grad():
        for p in stage.setting.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    with MetricsLogger(config, 9) as log:
        assert [math.isnan(x) for x in stage.mismatched_kl(stage.items[0], log)] == [True]
        [micro] = prepare(stage.setting.model, stage.objective, stage.prepare(stage.items[0], log), stage.how)
    assert micro.batch.per_sequence["kto_z"].tolist() == [0.0]


def test_a_step_with_one_label_logs_no_metric_of_the_other(place, tmp_path):
    config = kto_config(place, tmp_path, loss_type="bco")
    stage = build(config, Run(tmp_path, None, [])).stage
    good, bad = ([s for [s] in stage.items if bool(s.fields["label"]) is label][:3] for label in (True, False))
    of = {"rewards/chosen", "logps/chosen"}, {"rewards/rejected", "logps/rejected"}
    with MetricsLogger(config, 9) as log:
        for samples, names in ((good, of[0]), (bad, of[1]), (good + bad, {*of[0], *of[1], "rewards/margins"})):
            [micro] = prepare(stage.setting.model, stage.objective, stage.prepare(samples, log), stage.how)
            metrics = loss_of(stage.setting.model, stage.objective, micro, stage.how).metrics
            assert {n for n in metrics if "/" in n} == names and metrics["entropy"] > 0


# -- the choices of dpo ------------------------------------------------------------------------------------------------
def dpo_config(place, out, **options):
    return config_of(DPOConfig, place, out, **options)


EVERY = (*dpo_flags.AGAINST_REFERENCE, *dpo_flags.WITHOUT_REFERENCE, *dpo_flags.WITH_SCORES)


def one_step(stage, log) -> tuple[float, dict[str, float], bool]:
    """(loss, metrics, whether every gradient is finite and some is not 0) of the stage's next step."""
    model, totals = stage.setting.model, {}
    model.zero_grad()
    for micro in prepare(model, stage.objective, stage.collect(log), stage.how):
        out = loss_of(model, stage.objective, micro, stage.how)
        out.loss.backward()
        for n, x in {"loss": out.loss.detach(), **out.metrics}.items():
            totals[n] = totals.get(n, 0.0) + float(x)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return totals["loss"], totals, all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)


def test_every_loss_type_makes_a_step(place, tmp_path):
    config = dpo_config(place, tmp_path, max_tokens_per_device=40)
    stage = build(config, Run(tmp_path, None, [])).stage
    for i, item in enumerate(stage.items):
        item[0].fields["reward"], item[1].fields["reward"] = 1.0 + i % 3, -0.5
    with MetricsLogger(config, 99) as log:
        for name in EVERY:
            own = dpo_config(place, tmp_path, loss_type=[name])
            stage.objective = objective_of(own)
            assert own.needs_reference == stage.objective.needs_reference
            loss, _, moves = one_step(stage, log)
            assert math.isfinite(loss) and moves, name


def test_no_reference_is_loaded_where_none_is_read(place, tmp_path):
    for options in ({"loss_type": ["simpo", "sft"]}, {"reference_free": True}):
        config = dpo_config(place, tmp_path, **options)
        assert build(config, Run(tmp_path, None, [])).stage.setting.reference is None


def test_lists_with_weights_modifiers_and_names_of_trl(place, tmp_path):
    options = {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "rpo_alpha": 1.0, "beta": 0.3}
    more = {"use_weighting": True, "ld_alpha": 0.5, "f_divergence_type": "js_divergence"}
    objective = objective_of(dpo_config(place, tmp_path, **options, **more))
    want = losses.combined(
        ["dpo", "bco_pair", "sft"], [0.8, 0.2, 1.0], beta=0.3, use_weighting=True, ld_alpha=0.5,
        f_divergence="js_divergence",
    )  # fmt: skip
    assert objective == want and objective.needs_reference
    config = dpo_config(place, tmp_path, **options, **more)
    stage = build(config, Run(tmp_path, None, [])).stage
    with MetricsLogger(config, 9) as log:
        loss, metrics, moves = one_step(stage, log)
    # At the start: no margin, js_divergence's score is 0, so each pair loss is log 2 weighted by both answers (WPO).
    assert moves and metrics["nll_loss"] > 0 and metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert metrics["nll_loss"] < loss < metrics["nll_loss"] + 0.8 * math.log(2) * 18**2


def test_flags_that_no_loss_has_are_refused(place, tmp_path):
    for name, flag in (("hinge", {"label_smoothing": 0.1}), ("d2po", {"simpo_gamma": 0.2}), ("dpo", {"alpha": 0.1})):
        with pytest.raises(ConfigError, match=f"--{next(iter(flag))} 0.[12] changes nothing in {name}; drop it"):
            objective_of(dpo_config(place, tmp_path, loss_type=name, **flag))
    assert objective_of(dpo_config(place, tmp_path, loss_type="d2po")).gamma == losses.get("d2po").gamma
    with pytest.raises(ConfigError, match="give one for each"):
        dpo_config(place, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0])
    with pytest.raises(ConfigError, match="1e-3"):
        dpo_config(place, tmp_path, loss_type="exo_pair", label_smoothing=0.0)
    with pytest.raises(ConfigError, match="did you mean sigmoid"):
        dpo_config(place, tmp_path, loss_type="sigmod")
    with pytest.raises(DataError, match="odpo reads how much better .* score_chosen"):
        build(dpo_config(place, tmp_path, loss_type="odpo"), Run(tmp_path, None, []))
    with pytest.raises(ConfigError, match="no reference model"):
        dpo_config(place, tmp_path, loss_type="simpo", sync_ref_model=True)


def test_a_loss_keeps_its_own_numbers_unless_told(place, tmp_path):
    for name in EVERY:
        made, own = objective_of(dpo_config(place, tmp_path, loss_type=name)), losses.get(name)
        for number in ("beta", "label_smoothing"):
            assert getattr(made, number, None) == getattr(own, number, None), (name, number)
    made = objective_of(dpo_config(place, tmp_path, loss_type="robust", beta=0.3, label_smoothing=0.0))
    assert (made.beta, made.label_smoothing) == (0.3, 0.0)
    assert objective_of(dpo_config(place, tmp_path, loss_type="hinge", label_smoothing=0.0)) == losses.get("hinge")
    for name in ("simper", "dil", "sft"):
        with pytest.raises(ConfigError, match=f"--beta 0.1 changes nothing in {name}"):
            objective_of(dpo_config(place, tmp_path, loss_type=name, beta=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "beta_dpo"}, "must be one of"),  # nobody here keeps its running mean
        ({"f_alpha_divergence_coef": 0.3}, "--f_alpha_divergence_coef 0.3 changes nothing"),
        ({"ref_model_mixup_alpha": 0.5}, "--ref_model_mixup_alpha 0.5 is read with --sync_ref_model"),
        ({"ref_model_sync_steps": 8}, "--ref_model_sync_steps 8 is read with --sync_ref_model"),
    ],
)
def test_flags_that_nothing_reads_are_refused(options, message, place, tmp_path):
    with pytest.raises(ConfigError, match=message):
        dpo_config(place, tmp_path, **options)


def test_scores_are_asked_of_the_test_split_too(place, tmp_path):
    rows = [{**row, "score_chosen": 1.0, "score_rejected": 0.5} for row in tiny.sums(24, 3)]
    names = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    tiny.write(tmp_path / "d" / "train.jsonl", rows, names)
    tiny.write(tmp_path / "d" / "test.jsonl", rows[:4], names[:3])
    options = {"dataset_name": str(tmp_path / "d"), "loss_type": "odpo"}
    assert build(dpo_config(place, tmp_path / "o", **options), Run(tmp_path, None, [])).stage.items
    with pytest.raises(DataError, match="odpo reads how much better .* score_chosen"):
        build(dpo_config(place, tmp_path / "o", eval_strategy="steps", **options), Run(tmp_path, None, []))


def test_scoring_the_dataset_once_changes_nothing(place, tmp_path):
    losses_ = []
    for once in (False, True):
        config = dpo_config(place, tmp_path, precompute_ref_log_probs=once, eval_strategy="steps", eval_steps=4)
        stage = build(config, Run(tmp_path, None, [])).stage
        assert (stage.setting.reference is None) == once
        with torch.no_grad():
            for p in stage.setting.model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        with MetricsLogger(config, 9) as log:
            losses_.append([one_step(stage, log)[0], one_step(stage, log)[0], stage.evaluate(log)["eval_loss"]])
    assert losses_[0] == pytest.approx(losses_[1], rel=1e-4) and abs(losses_[0][0] - math.log(2)) > 1e-3


def test_the_reference_follows_the_policy_and_a_resumed_run_too(place, tmp_path):
    """ref <- policy after steps 2 and 4: the next step starts at log 2 again."""
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "max_steps": 5}
    whole = run(dpo_config(place, tmp_path / "whole", save_steps=3, **options)).output_dir
    assert [abs(x - math.log(2)) < 1e-6 for x in records(whole, "loss")] == [True, False, True, False, True]
    resumed = dpo_config(place, tmp_path / "again", resume_from_checkpoint=str(whole / "checkpoint-3"), **options)
    assert same(weights(whole), weights(run(resumed).output_dir))
    moved = load_file(whole / "checkpoint-3" / "reference" / "model.safetensors")
    assert not same(moved, weights(place["model"])) and not same(moved, weights(whole / "checkpoint-3"))


def test_the_reference_is_mixed():
    policy, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = reference.weight.clone()
    mix(reference, policy, 0.6)
    assert torch.allclose(reference.weight, 0.6 * policy.weight + 0.4 * before)

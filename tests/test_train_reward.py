"""fastrl reward, end to end on a tiny model: what it learns and saves, and that it is TRL's loss on TRL's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fastrl.cli import main
from fastrl.data import DataError, Limits
from fastrl.data.scored import encode_reward, last_token
from fastrl.models import load_reward_model, load_tokenizer
from fastrl.train import ConfigError, run
from fastrl.train.config import RewardConfig
from fastrl.train.metrics import MetricsLogger
from fastrl.train.output_dir import Run
from fastrl.train.workbench import build


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("fastrl.train.loop.plot_run", lambda path: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("reward")
    return {"model": tiny.make_model(root / "model"), **tiny.make_data(root / "data")}


def config_of(place: dict, out: Path, **options) -> RewardConfig:
    shared = {
        "model_name_or_path": str(place["model"]),
        "dataset_name": str(place["dpo"]),
        "output_dir": str(out),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
    }
    return RewardConfig(**{**shared, **options})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def records(path: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in lines if key in r]


def test_it_learns_and_transformers_loads_it(place, tmp_path):
    from transformers import AutoModelForSequenceClassification

    options = {"max_steps": 15, "center_rewards_coefficient": 0.01, "eval_strategy": "steps", "eval_steps": 15}
    out = run(config_of(place, tmp_path, **options)).output_dir
    assert records(out, "accuracy")[-1] == 1.0 and records(out, "eval_accuracy")[-1] == 1.0
    assert records(out, "margin")[-1] > 2 and records(out, "eval_margin")[-1] > 2
    assert abs(records(out, "mean_reward")[-1]) < 0.5
    assert records(out, "min_reward")[-1] < records(out, "mean_reward")[-1] < records(out, "max_reward")[-1]
    plain = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = load_tokenizer(out)
    good, bad = (plain(**tokenizer(t, return_tensors="pt")).logits.item() for t in ("4+5=9<eos>", "4+5=45 ?<eos>"))
    assert plain.config.num_labels == 1 and good > bad + 1


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(stop, place, tmp_path):
    options = {"save_steps": stop, "logging_steps": 2}
    whole = run(config_of(place, tmp_path / "whole", **options)).output_dir
    start = str(whole / f"checkpoint-{stop}")
    again = run(config_of(place, tmp_path / "again", resume_from_checkpoint=start, **options)).output_dir
    assert same(weights(whole), weights(again))
    for key in ("loss", "max_reward"):
        assert records(whole, key)[-1] == records(again, key)[-1]


def test_the_token_budget_changes_nothing(place, tmp_path):
    large, small = (run(config_of(place, tmp_path / str(n), max_tokens_per_device=n)).output_dir for n in (4096, 20))
    for key in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "grad_norm"):
        assert records(large, key) == pytest.approx(records(small, key), rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("loss", ["hinge_reward", "r3m", "adaptive_scale", "pcrm", "mean_variance_pairs"])
def test_every_pair_loss_trains(loss, place, tmp_path):
    out = run(config_of(place, tmp_path, loss_type=loss, max_steps=10)).output_dir
    assert records(out, "loss")[-1] < records(out, "loss")[0] and records(out, "accuracy")[-1] > 0.8
    assert load_reward_model(out).head.out_features == (2 if loss == "mean_variance_pairs" else 1)


def rows(margin: bool = True) -> list[dict]:
    made = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in tiny.sums(6, 3)]
    return [{**r, "margin": 0.5 * i} for i, r in enumerate(made)] if margin else made


def test_margins_of_the_dataset_are_read(place, tmp_path):
    data = tiny.write(tmp_path / "data" / "train.jsonl", rows(), ("prompt", "chosen", "rejected", "margin"))
    config = config_of(place, tmp_path / "out", dataset_name=str(data.parent), max_tokens_per_device=30)
    stage = build(config, Run(tmp_path, None, [])).stage
    with MetricsLogger(config, 1) as log:
        micros = stage.collect(log)
    seen = {float(m): s.fields["row"] for micro in micros for m, s in zip(
        micro.batch.margins, micro.samples[0::2], strict=True)}  # fmt: skip
    assert seen == {0.5 * i: i for i in range(6)} and len(micros) > 1
    for micro in micros:
        assert torch.equal(micro.rows, micro.ends)  # the end-of-text token itself
        assert (micro.input_ids[micro.rows] == 1).all()


def test_margins_that_are_wrong(place):
    tokenizer = load_tokenizer(place["model"])
    some = rows()
    some[2]["margin"] = None
    with pytest.raises(DataError, match="1 of 6 pairs have no margin"):
        encode_reward(some, tokenizer)
    some[2]["margin"] = True
    with pytest.raises(DataError, match="row 2: margin is True, expected a finite number"):
        encode_reward(some, tokenizer)
    some[2] |= {"margin": 1, "preference": 1.5}
    with pytest.raises(DataError, match="row 2: preference is 1.5, expected a number between 0 and 1"):
        encode_reward(some, tokenizer)


@pytest.mark.parametrize(
    "loss,column,values",
    [("soft_bradley_terry", "preference", (0.9, 0.2)), ("bradley_terry_ties", "tie", (True, False))],
)
def test_columns_that_say_how_sure_a_pair_is(loss, column, values, place, tmp_path):
    made = [{**r, column: values[i % 2]} for i, r in enumerate(rows(margin=False))]
    data = tiny.write(tmp_path / "data" / "train.jsonl", made, ("prompt", "chosen", "rejected", column))
    config = config_of(place, tmp_path / "out", dataset_name=str(data.parent), loss_type=loss, max_tokens_per_device=30)
    stage = build(config, Run(tmp_path, None, [])).stage
    with MetricsLogger(config, 1) as log:
        for micro in stage.collect(log):
            rows_ = [s.fields["row"] for s in micro.samples]
            assert micro.batch.per_sequence[column].tolist() == pytest.approx([float(values[i % 2]) for i in rows_])
    assert len(records(run(config).output_dir, "loss")) == 4
    with pytest.raises(DataError, match=f"needs a column '{column}' in the train split"):
        run(config_of(place, tmp_path / "no", loss_type=loss))


@pytest.mark.parametrize("loss,column", [("verifier", "label"), ("reward_regression", "score")])
def test_single_answers(loss, column, place, tmp_path):
    made = [
        {"prompt": r["prompt"], "completion": r[("rejected", "chosen")[i % 2]], "label": i % 2 == 1, "score": i % 2}
        for i, r in enumerate(tiny.sums(40, 1))
    ]
    data = tiny.write(tmp_path / "data" / "train.jsonl", made, ("prompt", "completion", column))
    config = config_of(place, tmp_path / "out", dataset_name=str(data.parent), loss_type=loss, max_steps=20)
    out = run(config).output_dir
    assert records(out, "loss")[-1] < 0.3 * records(out, "loss")[0]
    small = run(config_of(place, tmp_path / "small", dataset_name=str(data.parent), loss_type=loss, max_steps=2,
                          max_tokens_per_device=20)).output_dir  # fmt: skip
    assert records(small, "loss") == pytest.approx(records(out, "loss")[:2], rel=0.02)
    with pytest.raises(DataError, match=f"{column} is None, expected"):
        other = "score" if column == "label" else "label"
        bad = tiny.write(tmp_path / "bad" / "train.jsonl", made, ("prompt", "completion", other))
        run(config_of(place, tmp_path / "no", dataset_name=str(bad.parent), loss_type=loss))
    with pytest.raises(ConfigError, match="centres pairs"):
        config_of(place, tmp_path / "no", loss_type=loss, center_rewards_coefficient=0.1)


def test_long_pairs_are_dropped_together_and_told(place):
    tokenizer = load_tokenizer(place["model"])
    long = {"prompt": "1+2=", "chosen": "3", "rejected": "9" * 40}
    samples, report = encode_reward([*rows(), long], tokenizer, Limits(max_length=20))
    assert len(samples) == 12 and report.dropped[0].where.endswith("row 6")


def test_the_last_token_is_not_padding():
    assert last_token([5, 6, 7, 0, 0], 0) == 2
    assert last_token([5, 6, 7], None) == 2
    assert last_token([0, 0], 0) == 0


def test_tokens_and_loss_are_those_of_trl(place, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(place["model"])
    torch.manual_seed(0)
    model = load_reward_model(place["model"], tokenizer=tokenizer)
    torch.nn.init.normal_(model.head.weight)
    model.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    args = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        center_rewards_coefficient=0.01, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.RewardTrainer(plain, args, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer)
    samples, _ = encode_reward(rows(), tokenizer)
    theirs = list(trainer.train_dataset)
    assert [s.input_ids for s in samples[0::2]] == [r["chosen_ids"] for r in theirs]
    assert [s.input_ids for s in samples[1::2]] == [r["rejected_ids"] for r in theirs]
    want = trainer.compute_loss(plain.eval(), trainer.data_collator(theirs)).item()
    data = tiny.write(tmp_path / "data" / "test.jsonl", rows(), ("prompt", "chosen", "rejected", "margin"))
    tiny.write(data.parent / "train.jsonl", rows(), ("prompt", "chosen", "rejected", "margin"))
    options = {"dataset_name": str(data.parent), "eval_on_start": True, "center_rewards_coefficient": 0.01}
    config = config_of({**place, "model": tmp_path / "model"}, tmp_path / "out", max_steps=1, **options)
    assert records(run(config).output_dir, "eval_loss") == [pytest.approx(want, rel=1e-5)]


def test_a_setting_without_effect_is_refused(place, tmp_path):
    with pytest.raises(ConfigError, match="label_smoothing 0.1 has no effect with --loss_type r3m"):
        config_of(place, tmp_path, loss_type="r3m", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="r3m_lambda 0.2 has no effect with --loss_type bradley_terry"):
        config_of(place, tmp_path, r3m_lambda=0.2)
    head = tmp_path / "three"
    load_reward_model(place["model"], num_labels=3).model.save_pretrained(head)
    load_tokenizer(place["model"]).save_pretrained(head)
    with pytest.raises(ValueError, match="head of 3 outputs; bradley_terry reads 1"):
        run(config_of({**place, "model": head}, tmp_path / "out"))


def test_the_command(place, tmp_path, capsys):
    flags = [f"--model_name_or_path={place['model']}", f"--dataset_name={place['dpo']}", f"--output_dir={tmp_path}"]
    assert main(["reward", *flags, "--max_steps=1", "--center_rewards_coefficient", "0.1"]) == 0
    assert (tmp_path / "model.safetensors").exists()
    assert main(["reward", "--help"]) == 0
    assert "--center_rewards_coefficient" in capsys.readouterr().out

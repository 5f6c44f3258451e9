"""fastrl prm, end to end on a tiny model: tokens, labels, what it learns and what it saves."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fastrl.data import DataError, Limits
from fastrl.data.scored import encode_steps
from fastrl.models import load_token_classifier, load_tokenizer
from fastrl.train import run
from fastrl.train.config import PRMConfig
from fastrl.train.metrics import MetricsLogger
from fastrl.train.output_dir import Run
from fastrl.train.workbench import build

COLUMNS = ("prompt", "completions", "labels")


def problems(count: int, seed: int, soft: bool = False) -> list[dict]:
    """Sums in steps, each right or visibly wrong (it asks itself)."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.randint(0, 9), draw.randint(0, 9)
        labels = [draw.random() < 0.5 for _ in range(draw.randint(1, 3))]
        steps = [f"{a}+{b}={a + b}" if right else f"{a}+{b}= ?" for right in labels]
        given = [0.9 * x + 0.05 for x in labels] if soft else labels
        rows.append({"prompt": f"{a} {b}", "completions": steps, "labels": given})
    return rows


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("fastrl.train.loop.plot_run", lambda path: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("prm")
    for name, soft in (("hard", False), ("soft", True)):
        tiny.write(root / name / "train.jsonl", problems(40, 1, soft), COLUMNS)
        tiny.write(root / name / "test.jsonl", problems(10, 2, soft), COLUMNS)
    return {"model": tiny.make_model(root / "model"), "hard": root / "hard", "soft": root / "soft"}


def config_of(place: dict, out: Path, **options) -> PRMConfig:
    shared = {
        "model_name_or_path": str(place["model"]),
        "dataset_name": str(place["hard"]),
        "output_dir": str(out),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "step_separator": "c",
    }
    return PRMConfig(**{**shared, **options})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def records(path: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in lines if key in r]


def by_hand(row: dict, tokenizer, separator: str, last_only: bool) -> tuple[list[int], list[int]]:
    """TRL's tokenisation of a row, from its description: ids, and labels with -100 wherever nothing is read."""
    ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    labels = [-100] * len(ids)
    for i, (step, label) in enumerate(zip(row["completions"], row["labels"], strict=True)):
        own = tokenizer(step, add_special_tokens=False)["input_ids"]
        own = own + tokenizer(separator, add_special_tokens=False)["input_ids"]
        read = not last_only or i == len(row["labels"]) - 1
        ids, labels = ids + own, labels + [-100] * (len(own) - 1) + [int(label) if read else -100]
    return ids, labels


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("separator", ["c", " ?"])
def test_tokens_and_labels(separator, last_only, place):
    tokenizer, rows = load_tokenizer(place["model"]), problems(12, 5)
    samples, _ = encode_steps(rows, tokenizer, step_separator=separator, last_step_only=last_only)
    for sample, row in zip(samples, rows, strict=True):
        ids, labels = by_hand(row, tokenizer, separator, last_only)
        assert sample.input_ids == ids
        assert sample.completion_mask == [x != -100 for x in labels]
        assert sample.fields["step_label"] == [float(x) for x in labels if x != -100]


def test_the_head_is_read_at_the_separator_and_told_the_class(place, tmp_path):
    config = config_of(place, tmp_path, max_tokens_per_device=40)
    stage = build(config, Run(tmp_path, None, [])).stage
    separator = load_tokenizer(place["model"])("c")["input_ids"][0]
    with MetricsLogger(config, 1) as log:
        micros = stage.collect(log)
    assert len(micros) > 1
    for micro in micros:
        assert (micro.input_ids[micro.rows] == separator).all()
        assert micro.batch.targets.tolist() == [int(y) for s in micro.samples for y in s.fields["step_label"]]
    assert micros[0].batch.num_tokens == sum(len(m.rows) for m in micros)


def test_long_rows(place):
    tokenizer = load_tokenizer(place["model"])
    row = {"prompt": "1+2", "completions": ["12", "34", "56"], "labels": [True, False, True]}
    rows = [*problems(3, 1), row]
    whole = by_hand(row, tokenizer, "c", False)[0]
    short = [{"prompt": "1", "completions": ["2"], "labels": [True]}]
    cut, report = encode_steps([*short, row], tokenizer, Limits(10, truncation="keep_start"), step_separator="c")
    assert cut[1].input_ids == whole[:10] and cut[1].fields["step_label"] == [1.0, 0.0] and report.truncated == 1
    kept, report = encode_steps([*short, row], tokenizer, Limits(10), step_separator="c")
    assert len(kept) == 1 and len(report.dropped) == 1
    prompt, _ = encode_steps(rows, tokenizer, step_separator="c", max_prompt_length=1)
    assert prompt[3].input_ids == whole[2:]


@pytest.mark.parametrize(
    "row,match",
    [
        ({"prompt": "1", "completions": ["2"]}, r"prm needs \(prompt, completions, labels\)"),
        ({"prompt": "1", "completions": ["2"], "labels": [True, False]}, "expected a list of 1 labels"),
        ({"prompt": "1", "completions": "2", "labels": [True]}, "expected a list of one string a step"),
        ({"prompt": "1", "completions": [], "labels": []}, "expected a list of one string a step"),
        ({"prompt": ["1"], "completions": ["2"], "labels": [True]}, "expected a string"),
        ({"prompt": "1", "completions": ["2"], "labels": [2]}, "neither true or false nor a number between 0 and 1"),
    ],
)
def test_rows_that_are_no_steps(row, match, place):
    with pytest.raises(DataError, match=match):
        encode_steps([row], load_tokenizer(place["model"]))


def test_it_learns_and_transformers_loads_it(place, tmp_path):
    from transformers import AutoModelForTokenClassification

    out = run(config_of(place, tmp_path, max_steps=40, eval_strategy="steps", eval_steps=40)).output_dir
    assert records(out, "accuracy")[-1] > 0.9 and records(out, "eval_accuracy")[-1] > 0.8
    assert records(out, "loss")[-1] < 0.4 * records(out, "loss")[0]
    plain = AutoModelForTokenClassification.from_pretrained(out).eval()
    ours, tokenizer = load_token_classifier(out).eval(), load_tokenizer(out)
    ids = tokenizer("1 23c1+2= ?c", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = plain(ids).logits[0]
        got = ours.values(ids[0], torch.tensor([0, ids.shape[1]]))
    assert plain.config.num_labels == 2 and torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("loss", ["prm_bce", "prm_mse"])
def test_soft_labels(loss, place, tmp_path):
    config = config_of(place, tmp_path / "out", dataset_name=str(place["soft"]), loss_type=loss, max_steps=40)
    out = run(config).output_dir
    assert records(out, "loss")[-1] < records(out, "loss")[0] and records(out, "accuracy")[-1] > 0.8
    with pytest.raises(DataError, match="labels between 0 and 1, which --loss_type prm_class cannot read"):
        run(config_of(place, tmp_path / "no", dataset_name=str(place["soft"])))


def test_the_last_step_alone_is_trained_and_every_one_evaluated(place, tmp_path):
    options = {"train_on_last_step_only": True, "eval_on_start": True}
    stage = build(config_of(place, tmp_path, **options), Run(tmp_path, None, [])).stage
    assert all(len(s.fields["step_label"]) == 1 for [s] in stage.items)
    assert any(len(s.fields["step_label"]) > 1 for [s] in stage.held_out)


def test_exact_resume_and_any_budget(place, tmp_path):
    whole = run(config_of(place, tmp_path / "whole", save_steps=2)).output_dir
    start = str(whole / "checkpoint-2")
    again = run(config_of(place, tmp_path / "again", save_steps=2, resume_from_checkpoint=start)).output_dir
    a, b = weights(whole), weights(again)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    small = run(config_of(place, tmp_path / "small", max_tokens_per_device=20)).output_dir
    assert records(small, "loss") == pytest.approx(records(whole, "loss"), rel=1e-4, abs=1e-6)


def test_a_head_of_three_classes_is_refused(place, tmp_path):
    head = tmp_path / "three"
    load_token_classifier(place["model"], num_labels=3).model.save_pretrained(head)
    load_tokenizer(place["model"]).save_pretrained(head)
    with pytest.raises(ValueError, match="head of 3 classes"):
        run(config_of({**place, "model": head}, tmp_path / "out"))

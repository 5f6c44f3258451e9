"""Rehearsals of the memory benchmarks: the contenders train the same, points are compared rightly, limits are real."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))  # its scripts import each other as they stand there

import asked  # noqa: E402
import long_context  # noqa: E402
import memory  # noqa: E402
import plan_check  # noqa: E402
import tables  # noqa: E402
import trainer_vs_trl  # noqa: E402

LENGTH = 24
TINY = dict(hidden_size=32, num_hidden_layers=2, vocab_size=512, intermediate_size=64, head_dim=16)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("memory")
    trainer_vs_trl.make_model(path / "model", **TINY)
    return path


# -- bench/memory.py ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", memory.STAGES)
def test_both_trainers_take_the_same_loss(work, stage, monkeypatch):
    from fastrl.train.stages.grpo import GRPOStage

    monkeypatch.setattr(GRPOStage, "roll_out", GRPOStage.roll_out)  # put back what run_fastrl replaces
    # TRL takes its rows in an order of its own: all are alike.
    trainer_vs_trl.write_rows(work / "rows.jsonl", memory.make_rows(stage, LENGTH, 1) * 8)
    ours = memory.run_fastrl(stage, LENGTH, work, steps=2)
    theirs = memory.run_trl(stage, LENGTH, work, steps=2)
    assert len(ours[0]) == len(theirs[0]) == 2 and min(ours[0] + theirs[0]) > 0
    assert ours[1][0] == pytest.approx(theirs[1][0], abs=1e-5), stage


def test_rows_have_the_length_they_should(work):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    for stage, answers in (("sft", ("completion",)), ("dpo", ("chosen", "rejected"))):
        for row in memory.make_rows(stage, LENGTH, 3):
            for answer in answers:
                assert len(tokenizer(row["prompt"] + row[answer])["input_ids"]) == LENGTH - 1  # and its end


def test_points_are_compared_and_drawn(tmp_path):
    contenders = {
        "fastrl": {"median_s": 1.0, "tokens_per_s": 512.0, "peak_over_model_mib": 50.0, "losses": [2.0]},
        "trl": {"median_s": 8.0, "tokens_per_s": 64.0, "peak_over_model_mib": 500.0, "losses": [2.25]},
        "liger": {"not_run": "no GPU"},
    }
    made = memory.compared(contenders)
    assert made == {"speedup": 8.0, "memory_ratio": 0.1, "first_loss_gap": 0.25}
    assert memory.compared({"fastrl": contenders["fastrl"], "trl": {"not_run": "x"}}) == {}
    points = [{"stage": "sft", "length": n, "contenders": contenders} for n in (256, 512)]
    assert [p.name for p in memory.draw(points, tmp_path)] == ["memory_peak.png", "memory_speed.png"]


def test_asked_lines_hold_or_are_missed():
    stages = {"sft": {"speedup": 6.5, "memory_ratio": 0.3}}
    rows = {line.text: line.row(line.read(stages)) for line in asked.TRAINER}
    verdicts = [row["held"] for row in rows.values()]
    assert verdicts == [True, False, None, None]


# -- bench/long_context.py ---------------------------------------------------------------------------------------------
class Pretend:
    """An update that fits up to `limit` tokens."""

    def __init__(self, limit: int):
        self.limit, self.device = limit, argparse.Namespace(type="cpu")

    def run(self, tokens: int) -> None:
        if tokens > self.limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def forget(self) -> None: ...


@pytest.mark.parametrize("guess", [300, 5000, 9000])
def test_bisection_finds_the_longest(guess):
    found = long_context.bisect(Pretend(5000), guess, float("inf"))
    assert found["tokens"] <= 5000 < found["least_too_many"]
    assert found["least_too_many"] <= found["tokens"] * long_context.CLOSE + 16
    assert len(found["tries"]) <= 20


def test_other_errors_are_not_taken_for_want_of_memory():
    class Broken(Pretend):
        def run(self, tokens: int) -> None:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        long_context.bisect(Broken(1), 100, float("inf"))


def test_a_real_limit_is_met(tmp_path):
    """A tiny shape under a real limit of the address space, bisected in a process of its own."""
    out = tmp_path / "x.json"
    words = [sys.executable, str(ROOT / "bench/long_context.py"), "--rehearse", "--threads", "1", "--out", str(out)]
    done = subprocess.run(
        [*words, "--only", "full, ch", "--budget-s", "25"], capture_output=True, text=True, timeout=80
    )
    assert done.returncode == 0, done.stderr
    (rung,) = json.loads(out.read_text())["rungs"]
    tries = rung["tries"]
    assert any(t["fits"] for t in tries) and any(not t["fits"] for t in tries), rung
    assert rung["tokens"] == max(t["tokens"] for t in tries if t["fits"])


# -- tables ------------------------------------------------------------------------------------------------------------
def test_records_become_tables():
    environment = {
        "device": "a CPU",
        "threads": 2,
        "versions": {"trl": "1.16"},
        "git_commit": "",
        "uncommitted_changes": 0,
    }
    row = {"median_s": 1.0, "tokens_per_s": 512.0, "peak_over_model_mib": 50.0, "losses": [2.0]}
    point = {"stage": "sft", "length": 256, "contenders": {"fastrl": row, "trl": {"not_run": "x"}}}
    line = {"line": "SFT step", "asked": ">= 6", "measured": 7.0, "held": True}
    common = {"command": "python bench/x.py", "environment": environment}
    memory_record = {"bench": "memory", "points": [point], "lines": [line], "model": {}, **common}
    assert "512 tokens/s" in tables.memory(memory_record, "m.json") and "holds" in tables.memory(
        memory_record, "m.json"
    )
    case = {"case": "sft", "tokens": 9, "measured_mib": 100.0, "planned_mib": 95.0, "error": -0.05, "phase": "update"}
    check = {"bench": "plan_check", "cases": [case], "limit": 0.1, "kib_a_token": {"measured": 2.0, "planned": 2.1}}
    assert "-5.0%" in tables.plan_check(check | common, "p.json")
    rung = {"name": "full", "shape": "8B", "stage": "grpo", "cap": 80, "flags": {"tiled_mlp": "auto"}, "asked": 65536}
    rungs = [rung | {"tokens": 70000, "planned_tokens": 72000, "held": True}, rung | {"not_run": "no time"}]
    shown = tables.long_context({"bench": "long_context", "rungs": rungs, **common}, "l.json")
    assert "70,000" in shown and "no time" in shown


def test_cases_cover_what_is_asked():
    assert {c.stage for c in plan_check.CASES} == {"sft", "dpo", "grpo"} and len(plan_check.CASES) >= 5

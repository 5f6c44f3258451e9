"""Numbers of a run: how they add up, survive a resume, are drawn; and the optimizer step they report on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from fastrl.train import ConfigError, SFTConfig
from fastrl.train.checkpoint import TrainerState
from fastrl.train.display import Display, duration, summary
from fastrl.train.metrics import MetricsLogger, cut_metrics, read_metrics
from fastrl.train.optim import NonFiniteError, Schedule, StepGuard, build_optimizer, decay_names, global_norm
from fastrl.train.plots import PANELS, plot_run, quickstart_figure, smoothed


def config(tmp_path, **changes):
    return SFTConfig(model_name_or_path="m", dataset_name="d", output_dir=str(tmp_path), **changes)


class Silent(Display):
    def __init__(self):
        super().__init__("sft", 10)
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def logger(tmp_path, resume=None, **changes):
    return MetricsLogger(config(tmp_path, **changes), 10, resume=resume, display=Silent())


# -- how numbers add up --------------------------------------------------------------------------------------------
def test_kinds_of_numbers(tmp_path):
    with logger(tmp_path, logging_steps=2.0, logging_first_step=False) as log:
        for step in (1, 2):
            for part in (0.25, 0.5):  # two micro-batches whose parts add up
                log.add({"loss": torch.tensor(part * step, requires_grad=True)})
                log.add_max({"longest": torch.tensor(10.0 * step + part)})
                log.add_min({"shortest": 10.0 * step + part})
                log.add_mean({"reward": part})
                log.count_tokens(50)
            if step == 2:
                log.add({"rare": 4.0})
            with log.timing("gen"), log.timing("inner"):
                pass
            record = log.end_step(step, step / 4, {"learning_rate": step * 1e-3, "grad_norm": torch.tensor(2.0)})
            assert (record is None) == (step == 1)
    assert record["loss"] == 0.75 * 1.5 and record["rare"] == 4.0 and record["reward"] == 0.375
    assert record["longest"] == 20.5 and record["shortest"] == 10.25
    assert (record["learning_rate"], record["grad_norm"], record["num_tokens"]) == (2e-3, 2.0, 200)
    assert 0 <= record["timing_s/gen"] < 1 and record["perf/max_memory_rss_gb"] > 0.05
    assert record["perf/throughput"] == pytest.approx(200 / (2 * record["step_time"]), rel=1e-9)
    assert read_metrics(tmp_path) == [json.loads(json.dumps(record))] and log.history == [record]


def test_extremes_keep_a_nan():
    from fastrl.train.metrics import Interval

    interval = Interval()
    for value in (1.0, math.nan, 3.0):
        interval.add_extreme(interval.maxima, "x", value, larger=True)
        interval.add_extreme(interval.minima, "y", torch.tensor(value), larger=False)
    assert math.isnan(interval.results()["x"]) and math.isnan(interval.results()["y"])


def test_not_finite_is_null_and_the_file_is_strict_json(tmp_path):
    with logger(tmp_path, logging_steps=1.0) as log:
        log.add({"loss": math.nan, "kl": math.inf})
        log.end_step(1, 0.1)
        log.eval(1, 0.1, {"eval_loss": torch.tensor(2.0)})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=lambda c: pytest.fail(f"{c} in strict JSON"))
    assert first["loss"] is None and first["kl"] is None and json.loads(lines[1])["eval_loss"] == 2.0


def play(log, first, last):
    for step in range(first, last + 1):
        log.add({"loss": torch.tensor(1 / (3 + step))})
        log.add_mean({"reward": 1 / 7 * step})
        log.add_max({"longest": float(-step)})
        log.count_tokens(7)
        log.end_step(step, step / 10, {"learning_rate": 0.1 * step})


def stable(records):
    clocked = ("timing_s/", "perf/", "step_time")
    return [{k: v for k, v in r.items() if not k.startswith(clocked)} for r in records]


@pytest.mark.parametrize("saved_at", range(1, 10))
def test_a_resumed_run_writes_the_same_records(tmp_path, saved_at):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with logger(whole, logging_steps=4.0) as log:
        play(log, 1, 10)
    with logger(cut, logging_steps=4.0) as log:
        play(log, 1, saved_at)
        state = TrainerState(step=saved_at, num_tokens=log.num_tokens, metrics=json.loads(json.dumps(log.state_dict())))
        play(log, saved_at + 1, 10)  # beyond the checkpoint: to be cut
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "lo')  # and the kill came in the middle of a line
    with logger(cut, resume=state, logging_steps=4.0) as log:
        play(log, saved_at + 1, 10)
    assert stable(read_metrics(cut)) == stable(read_metrics(whole))
    assert [r["step"] for r in read_metrics(whole)] == [1, 4, 8, 10]


def test_reading_names_the_bad_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2 is not JSON"):
        read_metrics(path)
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(ValueError, match=":2 is not a record"):
        read_metrics(path)
    cut_metrics(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


# -- what is shown ---------------------------------------------------------------------------------------------------
def test_lines_show_the_numbers_that_matter(tmp_path):
    with logger(tmp_path, logging_steps=1.0) as log:
        log.add({"loss": 1.25, "reward": 0.5, "kl": 0.0, "entropy": 2.0, "obscure": 1.0})
        log.end_step(1, 0.1, {"learning_rate": 1e-5})
        log.note("a", "b")
    line, *rest = log._display.lines
    assert line.startswith("sft 1/10  loss 1.25  reward 0.5  kl 0  entropy 2  lr 1.0e-05  tok/s 0  eta 0:")
    assert rest == ["a", "b"] and "obscure" not in line
    assert summary({"eval_loss": 1.0, "loss": math.nan}) == "loss nan  eval_loss 1" and duration(3725.2) == "1:02:05"


def test_the_bar_runs_without_a_terminal(capsys):
    from fastrl.train.display import BarDisplay

    bar = BarDisplay("grpo", 4)
    bar.start()
    bar.advance(1, {"loss": 1.0})
    bar.note("[not markup] seen")
    bar.show({"step": 1, "eval_loss": 3.0}, "eval")
    bar.stop()
    shown = capsys.readouterr().err
    assert "[not markup] seen" in shown and "eval_loss 3" in shown and "1/4" in shown


def test_tensorboard_gets_the_records(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with logger(tmp_path, logging_steps=1.0, report_to=["tensorboard"]) as log:
        log.add({"loss": 1.25})
        log.end_step(1, 0.1)
        log.eval(1, 0.1, {"eval_loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("train/loss")[0].value == 1.25 and events.Scalars("eval/loss")[0].step == 1


def test_a_missing_tracker_is_named(tmp_path, monkeypatch):
    from fastrl.train import trackers

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--report_to wandb: wandb is not installed; pip install wandb"):
        logger(tmp_path, report_to=["wandb"])
    logger(tmp_path, report_to=["all"])  # those that are there: none


# -- pictures --------------------------------------------------------------------------------------------------------
def test_plots_of_what_was_recorded(tmp_path):
    assert plot_run(tmp_path) == []
    records = [{"step": s, "loss": 1 / s, "reward": None if s == 5 else s / 20} for s in range(1, 21)]
    records.append({"step": 20, "eval_loss": 0.05})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    written = plot_run(tmp_path)
    assert [p.name for p in written] == ["reward.png", "loss.png", "overview.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.parent.name == "plots" for p in written)
    again = [p.read_bytes() for p in written]
    assert [p.read_bytes() for p in plot_run(tmp_path)] == again  # same records, same bytes
    assert len({p.name for p in PANELS}) == len(PANELS)
    figure = quickstart_figure(tmp_path / "q.png", {"before": 0.0, "after SFT": 0.4}, records, records, "seed 0")
    assert figure.stat().st_size > 10_000


def test_smoothing_is_exact_on_constants_and_has_no_lag():
    assert smoothed([2.0] * 9, 0.8) == pytest.approx([2.0] * 9)
    line = smoothed(list(range(101)), 0.8)
    assert line[50] == pytest.approx(50, abs=1e-3) and smoothed([], 0.8) == []


# -- the optimizer ---------------------------------------------------------------------------------------------------
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 7)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.odd_norm = torch.nn.LayerNorm((4, 4))


def test_decay_is_for_matrices_that_are_no_norm(tmp_path):
    net = Net()
    assert decay_names(net) == {"embed.weight", "head.weight", "frozen.weight"}
    optimizer = build_optimizer(net, config(tmp_path, weight_decay=0.1, adam_beta2=0.95))
    decayed, plain = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [net.embed.weight.shape, net.head.weight.shape]
    assert (decayed["weight_decay"], plain["weight_decay"], plain["betas"]) == (0.1, 0.0, (0.9, 0.95))
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in net.parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="no parameter"):
        build_optimizer(net.requires_grad_(False), config(tmp_path))


WARMUPS = [({}, 0), ({"warmup_ratio": 0.25}, 3), ({"warmup_steps": 3.0}, 3), ({"warmup_steps": 0.1}, 2)]
WARMED = [(k, *w) for k in ("linear", "cosine", "constant_with_warmup") for w in WARMUPS]


@pytest.mark.parametrize(("kind", "warmup", "n"), [("constant", {}, 0), *WARMED])
def test_schedules_are_transformers(tmp_path, kind, warmup, n):
    schedule = Schedule.from_config(config(tmp_path, lr_scheduler_type=kind, learning_rate=0.5, **warmup), 11)
    assert schedule.warmup == n
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    if kind not in make:
        assert [schedule.lr(s) for s in range(11)] == [0.5 * min(1.0, s / n if n else 1.0) for s in range(11)]
        return
    theirs = make[kind](optimizer, n, 11)
    for step in range(11):
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
        optimizer.step(), theirs.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_global_and_wide(dtype):
    torch.manual_seed(0)
    gradients = [torch.randn(300, 50).to(dtype), torch.randn(7).to(dtype) * 100]
    truth = math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients))
    norm = global_norm(gradients)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.item() == pytest.approx(truth, rel=1e-6 if dtype != torch.float64 else 1e-14)
    assert global_norm([]).item() == 0


def guarded(max_norm=1.0, limit=3, size=4):
    p = torch.nn.Parameter(torch.ones(size))
    q = torch.nn.Parameter(torch.ones(2))
    return p, q, StepGuard(torch.optim.AdamW([p, q], lr=0.1), [("p", p), ("q", q)], max_norm, limit)


def test_clipping_is_torchs():
    for max_norm in (0.5, 100.0, 0.0):
        p, q, guard = guarded(max_norm)
        reference = [torch.nn.Parameter(x.detach().clone()) for x in (p, q)]
        optimizer = torch.optim.AdamW(reference, lr=0.01)
        for _ in range(3):
            for x, y in zip((p, q), reference, strict=True):
                x.grad = torch.randn(x.shape)
                y.grad = x.grad.clone()
            norm = torch.nn.utils.clip_grad_norm_(reference, max_norm or math.inf)
            optimizer.step()
            outcome = guard.step(lr=0.01)
            assert outcome.grad_norm == pytest.approx(norm.item(), rel=1e-6) and not outcome.skipped
        assert guard.lr == 0.01 and p.grad is None
        for x, y in zip((p, q), reference, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_moves_nothing(bad):
    p, q, guard = guarded(limit=3)
    p.grad, q.grad = torch.ones(4), torch.ones(2)
    guard.step(0.1)
    before = [p.detach().clone(), q.detach().clone()]
    moments = {k: v.clone() for k, v in guard.optimizer.state[q].items()}
    for _ in range(2):
        p.grad, q.grad = torch.ones(4), torch.tensor([1.0, bad])
        outcome = guard.step(0.1)
        assert outcome.skipped and outcome.culprits == ["q"] and not math.isfinite(outcome.grad_norm)
    assert torch.equal(p, before[0]) and torch.equal(q, before[1]) and p.grad is None
    assert all(torch.equal(moments[k], v) for k, v in guard.optimizer.state[q].items())
    p.grad = torch.ones(4)
    assert not guard.step(0.1).skipped and guard.in_a_row == 0 and guard.skipped == 2
    for i in range(3):
        p.grad = torch.full((4,), bad)
        if i < 2:
            guard.step(0.1)
    with pytest.raises(NonFiniteError, match="3 steps in a row.*in 1 parameters: p"):
        guard.step(0.1)


def test_skipped_steps_are_recorded(tmp_path):
    p, _, guard = guarded()
    p.grad = torch.full((4,), math.nan)
    with logger(tmp_path, logging_steps=1.0) as log:
        log.skipped(guard.step(0.1))
        record = log.end_step(1, 0.1)
    assert record["skipped_steps"] == 1 and "non-finite: p" in log._display.lines[0]

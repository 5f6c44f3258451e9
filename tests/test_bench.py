"""What is timed is right: every contender against float64. Then the measuring itself, the command, tables and plots."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastrl.bench import machine, measure, plots, report, rivals
from fastrl.bench.problems import (
    LOSSES,
    SEQUENCES,
    WHATS,
    Case,
    losses_of,
    make_data,
    make_problem,
    mean_loss,
    truth64,
)
from fastrl.cli import main

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))  # its scripts import each other as they stand there

import asked  # noqa: E402
import gpu  # noqa: E402
import sweep  # noqa: E402
import tables  # noqa: E402
import tile_search  # noqa: E402

SHAPE = dict(rows=64, hidden=24, vocabulary=331)
CASES = [(what, loss) for what in WHATS for loss in LOSSES if loss in losses_of(what)]
EAGER = ",".join(name for name, c in rivals.CONTENDERS.items() if not c.compiles)
ONCE = measure.Options(rounds=1, threads=1, only=EAGER, memory=False)


def entries_of(*whats: str, only: str = EAGER, loss: str = "ppo_clip") -> list[dict]:
    options = measure.Options(rounds=1, threads=1, only=only, memory=False)
    return measure.measure([Case(what=what, loss=loss, **SHAPE) for what in whats], options)


def wrong(entry: dict, times: float = 3.0) -> list[str]:
    """Contenders with an error above `times` that of materialised torch and a few roundings of float32."""
    plain = entry["contenders"]["naive log_softmax"]["error_vs_float64"]
    found = []
    for name, row in report.ran(entry).items():
        found += [f"{name}: {e}" for e, x in row["error_vs_float64"].items() if not x <= times * plain[e] + 1e-6]
    return found


# -- what is timed -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", LOSSES)
def test_every_contender_computes_the_same(loss):
    whats = [what for what, of in CASES if of == loss]
    for entry in entries_of(*whats, loss=loss):
        assert wrong(entry) == [], entry["title"]
        wanted = {"logprobs": True, "d_hidden": entry["what"] != "forward"}
        wanted["d_weight"] = entry["what"] not in ("forward", "frozen")
        for name in ("fastrl", "naive log_softmax"):
            found = entry["contenders"][name]["error_vs_float64"]
            assert {n: f"{n}_relative_l2" in found for n in wanted} == wanted, name
        assert entry["floor"]["median_s"] > 0 and entry["contenders"]["fastrl"]["tflops"] > 0


def test_compiled_torch_and_every_strategy_compute_the_same():
    data = make_data(Case(**SHAPE))
    for strategy in (None, "one_pass", "two_pass", "cached"):
        case = Case(strategy=strategy, **SHAPE)
        names = ["fastrl", "naive log_softmax", *(["naive torch.compile"] if strategy is None else [])]
        entry, ready = measure.prepare(case, make_problem(case, data), names, ONCE)
        assert wrong(entry) == [] and "fastrl" in ready


@pytest.mark.parametrize("fault", ["targets", "no mask", "sign", "scale"])
def test_a_contender_that_computes_something_else_is_seen(monkeypatch, fault):
    def law(case):
        def run(problem, hidden, weight):
            targets = problem.data.targets.roll(1) if fault == "targets" else problem.data.targets
            logprobs = rivals.gathered(hidden, weight, targets)
            if fault == "no mask":
                return -logprobs.mean(), logprobs
            loss = mean_loss(logprobs, problem)
            return {"sign": -loss, "scale": 1.01 * loss}.get(fault, loss), logprobs

        return run

    monkeypatch.setitem(rivals.CONTENDERS, "planted", rivals.Contender(law))
    (entry,) = entries_of("masked", only="naive log_softmax,planted", loss="nll")
    assert any(line.startswith("planted") for line in wrong(entry))


@pytest.mark.parametrize(("what", "loss"), CASES)
def test_the_truth_is_autograd_through_materialised_logits(what, loss):
    case = Case(what=what, loss=loss, **SHAPE)
    problem = make_problem(case, make_data(case))
    hidden, weight = (x.double().requires_grad_() for x in (problem.data.hidden, problem.data.weight))
    logprobs = rivals.gathered(hidden, weight, problem.data.targets)
    truth = truth64(problem)
    torch.testing.assert_close(truth.pop("logprobs"), logprobs.detach(), rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(mean_loss(logprobs, problem), (hidden, weight))
    wanted = {"forward": [], "frozen": ["d_hidden"]}.get(what, ["d_hidden", "d_weight"])
    assert list(truth) == wanted
    for name, grad in zip(wanted, grads, strict=False):
        torch.testing.assert_close(truth[name], grad, rtol=1e-9, atol=1e-14)


def test_three_quarters_are_masked_zero_or_clipped():
    data = make_data(Case(**SHAPE))
    made = {what: make_problem(Case(what=what, **SHAPE), data) for what in WHATS}
    assert made["masked"].mask.sum() == 16 and made["zero"].mask.all()
    assert (made["zero"].token_advantages == 0).sum() == 48 and made["zero"].active.sum() == 16
    assert made["clipped"].clipped == 0.75 and made["head"].clipped < 0.05
    logprobs = data.logprobs.detach().requires_grad_()
    (c,) = torch.autograd.grad(mean_loss(logprobs, made["clipped"]), logprobs)
    assert (c == 0).sum() == 48
    assert made["head"].data is made["zero"].data and made["head"].advantages.shape == (SEQUENCES,)


def test_the_floor_counts_the_gemms_that_nobody_can_avoid():
    rows = {what: Case(what=what, **SHAPE).gemm_rows for what in WHATS}
    assert rows == {
        "head": (64, 64, 64), "forward": (64, 0, 0), "frozen": (64, 64, 0), "tokens": (64, 64, 64),
        "masked": (16, 16, 16), "zero": (16, 16, 16), "clipped": (64, 16, 16),
    }  # fmt: skip
    assert Case(**SHAPE).flop == 2 * 3 * 64 * 24 * 331


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (dict(what="backward"), "head, forward"),
        (dict(loss="kto"), "ppo_clip, nll, dpo"),
        (dict(rows=30), "multiple of 32"),
        (dict(what="clipped", loss="nll"), "ppo_clip"),
        (dict(vocabulary=1), "vocabulary"),
    ],
)
def test_a_case_that_does_not_exist_is_refused(bad, text):
    with pytest.raises(ValueError, match=text):
        Case(**bad)


# -- rivals that are not there -----------------------------------------------------------------------------------------
def test_a_missing_rival_is_listed_with_its_reason(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else real(name, *rest))
    (entry,) = entries_of("head", only="fastrl,TRL,quack,naive log_softmax")
    assert set(entry["contenders"]) == {"fastrl", "TRL chunked head", "quack", "naive log_softmax"}
    shown = report.text(entry)
    assert "TRL chunked head: not run; not installed: pip install 'fastrl[bench]'" in shown
    assert "quack: not run; has no clipped policy loss" in shown


def test_a_rival_that_fails_is_listed_and_the_others_are_measured(monkeypatch):
    def broken(case):
        raise RuntimeError("needs sm_90\nand more")

    monkeypatch.setitem(rivals.CONTENDERS, "broken", rivals.Contender(broken))
    (entry,) = entries_of("head", only="broken,naive log_softmax")
    assert entry["contenders"]["broken"] == {"not_run": "RuntimeError: needs sm_90"}
    assert "median_s" in entry["contenders"]["naive log_softmax"]


def test_a_fault_of_fastrl_itself_is_raised():
    with pytest.raises(ValueError, match="strategy"):
        measure.measure([Case(strategy="three_pass", **SHAPE)], ONCE)


def test_no_contender_is_ever_left_out():
    for what, loss in CASES:
        case = Case(what=what, loss=loss, **SHAPE)
        for name in rivals.CONTENDERS:
            assert rivals.reason(name, case) is None or len(rivals.reason(name, case)) > 10
    with pytest.raises(ValueError, match="fits no contender"):
        rivals.names_of("megatron")
    assert rivals.names_of("fastrl") == ["fastrl"] and rivals.names_of("trl") == ["TRL chunked head"]
    assert len(rivals.names_of("liger")) >= 4


# -- measuring ---------------------------------------------------------------------------------------------------------
def test_calls_take_turns_and_stop_at_the_deadline():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = machine.alternate(calls, 3, limit=None)
    assert order == list("ab" * 4) and all(len(s) == 3 for s in seconds.values())
    late = machine.alternate(calls, 3, limit=None, deadline=time.monotonic() - 1)
    assert all(len(s) == 1 for s in late.values())


def test_a_disturbed_call_is_timed_again(monkeypatch):
    # (clock, CPU seconds of all, of this process): first others use a whole core, then nobody does.
    ticks = iter([(0, 0, 0), (1, 2, 1), (2, 2, 1), (3, 3, 2)])
    monkeypatch.setattr(machine, "cpu_seconds", lambda: next(ticks))
    monkeypatch.setattr(machine, "wait_until_quiet", lambda limit: None)
    assert machine.undisturbed(iter(["first", "second"]).__next__, 0.2) == "second"
    assert machine.disturbance((0, 0, 0), (0.01, 0.06, 0)) == 0.0  # ticks of 10 ms say nothing of 10 ms


def test_a_slow_rival_is_cut_short():
    with pytest.raises(TimeoutError), machine.time_limit(0.05):
        time.sleep(5)
    with machine.time_limit(None):
        pass


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_sees_the_logits():
    """[N, V] float32 is 24 MiB here: materialised it stands there twice at least, chunked far from it."""
    case = dict(rows=384, hidden=8, vocabulary=16384)
    peaks = {}
    for name in ("naive log_softmax", "fastrl"):
        arguments = [json.dumps({"name": name, **case})]
        peaks[name] = machine.in_subprocess("fastrl.bench.peak", arguments, threads=1)
    assert peaks["naive log_softmax"]["beyond_mib"] > 47
    assert peaks["fastrl"]["returned_mib"] == pytest.approx((384 * 8 + 16384 * 8 + 384) * 4 / 2**20, abs=0.1)
    assert 0 <= peaks["naive log_softmax"]["extra_peak_mib"] - peaks["naive log_softmax"]["returned_mib"]


# -- the command -------------------------------------------------------------------------------------------------------
def test_the_command_prints_tables_and_writes_record_and_plot(tmp_path, capsys):
    flags = "--what all --rows 32 --hidden 16 --vocabulary 96 --rounds 1 --threads 1 --no-memory".split()
    files = ["--out", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.png")]
    assert main(["bench", *flags, "--only", "fastrl,naive log_softmax,quack", *files]) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "r.json").read_text())
    assert [entry["what"] for entry in record["cases"]] == list(WHATS)
    assert shown.count("bare:") == len(WHATS) and "quack: not run;" in shown and "of floor" in shown
    assert record["command"].startswith("fastrl bench --what all") and str(tmp_path / "r.json") not in record["command"]
    assert record["environment"]["versions"]["torch"] and (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["bench", "--rows", "30"]) == 2 and "multiple of 32" in capsys.readouterr().err


def test_help_names_the_command_and_loads_no_torch():
    code = "import sys; from fastrl.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "fastrl bench" in done.stdout, done.stderr


# -- scripts, tables, plots --------------------------------------------------------------------------------------------
def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench" / name), *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environ)


def test_the_pytest_benchmark_suite_runs():
    small = dict(BENCH_ROWS="32", BENCH_HIDDEN="16", BENCH_VOCABULARY="96")
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_kernels.py", "--benchmark-disable"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **small}, capture_output=True, text=True)
    assert done.returncode == 0 and "16 passed" in done.stdout, done.stdout[-2000:]


def test_must_hold_and_tables_work_together(tmp_path):
    common = ["--scale", "64", "--rounds", "1", "--threads", "1", "--quiet", "0", "--no-memory"]
    done = script("must_hold.py", *common, "--out", str(tmp_path / "kernels_cpu_float32.json"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "kernels_cpu_float32.json").read_text())
    assert [row["key"] for row in record["lines"]] == [line.key for line in asked.CPU]
    by_text = {(row["shape"], row["line"]): row for row in record["lines"]}
    for line in asked.CPU:
        row = by_text[line.shape, line.text]
        no_liger = line.against == "Liger GRPO" and importlib.util.find_spec("liger_kernel") is None
        assert (row["measured"] is None) == (line.against == "memory" or no_liger), row
    text = tables.holds([("x.json", record)])
    assert "not measured" in text and record["command"] not in text  # a rehearsal is no measurement
    text = tables.holds([("x.json", {**record, "scale": 1})])
    shown = next(row for row in record["lines"] if row["measured"] is not None)
    assert f"{shown['measured']:.4g} x" in text and record["command"] in text
    assert text.count("bfloat16 |") == len(asked.GPU) and "GPU (bfloat16) rows: not measured" in text
    cases = tables.every_case([("x.json", {**record, "scale": 1})])
    assert cases.count("bare:") == len(record["cases"]) and "(../bench/results/x.json)" in cases


def test_the_sweep_is_measured_and_drawn(tmp_path, monkeypatch):
    small = [dict(rows=32, hidden=16, vocabulary=64), dict(rows=64, hidden=16, vocabulary=128)]
    monkeypatch.setattr(sweep, "AXES", {"rows": small, "vocabulary": small})
    flags = ["--rounds", "1", "--threads", "1", "--quiet", "0", "--no-memory"]
    files = ["--out", str(tmp_path / "s.json"), "--plots", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *flags, *files])
    sweep.main()
    record = json.loads((tmp_path / "s.json").read_text())
    (by_rows, by_vocabulary) = sweep.panels(record, "head_time")
    assert [line.name for line in by_rows.lines][:2] == ["fastrl", "naive log_softmax"]
    assert list(by_rows.lines[0].x) == [32, 64] and list(by_vocabulary.lines[0].x) == [64, 128]
    assert by_rows.lines[0].y[0] == record["axes"]["rows"][0]["contenders"]["fastrl"]["median_s"]
    for picture in sweep.PICTURES:
        assert 1000 < (tmp_path / f"{picture}.png").stat().st_size < 120_000


@pytest.mark.parametrize(
    ("value", "least", "held"), [(1.0, False, True), (1.2, False, False), (1.2, True, True), (None, True, None)]
)
def test_a_line_holds_on_its_own_side(value, least, held):
    row = asked.Asked("a", "text", "main", "head", "gemms", 1.1, least).row(value)
    assert row["held"] is held and asked.shown(row)[3] == ("not measured" if value is None else f"{value:g} x")


def test_the_pages_in_the_repository_fit_a_record_of_every_kind(tmp_path):
    """tables.py over a copy of the pages and the committed records: nothing to do, and idempotent."""
    (tmp_path / "docs").mkdir()
    for page in tables.PAGES:
        (tmp_path / page).write_text((ROOT / page).read_text())
    for _ in range(2):
        assert script("tables.py", "--root", str(tmp_path)).returncode == 0
        assert script("tables.py", "--root", str(tmp_path), "--check").returncode == 0
    page = tmp_path / "README.md"
    page.write_text(re.sub(r"\| bare: three GEMMs \| [\d.]+ s", "| bare: three GEMMs | 9.99 s", page.read_text()))
    assert script("tables.py", "--root", str(tmp_path), "--check").returncode == 1


def test_bars_are_drawn_for_contenders_that_ran(tmp_path):
    (entry,) = entries_of("head", only="fastrl,naive log_softmax,quack")
    assert plots.floor_bars([entry], tmp_path / "bars.png").stat().st_size > 1000


# -- the script for a GPU ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_gpu_script_runs_in_the_interpreter(tmp_path):
    out = tmp_path / "gpu.json"
    done = script("gpu.py", "--interpret", "--rounds", "1", "--threads", "1", "--out", str(out), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert record["measured"] is False and {p["ended"] for p in record["phases"].values()} == {"completed"}
    checked = record["phases"]["correctness"]["rows"]
    assert len(checked) == 8 and all(row["ratios"]["held"] for row in checked), checked
    rows = record["phases"]["tiles"]["rows"]
    assert {r["kernel"] for r in rows} == set(tile_search.KERNELS) and not [r for r in rows if "not_run" in r]
    assert set(record["best_tiles"]) == {"LINEAR_STATS", "LINEAR_DLOGITS", "ROWS"}
    for label in ("wide", "narrow"):
        assert [(e["what"], e["loss"]) for e in record["phases"][label]["rows"]] == list(gpu.CASES)
    assert {row["measured"] for row in record["lines"]} == {None} and len(record["lines"]) > len(asked.GPU)
    assert "not measured" in tables.holds([("gpu.json", record)])
    as_if = {**record, "measured": True, "lines": [{**row, "measured": 1.0, "held": True} for row in record["lines"]]}
    assert "bfloat16) rows: not measured" not in tables.holds([("gpu.json", as_if)])
    assert "`Tile(" in tables.every_case([("gpu.json", as_if)])


def test_without_time_every_phase_says_so(tmp_path):
    out = tmp_path / "gpu.json"
    assert script("gpu.py", "--interpret", "--budget-s", "1", "--out", str(out)).returncode == 1
    record = json.loads(out.read_text())
    assert len(record["phases"]) == 4 and all("time" in p["ended"] for p in record["phases"].values())


def test_a_tile_that_gives_other_numbers_is_not_taken(monkeypatch):
    first = tile_search.candidates(tile_search.KERNELS["row_stats"], "interpreter", True)[0]
    faulty = tile_search.Kernel(
        "ROWS", False, lambda x, tile: torch.ones(3) * (1 if tile == first else 1.5), lambda x: 1.0, "TB/s"
    )
    monkeypatch.setattr(tile_search, "KERNELS", {"row_stats": faulty})
    inputs = tile_search.make_inputs(dict(rows=4, hidden=8, vocabulary=16), "cpu", torch.bfloat16)
    rows = tile_search.search(inputs, "interpreter", time.monotonic() + 60, small=True)
    assert "median_s" in rows[0] and all("differs from the table's tile" in r["not_run"] for r in rows[1:]) and rows[1:]
    late = tile_search.search(inputs, "interpreter", time.monotonic() - 1, small=True)
    assert all("time" in row["not_run"] for row in late)
    for tile in (*tile_search.LINEAR, *tile_search.ROW):
        assert tile_search.parsed(tile_search.shown(tile)) == tile
    assert tile_search.best([rows, rows]) == {"ROWS": tile_search.shown(first)}

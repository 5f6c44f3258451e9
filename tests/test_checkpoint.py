"""Checkpoints are whole or not there: kills, full disks, tampering, and exact round trips."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl.train import SFTConfig, checkpoint, durable
from fastrl.train.checkpoint import (
    CheckpointError,
    TrainerState,
    find_checkpoint,
    is_complete,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_final,
)
from fastrl.train.output_dir import OutputDirError, StopRequest, start_run

ROOT = Path(__file__).resolve().parents[1]


def make(seed: int = 0, steps: int = 3, width: int = 4):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.LayerNorm(width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        advance(model, optimizer)
    return model, optimizer


def advance(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(5, 3)).pow(3).sum().backward()
    optimizer.step()


def saver_of(model):
    def save(directory):
        save_file(dict(model.state_dict()), directory / "model.safetensors")
        (directory / "config.json").write_text("{}")

    return save


def save(path, model, optimizer, step, **options):
    return save_checkpoint(
        path, TrainerState(step=step), saver_of(model), optimizer, model.named_parameters(), **options
    )


def bits(optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {(i, k): v.clone() for i, p in enumerate(parameters) for k, v in optimizer.state[p].items()}


# -- round trips ---------------------------------------------------------------------------------------------------
def test_training_goes_on_bitwise_after_a_resume(tmp_path):
    model, optimizer = make()
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator), random.random(), numpy.random.rand()
    path = save(tmp_path, model, optimizer, 3, generators={"sampler": generator})
    expect_draws = torch.rand(4), torch.rand(4, generator=generator), random.random(), numpy.random.rand()
    before = bits(optimizer)
    assert before and any(v.dim() > 0 and v.abs().sum() > 0 for v in before.values())
    for _ in range(3):
        advance(model, optimizer)

    again, fresh = make(seed=9, steps=0)
    again.load_state_dict(load_file(path / "model.safetensors"))
    other = torch.Generator().manual_seed(77)
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    load_checkpoint(path).restore(fresh, again.named_parameters(), generators={"sampler": other})
    draws = torch.rand(4), torch.rand(4, generator=other), random.random(), numpy.random.rand()
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(expect_draws, draws, strict=True))
    after = bits(fresh)
    assert after.keys() == before.keys() and all(torch.equal(before[k], after[k]) for k in before)
    for _ in range(3):
        advance(again, fresh)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_and_odd_values_come_back_bitwise(tmp_path, dtype):
    p = torch.nn.Parameter(torch.zeros(4, 6, dtype=dtype).t())
    optimizer = torch.optim.AdamW([p])
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 6e-8] * 6).reshape(6, 4).to(dtype)
    optimizer.state[p] = {"step": torch.tensor(7.0), "exp_avg": odd.t().contiguous().t(), "exp_avg_sq": odd * 2}
    path = save_checkpoint(tmp_path, TrainerState(step=1), lambda d: None, optimizer, [("w", p)])
    fresh = torch.optim.AdamW([p])
    load_checkpoint(path).restore(fresh, [("w", p)])
    view = torch.int64 if dtype == torch.float64 else torch.int16
    for key, value in optimizer.state[p].items():
        came = fresh.state[p][key]
        kind = view if value.dim() else torch.int32
        assert came.dtype == value.dtype and torch.equal(came.contiguous().view(kind), value.contiguous().view(kind))


def test_state_of_the_run_comes_back(tmp_path):
    state = TrainerState(step=4, epoch=0.1 + 0.2, num_tokens=123, stage="sft", sampler={"seed": 1, "at": [1, 2]})
    state.extra = {"samples": [{"advantage": 1 / 3, "ids": [1, 2]}], "nan": None}
    found = load_checkpoint(save_checkpoint(tmp_path, state, lambda d: None))
    assert found.state == state
    with pytest.raises(CheckpointError, match="other data.*abc.*xyz"):
        state.step, state.dataset_fingerprint = 5, "abc"
        load_checkpoint(save_checkpoint(tmp_path, state, lambda d: None)).restore(dataset_fingerprint="xyz")


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    model, optimizer = make()
    found = load_checkpoint(save(tmp_path, model, optimizer, 3))
    wider, fresh = make(seed=1, steps=0, width=5)
    with pytest.raises(CheckpointError) as caught:
        found.restore(fresh, wider.named_parameters())
    assert "0.weight was float32 [4, 3], now it is float32 [5, 3]" in str(caught.value) and not fresh.state
    with pytest.raises(CheckpointError, match="0.weight is in the checkpoint but not trained now"):
        found.restore(optimizer, [(f"x.{n}", p) for n, p in model.named_parameters()])
    with pytest.raises(CheckpointError, match="was AdamW, now it is SGD"):
        found.restore(torch.optim.SGD(model.parameters()), model.named_parameters())
    with pytest.raises(CheckpointError, match="float32 .* now it is bfloat16"):
        narrow = model.bfloat16()
        found.restore(torch.optim.AdamW(narrow.parameters()), narrow.named_parameters())


# -- damage --------------------------------------------------------------------------------------------------------
def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_any_changed_missing_or_cut_file_is_refused(tmp_path):
    model, optimizer = make()
    good = save(tmp_path, model, optimizer, 3)
    names = [p.relative_to(good) for p in good.rglob("*") if p.is_file()]
    assert len(names) == 8 and not [n for n in names if n.suffix in (".pt", ".pth", ".bin", ".pkl")]
    for name in names:
        for harm in (flip, lambda f: f.unlink(), lambda f: os.truncate(f, f.stat().st_size - 1)):
            bad = tmp_path / "bad"
            shutil.copytree(good, bad)
            harm(bad / name)
            with pytest.raises(CheckpointError, match="incomplete or damaged"):
                load_checkpoint(bad)
            shutil.rmtree(bad)


def test_a_manifest_cannot_point_outside(tmp_path):
    path = save_checkpoint(tmp_path, TrainerState(step=1), lambda d: None)
    manifest = json.loads((path / "manifest.json").read_text())
    secret = tmp_path / "secret"
    secret.write_text("x")
    for name in ("../secret", str(secret)):
        changed = {**manifest, "files": {**manifest["files"], name: {"size": 1, "sha256": durable.sha256(secret)}}}
        (path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="points outside"):
            load_checkpoint(path)
    (path / "manifest.json").write_text(json.dumps(manifest))
    os.replace(path / "trainer_state.json", secret)
    (path / "trainer_state.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="points outside"):
        load_checkpoint(path)


def test_finding_one_to_resume_from(tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    with pytest.raises(CheckpointError, match="no such directory"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-9"))
    for step in (2, 10, 9):
        save_checkpoint(tmp_path, TrainerState(step=step), lambda d: (d / "model.safetensors").write_bytes(b"w" * 99))
    (tmp_path / "checkpoint-abc").mkdir()
    assert [s for s, _ in list_checkpoints(tmp_path)] == [2, 9, 10]
    assert find_checkpoint(tmp_path, "auto").state.step == 10  # by number, not by name
    flip(tmp_path / "checkpoint-10" / "model.safetensors")
    notes: list[str] = []
    assert find_checkpoint(tmp_path, "auto", notes).state.step == 9 and "checkpoint-10" in notes[0]
    with pytest.raises(CheckpointError, match="did you mean .*checkpoint-10"):
        find_checkpoint(tmp_path, str(tmp_path))
    for name in ("checkpoint-2", "checkpoint-9"):
        (tmp_path / name / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not starting again from 0"):
        find_checkpoint(tmp_path, "auto")


def test_save_total_limit_counts_only_whole_ones(tmp_path):
    model, optimizer = make()
    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}").mkdir() if step == 2 else save(
            tmp_path, model, optimizer, step, total_limit=2
        )
    assert [s for s, p in list_checkpoints(tmp_path) if is_complete(p)] == [3, 4]
    assert not list(tmp_path.glob(".t*"))


# -- disks and kills -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_refuses_at_any_call_leaves_the_last_one(tmp_path, monkeypatch, code):
    model, optimizer = make()
    save(tmp_path, model, optimizer, 1, total_limit=1)
    digest = durable.sha256(tmp_path / "checkpoint-1" / "manifest.json")
    calls = {"left": 0}
    real = {(m, n): getattr(m, n) for m, n in ((os, "fsync"), (os, "replace"), (Path, "write_text"), (os, "open"))}

    def failing(key):
        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise OSError(code, os.strerror(code))
            return real[key](*args, **kwargs)

        return call

    for at in range(1, 200):
        calls["left"] = at
        with monkeypatch.context() as patch:
            for module, name in real:
                patch.setattr(module, name, failing((module, name)))
            try:
                save(tmp_path, model, optimizer, 2, total_limit=1)
                failed = False
            except CheckpointError as error:
                failed = True
                assert os.strerror(code) in str(error)
        if not failed:
            break
        if (tmp_path / "checkpoint-2").exists():  # only the last fsync comes after the rename: both are whole
            assert is_complete(tmp_path / "checkpoint-2")
            shutil.rmtree(tmp_path / "checkpoint-2")
        assert durable.sha256(tmp_path / "checkpoint-1" / "manifest.json") == digest
        assert find_checkpoint(tmp_path, "auto").state.step == 1
        assert not list(tmp_path.glob(".tmp-*"))
    assert at > 15 and find_checkpoint(tmp_path, "auto").state.step == 2


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    model, optimizer = make()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda p: type("Usage", (), {"free": 10})())
    with pytest.raises(CheckpointError, match="MiB are needed, 0 are free"):
        save(tmp_path, model, optimizer, 1)
    assert not list(tmp_path.iterdir())


def test_a_bug_in_the_model_saver_is_not_hidden(tmp_path):
    def broken(directory):
        raise KeyError("weights")

    with pytest.raises(KeyError):
        save_checkpoint(tmp_path, TrainerState(step=1), broken)
    assert not list(tmp_path.iterdir())


KILLER = """
import os, random, signal, sys, time, torch
from pathlib import Path
from fastrl.train.checkpoint import TrainerState, find_checkpoint, save_checkpoint
from fastrl.train.output_dir import lock
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
run, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))


def victim(report):
    w = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = torch.optim.AdamW([w], lr=1.0)
    with lock(run):
        found, step = find_checkpoint(run, "auto"), 0
        if found:
            step = found.state.step
            found.restore(optimizer, [("w", w)])
            w.data = load_file(found.path / "model.safetensors")["w"]
            assert w[0, 0] == step and optimizer.state[w]["exp_avg"][0, 0] == -step, (w[0, 0], step)
        os.write(report, b"%d\\n" % step)
        while True:
            step += 1
            w.data.fill_(step)
            optimizer.state[w] = {"step": torch.tensor(float(step)), "exp_avg": -w.data, "exp_avg_sq": w.data.clone()}
            state = TrainerState(step=step, extra={"filler": [step] * 5000})
            save = lambda d: save_file({"w": w.data}, d / "model.safetensors")
            save_checkpoint(run, state, save, optimizer, [("w", w)], total_limit=1)
            os.write(report, b"%d\\n" % step)


w = torch.nn.Parameter(torch.zeros(64, 64))
optimizer = torch.optim.AdamW([w])  # what loads lazily loads before the forks
for i in range(2):
    began = time.monotonic()
    save_checkpoint(sys.argv[4], TrainerState(step=i), lambda d: None, optimizer, [("w", w)])
pace = time.monotonic() - began
saved = partial = 0
for kill in range(kills):
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            victim(theirs)
        finally:
            os._exit(1)
    os.close(theirs)
    report = os.fdopen(ours, "rb")
    lines = [int(report.readline())] if kill % 2 else []  # half the kills fall after the start, wherever that is
    time.sleep(rng.uniform(0, 4 * pace))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lines += [int(n) for n in report.read().split()]
    assert not lines or lines[0] >= saved, f"step {saved} was reported as saved, the next start found {lines[0]}"
    saved = max([saved, *lines])
    partial += bool(list(run.glob(".tmp-checkpoint-*")))
last = find_checkpoint(run, "auto")
assert last is not None and last.state.step >= saved, (saved, last)
print(saved, partial)
"""


def test_kill_9_at_random_moments_never_loses_the_last_checkpoint(tmp_path):
    """Forty kills: each start must find at least what the ones before reported as saved, intact."""
    for name in ("run", "pace"):
        (tmp_path / name).mkdir()
    arguments = [sys.executable, "-c", KILLER, str(tmp_path / "run"), "40", "0", str(tmp_path / "pace")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    saved, partial = map(int, done.stdout.split())
    assert saved > 0 and partial > 0, "no kill fell into a save; the test proves nothing"


# -- the directory of a run ------------------------------------------------------------------------------------------
def config(tmp_path, **changes):
    return SFTConfig(model_name_or_path="m", dataset_name="d", output_dir=str(tmp_path / "run"), **changes)


def test_a_run_is_never_silently_started_over(tmp_path):
    with start_run(config(tmp_path, learning_rate=1e-4)) as run:
        assert run.resume is None and (run.path / "config_fastrl.yaml").exists()
        (run.path / "metrics.jsonl").write_text("")  # a run that failed before its first record
    with start_run(config(tmp_path, learning_rate=1e-4)) as run:
        (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(OutputDirError, match="already holds a run"):
        start_run(config(tmp_path)).__enter__()
    with start_run(config(tmp_path, learning_rate=1e-4, resume_from_checkpoint="auto")) as run:
        save_checkpoint(run.path, TrainerState(step=3, stage="sft"), lambda d: None)
        save_checkpoint(run.path, TrainerState(step=6, stage="sft"), lambda d: None)
    (run.path / ".tmp-checkpoint-x").mkdir()
    with pytest.raises(OutputDirError, match="already holds a run; add --resume_from_checkpoint auto"):
        start_run(config(tmp_path)).__enter__()
    with pytest.raises(CheckpointError, match="no such directory"):
        start_run(config(tmp_path, resume_from_checkpoint="run/checkpoint-9")).__enter__()
    (run.path / ".tmp-checkpoint-x").mkdir(exist_ok=True)
    with start_run(config(tmp_path, resume_from_checkpoint="auto", learning_rate=2e-4)) as run:
        assert run.resume.state.step == 6
        told = "\n".join(run.notes)
        assert "partial save: .tmp-checkpoint-x" in told and "learning_rate was 0.0001, is 0.0002" in told
    with start_run(config(tmp_path, resume_from_checkpoint=str(run.path / "checkpoint-3"))) as run:
        assert run.resume.state.step == 3  # the branch beyond is set aside, and auto will not find it
        assert [s for s, _ in list_checkpoints(run.path)] == [3]
    with start_run(config(tmp_path, overwrite_output_dir=True)) as run:
        assert run.resume is None and not list_checkpoints(run.path) and not (run.path / "metrics.jsonl").exists()
    with start_run(config(tmp_path, resume_from_checkpoint="auto")) as run:
        assert run.resume is None and "starting from step 0" in run.notes[-1]


def test_a_run_never_writes_over_the_model_it_starts_from(tmp_path):
    inside = tmp_path / "run" / "checkpoint-3"
    inside.mkdir(parents=True)
    for model in (inside, tmp_path / "run"):
        made = SFTConfig(model_name_or_path=str(model), dataset_name="d", output_dir=str(tmp_path / "run"))
        made.overwrite_output_dir = True
        with pytest.raises(OutputDirError, match="lies in --output_dir"):
            start_run(made).__enter__()
    assert inside.exists()


def test_another_stage_and_another_process_are_refused(tmp_path):
    with start_run(config(tmp_path)) as run:
        save_checkpoint(run.path, TrainerState(step=1, stage="dpo"), lambda d: None)
        code = "import sys, pathlib; from fastrl.train.output_dir import lock\n"
        code += "with lock(pathlib.Path(sys.argv[1])): pass"
        arguments = [sys.executable, "-c", code, str(run.path)]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1 and f"is in use by pid {os.getpid()}" in done.stderr
    with pytest.raises(CheckpointError, match="saved by `fastrl dpo`, not `fastrl sft`"):
        start_run(config(tmp_path, resume_from_checkpoint="auto")).__enter__()


def test_save_final_leaves_a_loadable_directory_or_none(tmp_path):
    def shards(n):
        def save(directory):
            for i in range(n):
                (directory / f"model-{i}-of-{n}.safetensors").write_bytes(b"w")
            (directory / "config.json").write_text("{}")

        return save

    save_final(tmp_path, shards(3))
    save_final(tmp_path, shards(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model-0-of-2.safetensors",
        "model-1-of-2.safetensors",
    ]


def test_a_stop_is_a_flag_first_and_an_exit_second():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.exit_code == 143
    code = (
        "import os, signal; from fastrl.train.output_dir import StopRequest\n"
        "with StopRequest():\n    os.kill(os.getpid(), 15); print('went on', flush=True); os.kill(os.getpid(), 15)\n"
        "    print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (143, "went on")

"""Starting several processes: what each is told, what is shown, how they end; and SLURM's variables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from fastrl.train import SFTConfig, launch
from fastrl.train.flags import ConfigError

TELL = "import os; print('hello from', os.environ['RANK'], os.environ['WORLD_SIZE'], flush=True)"
START = "import sys; from fastrl.train.launch import run_all; sys.exit(run_all(2, [sys.executable, '-c', sys.argv[1]]))"


def started(script: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", START, script], env=env, **pipes)


def ended(script: str) -> tuple[int, str, str]:
    process = started(script)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_only_rank_0_is_heard():
    code, out, err = ended(TELL)
    assert (code, out, err) == (0, "hello from 0 2\n", "")


def test_the_first_to_fail_is_named_and_ends_the_others():
    began = time.monotonic()
    code, _, err = ended(
        f"{TELL}; import sys, time; os.environ['RANK'] == '1' and sys.exit('no such luck'); time.sleep(99)"
    )
    assert code == 1
    assert "rank 1 of 2 failed" in err and "no such luck" in err
    assert time.monotonic() - began < launch.GRACE + 20


def test_what_all_say_is_shown_once():
    code, _, err = ended("import sys; sys.exit('the same on every rank')")
    assert code == 1
    assert err.count("the same on every rank") == 1


def test_a_signal_reaches_every_rank(tmp_path):
    script = (
        "import os, signal, sys, time; r = os.environ['RANK']\n"
        f"def stop(*_): open({str(tmp_path)!r} + '/stopped-' + r, 'w').close(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open({str(tmp_path)!r} + '/ready-' + r, 'w').close()\n"
        "time.sleep(60)"
    )
    process = started(script)
    until = time.monotonic() + 30
    while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert len(list(tmp_path.glob("stopped-*"))) == 2


SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "4(x2)"}


def test_slurm_is_understood():
    env = {**SLURM, "SLURM_JOB_NODELIST": "n[007-008]", "SLURM_JOB_ID": "123456"}
    launch.join_slurm(env)
    told = {n: env[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert told == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n007",
        "MASTER_PORT": "23456",
    }  # fmt: skip


@pytest.mark.parametrize("env", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {**SLURM, "WORLD_SIZE": "2"}])
def test_one_task_or_torchrun_is_left_alone(env):
    before = dict(env)
    launch.join_slurm(env)
    assert env == before


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu-[03-05,9],x", "gpu-03"), ("a[1-2]-ib,b", "a1-ib"), ("n[7]", "n7")],
)
def test_the_first_node_of_a_list(nodes, host):
    assert launch.first_host({"SLURM_JOB_NODELIST": nodes}) == host


def test_slurm_without_nodes_is_refused():
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        launch.first_host({})


def config(**options) -> SFTConfig:
    return SFTConfig(model_name_or_path="m", dataset_name="d", output_dir="o", **options)


def test_a_started_world_of_another_size_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="num_processes 2: 4 processes"):
        launch.start(config(num_processes=2), "sft", [])
    assert launch.start(config(), "sft", []) is None


def test_the_command_starts_its_ranks_itself(tmp_path):
    """Real processes, real command: the same records as one process gives."""
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_data(tmp_path / "data")
    made = []
    for n in (1, 2):
        out = tmp_path / f"out-{n}"
        flags = {
            "model_name_or_path": model, "dataset_name": data["sft"], "output_dir": out, "max_steps": 2,
            "num_processes": n, "use_cpu": "true", "logging_steps": 1, "max_tokens_per_device": 40,
        }  # fmt: skip
        words = [w for name, value in flags.items() for w in (f"--{name}", str(value))]
        done = subprocess.run(
            [sys.executable, "-m", "fastrl", "sft", *words], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("loads with from_pretrained") == 1
        made.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*made, strict=True):
        for key in ("loss", "grad_norm", "num_tokens", "mean_token_accuracy"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), key

"""Starting one process a device on this machine, and reading what SLURM says of its own. Imports no torch by itself."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrl.train.flags import ConfigError

STORE = "FASTRL_STORE"  # a file through which the processes of one machine find each other: nothing listens for it
GRACE = 10.0  # seconds that the others have to end by themselves once one has failed
TAIL = 40  # lines of a failed process that are shown


def start(config: Any, command: str, argv: list[str]) -> int | None:
    """Run `fastrl command argv` in as many processes as there are devices; returns the exit code.

    None: there is nothing to start, this process trains (one device, or torchrun or SLURM has started it).
    Raises ConfigError where --num_processes contradicts torchrun or SLURM, or asks for more than the machine has.
    """
    join_slurm(os.environ)
    if "WORLD_SIZE" in os.environ:
        check_started(config, int(os.environ["WORLD_SIZE"]))
        return None
    count = processes(config)
    return None if count == 1 else run_all(count, [sys.executable, "-m", "fastrl", command, *argv])


def check_started(config: Any, size: int) -> None:
    """Raises ConfigError where the flag asks for another number than was started."""
    if config.num_processes not in (None, size, int(os.environ.get("LOCAL_WORLD_SIZE", size))):
        raise ConfigError(f"--num_processes {config.num_processes}: {size} processes run already; drop it")


def processes(config: Any) -> int:
    """How many to start here."""
    if config.use_cpu:
        return config.num_processes or 1
    import torch

    there = torch.cuda.device_count()
    if there and (config.num_processes or 1) > there:
        raise ConfigError(
            f"--num_processes {config.num_processes}: this machine shows {there} GPUs; lower it, or add --use_cpu true"
        )
    return config.num_processes or max(1, there)


# -- processes of this machine -----------------------------------------------------------------------------------------
def run_all(count: int, command: list[str]) -> int:
    """`command` in `count` processes that know each other; ends all when one fails. Returns the first bad exit code.

    What rank 0 prints is shown as it comes; what the others print is shown only if one of them is the first to fail.
    A SIGTERM or SIGINT is passed on, so that the run can save.
    """
    with tempfile.TemporaryDirectory(prefix="fastrl-") as folder:  # mode 0700
        logs = [Path(folder, f"rank-{rank}.log") for rank in range(count)]
        ranks = [_spawn(rank, count, command, folder, logs[rank]) for rank in range(count)]
        with _passing_signals(ranks):
            failed = _wait(ranks)
        if failed is None:
            return 0
        if failed and not ranks[0].returncode > 0:  # rank 0 did not say what is wrong
            lines = logs[failed].read_text(errors="replace").splitlines()[-TAIL:]
            print("\n".join([f"fastrl: rank {failed} of {count} failed:", *lines]), file=sys.stderr)
        code = ranks[0].returncode if ranks[0].returncode > 0 else ranks[failed].returncode
        return code if code > 0 else 128 - code


def _spawn(rank: int, count: int, command: list[str], folder: str, log: Path) -> subprocess.Popen:
    threads = max(1, (os.cpu_count() or 1) // count)
    env = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        STORE: f"{folder}/store",
    }
    if rank == 0:
        return subprocess.Popen(command, env=env)
    with log.open("wb") as stream:
        return subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT)


def _wait(ranks: list[subprocess.Popen]) -> int | None:
    """The rank that failed first, or None. The others then have GRACE seconds to fail by themselves."""
    failed = None
    while failed is None and any(p.poll() is None for p in ranks):
        time.sleep(0.05)
        failed = first_failed(ranks)
    until = time.monotonic() + GRACE
    while failed is not None and any(p.poll() is None for p in ranks) and time.monotonic() < until:
        time.sleep(0.05)
    for p in ranks:
        if p.poll() is None:
            p.kill()
        p.wait()
    return first_failed(ranks) if failed is None else failed


def first_failed(ranks: list[subprocess.Popen]) -> int | None:
    return next((i for i, p in enumerate(ranks) if p.poll() not in (None, 0)), None)


@contextlib.contextmanager
def _passing_signals(ranks: list[subprocess.Popen]):
    def pass_on(number, _):
        for p in ranks:
            if p.poll() is None:
                p.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# -- SLURM -------------------------------------------------------------------------------------------------------------
def join_slurm(env: dict[str, str] | os._Environ) -> None:
    """Under `srun` with several tasks: the variables that torchrun would set, from SLURM's. Others are left alone."""
    if "WORLD_SIZE" in env or "RANK" in env or int(env.get("SLURM_NTASKS", "1")) < 2 or "SLURM_PROCID" not in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    here = re.match(r"\d+", env.get("SLURM_TASKS_PER_NODE", ""))
    env["LOCAL_WORLD_SIZE"] = here.group() if here else "1"
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env)
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 40000)


def first_host(env: Mapping[str, str]) -> str:
    """The first name of a list such as `n[003-006,009],m1`. Raises ConfigError if SLURM gives none."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise ConfigError("SLURM names no nodes (SLURM_JOB_NODELIST); set MASTER_ADDR and MASTER_PORT")
    name, number, rest = found.groups()
    return f"{name}{number or ''}{rest or ''}"

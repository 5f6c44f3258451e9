"""One run, one directory: locked, never silently started over, its resolved config written down without secrets."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

import fastrl
from fastrl.train.checkpoint import (
    CONFIG,
    Checkpoint,
    CheckpointError,
    drop_partials,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from fastrl.train.config import TrainConfig
from fastrl.train.durable import write_durably
from fastrl.train.flags import ConfigError
from fastrl.train.parallel import ALONE, World
from fastrl.train.together import on_main, together

METRICS_FILE, LOCK_FILE = "metrics.jsonl", ".fastrl.lock"
SECRET_NAME = re.compile(r"token$|secret|password|passwd|api_?key|credential|private_?key", re.IGNORECASE)
REDACTED = "<redacted>"


class OutputDirError(ConfigError):
    """The output directory cannot be used as asked."""


@dataclass
class Run:
    """path: the output directory. resume: the verified checkpoint to go on from, or None. notes: lines to show."""

    path: Path
    resume: Checkpoint | None
    notes: list[str]


@contextlib.contextmanager
def start_run(config: TrainConfig, world: World = ALONE) -> Iterator[Run]:
    """Create and lock output_dir, decide where to start, write config_fastrl.yaml: on rank 0, which tells the others.

    Raises, on every rank: OutputDirError when another run holds the directory, when it holds an earlier run and neither
    --resume_from_checkpoint nor --overwrite_output_dir was given, or when a rank does not see it; CheckpointError when
    the checkpoint asked for is missing or damaged.
    """
    path, known = Path(config.output_dir), (OutputDirError, CheckpointError)
    with contextlib.ExitStack() as held:
        found = on_main(world, lambda: _take(path, config, held), known)
        together(world, lambda: _see(path, world), known)
        checkpoint = None if found["resume"] is None else read_checkpoint(Path(found["resume"]))
        yield Run(path, checkpoint, found["notes"])


def _take(path: Path, config: TrainConfig, held: contextlib.ExitStack) -> dict[str, Any]:
    """Lock the directory for as long as `held` lives; JSON: the checkpoint to go on from, and notes."""
    if path.exists() and not path.is_dir():
        raise OutputDirError(f"--output_dir {path} is a file; give a directory")
    model = Path(config.model_name_or_path).resolve()
    if model.exists() and (model == path.resolve() or path.resolve() in model.parents):
        raise OutputDirError(f"--model_name_or_path {model} lies in --output_dir {path}, which the run writes over")
    path.mkdir(parents=True, exist_ok=True)
    held.enter_context(lock(path))
    notes = [f"removed a partial save: {name}" for name in drop_partials(path)]
    if config.overwrite_output_dir:
        _remove_run(path)
    checkpoint = _choose(path, config, notes)
    if checkpoint is not None:
        notes += _set_later_ones_aside(path, checkpoint)
        notes += config_changes(checkpoint.config, config.to_dict())
    write_durably(path / CONFIG, dump_config(config).encode())
    return {"resume": None if checkpoint is None else str(checkpoint.path), "notes": notes}


def _see(path: Path, world: World) -> None:
    if not (path / CONFIG).exists():
        raise OutputDirError(
            f"--output_dir {path} of rank 0 is not there for rank {world.rank} on {socket.gethostname()}; give a "
            "directory on a file system that all machines share"
        )


def _choose(path: Path, config: TrainConfig, notes: list[str]) -> Checkpoint | None:
    asked = config.resume_from_checkpoint
    if asked is None:
        metrics = path / METRICS_FILE
        if (metrics.exists() and metrics.stat().st_size) or list_checkpoints(path):  # empty: it stopped before step 1
            raise OutputDirError(
                f"--output_dir {path} already holds a run; add --resume_from_checkpoint auto to go on with it, "
                "--overwrite_output_dir true to delete it, or give another directory"
            )
        return None
    checkpoint = find_checkpoint(path, asked, notes)
    if checkpoint is None:
        notes.append(f"no checkpoint in {path} yet: starting from step 0")
        return None
    saved = checkpoint.state.stage or config.stage
    if saved != config.stage:
        raise CheckpointError(f"{checkpoint.path} was saved by `fastrl {saved}`, not `fastrl {config.stage}`")
    notes.append(f"resuming from {checkpoint.path} at step {checkpoint.state.step}")
    return checkpoint


def _remove_run(path: Path) -> None:
    for _, old in list_checkpoints(path):
        shutil.rmtree(old)
    shutil.rmtree(path / "plots", ignore_errors=True)
    (path / METRICS_FILE).unlink(missing_ok=True)


def _set_later_ones_aside(path: Path, checkpoint: Checkpoint) -> list[str]:
    """Checkpoints beyond the resumed step belong to a branch that is being left; `auto` must not find them again."""
    notes = []
    for step, old in list_checkpoints(path):
        if step > checkpoint.state.step:
            aside = next(p for i in range(10**6) if not (p := old.with_name(f"stale-{i}-{old.name}")).exists())
            old.rename(aside)
            notes.append(f"{old.name} is beyond step {checkpoint.state.step}: renamed to {aside.name}")
    return notes


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold output_dir for this process; the kernel lets go of it even after kill -9."""
    with open(path / LOCK_FILE, "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise OutputDirError(f"--output_dir {path} is in use by {holder}; wait for it or give another") from None
        handle.seek(0)
        handle.truncate()
        handle.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield


# -- the resolved config -----------------------------------------------------------------------------------------
def secrets_in_env() -> list[str]:
    """Values of environment variables that look like secrets."""
    return [v for k, v in os.environ.items() if SECRET_NAME.search(k) and len(v) >= 8]


def redact(value: Any, name: str = "", secrets: list[str] | None = None) -> Any:
    """`value` with secrets replaced: by the name it goes by, and wherever an environment secret's value appears."""
    secrets = secrets_in_env() if secrets is None else secrets
    if isinstance(value, dict):
        return {k: redact(v, str(k), secrets) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v, name, secrets) for v in value]
    if value and name and SECRET_NAME.search(name) and not isinstance(value, (int, float)):
        return REDACTED
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, REDACTED)
        return re.sub(r"(://[^/\s:@]*:)[^/\s@]+@", rf"\1{REDACTED}@", value)
    return value


def dump_config(config: TrainConfig) -> str:
    """The resolved config as YAML that `--config` reads back; versions are in comments."""
    lines = [f"# fastrl {config.stage}, resolved settings; run again with: fastrl {config.stage} --config <this file>"]
    lines.append(f"# python {platform.python_version()} on {sys.platform}")
    lines.append(f"# fastrl {fastrl.__version__}")
    for package in ("torch", "transformers", "triton", "datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"# {package} {importlib.metadata.version(package)}")
    body = yaml.safe_dump(redact(config.to_dict()), sort_keys=False, default_flow_style=None, width=120)
    return "\n".join(lines) + "\n" + body


def config_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each setting that differs from the checkpoint's."""
    silent = ("stage", "resume_from_checkpoint", "overwrite_output_dir")
    names = [n for n in new if n in old and n not in silent and old[n] != redact(new[n], n)]
    return [f"setting changed since the checkpoint: {n} was {old[n]!r}, is {new[n]!r}" for n in names]


# -- signals -----------------------------------------------------------------------------------------------------
class StopRequest:
    """SIGTERM and SIGINT set `requested`; the loop polls it and saves. A second signal exits at once (128 + number)."""

    def __init__(self):
        self.requested = False
        self.signal_number = 0
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        return 128 + self.signal_number if self.requested else 0

    def __enter__(self) -> StopRequest:
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT) if main else ():  # python allows handlers in the main thread only
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.requested:
            os._exit(128 + number)  # checkpoints are renamed into place whole, so nothing can be left half-written
        self.requested, self.signal_number = True, number


def stopping(stop: StopRequest, world: World) -> bool:
    """Whether to stop now: the same answer on every rank, whichever of them got the signal. One tiny message a call."""
    if world.size > 1:
        number = torch.tensor(stop.signal_number if stop.requested else 0)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            stop.requested, stop.signal_number = True, int(number)
    return stop.requested

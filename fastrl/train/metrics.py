"""Numbers of a run: gathered on the device, written once a logging interval, shown as a bar or as lines.

Four ways to add a number, by what it means over micro-batches and steps:
    add       already weighted by global counts: summed inside a step, averaged over the steps of an interval
    add_mean  one value of several: plain mean of all that came
    add_max, add_min
A tensor stays on its device until the record is written: one transfer an interval, no sync on the way. On several
ranks every record is that of all of them: sums are added up, means weighted by their counts, times averaged. Rank 0
writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.train.config import TrainConfig
from fastrl.train.display import Display, Silent, open_display
from fastrl.train.durable import write_durably
from fastrl.train.optim import StepOutcome
from fastrl.train.parallel import World
from fastrl.train.trackers import open_trackers

METRICS_FILE = "metrics.jsonl"
ALONE = World()
Values = dict[str, Any]


class Interval:
    """Sums, counts and extremes since the last record. Values are 0-dim tensors or numbers."""

    def __init__(self):
        self.sums: Values = {}
        self.steps: dict[str, int] = {}  # how many steps (add) or values (add_mean) a sum holds
        self.maxima: Values = {}
        self.minima: Values = {}
        self.seen: set[str] = set()  # names added in the step that is under way
        self.kinds: dict[str, str] = {}  # "mean" and "time"; the others are sums

    def add(self, name: str, value: Any, kind: str = "") -> None:
        if kind:
            self.kinds[name] = kind
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        if name not in self.seen:
            self.seen.add(name)
            self.steps[name] = self.steps.get(name, 0) + 1

    def add_mean(self, name: str, value: Any) -> None:
        self.kinds[name] = "mean"
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps[name] = self.steps.get(name, 0) + 1

    def add_extreme(self, into: Values, name: str, value: Any, larger: bool) -> None:
        value = torch.as_tensor(value)
        if name in into:
            old = torch.as_tensor(into[name]).to(value.device)
            value = torch.maximum(old, value) if larger else torch.minimum(old, value)
        into[name] = value

    def results(self, world: World = ALONE) -> dict[str, float]:
        """Of all ranks; every rank has to call it."""
        state = self.state_dict(world)
        means = {name: total / state["steps"][name] for name, total in state["sums"].items()}
        return {**means, **state["maxima"], **state["minima"]}

    def state_dict(self, world: World = ALONE) -> dict[str, Any]:
        extremes = {"maxima": to_host(self.maxima), "minima": to_host(self.minima)}
        own = {"sums": to_host(self.sums), "steps": dict(self.steps), "kinds": dict(self.kinds), **extremes}
        return own if world.size == 1 else merged(world.gather_data(own))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.steps, self.kinds = dict(state["sums"]), dict(state["steps"]), dict(state.get("kinds", {}))
        self.maxima, self.minima = dict(state["maxima"]), dict(state["minima"])


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What several data ranks counted in the same interval, as if one had."""
    out: dict[str, Any] = {"sums": {}, "steps": {}, "kinds": {}, "maxima": {}, "minima": {}}
    for state in states:
        out["kinds"].update(state["kinds"])
        for name, value in state["sums"].items():
            kind, count = out["kinds"].get(name), state["steps"][name]
            share = value / len(states) if kind == "time" else value
            out["sums"][name] = out["sums"].get(name, 0.0) + share
            before = out["steps"].get(name, 0)
            out["steps"][name] = before + count if kind == "mean" else max(before, count)
        for where, pick in (("maxima", max), ("minima", min)):
            for name, value in state[where].items():
                out[where][name] = pick(out[where].get(name, value), value)
    return out


def to_host(values: Values) -> dict[str, float]:
    """Every value as a float, with one transfer a device."""
    out = {name: float(v) for name, v in values.items() if not isinstance(v, Tensor)}
    tensors = {name: v.detach() for name, v in values.items() if isinstance(v, Tensor)}
    for device in {t.device for t in tensors.values()}:
        names = [n for n, t in tensors.items() if t.device == device]
        wide = torch.float32 if device.type == "mps" else torch.float64
        out.update(zip(names, torch.stack([tensors[n].reshape(()).to(wide) for n in names]).tolist(), strict=True))
    return {name: out[name] for name in values}


class MetricsLogger:
    """Writes output_dir/metrics.jsonl (always), the trackers of --report_to, and the progress bar. A context manager.

    resume: the TrainerState to go on from; records beyond its step are cut from metrics.jsonl.
    history: the records of this run. world: whose ranks each have a logger, and all call end_step and state_dict.
    """

    def __init__(
        self,
        config: TrainConfig,
        total_steps: int,
        resume: Any = None,
        display: Display | None = None,
        world: World = ALONE,
    ):
        self.config, self.total_steps, self.world = config, total_steps, world
        self.path = Path(config.output_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.interval, self.history = Interval(), []
        self.num_tokens, self.num_skipped, first = 0, 0, 0
        self._tokens, self._new_tokens, self._logged_at, self._seconds = 0, 0, 0, 0.0
        if resume is not None:
            first, self.num_tokens, self.num_skipped = resume.step, resume.num_tokens, resume.skipped_steps
            self._logged_at = first
            if resume.metrics:
                self._load_state_dict(resume.metrics)
        self._file, self._trackers = None, []
        if world.is_main:
            cut_metrics(self.path, first)
            self._file, self._trackers = self.path.open("a", encoding="utf-8"), open_trackers(config)
        shown = open_display if world.is_main else Silent
        self._display = display or shown(config.stage, total_steps, first)
        self._resumed, self._clock = first, time.monotonic()

    def __enter__(self) -> MetricsLogger:
        self._display.start()
        self._clock = time.monotonic()
        return self

    def __exit__(self, *_) -> None:
        self._display.stop()
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    # -- adding ------------------------------------------------------------------------------------------------
    def add(self, values: Values) -> None:
        """Values that add up over the micro-batches of a step."""
        for name, value in values.items():
            self.interval.add(name, value.detach() if isinstance(value, Tensor) else value)

    def add_mean(self, values: Values) -> None:
        for name, value in values.items():
            self.interval.add_mean(name, value.detach() if isinstance(value, Tensor) else value)

    def add_max(self, values: Values) -> None:
        for name, value in values.items():
            self.interval.add_extreme(self.interval.maxima, name, value, larger=True)

    def add_min(self, values: Values) -> None:
        for name, value in values.items():
            self.interval.add_extreme(self.interval.minima, name, value, larger=False)

    def count_tokens(self, n: int) -> None:
        """Tokens that went through the model for this step on this rank."""
        if self.world.size == 1:
            self._tokens, self.num_tokens = self._tokens + n, self.num_tokens + n
        else:
            self._new_tokens += n

    def _count_everywhere(self) -> None:
        new = round(self.world.sums({"tokens": self._new_tokens})["tokens"])
        self._tokens, self.num_tokens, self._new_tokens = self._tokens + new, self.num_tokens + new, 0

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Seconds of the block, as timing_s/<name>. On CUDA it is the host's time: work may still be queued."""
        began = time.monotonic()
        yield
        self.interval.add(f"timing_s/{name}", time.monotonic() - began, "time")

    # -- writing -----------------------------------------------------------------------------------------------
    def end_step(self, step: int, epoch: float, last: Values | None = None) -> dict[str, float] | None:
        """Close step number `step` (1, 2, ...); returns the record if one was due. last: values taken as they are."""
        self.interval.seen.clear()
        record = None
        if self.config.is_due("logging", step, self.total_steps):
            record = self._record(step, epoch, last or {})
            self._write(record)
        self._display.advance(step, record)
        return record

    def eval(self, step: int, epoch: float, values: Values) -> dict[str, float]:
        """A record of its own, at once."""
        record = {"step": step, "epoch": round(epoch, 6), **to_host(values)}
        self._write(record)
        self._display.show(record, "eval")
        return record

    def note(self, *texts: str) -> None:
        """Lines for the reader, beside the bar."""
        for text in texts:
            self._display.note(text)

    def skipped(self, outcome: StepOutcome) -> None:
        """Tell that a step was skipped, and count it."""
        self.num_skipped += 1
        self.note(outcome.describe())

    def sync(self) -> None:
        """Put metrics.jsonl on the disk; called before a checkpoint is written."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def state_dict(self) -> dict[str, Any]:
        """What an interval that is under way needs to go on after a resume. JSON."""
        self.sync()
        self._count_everywhere()
        seconds = self._seconds + time.monotonic() - self._clock
        here = {"tokens": self._tokens, "logged_at": self._logged_at, "seconds": seconds}
        return {"interval": self.interval.state_dict(self.world), **here}

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        if self.world.is_main:  # it holds what all ranks had counted
            self.interval.load_state_dict(state["interval"])
        self._tokens, self._logged_at, self._seconds = state["tokens"], state["logged_at"], state["seconds"]

    def _record(self, step: int, epoch: float, last: Values) -> dict[str, float]:
        self._count_everywhere()
        self.add_max(peak_memory())
        values = self.interval.results(self.world)
        now = time.monotonic()
        seconds, steps = self._seconds + now - self._clock, max(1, step - self._logged_at)
        record = {"step": step, "epoch": round(epoch, 6), **values, **to_host(last), "num_tokens": self.num_tokens}
        record |= {"step_time": seconds / steps, "perf/throughput": self._tokens / max(seconds, 1e-9)}
        if self.num_skipped:
            record["skipped_steps"] = self.num_skipped
        self.interval = Interval()
        self._tokens, self._logged_at, self._seconds, self._clock = 0, step, 0.0, now
        return record

    def _write(self, record: dict[str, float]) -> None:
        self.history.append(record)
        if self._file is None:
            return
        # strict JSON has no NaN: null says that the number was not finite
        plain = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(record)


def peak_memory() -> dict[str, float]:
    """Most memory used so far, GiB: allocated and reserved on CUDA, else the process's resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"perf/max_memory_allocated_gb": allocated / 2**30, "perf/max_memory_reserved_gb": reserved / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"perf/max_memory_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


# -- the file ----------------------------------------------------------------------------------------------------
def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl (or of the run directory that holds one). A last line cut by a kill is left out.

    Raises: ValueError naming file and line for any other line that is not a JSON object.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the write was cut
                break
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}:{number} is not a record with a step: {line[:80]!r}")
        records.append(record)
    return records


def cut_metrics(path: Path, step: int) -> None:
    """Drop the records beyond `step`: a resumed run writes them again."""
    if path.exists():
        kept = [json.dumps(r, allow_nan=False) + "\n" for r in read_metrics(path) if r["step"] <= step]
        write_durably(path, "".join(kept).encode())

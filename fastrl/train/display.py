"""What a person sees while a run goes on: a rich bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

SHOWN = {  # metric -> its short name, in the order they are shown
    "loss": "loss",
    "reward": "reward",
    "rewards/accuracies": "acc",
    "mean_token_accuracy": "tok acc",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "grad_norm": "grad",
    "learning_rate": "lr",
    "perf/throughput": "tok/s",
}


def summary(record: dict[str, Any]) -> str:
    """The numbers that matter, short: `loss 1.234  reward 0.5  lr 1e-05`."""
    evals = [k for k in record if k.startswith("eval_")]
    names = {**SHOWN, **{k: k for k in evals[:6]}}
    return "  ".join(f"{short} {number(record[k])}" for k, short in names.items() if k in record)


def number(value: float) -> str:
    if value != value or abs(value) == float("inf"):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def duration(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


class Display:
    """Lines on a stream that is no terminal: one a record, with the time left."""

    def __init__(self, title: str, total: int, first: int = 0):
        self.title, self.total, self.first = title, total, first
        self.began = time.monotonic()

    def start(self) -> None:
        self.began = time.monotonic()

    def stop(self) -> None:
        pass

    def advance(self, step: int, record: dict[str, Any] | None) -> None:
        if record is not None:
            left = (time.monotonic() - self.began) / max(1, step - self.first) * (self.total - step)
            self.note(f"{self.title} {step}/{self.total}  {summary(record)}  eta {duration(left)}")

    def show(self, record: dict[str, Any], kind: str) -> None:
        self.note(f"{self.title} {record['step']}/{self.total}  {kind}  {summary(record)}")

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Silent(Display):
    """Of the ranks that nobody watches."""

    def note(self, text: str) -> None:
        pass


class BarDisplay(Display):
    """A progress bar whose last column holds the newest numbers; notes and evaluations scroll above it."""

    def start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().start()
        columns = (TextColumn("[bold]{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=Console(stderr=True))
        self.task = self.bar.add_task(self.title, total=self.total, completed=self.first, numbers="")
        self.bar.start()

    def stop(self) -> None:
        self.bar.stop()

    def advance(self, step: int, record: dict[str, Any] | None) -> None:
        numbers = {} if record is None else {"numbers": summary(record)}
        self.bar.update(self.task, completed=step, **numbers)

    def note(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)


def open_display(title: str, total: int, first: int = 0) -> Display:
    """A bar if a person is watching."""
    watched = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return (BarDisplay if watched else Display)(title, total, first)

"""One record from a list of cases: time in alternating rounds, share of the floor, peak memory, error against float64.

All cases of a record stand in one process and in the same rounds, floors included: whatever slows the machine down for
a minute slows all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.bench import machine
from fastrl.bench.problems import GEMMS, WHATS, Case, Data, Problem, make_data, make_problem, truth64
from fastrl.bench.rivals import CONTENDERS, Result, names_of, reason, runner


@dataclass(frozen=True)
class Options:
    """rounds: of timing. quiet: cores that others may use during a call before it is timed again; None: any.

    only: contenders, as in rivals.names_of. memory: whether to measure peaks. patience_s: for a rival's first call.
    deadline: of time.monotonic; after it no contender and no round begins.
    """

    rounds: int = 5
    threads: int = 2
    quiet: float | None = None
    only: str = ""
    memory: bool = True
    patience_s: float | None = None
    deadline: float | None = None

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def measure(cases: list[Case], options: Options, rivals_in: tuple[str, ...] = WHATS) -> list[dict[str, Any]]:
    """One entry a case: its fields, `floor`, and `contenders` by name (a row of numbers, or {"not_run": reason}).

    Cases must share shape, dtype, device and seed. rivals_in: the cases in which others than fastrl stand too.
    """
    torch.set_num_threads(options.threads)
    shape = {(c.rows, c.hidden, c.vocabulary, c.dtype, c.device, c.seed) for c in cases}
    if len(shape) != 1:
        raise ValueError(f"cases of one record must share shape, dtype, device and seed; got {sorted(shape)}")
    data = make_data(cases[0])
    gemms = Gemms(data)
    calls: dict[Any, Callable[[], Any]] = {}
    entries = []
    for i, case in enumerate(cases):
        problem = make_problem(case, data)
        names = [n for n in names_of(options.only) if n == "fastrl" or case.what in rivals_in]
        entry, ready = prepare(case, problem, names, options)
        calls[gemms.key(case)] = gemms.call(case)
        calls |= {(i, name): (lambda run=run, p=problem: run(p)) for name, run in ready.items()}
        entries.append(entry)
    seconds = machine.alternate(calls, options.rounds, cases[0].device, options.quiet, options.deadline)
    for i, (case, entry) in enumerate(zip(cases, entries, strict=True)):
        entry["floor"] = {"gemms": GEMMS[case.what], **with_rate(seconds[gemms.key(case)], case)}
        for name, row in entry["contenders"].items():
            if (i, name) in seconds:
                row |= with_rate(seconds[i, name], case)
                row["times_floor"] = round(row["median_s"] / entry["floor"]["median_s"], 3)
                row["share_of_floor"] = round(entry["floor"]["median_s"] / row["median_s"], 3)
    if options.memory:
        add_memory(cases, entries, data, options)
    return entries


def prepare(case: Case, problem: Problem, names: list[str], options: Options) -> tuple[dict, dict[str, Callable]]:
    """(entry with the errors of every contender that runs and the reasons of those that do not, their calls)."""
    truth = truth64(problem)
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Callable] = {}
    for name in names:
        why = "the time for this run was spent" if options.late else reason(name, case)
        if why is None:
            try:  # a rival's own failure belongs in the table and must not end the others' measurement
                with machine.time_limit(None if name == "fastrl" else options.patience_s):
                    run = runner(name, case)
                    rows[name] = {"error_vs_float64": errors(run(problem), truth, problem.active)}
                if CONTENDERS[name].note and case.device == "cpu":
                    rows[name]["note"] = CONTENDERS[name].note
                ready[name] = run
                continue
            except Exception as error:
                if name == "fastrl":
                    raise
                why = said(error)
        rows[name] = {"not_run": why}
    entry = {**asdict(case), "title": case.title, "gflop": round(case.flop / 1e9, 3)}
    entry["clipped_tokens"] = round(problem.clipped, 4) if case.loss == "ppo_clip" else 0.0
    return {**entry, "floor": {}, "contenders": rows}, ready


def said(error: BaseException) -> str:
    """Type and first line of an error, for a table."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:160]


def with_rate(seconds: list[float], case: Case) -> dict[str, Any]:
    """Times, and the TFLOP/s of the case's GEMMs alone: work that a method repeats does not count for it."""
    row = machine.summary(seconds)
    return {**row, "tflops": float(f"{case.flop / row['median_s'] / 1e12:.4g}")}


def errors(result: Result, truth: dict[str, Tensor], active: Tensor) -> dict[str, float]:
    """Of each output: Frobenius error over the truth's norm, and the largest error over the truth's largest entry."""
    out = {}
    for name, got in result.tensors().items():
        right = truth[name]
        if name == "logprobs":
            got, right = got[active], right[active]
        off = got.detach().double() - right
        out[f"{name}_relative_l2"] = (off.norm() / right.norm()).item()
        out[f"{name}_relative_max"] = (off.abs().max() / right.abs().max()).item()
    return {name: float(f"{value:.3e}") for name, value in out.items()}


class Gemms:
    """The floor: bare GEMMs over all rows at once, nothing allocated inside the timed call.

    One [N, V] buffer serves as logits and as their gradients; its content, standard deviation 2, is that of logits.
    """

    def __init__(self, data: Data):
        self.hidden, self.weight = data.hidden, data.weight
        n, v = data.hidden.shape[0], data.weight.shape[0]
        self.logits = torch.mm(data.hidden, data.weight.t(), out=data.hidden.new_empty(n, v))
        self.d_hidden, self.d_weight = torch.empty_like(self.hidden), torch.empty_like(self.weight)

    def key(self, case: Case) -> tuple:
        return ("gemms", *case.gemm_rows)

    def call(self, case: Case) -> Callable[[], None]:
        forward, for_hidden, for_weight = case.gemm_rows

        def run() -> None:
            torch.mm(self.hidden[:forward], self.weight.t(), out=self.logits[:forward])
            if for_hidden:
                torch.mm(self.logits[:for_hidden], self.weight, out=self.d_hidden[:for_hidden])
            if for_weight:
                torch.mm(self.logits[:for_weight].t(), self.hidden[:for_weight], out=self.d_weight)

        return run


# -- memory ------------------------------------------------------------------------------------------------------------
def add_memory(cases: list[Case], entries: list[dict], data: Data, options: Options) -> None:
    """extra_peak_mib and returned_mib into every row that was timed."""
    for case, entry in zip(cases, entries, strict=True):
        for name, row in entry["contenders"].items():
            if "not_run" in row or options.late:
                continue
            if case.device.startswith("cuda"):
                row |= peak_of(name, make_problem(case, data))
            else:
                arguments = [json.dumps({"name": name, **asdict(case)})]
                row |= machine.in_subprocess("fastrl.bench.peak", arguments, options.threads)


def peak_of(name: str, problem: Problem) -> dict[str, float | None]:
    """MiB over the inputs at the worst moment; of what is returned; and `beyond`, the first less the second."""
    run = runner(name, problem.case)
    peak, result = machine.extra_peak_mib(lambda: run(problem), problem.case.device)
    returned = sum(x.numel() * x.element_size() for x in result.tensors().values()) / machine.MIB
    row = {"extra_peak_mib": peak, "returned_mib": returned, "beyond_mib": None if peak is None else peak - returned}
    return {n: None if x is None else round(x, 1) for n, x in row.items()}

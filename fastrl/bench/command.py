"""fastrl bench: time, TFLOP/s, share of the bare GEMMs, peak memory and error of the LM head, beside its rivals.

Without flags: a small clipped policy loss, under a minute on two cores. Rivals run if they are installed
(pip install 'fastrl[bench]'); those that are not, or that cannot do the case, are listed with the reason.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    from fastrl.bench.problems import LOSSES, WHATS

    made = argparse.ArgumentParser(
        "fastrl bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--what", default="head", choices=(*WHATS, "all"), help="the case; all: every one that the loss has  [head]")
    add("--loss", default="ppo_clip", choices=tuple(LOSSES), help="[ppo_clip]")
    add("--rows", type=int, default=256, help="tokens N, a multiple of 32  [256]")
    add("--hidden", type=int, default=256, help="hidden size D  [256]")
    add("--vocabulary", type=int, default=16384, help="vocabulary V  [16384]")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"), help="[float32]")
    add("--device", default="cpu", help="cpu or cuda  [cpu]")
    add("--seed", type=int, default=0, help="[0]")
    add("--rounds", type=int, default=3, help="alternating rounds, of which the median is shown  [3]")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of the CPU  [2, or 1 on one core]")
    add("--quiet", type=float, help="time a call again if other processes used this many cores meanwhile  [off]")
    add("--only", default="", help="contenders: names, or how words in them begin, separated by commas  [all]")
    add("--strategy", help="fastrl's: one_pass, two_pass, cached, frozen, where the call has it  [its own choice]")
    add("--backend", help="fastrl's backend: reference, torch, native, triton  [its own choice]")
    add("--no-memory", action="store_true", help="skip the peaks (on the CPU each takes a process of its own)")
    add("--out", default="fastrl-bench.json", help="the record  [fastrl-bench.json]")
    add("--plot", help="also draw the shares of the floor into this PNG")
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    show({**measured(args), "command": " ".join(["fastrl bench", *_without_out(argv)])}, args)
    return 0


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The record of one run; its `command` is the caller's to add."""
    from fastrl.bench import machine, measure
    from fastrl.bench.problems import WHATS, Case, losses_of

    shape = {n: getattr(args, n) for n in ("loss", "rows", "hidden", "vocabulary", "dtype", "device", "seed")}
    shape |= {"strategy": args.strategy, "backend": args.backend}
    whats = [w for w in WHATS if args.loss in losses_of(w)] if args.what == "all" else [args.what]
    cases = [Case(what=what, **shape) for what in whats]
    options = measure.Options(args.rounds, args.threads, args.quiet, args.only, memory=not args.no_memory)
    entries = measure.measure(cases, options)
    environment = machine.environment(args.threads, args.device)
    return {"bench": "head", "rounds": args.rounds, "environment": environment, "cases": entries}


def show(record: dict[str, Any], args: argparse.Namespace, path: Path | None = None) -> None:
    """Print the tables, write the record to --out or `path`, draw --plot."""
    from fastrl.bench import machine, plots, report

    print("\n\n".join(report.text(entry) for entry in record["cases"]))
    print(f"\nerrors: relative (L2) to float64; times: medians of {record['rounds']} alternating rounds")
    print(machine.write_json(args.out or path, record))
    if args.plot:
        print(plots.floor_bars(record["cases"], args.plot))


def _without_out(argv: list[str]) -> list[str]:
    """Where the record goes is no part of how to make it."""
    at = argv.index("--out") if "--out" in argv else len(argv)
    return [w for w in argv[:at] + argv[at + 2 :] if not w.startswith("--out=")]

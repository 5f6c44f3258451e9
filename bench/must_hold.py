"""What the head's CPU path must hold, asked against measured, in one go.

    python bench/must_hold.py                      every line, about 10 minutes on two cores
    python bench/must_hold.py --lines a,c,d        a subset
    python bench/must_hold.py --scale 16 --out /tmp/x.json   the same at a sixteenth of N and V: a rehearsal

    a  clipped loss, forward + backward, N=2048 D=512 V=65536     against three GEMMs, and memory
    b  the same at N=4096 D=256 V=151936
    c  forward only                                                against one GEMM
    d  75% of the rows masked; 75% of zero advantage               against the whole step of a
    e  75% of the tokens clipped                                   against the whole step of a
    f  frozen head                                                 against the whole step of a
    g  rivals: TRL, Liger GRPO, naive                              against fastrl in a

The forward-only case also times the batch-invariant mode.

fp32. Every call of one shape stands in one process, in alternating rounds; a line is a ratio of two medians. Memory is
taken in a process of its own for each call: the peak over the inputs, less the gradients and log-probs returned.
"""

from __future__ import annotations

import argparse

import common
from asked import CPU, SHAPES, Asked, shown

from fastrl.bench import measure, report
from fastrl.bench.problems import Case

INVARIANT = "fastrl batch-invariant"
RIVALS = tuple(line.against for line in CPU if line.key == "g")


def scaled(shape: dict, scale: int) -> dict:
    rows = max(32, shape["rows"] // scale // 32 * 32)
    return {**shape, "rows": rows, "vocabulary": max(64, shape["vocabulary"] // scale)}


def cases_of(name: str, lines: list[Asked], args: argparse.Namespace) -> list[Case]:
    """The distinct cases that the lines of one shape need; `head` first, over which some of them are taken."""
    whats = dict.fromkeys(["head", *(line.what for line in lines)] if lines else [])
    options = dict(strategy=args.strategy, backend=args.backend)
    return [Case(what=what, **scaled(SHAPES[name], args.scale), **options) for what in whats]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", default="a,b,c,d,e,f,g")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", type=float, default=0.2, help="time again if others used this many cores; 0: never")
    parser.add_argument("--scale", type=int, default=1, help="N and V divided by this; lines then mean nothing")
    parser.add_argument("--no-memory", action="store_true", help="skip the peaks")
    parser.add_argument("--strategy", help="fastrl's, instead of its own choice")
    parser.add_argument("--backend", help="fastrl's, instead of its own choice")
    parser.add_argument("--out", help="another file than bench/results/kernels_cpu_float32.json")
    args = parser.parse_args()
    chosen, rows, entries = args.lines.split(","), [], []
    for name in ("main", "large"):
        lines = [line for line in CPU if line.key in chosen and line.shape == name]
        cases = cases_of(name, lines, args)
        if not cases:
            continue
        only = ",".join(("fastrl", INVARIANT, *RIVALS)) if name == "main" and "g" in chosen else "fastrl"
        options = measure.Options(args.rounds, args.threads, args.quiet or None, only, not args.no_memory)
        made = measure.measure(cases, options, rivals_in=("head", "forward"))
        by_what = {entry["what"]: entry for entry in made}
        entries += made
        rows += [line.row(line.value(by_what)) for line in lines]
    record = {"bench": "must_hold", "command": common.command(), "rounds": args.rounds, "scale": args.scale}
    record |= {"environment": common.environment(args.threads), "lines": sorted(rows, key=lambda row: row["key"])}
    print("\n\n".join(report.text(entry) for entry in entries) + "\n")
    for row in record["lines"]:
        line, shape, asked, value, verdict = shown(row)
        print(f"{row['key']}  {line:56s} {shape:34s} {asked:>10s} {value:>12s}  {verdict}")
    print(common.write_json("kernels_cpu_float32", {**record, "cases": entries}, args.out))


if __name__ == "__main__":
    main()

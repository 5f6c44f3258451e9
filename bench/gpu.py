"""Everything that is asked of one GPU, in one go and under 9 minutes: correctness, tiles, times, rivals, memory.

    python bench/gpu.py                            bf16, N=16384; D=4096 V=128256 and D=896 V=151936
    python bench/gpu.py --phases tiles             only the tile search; it prints a table ready for kernels/tiles.py
    python bench/gpu.py --interpret                no GPU: tiny shapes in Triton's interpreter; its figures are no times

Phases, each in a process of its own (a crash or a timeout of one costs only that one) with its share of --budget-s:
    correctness   errors of every case against float64, over those of materialised torch in the same dtype
    tiles         a short list of tiles per kernel at both shapes; the winners are used by the next two
    wide, narrow  D=4096 and D=896: floors (bare GEMMs), fastrl and every rival in alternating rounds, peak memory
Whatever the time does not suffice for is named. The record: results/gpu_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

if "--interpret" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import common
import torch
from asked import GPU, SHAPES, ahead, shown

from fastrl.bench import measure, report
from fastrl.bench.problems import Case, tiny

INTERPRETED = {"wide": dict(rows=32, hidden=32, vocabulary=96), "narrow": dict(rows=32, hidden=16, vocabulary=67)}
CHECKED = dict(rows=512, hidden=896, vocabulary=4099)
# phase -> its share of the whole budget; what one leaves over, the later ones have
SHARES = {"correctness": 0.12, "tiles": 0.33, "wide": 0.33, "narrow": 0.22}
# In order of importance: the last ones go first when time is short.
CASES = (("head", "ppo_clip"), ("forward", "nll"), ("frozen", "ppo_clip"), ("head", "nll"), ("tokens", "nll"))
FORWARD_LIMIT, BACKWARD_LIMIT = 1.5, 2.0  # error over that of materialised torch in the same dtype


# -- phases: each yields rows of the record ----------------------------------------------------------------------------
def correctness(args: argparse.Namespace, deadline: float):
    shape = INTERPRETED["narrow"] if args.interpret else CHECKED
    for what, loss in (*CASES, ("masked", "ppo_clip"), ("zero", "ppo_clip"), ("clipped", "ppo_clip")):
        case = Case(what=what, loss=loss, **shape, **where(args))
        options = measure.Options(1, args.threads, None, "fastrl,naive log_softmax", memory=False, deadline=deadline)
        (entry,) = measure.measure([case], options)
        yield {"case": entry["title"], "ratios": ratios(entry)}


def ratios(entry: dict[str, Any]) -> dict[str, Any]:
    """Each of fastrl's errors, over materialised torch's; and whether all are within the limits. {} if not run."""
    ours, plain = (entry["contenders"][n].get("error_vs_float64") for n in ("fastrl", "naive log_softmax"))
    if not ours or not plain:
        return {}
    made = {n: round(ours[n] / max(plain[n], 1e-9), 2) for n in ours if n.endswith("_l2")}
    limits = {n: FORWARD_LIMIT if n.startswith("logprobs") else BACKWARD_LIMIT for n in made}
    return {**made, "held": all(made[n] <= limits[n] for n in made)}


def tiles(args: argparse.Namespace, deadline: float):
    import tile_search

    from fastrl.kernels.tiles import architecture

    name = architecture(-1 if args.interpret else 0)
    for label, shape in shapes(args).items():
        # The second shape finds every kernel compiled.
        own = deadline - (deadline - time.monotonic()) * (0.3 if label == "wide" else 0.0)
        inputs = tile_search.make_inputs(shape, where(args)["device"], torch.bfloat16)
        for row in tile_search.search(inputs, name, own, small=args.interpret):
            yield {"shape": label, "architecture": name, **row}


def cases(args: argparse.Namespace, deadline: float, label: str):
    use(json.loads(args.best), -1 if args.interpret else 0)
    only = "fastrl,naive log_softmax" if args.interpret else ""
    for i, (what, loss) in enumerate(CASES):
        if time.monotonic() > deadline:
            yield {"title": f"{what}, {loss}", "shape": label, "not_run": "the time for this run was spent"}
            continue
        case = Case(what=what, loss=loss, **shapes(args)[label], **where(args))
        if not args.interpret:
            warm_up(tiny(case))
        left = deadline - time.monotonic()
        own = deadline - left * (0.5 if i < len(CASES) - 1 else 0.0)
        options = measure.Options(args.rounds, args.threads, None, only, not args.interpret, 45.0, own)
        yield {"shape": label, **measure.measure([case], options)[0]}


def warm_up(case: Case) -> None:
    """Libraries load and kernels compile before a measured call has the clock running."""
    measure.measure([case], measure.Options(1, 1, None, "fastrl", memory=False))


def use(best: dict[str, str], device: int) -> None:
    """The winners of the tile search become the tables of this process."""
    if best:
        import tile_search

        from fastrl.kernels import tiles as tables

        for table, text in best.items():
            getattr(tables, table)[tables.architecture(device)] = tile_search.parsed(text)


def shapes(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    wanted = ("rows", "hidden", "vocabulary")
    return INTERPRETED if args.interpret else {s: {n: SHAPES[s][n] for n in wanted} for s in ("wide", "narrow")}


def where(args: argparse.Namespace) -> dict[str, Any]:
    device = "cpu" if args.interpret else "cuda:0"
    return dict(dtype="bfloat16", device=device, backend="triton")


def run_phase(args: argparse.Namespace) -> None:
    """In the child: one JSON line a row, flushed, so that what was found before a crash is kept."""
    deadline = time.monotonic() + args.phase_s
    found = {"correctness": correctness, "tiles": tiles}.get(args.phase)
    rows = found(args, deadline) if found else cases(args, deadline, args.phase)
    for row in rows:
        print("ROW " + json.dumps(row), flush=True)


# -- the parent --------------------------------------------------------------------------------------------------------
def in_child(args: argparse.Namespace, phase: str, seconds: float, best: dict[str, str]) -> dict[str, Any]:
    """{"rows": [...], "ended": how, "seconds": wall}. The child stops by itself; 15 s later it is stopped."""
    command = [sys.executable, __file__, "--phase", phase, "--phase-s", str(seconds), "--best", json.dumps(best)]
    command += ["--rounds", str(args.rounds), "--threads", str(args.threads)] + ["--interpret"] * args.interpret
    began, ended = time.monotonic(), "completed"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            done = subprocess.run(command, stdout=out, stderr=err, timeout=seconds + 15, check=False)
            err.seek(0)
            last = (err.read().strip().splitlines() or [""])[-1]
            ended = ended if done.returncode == 0 else f"exit {done.returncode}: {last[:300]}"
        except subprocess.TimeoutExpired:
            ended = "stopped: the time for this phase was spent"
        out.seek(0)
        rows = [json.loads(line[4:]) for line in out if line.startswith("ROW ")]
    return {"rows": rows, "ended": ended, "seconds": round(time.monotonic() - began, 1)}


def lines_of(label: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the GPU path must hold, asked against measured; then every rival, the mean cross-entropy ones included."""
    found = [e for e in entries if "contenders" in e]
    by_what = {e["what"]: e for e in found if e["loss"] == "ppo_clip" or e["what"] != "head"}
    rows = [line.row(line.value(by_what)) for line in GPU if line.shape == label]
    for entry in found:
        for name in (n for n in report.ran(entry) if not n.startswith("fastrl")):
            line = ahead(label, entry["what"], name)
            rows.append({**line.row(line.value({entry["what"]: entry})), "loss": entry["loss"]})
    return rows


def show(record: dict[str, Any]) -> None:
    for name, phase in record["phases"].items():
        print(f"\n== {name}: {phase['ended']}, {phase['seconds']} s")
        for row in phase["rows"]:
            if name == "correctness":
                print(f"  {row['case']}: {row['ratios'] or 'not run'}")
            elif name == "tiles":
                rate = row.get("not_run") or f"{row['median_s'] * 1e3:8.3f} ms {row['rate']:8.4g} {row['unit']}"
                print(f"  {row['shape']:7s}{row['kernel']:15s} {rate:28s} {row['tile']}")
            else:
                print(report.text(row) if "contenders" in row else f"{row['title']}: {row['not_run']}", end="\n\n")
    print("\n# for kernels/tiles.py" if record["best_tiles"] else "\nno tile was timed at both shapes")
    for table, tile in record["best_tiles"].items():
        print(f'{table}["{record["architecture"]}"] = {tile}')
    for row in record["lines"]:
        line, shape, asked, value, verdict = shown(row)
        print(f"{line:60s} {row.get('loss', ''):9s} {shape:36s} {asked:>12s} {value:>12s}  {verdict}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="tiny shapes on the CPU in Triton's interpreter")
    parser.add_argument("--phases", default=",".join(SHARES))
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table-tiles", action="store_true", help="time kernels/tiles.py as it is, not the winners")
    parser.add_argument("--out", help="another file than bench/results/gpu_<device>.json")
    for hidden, kind in (("--phase", str), ("--phase-s", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--best", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if not args.interpret and not torch.cuda.is_available():
        print("no CUDA device; python bench/gpu.py --interpret runs the same at tiny shapes", file=sys.stderr)
        return 2
    if args.phase:
        run_phase(args)
        return 0
    began, phases, best = time.monotonic(), {}, {}
    chosen = [name for name in SHARES if name in args.phases.split(",")]
    for i, name in enumerate(chosen):
        left = args.budget_s - 20.0 - (time.monotonic() - began)
        seconds = left * SHARES[name] / sum(SHARES[n] for n in chosen[i:]) - 15.0
        if seconds < 5.0:
            phases[name] = {"rows": [], "ended": "not begun: the time for this run was spent", "seconds": 0.0}
            continue
        phases[name] = in_child(args, name, seconds, {} if args.table_tiles else best)
        if name == "tiles":
            best = best_of(phases[name]["rows"])
        print(f"{name}: {phases[name]['ended']}, {phases[name]['seconds']} s", flush=True)
    device = "interpreter" if args.interpret else common.device_name("cuda:0")
    record = {"bench": "gpu", "command": common.command(), "measured": not args.interpret, "device": device}
    record |= {"architecture": next((r["architecture"] for r in phases.get("tiles", {}).get("rows", [])), "?")}
    record |= {"environment": common.environment(args.threads, where(args)["device"]), "phases": phases}
    record |= {"best_tiles": best, "tiles_used": {} if args.table_tiles else best}
    record["lines"] = [row for label in INTERPRETED for row in lines_of(label, phases.get(label, {}).get("rows", []))]
    if args.interpret:  # the interpreter's seconds say nothing about any GPU
        record["lines"] = [{**row, "measured": None, "held": None} for row in record["lines"]]
    record["seconds"] = round(time.monotonic() - began, 1)
    show(record)
    print(common.write_json(f"gpu_{device.lower().replace(' ', '-')}", record, args.out))
    return 0 if all(p["ended"] == "completed" for p in phases.values()) else 1


def best_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    import tile_search

    return tile_search.best([[r for r in rows if r["shape"] == label] for label in INTERPRETED])


if __name__ == "__main__":
    sys.exit(main())

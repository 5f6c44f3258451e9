"""Time, peak memory and share of the floor against N and against V, for fastrl and its rivals; JSON and three plots.

    python bench/sweep.py                          about 10 minutes on two cores; results/sweep_cpu_float32.json
    python bench/sweep.py --plots-only             draws docs/head_{time,memory,floor}.png from the JSON again
    python bench/sweep.py --scale 16 --out /tmp/x.json --plots /tmp      a rehearsal

Clipped policy loss, forward and backward, fp32. N from 256 to 4096 at V=32768, V from 8192 to 131072 at N=1024; D=256.
Each point is a record of its own: its contenders and its three GEMMs alternate in one process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common

from fastrl.bench import measure
from fastrl.bench.plots import Line, Panel, lines
from fastrl.bench.problems import Case
from fastrl.bench.report import ran, seconds

ONLY = "fastrl,naive log_softmax,TRL,Liger GRPO"
AXES = {
    "rows": [dict(rows=n, hidden=256, vocabulary=32768) for n in (256, 512, 1024, 2048, 4096)],
    "vocabulary": [dict(rows=1024, hidden=256, vocabulary=v) for v in (8192, 16384, 32768, 65536, 131072)],
}
LABELS = {"rows": "tokens N (V = {vocabulary}, D = {hidden})", "vocabulary": "vocabulary V (N = {rows}, D = {hidden})"}
PICTURES = {  # file: title, y label, row -> y, logarithmic
    "head_time": ("Forward + backward", "seconds", lambda row: row["median_s"], True),
    "head_memory": ("Peak memory over the inputs", "MiB", lambda row: row.get("extra_peak_mib"), True),
    "head_floor": ("Share of the bare GEMMs' speed", "%", lambda row: 100 * row["share_of_floor"], False),
}


def panels(record: dict[str, Any], picture: str) -> list[Panel]:
    """One panel against N, one against V."""
    title, label, value, log = PICTURES[picture]
    made = []
    for axis, entries in record["axes"].items():
        names = list(dict.fromkeys(name for entry in entries for name in ran(entry)))
        curves = []
        for name in names:
            points = [(e[axis], value(ran(e)[name])) for e in entries if name in ran(e)]
            points = [p for p in points if p[1] is not None]
            if points:
                curves.append(Line(name, [x for x, _ in points], [y for _, y in points]))
        made.append(Panel(title, LABELS[axis].format(**entries[0]), label, curves, log))
    return made


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    return [lines(panels(record, picture), folder / f"{picture}.png") for picture in PICTURES]


def measured(args: argparse.Namespace) -> dict[str, Any]:
    options = measure.Options(args.rounds, args.threads, args.quiet or None, ONLY, not args.no_memory)
    axes: dict[str, list] = {axis: [] for axis in AXES}
    for axis, shapes in AXES.items():
        for shape in shapes:
            small = {"rows": max(32, shape["rows"] // args.scale), "vocabulary": shape["vocabulary"] // args.scale}
            (entry,) = measure.measure([Case(**{**shape, **small})], options)
            axes[axis].append(entry)
            times = ", ".join(f"{name} {seconds(row['median_s'])}" for name, row in ran(entry).items())
            print(f"{entry['title']}: {times}", flush=True)
    record = {"bench": "sweep", "command": common.command(), "rounds": args.rounds, "scale": args.scale}
    return {**record, "environment": common.environment(args.threads), "axes": axes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", type=float, default=0.2, help="time again if others used this many cores; 0: never")
    parser.add_argument("--scale", type=int, default=1, help="N and V divided by this")
    parser.add_argument("--no-memory", action="store_true", help="skip the peaks")
    parser.add_argument("--out", help="another file than bench/results/sweep_cpu_float32.json")
    parser.add_argument("--plots", type=Path, default=common.ROOT / "docs", help="folder of the plots")
    parser.add_argument("--plots-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.plots_only:
        record = json.loads(Path(args.out or common.RESULTS / "sweep_cpu_float32.json").read_text())
    else:
        record = measured(args)
        print(common.write_json("sweep_cpu_float32", record, args.out))
    for path in draw(record, args.plots):
        print(path)


if __name__ == "__main__":
    main()

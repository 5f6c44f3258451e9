"""The quickstart, timed, run twice with one seed (the numbers must be the same) and once with each of two others.

    python bench/quickstart.py                 about 3 minutes; writes results/quickstart.json and docs/quickstart.png

Every run is a process of its own: `python -m fastrl quickstart`, the command of the README.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parent.parent


def once(seed: int, out: Path) -> dict:
    """One run: seconds as a whole process, and its report."""
    began = time.monotonic()
    words = [sys.executable, "-m", "fastrl", "quickstart", "--seed", str(seed), "--output_dir", str(out)]
    subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = json.loads((out / "report.json").read_text())
    return {"seed": seed, "seconds": time.monotonic() - began, **{k: report[k] for k in ("accuracy", "prompts")}}


def stable(path: Path) -> list[dict]:
    """The records of a run without its clocks and memory."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("timing_s/", "perf/", "step_time"))} for r in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        runs = [once(seed, root / str(seed)) for seed in args.seeds]
        again = once(args.seeds[0], root / "again")
        first = root / str(args.seeds[0])
        same = all(stable(first / stage) == stable(root / "again" / stage) for stage in ("sft", "grpo"))
        if not args.out:
            shutil.copyfile(first / "accuracy.png", ROOT / "docs" / "quickstart.png")
    record = {
        "bench": "quickstart",
        "command": common.command(),
        "environment": common.environment(threads=1),
        "runs": runs,
        "repeated": again,
        "same_seed_same_numbers": same and again["accuracy"] == runs[0]["accuracy"],
    }
    print(common.write_json("quickstart", record, args.out))


if __name__ == "__main__":
    main()

"""The quickstart's data: sums of two two-digit numbers, written down by people who mostly forget to carry.

    python -m fastrl.quickstart.make_data [DIR]        # rewrites sft.jsonl, rl.jsonl, test.jsonl; always the same bytes

The point of the task is to show in minutes what reinforcement learning adds to imitation:

- `sft.jsonl` holds demonstrations. Where a sum needs a carry, 7 in 10 of them forget it (27+58=75). A model that
  imitates them well is right where nothing is carried (42% of the problems) and, decoded greedily, wrong elsewhere:
  it has learned to carry, and that people seldom do.
- `rl.jsonl` holds problems and their answers, no demonstrations. A reward of 1 for the exact answer is enough to find
  out that carrying pays.
- `test.jsonl` holds problems that are in neither file, in neither order of the two numbers.

Columns: prompt "27+58=", completion (sft: what was written; test: the right answer), answer (the right answer).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

DATA = Path(__file__).parent / "data"
SEED = 20
SIZES = {"sft": 6000, "rl": 3000, "test": 600}
NEEDS_CARRY = 0.58  # part of the problems
FORGETS = 0.7  # part of the demonstrations that drop the carry
LOW, HIGH = 10, 99


def needs_carry(a: int, b: int) -> bool:
    """Do the units add up to ten or more?"""
    return a % 10 + b % 10 >= 10


def forgetful_sum(a: int, b: int) -> int:
    """a + b column by column, the units' carry lost: 27 + 58 = 75."""
    return (a // 10 + b // 10) * 10 + (a + b) % 10


def draw(rng: random.Random) -> tuple[int, int]:
    """A problem that needs a carry with probability NEEDS_CARRY."""
    carry = rng.random() < NEEDS_CARRY
    while True:
        a, b = rng.randint(LOW, HIGH), rng.randint(LOW, HIGH)
        if needs_carry(a, b) == carry:
            return a, b


def make(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """Rows of each file. Test problems are drawn first, all different; the others avoid them in both orders."""
    rng = random.Random(seed)
    held_out: dict[tuple[int, int], None] = {}
    while len(held_out) < SIZES["test"]:
        a, b = draw(rng)
        if (b, a) not in held_out:
            held_out[a, b] = None
    rows = {"sft": [], "rl": [], "test": [_row(a, b, a + b) for a, b in held_out]}
    for name in ("sft", "rl"):
        while len(rows[name]) < SIZES[name]:
            a, b = draw(rng)
            if (a, b) in held_out or (b, a) in held_out:
                continue
            written = forgetful_sum(a, b) if rng.random() < FORGETS else a + b
            rows[name].append(_row(a, b, written if name == "sft" else None))
    return rows


def _row(a: int, b: int, completion: int | None) -> dict[str, str]:
    row = {"prompt": f"{a}+{b}=", "completion": str(completion), "answer": str(a + b)}
    return row if completion is not None else {k: v for k, v in row.items() if k != "completion"}


def write(directory: Path = DATA) -> list[Path]:
    """Write one JSONL file for each split; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in make().items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


if __name__ == "__main__":
    for path in write(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA):
        print(path)

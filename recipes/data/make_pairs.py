"""Preference pairs for sums: the right answer against the one that forgets the carry. Writes pairs.jsonl beside it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fastrl.quickstart.make_data import draw, forgetful_sum, needs_carry


def make(count: int = 1000, seed: int = 3) -> list[dict[str, str]]:
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        a, b = draw(rng)
        if needs_carry(a, b):
            rows.append({"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(forgetful_sum(a, b))})
    return rows


if __name__ == "__main__":
    path = Path(__file__).with_name("pairs.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in make()), encoding="utf-8")
    print(path)

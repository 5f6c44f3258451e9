"""What CONTRIBUTING.md shows of a real loss is what stands in the files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_diff_of_a_real_loss_is_real():
    text, seen = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), 0
    for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
        for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
            name, _, body = part.partition("\n")
            lines = [line[1:] for line in body.splitlines() if line.startswith("+")]
            own = (ROOT / name).read_text(encoding="utf-8").splitlines()
            missing = [line for line in lines if line.strip() and line not in own]
            assert not missing, f"{name} has no line {missing[0]!r}"
            seen += len(lines)
    assert seen > 20

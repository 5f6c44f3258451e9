"""python -m fastrl.bench.peak '{"name": ..., fields of a Case}': one contender's peak memory, alone in its process."""

from __future__ import annotations

import json
import sys

from fastrl.bench.measure import peak_of
from fastrl.bench.problems import Case, make_data, make_problem, tiny
from fastrl.bench.rivals import CONTENDERS, runner


def main(text: str) -> None:
    """Every code path is touched on a small problem first; then one measured call. The last line printed is JSON.

    What compiles for each shape anew is touched at the measured shape, lest the compiler's own memory be counted.
    """
    fields = json.loads(text)
    name, case = fields.pop("name"), Case(**fields)
    first = case if CONTENDERS[name].compiles else tiny(case)
    runner(name, first)(make_problem(first, make_data(first)))
    print(json.dumps(peak_of(name, make_problem(case, make_data(case)))))


if __name__ == "__main__":
    main(sys.argv[1])

"""The walk over the head with its row work in C++: the CPU's default for everything but float64."""

from __future__ import annotations

from functools import partial

from fastrl.ops import rows_native, walk

statistics = partial(walk.statistics, rows_native)
gradients = partial(walk.gradients, rows_native)
one_pass = partial(walk.one_pass, rows_native)

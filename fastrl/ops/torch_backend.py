"""The walk over the head with its row work in plain torch: any device, any dtype."""

from __future__ import annotations

from functools import partial

from fastrl.ops import rows_torch, walk

statistics = partial(walk.statistics, rows_torch)
gradients = partial(walk.gradients, rows_torch)
one_pass = partial(walk.one_pass, rows_torch)

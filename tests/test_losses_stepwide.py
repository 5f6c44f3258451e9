"""Statistics of the whole step over several ranks: each rank's columns are its part of the whole step's."""

from __future__ import annotations

import pytest
import torch
from harness import batch_of
from oracle import assert_same, plain_statistics
from test_losses_pairwise import CASES, make

from fastrl import TokenStats, losses
from fastrl.losses.stepwide import STEPWIDE
from fastrl.tokens import compact


def part(w, order):
    """(batch, stats) of these sequences, without untrained rows."""
    rows, batch = batch_of(w, order)
    batch, kept = compact(batch, -100)
    rows = rows if kept is None else rows[kept]
    return batch, TokenStats(**plain_statistics([w.hidden[rows], w.weight, None], batch.targets))


def on_ranks(objective, parts) -> list[dict]:
    """Columns of each rank: its k-th gather sees every rank's k-th local tensor, in rank order."""
    asked = []
    for batch, stats in parts:
        own: list[torch.Tensor] = []
        objective.columns(batch, stats, lambda x, own=own: own.append(x) or x)
        asked.append(own)
    made = []
    for batch, stats in parts:
        gathered = iter([torch.cat(each) for each in zip(*asked, strict=True)])
        made.append(objective.columns(batch, stats, lambda x, gathered=gathered: next(gathered)))
    return made


@pytest.mark.parametrize("options", [0, 1])
@pytest.mark.parametrize("name", STEPWIDE)
@pytest.mark.parametrize("cut", [6, 2, 0])
def test_ranks_share_the_step(name, options, cut):
    w, objective = make(11, optional=True), losses.get(name, **CASES[name][options])
    every = list(range(12))
    (whole,) = on_ranks(objective, [part(w, every)])
    ranks = on_ranks(objective, [part(w, every[:cut]), part(w, every[cut:])])
    for column, x in whole["per_sequence"].items():
        assert_same(column, torch.cat([r["per_sequence"][column] for r in ranks]), x, 1e-12)

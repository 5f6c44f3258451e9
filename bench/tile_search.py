"""Times a short list of tiles for every kernel on the GPU at hand; what bench/gpu.py pastes into kernels/tiles.py.

Each candidate is launched through the kernel's own launcher, its result is held against the first one's, and its median
time is kept. A candidate that does not compile, does not fit the chip or gives other numbers is listed with the reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrl.bench import machine, measure
from fastrl.kernels import tiles
from fastrl.kernels.launch import LogitScale
from fastrl.kernels.linear_dlogits import RowGradient, linear_dlogits
from fastrl.kernels.linear_stats import linear_stats
from fastrl.kernels.row_dlogits import row_dlogits
from fastrl.kernels.row_stats import row_stats
from fastrl.kernels.tiles import Tile

LINEAR = [
    Tile(128, 256, 64, 8, 4, 8, descriptors=True),
    Tile(128, 256, 64, 8, 3, 8, descriptors=True),
    Tile(128, 256, 64, 8, 4, 4, descriptors=True),
    Tile(256, 128, 64, 8, 4, 8, descriptors=True),
    Tile(128, 128, 64, 8, 4, 4, descriptors=True),
    Tile(128, 128, 64, 4, 4, 4, descriptors=True),
    Tile(64, 256, 64, 4, 4, 8, descriptors=True),
    Tile(128, 128, 32, 8, 3, 8),
]
ROW = [Tile(1, columns, num_warps=warps) for columns in (2048, 4096, 8192) for warps in (4, 8, 16)]
SMALL_LINEAR, SMALL_ROW = [Tile(16, 32, 32, 4, 1, 2, descriptors=True), Tile(32, 64, 32, 4, 1, 2)], [Tile(1, 64)]
COLUMNS, ROWS = 16384, 2048  # of a vocabulary slice for linear_dlogits; of a chunk for the row kernels
AGREE = 1e-2  # largest difference from the first candidate over the largest entry: one bf16 step is at most 2^-7


@dataclass(frozen=True)
class Kernel:
    """table: its dict in kernels/tiles.py. call(inputs, tile) -> a tensor to compare. work(inputs) -> flop or bytes."""

    table: str
    linear: bool
    call: Callable[[Inputs, Tile], Tensor]
    work: Callable[[Inputs], float]
    unit: str


@dataclass(frozen=True)
class Inputs:
    """hidden [N, H], weight [V, H] of half precision; logits [ROWS, V] float32 and room of the same shape."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    logits: Tensor
    room: Tensor

    @property
    def law(self) -> RowGradient:
        n = self.hidden.shape[0]
        ones = torch.ones(n, device=self.hidden.device)
        return RowGradient(8 * ones, ones / n, 0 * ones, ones / n)

    def first_rows(self) -> tuple[Tensor, RowGradient]:
        k = self.logits.shape[0]
        return self.targets[:k], RowGradient(*(x[:k] for x in self.law.arguments()))


def make_inputs(shape: dict[str, int], device: str, dtype: torch.dtype) -> Inputs:
    make = torch.Generator(device).manual_seed(0)
    n, h, v = shape["rows"], shape["hidden"], shape["vocabulary"]
    hidden = torch.randn(n, h, generator=make, device=device).to(dtype)
    weight = torch.randn(v, h, generator=make, device=device).mul_(2 / h**0.5).to(dtype)
    targets = torch.randint(v, (n,), generator=make, device=device)
    logits = 2 * torch.randn(min(n, ROWS), v, generator=make, device=device)
    return Inputs(hidden, weight, targets, logits, torch.empty_like(logits))


def stats_call(x: Inputs, tile: Tile) -> Tensor:
    return linear_stats(x.hidden, x.weight, x.targets, entropy=False, squares=False, argmax=False, tile=tile).logprobs


def dlogits_call(x: Inputs, tile: Tile) -> Tensor:
    weight = x.weight[:COLUMNS]
    return linear_dlogits(x.hidden, weight, x.targets, None, LogitScale(), x.law, entropy=False, tile=tile)[0]


def row_stats_call(x: Inputs, tile: Tile) -> Tensor:
    targets, _ = x.first_rows()
    return row_stats(x.logits, targets, entropy=False, squares=False, argmax=False, tile=tile).logprobs


def row_dlogits_call(x: Inputs, tile: Tile) -> Tensor:
    """In place; the copy of the logits into its room is timed with it, the same for every candidate."""
    targets, law = x.first_rows()
    x.room.copy_(x.logits)
    return row_dlogits(x.room, targets, None, LogitScale(), law, x.room, entropy=False, tile=tile)


def gemm_flop(x: Inputs, columns: int | None = None) -> float:
    return 2.0 * x.hidden.numel() * min(columns or x.weight.shape[0], x.weight.shape[0])


KERNELS = {
    "linear_stats": Kernel("LINEAR_STATS", True, stats_call, gemm_flop, "TFLOP/s"),
    "linear_dlogits": Kernel("LINEAR_DLOGITS", True, dlogits_call, lambda x: gemm_flop(x, COLUMNS), "TFLOP/s"),
    "row_stats": Kernel("ROWS", False, row_stats_call, lambda x: 4.0 * x.logits.numel(), "TB/s"),
    "row_dlogits": Kernel("ROWS", False, row_dlogits_call, lambda x: 16.0 * x.logits.numel(), "TB/s"),
}


def candidates(kernel: Kernel, architecture: str, small: bool) -> list[Tile]:
    """The table's own tile first: the others must agree with it and beat it."""
    listed = (SMALL_LINEAR if small else LINEAR) if kernel.linear else (SMALL_ROW if small else ROW)
    return list(dict.fromkeys([getattr(tiles, kernel.table)[architecture], *listed]))


def search(inputs: Inputs, architecture: str, deadline: float, small: bool = False) -> list[dict[str, Any]]:
    """One row per (kernel, tile): time and rate, or why not. Nothing begins after `deadline`."""
    found = []
    for name, kernel in KERNELS.items():
        right = None
        for tile in candidates(kernel, architecture, small):
            row: dict[str, Any] = {"kernel": name, "tile": shown(tile)}
            found.append(row)
            if time.monotonic() > deadline:
                row["not_run"] = "the time for this run was spent"
                continue
            try:  # a tile that the chip or the compiler refuses is an answer, not the end of the search
                got = kernel.call(inputs, tile).detach().float().clone()
                right = got if right is None else right
                off = ((got - right).abs().max() / right.abs().max()).item()
                if not off <= AGREE:
                    raise ArithmeticError(f"differs from the table's tile by {off:.1e}")
                seconds = median_seconds(lambda k=kernel, t=tile: k.call(inputs, t), inputs.hidden.device.type)
                row |= {"median_s": float(f"{seconds:.4g}"), "unit": kernel.unit}
                row["rate"] = float(f"{kernel.work(inputs) / seconds / 1e12:.4g}")
            except Exception as error:
                row["not_run"] = measure.said(error)
    return found


def median_seconds(call: Callable[[], Any], device: str, rounds: int = 5) -> float:
    return statistics.median(machine.timed(call, device) for _ in range(rounds if device == "cuda" else 1))


def shown(tile: Tile) -> str:
    """As it would stand in kernels/tiles.py."""
    plain = Tile(tile.rows, tile.columns)
    words = [str(tile.rows), str(tile.columns)]
    for field in ("depth", "num_warps", "num_stages", "parts", "descriptors"):
        if getattr(tile, field) != getattr(plain, field):
            words.append(f"{field}={getattr(tile, field)}")
    return f"Tile({', '.join(words)})"


def parsed(text: str) -> Tile:
    """The inverse of shown."""
    numbers, options = [], {}
    for word in text.removeprefix("Tile(").removesuffix(")").split(", "):
        name, _, value = word.rpartition("=")
        if name:
            options[name] = value == "True" if value in ("True", "False") else int(value)
        else:
            numbers.append(int(value))
    return replace(Tile(*numbers), **options)


def best(rows_by_shape: list[list[dict[str, Any]]]) -> dict[str, str]:
    """table name -> tile with the least product of times over the shapes and kernels of that table."""
    totals: dict[tuple[str, str], float] = {}
    complete: dict[tuple[str, str], int] = {}
    wanted: dict[str, set] = {}
    for i, rows in enumerate(rows_by_shape):
        for row in rows:
            table = KERNELS[row["kernel"]].table
            wanted.setdefault(table, set()).add((i, row["kernel"]))
            if "median_s" in row:
                key = (table, row["tile"])
                totals[key] = totals.get(key, 1.0) * row["median_s"]
                complete[key] = complete.get(key, 0) + 1
    made = {}
    for table, parts in wanted.items():
        full = {tile: t for (name, tile), t in totals.items() if name == table and complete[name, tile] == len(parts)}
        if full:
            made[table] = min(full, key=full.get)
    return made

"""Pictures of records: bars of the share of the floor, and lines against N or V. Small PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.bench.report import ran

COLOURS = ("#2563a8", "#d9712b", "#8a8f98", "#3a8f5c", "#8c4fa8", "#b5a12f", "#4a4a4a")


@dataclass(frozen=True)
class Line:
    """One contender's curve: x ascending, y of the same length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log: bool = True


def lines(panels: Sequence[Panel], path: Path | str) -> Path:
    """Panels side by side; a contender keeps its colour from panel to panel; x is logarithmic to base 2."""
    figure, axes = _figure(len(panels))
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    for axis, panel in zip(axes, panels, strict=True):
        for line in panel.lines:
            i = names.index(line.name)
            axis.plot(line.x, line.y, "o-", color=COLOURS[i % len(COLOURS)], markersize=3, label=line.name)
        axis.set_xscale("log", base=2)
        ticks = sorted({x for line in panel.lines for x in line.x})
        axis.set_xticks(ticks, [f"{x:,}" for x in ticks], fontsize=7)
        if panel.log and ticks:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlabel(panel.x_label)
        axis.set_ylabel(panel.y_label)
        axis.grid(True, which="major", color="#e5e5e5", linewidth=0.6)
    if names:
        axes[-1].legend(fontsize=7, frameon=False)
    return _save(figure, path)


def floor_bars(entries: Sequence[dict[str, Any]], path: Path | str) -> Path:
    """One panel a case: share of the floor of every contender that ran, 100% marked."""
    figure, axes = _figure(len(entries), height=0.5 + 0.28 * max(2, *(len(ran(e)) for e in entries)))
    for axis, entry in zip(axes, entries, strict=True):
        rows = dict(reversed(ran(entry).items()))
        colours = [COLOURS[0] if name.startswith("fastrl") else COLOURS[2] for name in rows]
        axis.barh(list(rows), [100 * row["share_of_floor"] for row in rows.values()], color=colours, height=0.7)
        axis.axvline(100, color="#4a4a4a", linewidth=0.8)
        axis.set_title(entry["title"].replace(", ", "\n"), fontsize=7)
        axis.set_xlabel("% of bare GEMMs' speed", fontsize=8)
        axis.tick_params(labelsize=7)
    return _save(figure, path)


def _figure(panels: int, height: float = 2.6):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.2, 3.4 * panels), max(2.0, height)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure, path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path

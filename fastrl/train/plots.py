"""Pictures of a run from its metrics.jsonl: one PNG a quantity, an overview, and the quickstart's figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.train.metrics import read_metrics

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9712b", "#3a8f5c", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, GREY)
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One picture: metric keys with their legend names. Drawn only if one of the keys was recorded."""

    name: str
    title: str
    unit: str
    keys: dict[str, str]


PANELS = (
    Panel("reward", "Reward", "mean reward", {"reward": "training", "eval_reward": "held-out"}),
    Panel("loss", "Loss", "loss (nats)", {"loss": "training", "eval_loss": "held-out"}),
    Panel(
        "accuracy",
        "Accuracy",
        "fraction",
        {
            "eval_accuracy": "held-out",
            "eval_mean_token_accuracy": "held-out tokens",
            "rewards/accuracies": "pairs ranked right",
            "eval_rewards/accuracies": "held-out pairs",
            "mean_token_accuracy": "training tokens",
        },
    ),
    Panel("entropy", "Entropy", "nats per token", {"entropy": "training", "eval_entropy": "held-out"}),
    Panel("kl", "KL to the starting model", "nats per token", {"kl": "training", "eval_kl": "held-out"}),
    Panel(
        "lengths",
        "Completion length",
        "tokens",
        {
            "completions/mean_length": "mean",
            "completions/max_length": "longest",
            "completions/min_length": "shortest",
        },
    ),
    Panel(
        "margins",
        "Implicit rewards",
        "reward",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"},
    ),
    Panel("grad_norm", "Gradient norm", "before clipping", {"grad_norm": "training"}),
)


def series(records: Records, key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the records that have a finite number under `key`."""
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float)) and abs(r[key]) < 1e300]
    return [p[0] for p in points], [p[1] for p in points]


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average from both sides: no lag, and unbiased at the ends."""

    def one_way(xs: Sequence[float]) -> list[float]:
        out, total, norm = [], 0.0, 0.0
        for x in xs:
            total, norm = weight * total + (1 - weight) * x, weight * norm + (1 - weight)
            out.append(total / norm)
        return out

    return [(a + b) / 2 for a, b in zip(one_way(values), one_way(values[::-1])[::-1], strict=True)]


def plot_run(output_dir: Path | str) -> list[Path]:
    """Write output_dir/plots/<panel>.png and overview.png from output_dir/metrics.jsonl; returns the paths written."""
    output_dir = Path(output_dir)
    records = read_metrics(output_dir) if (output_dir / "metrics.jsonl").exists() else []
    panels = [p for p in PANELS if any(series(records, key)[0] for key in p.keys)]
    if not panels:
        return []
    folder = output_dir / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for panel in panels:
        figure, axes = _figure(1, 1, 6.4, 4.0)
        draw_panel(axes[0], records, panel)
        paths.append(_save(figure, folder / f"{panel.name}.png"))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, 4.6 * columns, 3.1 * rows)
    for axis, panel in zip(axes, panels, strict=False):
        draw_panel(axis, records, panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return [*paths, _save(figure, folder / "overview.png")]


def draw_panel(axis: Any, records: Records, panel: Panel) -> None:
    """One panel onto a matplotlib axis: faint raw points under a smoothed line; held-out values as dots."""
    drawn = [(label, key, *series(records, key)) for key, label in panel.keys.items() if series(records, key)[0]]
    for (label, key, steps, values), colour in zip(drawn, COLOURS * 2, strict=False):
        if key.startswith("eval_"):
            axis.plot(steps, values, "o-", color=colour, markersize=4, linewidth=1.4, label=label)
        elif len(values) < 8:
            axis.plot(steps, values, color=colour, linewidth=1.8, label=label)
        else:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
            axis.plot(steps, smoothed(values, 0.8), color=colour, linewidth=1.8, label=label)
    _dress(axis, panel.title, "optimizer step", panel.unit)
    if len(drawn) > 1:
        axis.legend(frameon=False, fontsize=8)


def quickstart_figure(
    path: Path | str, accuracy: dict[str, float], sft_metrics: Records, grpo_metrics: Records, caption: str = ""
) -> Path:
    """Held-out accuracy at each stage as bars, and the two learning curves. accuracy: {"before": 0.01, ...} in [0, 1].

    The metrics are records (`read_metrics`). Returns the path written.
    """
    figure, (bars, sft, grpo) = _figure(1, 3, 12.6, 3.7)
    names, values = list(accuracy), [100 * v for v in accuracy.values()]
    drawn = bars.bar(names, values, color=[GREY, BLUE, GREEN][: len(names)] + [ORANGE] * (len(names) - 3), width=0.62)
    bars.bar_label(drawn, [f"{v:.1f}%" for v in values], padding=2, fontsize=10)
    bars.set_ylim(0, max(105.0, *values))
    _dress(bars, "Held-out accuracy", "", "exact answers (%)")
    bars.grid(False, axis="x")
    keys = {"loss": "training", "eval_loss": "held-out"}
    draw_panel(sft, sft_metrics, Panel("", "SFT", "loss (nats per token)", keys))
    keys = {"reward": "training reward", "eval_reward": "held-out reward", "eval_accuracy": "held-out accuracy"}
    draw_panel(grpo, grpo_metrics, Panel("", "GRPO", "fraction right", keys))
    if caption:
        figure.supxlabel(caption, fontsize=8, color=GREY)
    return _save(figure, Path(path))


# -- matplotlib --------------------------------------------------------------------------------------------------
def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure drawn by Agg without pyplot: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _dress(axis: Any, title: str, x_label: str, y_label: str) -> None:
    axis.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel(y_label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(True, color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path

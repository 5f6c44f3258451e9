"""Entries of measure.measure as text: a table a case, every contender in it, those that did not run with the reason."""

from __future__ import annotations

from typing import Any

Entry = dict[str, Any]
GEMM_WORDS = {1: "one GEMM", 2: "two GEMMs", 3: "three GEMMs"}
ERRORS = {"logprobs": "log-prob err", "d_hidden": "dH err", "d_weight": "dW err"}
HEADER = ["", "time", "TFLOP/s", "of floor", "peak MiB", "beyond grads", *ERRORS.values()]


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def mib(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def rows_of(entry: Entry) -> list[list[str]]:
    """Floor first, then the contenders that ran, as cells under HEADER."""
    floor = entry["floor"]
    rows = [[bare(entry), seconds(floor["median_s"]), f"{floor['tflops']:.3g}", "100%", *[""] * 5]]
    for name, row in ran(entry).items():
        error = row["error_vs_float64"]
        shown = [error.get(f"{output}_relative_l2") for output in ERRORS]
        cells = [name, seconds(row["median_s"]), f"{row['tflops']:.3g}", f"{row['share_of_floor']:.0%}"]
        cells += [mib(row.get("extra_peak_mib")), mib(row.get("beyond_mib"))]
        rows.append(cells + ["" if e is None else f"{e:.1e}" for e in shown])
    return rows


def bare(entry: Entry) -> str:
    kept = " of the rows kept" if entry["what"] in ("masked", "zero", "clipped") else ""
    return f"bare: {GEMM_WORDS[entry['floor']['gemms']]}{kept}"


def ran(entry: Entry) -> dict[str, Any]:
    return {name: row for name, row in entry["contenders"].items() if "not_run" not in row}


def not_run(entry: Entry) -> dict[str, str]:
    return {name: row["not_run"] for name, row in entry["contenders"].items() if "not_run" in row}


def notes(entry: Entry) -> list[str]:
    """One line for every contender that did not run, or that was not quite what its name says."""
    lines = [f"{name}: not run; {why}" for name, why in not_run(entry).items()]
    return lines + [f"{name}: {row['note']}" for name, row in ran(entry).items() if "note" in row]


def text(entry: Entry) -> str:
    cells = [HEADER, *rows_of(entry)]
    first, *others = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
    numbers = ["  ".join(c.rjust(w) for c, w in zip(row[1:], others, strict=True)) for row in cells]
    lines = [f"{row[0]:{first}}  {rest}".rstrip() for row, rest in zip(cells, numbers, strict=True)]
    return "\n".join([entry["title"], *lines, *(f"  {note}" for note in notes(entry))])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])

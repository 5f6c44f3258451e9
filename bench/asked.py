"""What the head must hold, line by line: the numbers asked for, and how each is read off the measured cases.

Nothing heavy is imported: bench/tables.py shows the lines that nobody has measured yet as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHAPES = {
    "main": dict(rows=2048, hidden=512, vocabulary=65536, dtype="float32"),
    "large": dict(rows=4096, hidden=256, vocabulary=151936, dtype="float32"),
    "wide": dict(rows=16384, hidden=4096, vocabulary=128256, dtype="bfloat16"),
    "narrow": dict(rows=16384, hidden=896, vocabulary=151936, dtype="bfloat16"),
}
Entries = dict[str, dict[str, Any]]  # what -> entry of fastrl.bench.measure


@dataclass(frozen=True)
class Asked:
    """One line. against: "gemms" (the case's floor), "memory" (MiB beyond the gradients), "whole" (the whole step),
    or a rival's name (its time over fastrl's). least: the limit is a least value, not a greatest."""

    key: str
    text: str
    shape: str
    what: str
    against: str
    limit: float
    least: bool = False

    @property
    def unit(self) -> str:
        return "MiB" if self.against == "memory" else "x"

    def row(self, value: float | None) -> dict[str, Any]:
        """As it stands in a record; held is None where nothing was measured."""
        good = None if value is None else value >= self.limit if self.least else value <= self.limit
        sign = ">=" if self.least else "<="
        line = {"key": self.key, "line": self.text, "shape": self.shape, "asked": f"{sign} {self.limit:g} {self.unit}"}
        return {**line, "measured": value, "unit": self.unit, "held": good}

    def value(self, entries: Entries) -> float | None:
        """Read off the entries of this line's shape; None where a needed one did not run."""
        contenders = entries.get(self.what, {}).get("contenders", {})
        ours = contenders.get("fastrl", {})
        if "median_s" not in ours:
            return None
        if self.against == "gemms":
            return ours["times_floor"]
        if self.against == "memory":
            return ours.get("beyond_mib")
        if self.against == "whole":
            whole = entries.get("head", {}).get("contenders", {}).get("fastrl", {}).get("median_s")
            return None if whole is None else round(ours["median_s"] / whole, 3)
        rival = contenders.get(self.against, {}).get("median_s")
        return None if rival is None else round(rival / ours["median_s"], 3)


CPU = (
    Asked("a", "clipped loss, forward + backward, over three GEMMs", "main", "head", "gemms", 1.10),
    Asked("a", "its memory beyond the gradients", "main", "head", "memory", 64),
    Asked("b", "clipped loss, forward + backward, over three GEMMs", "large", "head", "gemms", 1.20),
    Asked("b", "its memory beyond the gradients", "large", "head", "memory", 128),
    Asked("c", "forward only, over one GEMM", "main", "forward", "gemms", 1.15),
    Asked("d", "75% of the rows masked, over the whole step", "main", "masked", "whole", 0.32),
    Asked("d", "75% of the rows of zero advantage, over the whole step", "main", "zero", "whole", 0.32),
    Asked("e", "75% of the tokens clipped, over the whole step", "main", "clipped", "whole", 0.60),
    Asked("f", "frozen head, over the whole step", "main", "frozen", "whole", 0.75),
    Asked("g", "TRL's head over fastrl", "main", "head", "TRL chunked head", 2.5, least=True),
    Asked("g", "Liger's GRPO over fastrl", "main", "head", "Liger GRPO", 1.3, least=True),
    Asked("g", "naive log_softmax over fastrl", "main", "head", "naive log_softmax", 1.5, least=True),
)
GPU = tuple(
    line
    for shape in ("wide", "narrow")
    for line in (
        Asked(shape, "forward only, over one GEMM", shape, "forward", "gemms", 1.20),
        Asked(shape, "clipped loss, forward + backward, over three GEMMs", shape, "head", "gemms", 1.15),
        Asked(shape, "frozen head, over two GEMMs", shape, "frozen", "gemms", 1.20),
    )
) + (Asked("wide", "clipped loss: memory beyond the gradients", "wide", "head", "memory", 1.1 * 1024),)


@dataclass(frozen=True)
class AskedOfStep:
    """One line of an optimizer step against TRL's. field: of a stage's result in bench/trainer_vs_trl.py."""

    text: str
    stage: str
    field: str
    limit: float
    least: bool = False

    def read(self, stages: dict[str, dict[str, Any]]) -> float | None:
        return stages.get(self.stage, {}).get(self.field)

    def row(self, value: float | None) -> dict[str, Any]:
        """As it stands in a record; held is None where nothing was measured."""
        good = None if value is None else value >= self.limit if self.least else value <= self.limit
        sign = ">=" if self.least else "<="
        return {"line": self.text, "asked": f"{sign} {self.limit:g}", "measured": value, "held": good}


TRAINER = tuple(
    line
    for stage in ("sft", "dpo")
    for line in (
        AskedOfStep(f"{stage.upper()} step: TRL's time over fastrl's", stage, "speedup", 6.0, least=True),
        AskedOfStep(f"{stage.upper()} step: fastrl's peak over the model, of TRL's", stage, "memory_ratio", 0.20),
    )
)


def ahead(shape: str, what: str, rival: str) -> Asked:
    """Faster than a rival that offers the same outputs."""
    return Asked(shape, f"{rival} over fastrl: {what}", shape, what, rival, 1.0, least=True)


def shown(row: dict[str, Any]) -> list[str]:
    """[shape, line, asked, measured, verdict] of a record's row."""
    shape = SHAPES[row["shape"]]
    where = f"N={shape['rows']} D={shape['hidden']} V={shape['vocabulary']} {shape['dtype']}"
    value = "not measured" if row["measured"] is None else f"{row['measured']:.4g} {row['unit']}"
    return [row["line"], where, row["asked"], value, {True: "holds", False: "missed", None: ""}[row["held"]]]

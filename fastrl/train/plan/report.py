"""A plan as text for a reader, and as JSON for a program."""

from __future__ import annotations

from typing import Any

from fastrl.train.plan.estimate import Estimate, MemoryModel
from fastrl.train.plan.switches import Fit, Trial, shown

GIB = 1 << 30
ROWS = (
    "weights", "critic", "reference", "teacher", "reward model", "gradients", "optimizer", "optimizer's work",
    "activations", "head workspace", "KV cache", "logits", "bf16 weights", "files", "runtime",
)  # fmt: skip


def gib(x: float) -> str:
    return f"{x / GIB:.2f}"


def table(rows: list[list[str]]) -> str:
    """Aligned: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def bytes_table(estimate: Estimate) -> str:
    names = [n for n in ROWS if any(n in p.rows for p in estimate.phases)]
    cells = [["GiB a device", *(p.name for p in estimate.phases)]]
    cells += [[n, *(gib(p.rows[n]) if n in p.rows else "-" for p in estimate.phases)] for n in names]
    return table([*cells, ["total", *(gib(p.total) for p in estimate.phases)]])


def head_lines(model: MemoryModel) -> list[str]:
    config, policy, arch = model.config, model.sizes["policy"], model.architectures["policy"]
    name = (arch.architectures or [arch.model_type])[0]
    compute = "bfloat16" if model.autocast else config.dtype
    ranks = f"{model.ranks} x " if model.ranks > 1 else ""
    trained = sum(s.trained for s in model.trained)
    counts = f"{count(policy.parameters)} parameters, {count(trained)} trained"
    shape = model.shape
    return [
        f"fastrl {config.stage}: {name}, {counts}; {config.dtype} weights, {compute} compute",
        f"{ranks}{model.device.name}, {model.device.capacity / GIB:.1f} GiB; micro-batches of {shape.tokens:,} tokens, "
        f"sequences of at most {shape.longest:,}",
    ]


def count(n: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def limits(model: MemoryModel) -> dict[str, int]:
    """Most tokens of a micro-batch that fit, and the longest single sequence."""
    most = model.most_tokens()
    return {"most_tokens": most, "longest_sequence": model.most_tokens(as_one=True)}


def flags_text(flags: dict[str, Any]) -> str:
    return " ".join(f"--{name} {shown(value)}" for name, value in flags.items())


def text(model: MemoryModel, trials: list[Trial], found: Fit | None) -> str:
    estimate, device = model.estimate(), model.device
    left = device.usable - estimate.total
    verdict = f"fits, {gib(left)} GiB to spare" if left >= 0 else f"does not fit: {gib(-left)} GiB too much"
    lines = [*head_lines(model), "", bytes_table(estimate), ""]
    spare = device.capacity - device.usable
    lines.append(f"{estimate.peak.name} is the largest phase: {gib(estimate.total)} GiB; {verdict}")
    lines.append(f"({gib(device.usable)} GiB count: {gib(spare)} are left for gaps between blocks)")
    found_limits = limits(model)
    context = context_of(model)
    lines.append("")
    lines.append(f"most tokens that fit      {found_limits['most_tokens']:>11,}  (--max_tokens_per_device)")
    beyond = f"  (the model has positions for {context:,})" if context else ""
    lines.append(f"longest sequence          {found_limits['longest_sequence']:>11,}{beyond}")
    if trials:
        rows = [["each switch by itself", "GiB", "saves", "most tokens", "", "costs"]]
        rows += [[flags_text(t.flags), gib(t.total), gib(t.saves), f"{t.most_tokens:,}", "", ""] for t in trials]
        made = table([row[:4] for row in rows]).splitlines()
        prices = ["costs", *(t.price for t in trials)]
        lines += ["", *(f"{line}  {price}" for line, price in zip(made, prices, strict=True))]
    if found is not None:
        lines += ["", fit_line(found, device.usable)]
    lines += [f"note: {note}" for note in dict.fromkeys(model.notes)]
    return "\n".join(lines)


def fit_line(found: Fit, usable: int) -> str:
    if found.flags is None:
        return f"--fit: no set of switches fits; the smallest takes {gib(found.total)} of {gib(usable)} GiB"
    if not found.flags:
        return "--fit: it fits as it is"
    return f"--fit: add  {flags_text(found.flags)}\n       then {gib(found.total)} GiB"


def context_of(model: MemoryModel) -> int | None:
    arch = model.architectures["policy"].get_text_config()
    return getattr(arch, "max_position_embeddings", None) or getattr(arch, "n_positions", None)


def record(model: MemoryModel, trials: list[Trial], found: Fit | None) -> dict[str, Any]:
    """Bytes and tokens as numbers, flags as they would be given."""
    estimate = model.estimate()
    made = {
        "stage": model.config.stage,
        "model": model.config.model_name_or_path,
        "parameters": model.sizes["policy"].parameters,
        "trained_parameters": sum(s.trained for s in model.trained),
        "device": {"name": model.device.name, "kind": model.device.kind, "bytes": model.device.capacity},
        "usable_bytes": model.device.usable,
        "ranks": model.ranks,
        "tokens": estimate.tokens,
        "longest": model.shape.longest,
        "phases": {p.name: p.rows for p in estimate.phases},
        "peak_phase": estimate.peak.name,
        "total_bytes": estimate.total,
        "fits": estimate.total <= model.device.usable,
        **limits(model),
        "context": context_of(model),
        "switches": [vars(t) for t in trials],
        "notes": list(dict.fromkeys(model.notes)),
    }
    if found is not None:
        made["fit"] = vars(found)
    return made
